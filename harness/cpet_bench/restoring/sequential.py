"""Compensation in sequence: each layer's part is found with those before it in place, and aims at what the dense model gives.

Plain compensation (compensate.py) takes a layer's error by itself, W x - W' x on inputs that both are given. In use a layer is
not given what the dense one is: what all layers before it got wrong comes in, and no layer makes up for that. Here x is what
enters the layer in the dense model, and x' what enters it in the compressed one when all that runs before it has its part
already. Of all maps M of x',

    E|W x - M x'|^2 + |(M - W_K) D^1/2|^2   is least at   M = W_K + (W A - W_K H) (H + D)^-1,   A = E x x'T, H = E x' x'T.

K are the inputs that are left (all, but for structured pruning, whose lost inputs are so predicted from the others). D is a
ridge, as in lost_inputs.py: few tokens say little, and M then stays near W. The error is E = M - W', and its rank-r part is
found in the norm H + D as in compensate.py. The aim is that of GPTAQ's asymmetric calibration (arXiv 2504.02692), there of
quantised weights, here of low-rank factors beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compression.blockwise import first_inputs, hidden_of, kinds_of, observed, read, run_block
from ..compression.streaming import Whole
from ..errors import StepFailed, Unsupported
from ..models.arch import block_linears, block_lists, dense_weight
from ..models.loading import load_model
from . import lost_inputs
from .compensate import Found, Progress, moment_root, one_blas_thread
from .cuts import Cuts
from .lost_inputs import RIDGE, Origin
from .recover import Recovery, put_beside

OTHERS = "init: svd reads no text"
NOISE = 1e-6  # of a layer's mean square: what the rounding of its moments may leave


class _Reached(Exception):
    """The layer that is watched was reached; the rest of the block need not run."""


class _Side:
    """One of the two models, run block by block over the same documents, a list of blocks (encoder, decoder) at a time."""

    def __init__(self, model: nn.Module):
        self.opened = Whole(model, Path(), Path(), "it is resident")
        self.ended: dict[str, list[Any]] = {}

    def enter(self, name: str, examples: list[list[int]]) -> None:
        """Go to before the first block of the list `name`."""
        self.name, self.blocks, self.at = name, self.opened.model.get_submodule(name), 0
        self.kinds = kinds_of(self.opened.model, len(self.blocks))
        self.batches = first_inputs(self.opened, name, examples, self.ended)

    def advance(self, to: int) -> None:
        """Run blocks until `to` (the first block that was not run); after the last, what it gives is kept for the next list."""
        for number in range(self.at, to):
            ends = []
            for batch in self.batches:
                given = run_block(self.blocks[number], batch, self.kinds[number])
                batch["hidden"] = hidden_of(given)
                if number + 1 == len(self.blocks):
                    ends.append(given)
            self.ended |= {self.name: ends} if ends else {}
        self.at = to

    def groups(self) -> list[dict[str, nn.Module]]:
        """The linear layers of the block at hand by name, those together that read the same, in the order they run."""
        prefix = f"{self.name}.{self.at}."
        mine = {name: layer for name, layer in self.opened.layers.items() if name.startswith(prefix)}
        block, kind = self.blocks[self.at], self.kinds[self.at]
        return [group for group, _ in observed(block, kind, mine, self.batches[:1], lambda *_: None, None, OTHERS)]

    def read(self, layer: nn.Module, batch: dict[str, Any], name: str) -> torch.Tensor:
        """What `layer` of the block at hand reads for a batch, (tokens x in) in fp32, padding left out."""
        seen: list[torch.Tensor] = []

        def catch(module, args):
            seen.append(args[0])
            raise _Reached

        handle = layer.register_forward_pre_hook(catch)
        try:
            run_block(self.blocks[self.at], batch, self.kinds[self.at])
        except _Reached:
            pass
        finally:
            handle.remove()
        if not seen:
            raise Unsupported(f"no input reaches {name} of the dense model, so there is nothing that it should give; {OTHERS}")
        return read(seen[0], batch["real"], name, f"what it reads is not the calibration text; {OTHERS}")


def sequential_compensation(
    dense: nn.Module,
    folder: Path,
    model: nn.Module,
    examples: list[list[int]],
    r: int,
    out: Path,
    progress: Progress,
    cuts: Cuts | None = None,
) -> dict:
    """Write to `out` the recovery (identity activation, scale 1) of rank `r` beside every layer, found as said above.

    Args:
        dense: the dense model, resident as `model` is; folder: its files, whose weights are read in fp32.
        model: the compressed model, resident; it is given back without what is put beside its layers meanwhile.
        examples: token ids by calibration document. cuts: what structural compression took out of `model`.
    Takes, for each set of layers that read the same, a pass of both models through the block as far as them.

    Returns: facts: as `compensation`, and sequential, documents, tokens. Errors are those against what the dense layer gives on
        its own inputs; before: without the layer's own part, and with those of all that run before it.
    Raises: Unsupported: a layer that not all tokens go through, other layers than the dense model has, or no error to make up
        where something was cut. StepFailed: inputs that are not finite.
    """
    began = time.perf_counter()
    original, old, new = block_linears(load_model(Path(folder))), _Side(dense), _Side(model)
    theirs, layers, tokens = old.opened.layers, new.opened.layers, sum(map(len, examples))
    origins = lost_inputs.origins(original, layers, cuts)
    found, done = Found(r, "eora", sequential=True), 0
    with torch.no_grad(), one_blas_thread(), ExitStack() as beside:
        for group in _in_turn(old, new, examples, cuts):
            first = next(iter(group))
            moments = _moments(old, new, theirs[origins[first].name], group[first], first)
            for name, factors in _parts(group, origins, original, moments, tokens, found, bool(cuts)).items():
                beside.callback(put_beside(layers[name], Recovery(*factors, "identity", 1.0)).remove)
                done += 1
                progress(done, len(layers), name)
    if cuts and not any(found.shares.values()):
        raise Unsupported("each layer that is left gives what it did, so there is no error to make up")
    about = {"sequential": True, "documents": len(examples), "tokens": tokens}
    return found.saved(out) | about | {"seconds": time.perf_counter() - began}


def _in_turn(old: _Side, new: _Side, examples: list[list[int]], cuts: Cuts | None) -> Iterator[dict[str, nn.Module]]:
    """Layers of `new` that read the same, in the order they run, with both models before the block that they are in."""
    lists = block_lists(new.opened.model)
    for name in lists:
        for side in (old, new):
            side.enter(name, examples)
        count = len(new.blocks)
        places = sorted(cuts.blocks[name]) if cuts and name in cuts.blocks else range(count)
        for number, place in enumerate(places):
            old.advance(place)
            yield from new.groups()
            if name != lists[-1] or number + 1 < count:  # after the very last nothing runs
                new.advance(number + 1)
        if name != lists[-1]:
            old.advance(len(old.blocks))


def _moments(old: _Side, new: _Side, was: nn.Module, layer: nn.Module, name: str) -> tuple[torch.Tensor, ...]:
    """(H = E x' x'T, A = E x x'T, B = E x xT) over all tokens, fp32: x as the dense layer reads it, x' as this one does."""
    sums: list[torch.Tensor] = []
    tokens = 0
    for theirs, ours in zip(old.batches, new.batches, strict=True):
        here = new.read(layer, ours, name)
        x = old.read(was, theirs, name).to(here.device)
        sums = sums or [here.new_zeros(a.shape[1], b.shape[1]) for a, b in ((here, here), (x, here), (x, x))]
        for total, a, b in zip(sums, (here, x, x), (here, here, x), strict=True):
            total.addmm_(a.t(), b)
        tokens += len(here)
    if not all(bool(total.isfinite().all()) for total in sums):
        raise StepFailed(f"the inputs of {name} are not finite")
    return tuple(total.div_(tokens) for total in sums)


def _parts(
    group: dict[str, nn.Module],
    origins: dict[str, Origin],
    original: dict[str, nn.Module],
    moments: tuple[torch.Tensor, ...],
    tokens: int,
    found: Found,
    cut: bool,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(U1, U2) by layer, for layers that read the same."""
    h, across, whole = moments
    kept = origins[next(iter(group))].inputs
    kept = list(range(len(h))) if kept is None else list(kept)
    damping = RIDGE * len(h) / tokens * h.diagonal()
    root = moment_root(h + damping.diag())  # raised where inputs hardly go: there M stays W, since what is added to it is 0
    apart = across.clone()
    apart[kept] -= h
    predicted = torch.cholesky_solve(apart.double().t(), root.double()).t().float()  # (inputs of the dense layer x in)
    predicted[kept, range(len(kept))] += 1
    exact, parts = h.double(), {}
    for name, layer in group.items():
        compressed = dense_weight(layer)
        w = dense_weight(original[origins[name].name]).to(compressed.device)
        w = lost_inputs.as_it_was(w, origins[name], layer) if cut else w
        u1, u2, _ = found.factors(name, w @ predicted - compressed, root)
        size, seen, errors = float(((w @ whole) * w).sum()), (w @ across).double(), []
        for m in (compressed.double(), (compressed + u2 @ u1).double()):
            left = size - 2 * float((seen * m).sum()) + float(((m @ exact) * m).sum())
            errors.append(left if left > NOISE * size else 0.0)
        found.count(name, size, *errors)
        parts[name] = (u1, u2)
    return parts
