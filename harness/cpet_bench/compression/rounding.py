"""The grid that weights are rounded to: b bits, a scale (and a zero point) per output row and group of consecutive inputs.

It is the grid of GPTQ's authors (arXiv 2210.17323, their Quantizer): with m = 2^b - 1 steps, the scale is (max - min) / m over
the group, 0 always among its values; symmetric: max = -min is the largest |w| and the zero point 2^(b-1). A weight of 0 stays
0 on either grid, so the zeros of a pruning survive it. Scales are kept in float16, and weights are rounded to the kept ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import StepFailed, Unsupported

if TYPE_CHECKING:
    import torch

GROUPS = (128, 64, 32)  # what a group of inputs is where the settings name none: the first that divides every width
PACKING = ("bitsandbytes", "gptq", "rtn")  # backends that leave no plain weights behind


def refuse_packed_again(before: list[str]) -> str | None:
    """Why weights cannot be quantised after these backends."""
    packed = [name for name in before if name in PACKING]
    return f"the weights are packed by {packed[-1]} already" if packed else None


def group_of(widths: dict[str, int], asked: int | None, sizes: Iterable[int] = range(8, 1025, 8)) -> int:
    """The group size for layers with these input widths: the one asked for, else the largest of GROUPS that divides all.

    sizes: those that can be asked for, for the message.

    Raises: Unsupported: it does not divide a width; the layer is named, and what would.
    """
    for group in (asked,) if asked is not None else GROUPS:
        left = [name for name, width in widths.items() if width % group]
        if not left:
            return group
    would = [g for g in sizes if not any(width % g for width in widths.values())]
    advice = f"group can be {', '.join(map(str, would))}" if would else "no group size divides all widths"
    raise Unsupported(f"groups of {group} do not divide the width {widths[left[0]]} of {left[0]}; {advice}")


def grid(weight: torch.Tensor, bits: int, group: int, sym: bool, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero point), each out x groups, in float16 and uint8, for a weight (out x in, float32).

    Raises: StepFailed: the weight of layer `name` is not finite; Unsupported: it is too large for float16 scales.
    """
    import torch

    if not torch.isfinite(weight).all():
        raise StepFailed(f"the weights of {name} are not finite")
    groups = weight.view(weight.shape[0], -1, group)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / (2**bits - 1)
    # float16 has only multiples of 2^-24 below 2^-14: rounded up there, so that the group's ends stay on the grid
    scale = torch.where(scale < 2**-14, (scale * 2**24).ceil() * 2**-24, scale).half()
    if not torch.isfinite(scale).all():
        raise Unsupported(f"the weights of {name} are too large for scales in float16 (up to {float(weight.abs().max()):.3g})")
    scale[scale == 0] = 1.0  # a group of zeros alone
    if sym:
        zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zero = (-low / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return scale, zero


def integers(weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest values of the grid as integers 0..2^bits - 1: uint8, out x in."""
    import torch

    groups = weight.view(*scale.shape, -1)
    q = (groups / scale.float()[..., None]).round_().add_(zero.float()[..., None]).clamp_(0, 2**bits - 1)
    return q.to(torch.uint8).view_as(weight)
