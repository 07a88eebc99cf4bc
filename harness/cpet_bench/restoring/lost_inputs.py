"""Layers that lost outputs or inputs to structured pruning, as compensation sees them (restoring/compensate.py).

The inputs that are left, K, stand in for the lost ones, P, as far as the one can be told from the other: x_P is predicted by
H_PK H_KK^-1 x_K, so that E = W_K + W_P H_PK H_KK^-1 - W', and H_KK is its norm. Only the dense model has all inputs, so H is of
its own there. Outputs that are gone are left out of W.

That is a least-squares fit to the calibration tokens, which fits their noise where they are not many times as many as the
inputs. So H_KK is damped by a ridge that goes with the number of inputs for each token, in proportion to each input's own mean
square: in some models a few inputs are a thousand times as large as the others, and a common ridge would silence those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import Unsupported
from ..models.arch import features
from ..pet.methods import differences
from .cuts import Cut, Cuts

# On text that was not calibrated on, eight layers of SmolLM2-135M cut by 20 % came nearest to what they were at 3, of 0, 0.1,
# 1, 3 and 10 (4,781 tokens): with rank 16, 0.77 to 0.88 of the error of four down_proj is left, without a ridge 0.81 to 0.95.
RIDGE = 3.0


@dataclass(frozen=True)
class Origin:
    """A layer's name in the dense model, and the places there of its outputs and inputs (None: all)."""

    name: str
    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None


def origins(original: dict[str, nn.Module], layers: dict[str, nn.Module], cuts: Cuts | None) -> dict[str, Origin]:
    """By layer of the compressed model. Unsupported where the models differ in more than was cut."""
    found: dict[str, Origin] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for was, module in original.items():
        here = cuts.renamed(was) if cuts else was
        if here is None:
            continue
        n_in, n_out = features(module)
        cut = cuts.layers.get(here, Cut()) if cuts else Cut()
        outputs = None if cut.outputs is None else cut.over_runs(cut.outputs, n_out, was)
        inputs = None if cut.inputs is None else cut.over_runs(cut.inputs, n_in, was)
        found[here] = Origin(was, outputs, inputs)
        shapes[here] = (n_in if inputs is None else len(inputs), n_out if outputs is None else len(outputs))
    problems = differences(shapes, {name: features(m) for name, m in layers.items()})
    if problems:
        raise Unsupported(f"the compressed model has other layers than the dense one, and so no error to make up: {problems}")
    return found


def as_it_was(w: torch.Tensor, origin: Origin, layer: nn.Module) -> torch.Tensor:
    """The dense weight `w` at the outputs that are left, rounded as plain weights of the layer are: no error of the cut."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        w = w.to(weight.dtype).float()
    return w if origin.outputs is None else w[list(origin.outputs)]


def damped(h: torch.Tensor, inputs: tuple[int, ...], tokens: int) -> torch.Tensor:
    """H_KK with its ridge; h: of all inputs, a mean over `tokens`."""
    kept = h[list(inputs)][:, list(inputs)]
    kept.diagonal().mul_(1 + RIDGE * len(inputs) / tokens)
    return kept


def seen_from(w: torch.Tensor, inputs: tuple[int, ...], h: torch.Tensor | None, root: torch.Tensor | None) -> torch.Tensor:
    """What comes nearest to `w` (out x all inputs) from the inputs that are left, (out x left).

    h: of all inputs; root: of H_KK as damped. Where they are None, no input says anything of another.
    """
    left, kept = w[:, list(inputs)], torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
    if h is None:
        return left
    kept[list(inputs)] = True
    across = w[:, ~kept].double() @ h[~kept][:, list(inputs)].double()
    return left + torch.cholesky_solve(across.t(), root.double()).t().to(left.dtype)


def errors(w: torch.Tensor, inputs: tuple[int, ...], h: torch.Tensor | None, *found: torch.Tensor) -> list[float]:
    """Mean square of what `w` gives of all inputs, and of how far each of `found` (out x left) is from that; over outputs."""
    sizes, h = [], None if h is None else h.double()
    for weight in (None, *found):
        off = w.double()
        if weight is not None:
            off[:, list(inputs)] -= weight.double()
        sizes.append(float(off.square().sum() if h is None else ((off @ h) * off).sum()))
    return sizes
