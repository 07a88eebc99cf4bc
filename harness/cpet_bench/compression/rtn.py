"""Round to nearest: each weight becomes the nearest value of its group's grid. The baseline that every quantiser must beat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from ..settings import Settings
from .masks import needs_plain
from .rounding import grid, group_of, integers, refuse_packed_again
from .sizes import F32, ModelSize


class Rtn:
    """Linear layers of the blocks as packed integers; head and embeddings stay as they are."""

    name = "rtn"
    version = 1
    packages = ("torch", "transformers")
    calibrated = False
    tries = ({"bits": 4}, {"bits": 3, "sym": False})  # settings that `doctor` tries

    class Settings(Settings):
        """bits of each weight. group: inputs that share a scale (None: the largest of 128, 64, 32 that divides every width).

        sym: whether the grid is symmetric about 0; else each group has a zero point of its own.
        """

        bits: int = Field(ge=2, le=8)
        group: int | None = Field(None, ge=8, le=1024, multiple_of=8)
        sym: bool = True

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return settings.model_dump(mode="json")

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed_again(before)

    @staticmethod
    def fits(settings, size: ModelSize) -> None:
        """Unsupported where a model of these sizes cannot be rounded so."""
        if size.quantised:
            raise needs_plain("rtn", size.quantised)
        if size.shapes:
            group_of({name: inputs for name, (inputs, _) in size.shapes.items()}, settings.group)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of one layer, its integers on their way, and the packed ones; or of the largest tensor on its way through."""
        return F32 * max(6 * size.layer, 2 * size.largest)

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Round, pack and save. Sizes are real, and so is the speed: of dequantising and multiplying, without a fused kernel.

        Facts: bits, group, sym, layers, weights, packed_bytes (integers, scales, zero points), bytes (all stored), kernel,
            streamed.
        """
        import torch

        from ..models.arch import dense_weight, features
        from ..models.packed import PackedConfig, PackedLinear, pack, packed_bytes, put
        from .streaming import open_plain

        opened = open_plain(source, out, device, "rtn", forward=False)
        model, layers = opened.model, opened.layers
        group = group_of({name: features(module)[0] for name, module in layers.items()}, settings.group)
        how = {"bits": settings.bits, "group": group, "sym": settings.sym}
        for name, module in layers.items():
            put(model, name, PackedLinear(*features(module), **how, bias=module.bias is not None, device="meta"))
        count = size = 0
        for done, (name, module) in enumerate(layers.items()):
            with opened.held(name, module):
                weight = dense_weight(module).contiguous()  # Conv1D keeps its transpose
                n_out, n_in = weight.shape
                scale, zero = grid(weight, settings.bits, group, settings.sym, name)
                packed = PackedLinear(n_in, n_out, **how, device=weight.device)
                packed.packed = pack(integers(weight, scale, zero, settings.bits), settings.bits)
                packed.scales = scale
                if not settings.sym:
                    packed.zeros = zero
                if module.bias is not None:
                    packed.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
                put(model, name, packed)
            count += weight.numel()
            size += packed_bytes(n_in, n_out, **how)
            progress(done + 1, len(layers), name)
        model.config.quantization_config = PackedConfig(**how)
        facts = {**how, "layers": len(layers), "weights": count, "packed_bytes": size}
        facts["kernel"] = "weights dequantised to dense ones for each product"
        note = {"backend": "rtn", **facts}
        return {**facts, **opened.facts, "bytes": opened.save(note)}
