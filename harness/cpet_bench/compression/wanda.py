"""Wanda (arXiv 2306.11695): pruning by |W_ij| ||X_j||, within each output row, layer by layer, without an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StepFailed
from ..settings import CalibrationSettings
from .blockwise import change_blocks
from .masks import PatternSettings, Zeros, check_widths, fits, inputs_of, keep_mask, refuse_packed, weight_out_in
from .sizes import F32, ModelSize, streamed

if TYPE_CHECKING:
    import torch

    from .streaming import Whole


class WandaSettings(PatternSettings):
    """As magnitude's, with the documents whose activations weigh the inputs."""

    calibration: CalibrationSettings = CalibrationSettings()


class Wanda:
    """Blocks in order: each sees what the blocks before it give after their pruning (as the authors' code does)."""

    name = "wanda"
    version = 1
    packages = ("torch", "transformers")
    calibrated = True
    min_tokens = 64  # an input's mean square over n tokens is off by about sqrt(2 / n), over 64 by 18 %
    tries = ({"pattern": "2:4"}, {"sparsity": 0.5})  # settings that `doctor` tries
    Settings = WandaSettings

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return {}

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed(before)

    fits = staticmethod(fits)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of going block by block, with one layer's scores, what stays of them and where."""
        return streamed(size, settings.calibration) + F32 * 6 * size.layer

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: WandaSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Prune and save. Facts: sparsity, calibration documents and tokens, streamed, bytes; the speed stays the
        dense kernels'."""
        from .streaming import open_plain

        if not examples:
            raise StepFailed("Wanda needs calibration documents, and there are none")
        opened = open_plain(source, out, device)
        check_widths(inputs_of(opened.layers), settings)
        facts = prune(opened, examples, settings, progress)
        facts |= {"calibration_documents": len(examples), "calibration_tokens": sum(map(len, examples))}
        note = {"backend": "wanda", **settings.model_dump(mode="json"), **facts}
        return {**facts, **opened.facts, "bytes": opened.save(note), "simulated": ["size", "speed"]}


def prune(opened: Whole, examples: list[list[int]], settings: WandaSettings, progress) -> dict[str, Any]:
    """Prune the blocks' layers. Returns the zeros' shares."""
    zeros = Zeros(settings)

    def squares(found: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        return (0.0 if found is None else found) + x.square().sum(0)

    def mask(group: dict[str, Any], found: torch.Tensor) -> None:
        for module in group.values():
            weight = weight_out_in(module)
            score = weight.abs().float() * found.sqrt()
            weight.mul_(keep_mask(score, settings, per_row=True))
        zeros.count(group)

    change_blocks(opened, examples, squares, mask, progress)
    return zeros.facts()
