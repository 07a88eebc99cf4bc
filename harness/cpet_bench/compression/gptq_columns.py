"""GPTQ (arXiv 2210.17323, algorithm 1) for models that GPTQModel does not take: encoder-decoders such as T5.

The column loop, block by block (blockwise.py), into this package's packed layers (models/packed.py), whose groups are of
neighbouring inputs. So act order (desc_act) has static groups here, as in AutoGPTQ: scales are those of the weights as they
were, and columns in any order keep the group of their neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported
from . import rounding
from .blockwise import change_blocks
from .masks import load_plain
from .sparsegpt import inverse_factor

if TYPE_CHECKING:
    import torch

    from .gptq import GptqSettings
    from .streaming import Whole

ENGINE = "cpet-bench"
BLOCK = 128  # columns whose errors are passed on to the rest of the row together (the paper's lazy batches)


def compress(
    source: Path, out: Path, settings: GptqSettings, examples: list[list[int]], device: str, progress
) -> dict[str, Any]:
    """Quantise in float32, pack and save. Facts: as those of gptq.Gptq.compress, and sym, order (of the columns)."""
    from ..models.arch import features
    from ..models.packed import PackedConfig, packed_bytes
    from .streaming import Whole

    model, layers = load_plain(source, device, "float32", "GPTQ")
    opened = Whole(model, source, out, "layers are replaced while their block is at work")
    group = group_of({name: features(layer) for name, layer in layers.items()}, settings.group)
    zeros, kept = quantise(opened, examples, settings, group, progress)
    how = {"bits": settings.bits, "group": group, "sym": settings.sym}
    model.config.quantization_config = PackedConfig(**how)
    shapes = [features(layer) for layer in layers.values()]
    weights = sum(n_in * n_out for n_in, n_out in shapes)
    facts = {
        **how,
        "order": order_name(settings, group),
        "layers": len(layers),
        "left_dense": [],
        "packed_bytes": sum(packed_bytes(*shape, settings.bits, _width(group, shape[0]), settings.sym) for shape in shapes),
        "engine": ENGINE,
        "kernel": "weights dequantised to dense ones for each product",
        "calibration_documents": len(examples),
        "calibration_tokens": sum(map(len, examples)),
    }
    if zeros > 0.01 * weights:
        facts["zeros_kept"] = round(kept / zeros, 6)
    return {**facts, **opened.facts, "bytes": opened.save({"backend": "gptq", **facts})}


def group_of(shapes: dict[str, tuple[int, int]], wanted: int | None) -> int:
    """The group for layers with these inputs and outputs (-1: the whole row); Unsupported, with the layer's name, where it
    cannot be."""
    widths = {name: inputs for name, (inputs, _) in shapes.items()}
    if wanted != -1:
        return rounding.group_of(widths, wanted, (16, 32, 64, 128, 256, 512, 1024))
    for name, width in widths.items():
        if width % 8:
            raise Unsupported(f"eight integers are packed together, and {name} reads {width} inputs, which 8 does not divide")
    return -1


def _width(group: int, n_in: int) -> int:
    return n_in if group == -1 else group


def quantise(opened: Whole, examples, settings: GptqSettings, group: int, progress) -> tuple[int, int]:
    """Put packed layers in the place of an opened model's. Returns how many weights were zero, and of those still are.

    Layers that read the same input are quantised together; those after them in a block see what they then give.
    """
    import torch

    from ..models.arch import dense_weight, features
    from ..models.packed import PackedLinear, pack, put

    zeros = [0, 0]

    def products(found: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        return x.t() @ x if found is None else found.addmm_(x.t(), x)

    def replace(group_: dict[str, Any], h: torch.Tensor) -> None:
        size = _width(group, len(h))
        order = columns_in_order(h.diagonal(), size, settings, group)
        factor = inverse_factor(h[order][:, order], settings.damp, next(iter(group_)))
        for name, module in group_.items():
            weight = dense_weight(module)
            q, scale, zero = quantised(weight, factor, order, size, settings, name)
            n_in, n_out = features(module)
            packed = PackedLinear(n_in, n_out, bits=settings.bits, group=size, sym=settings.sym, device=weight.device)
            packed.packed, packed.scales = pack(q, settings.bits), scale
            if not settings.sym:
                packed.zeros = zero
            if module.bias is not None:
                packed.bias = torch.nn.Parameter(module.bias.detach(), requires_grad=False)
            put(opened.model, name, packed)
            none = weight == 0
            zeros[0] += int(none.sum())
            zeros[1] += int((dense_weight(packed)[none] == 0).sum())

    change_blocks(opened, examples, products, replace, progress, in_turn=True)
    return zeros[0], zeros[1]


def order_name(settings: GptqSettings, group: int) -> str:
    """How the columns of a layer are ordered, as the record says it."""
    if settings.desc_act:
        return "falling diagonal of the Hessian, static groups"
    aware = group > 0 if settings.act_group_aware is None else settings.act_group_aware
    return "falling diagonal of the Hessian, group by group" if aware else "as they stand"


def columns_in_order(diagonal: torch.Tensor, size: int, settings: GptqSettings, group: int) -> torch.Tensor:
    """Columns (indices) in the order they are rounded: the most active first, or as they stand.

    Group by group (arXiv 2505.14638): groups by their largest entry of the Hessian's `diagonal`, each sorted in itself.
    """
    import torch

    name = order_name(settings, group)
    if name == "as they stand":
        return torch.arange(len(diagonal), device=diagonal.device)
    if settings.desc_act:
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.view(-1, size)
    inner = groups.argsort(dim=1, descending=True, stable=True)
    inner += torch.arange(0, len(diagonal), size, device=diagonal.device)[:, None]
    return inner[groups.amax(1).argsort(descending=True, stable=True)].flatten()


def quantised(
    weight: torch.Tensor, factor: torch.Tensor, order: torch.Tensor, size: int, settings: GptqSettings, name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(integers out x in, scales and zero points out x groups) of `weight` (out x in, fp32): see rounding.grid.

    factor: of `sparsegpt.inverse_factor`, its rows and columns in `order`. Each column is rounded in turn, and its error, over
    U_jj, passed on to the columns after it along row j of U. A group's scale is that of its weights when the loop reaches it,
    with the errors of all columns before; with desc_act of the weights as they were.
    """
    import torch

    bits, sym = settings.bits, settings.sym
    scales, zeros = rounding.grid(weight.contiguous(), bits, size, sym, name)
    weight = weight.t()[order].t()  # a copy, its columns whole in memory
    columns, place = weight.shape[1], order.tolist()
    q = torch.empty(columns, weight.shape[0], dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            g = place[j] // size
            if j % size == 0 and not settings.desc_act:  # groups are powers of 2: a large one begins where a block does
                now = weight[:, j : j + size].contiguous()
                scales[:, g : g + 1], zeros[:, g : g + 1] = rounding.grid(now, bits, size, sym, name)
            scale, zero = scales[:, g : g + 1], zeros[:, g : g + 1]
            q[place[j]] = rounding.integers(weight[:, j : j + 1].contiguous(), scale, zero, bits)[:, 0]
            value = (q[place[j]].float() - zero[:, 0].float()) * scale[:, 0].float()
            error = (weight[:, j] - value) / factor[j, j]
            if j + 1 < end:
                weight[:, j + 1 : end] -= torch.outer(error, factor[j, j + 1 : end])
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return q.t().contiguous(), scales, zeros
