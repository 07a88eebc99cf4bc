"""Magnitude pruning: the smallest weights of each layer (or of each group of m inputs) become zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .masks import PatternSettings, Zeros, check_widths, fits, inputs_of, keep_mask, refuse_packed, weight_out_in
from .sizes import F32, ModelSize


class Magnitude:
    """A plain top-k of |W|, per group for n:m and per layer for a share; never the head or the embeddings."""

    name = "magnitude"
    version = 1
    packages = ("torch", "transformers")
    calibrated = False
    tries = ({"pattern": "2:4"}, {"sparsity": 0.5})  # settings that `doctor` tries
    Settings = PatternSettings

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return {}

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed(before)

    fits = staticmethod(fits)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of one layer with its scores, what stays of them and where; or of the largest tensor on its way through."""
        return F32 * max(8 * size.layer, 2 * size.largest)

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: PatternSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Prune and save. Facts: sparsity (whole and by kind of layer), bytes, streamed; speed stays the dense kernels'."""
        from .streaming import open_plain

        opened = open_plain(source, out, device, forward=False)
        check_widths(inputs_of(opened.layers), settings)
        zeros = Zeros(settings)
        for done, name in enumerate(opened.layers):
            with opened.held(name) as module:
                weight = weight_out_in(module)
                weight.mul_(keep_mask(weight.abs().float(), settings, per_row=False))
                zeros.count({name: module})
            progress(done + 1, len(opened.layers), name)
        facts = zeros.facts()
        note = {"backend": "magnitude", **settings.model_dump(mode="json"), **facts}
        return {**facts, **opened.facts, "bytes": opened.save(note), "simulated": ["size", "speed"]}
