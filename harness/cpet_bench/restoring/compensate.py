"""Compensation: a recovery that starts from the compression's error instead of from zero (EoRA, arXiv 2410.21271).

E = W - W', W' the weight as the compressed layer really computes it; H the mean of x xT over the layer's inputs x. Of all maps
of rank r, U2 U1 makes ||E - U2 U1||_H^2 = tr((E - U2 U1) H (E - U2 U1)T), the mean squared error of the layer's output, least.
Any root of H serves to find it: with H = L LT and E L = U S VT, U2 U1 = U_r U_rT E (the paper's L is Q sqrt(D), H = Q D QT).
Of layers that lost inputs: `lost_inputs`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..compression.blockwise import grouped, read
from ..errors import StepFailed, Unsupported
from ..models.arch import block_linears, body, dense_weight, features
from ..models.loading import load_model
from ..models.passes import text_inputs
from ..settings import RecoverSettings
from . import lost_inputs
from .cuts import Cuts
from .recover import kaiming_, write

BUDGET = 4 << 30  # bytes of moments kept at once; where all of them are more, the documents are run again for the rest
FLOOR = 1e-6  # of the largest eigenvalue of H
Progress = Callable[[int, int, str], None]


def moments_bytes(widths: Iterable[int]) -> int:
    """Bytes of the input moments of layers with these input widths (layers that share an input count once)."""
    return sum(4 * n * n for n in widths)


# -- input moments -----------------------------------------------------------------------------------------------------
def input_moments(model: nn.Module, examples: list[list[int]], out: Path, progress: Progress) -> dict:
    """H = mean of x xT (in x in, fp32) of every linear layer of the blocks, over the tokens of `examples`, padding left out.

    Written to `out`: moments-N.safetensors, and moments.json that says which tensor is which layer's; layers that read the
    same input (q, k, v; gate, up) share one. Of an encoder-decoder model the encoder reads the document, and the decoder
    its start token and the document after it.

    Returns: facts: documents, tokens, bytes, layers, inputs (distinct ones), passes.
    Raises: Unsupported: a layer that not all tokens go through; StepFailed: inputs that are not finite.
    """
    layers = block_linears(model)
    leader = shared_inputs(model, layers, examples)
    parts = _parts({name: features(layers[name])[0] for name in dict.fromkeys(leader.values())})
    batches = grouped(examples)
    tokens = sum(map(len, examples))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    size = 0
    for number, part in enumerate(parts):
        sums: dict[str, torch.Tensor] = {}
        keep: dict[str, torch.Tensor] = {}
        hooks = [layers[name].register_forward_pre_hook(_add_product(name, sums, keep)) for name in part]
        try:
            for done, batch in enumerate(batches):
                _run(model, batch, keep)
                progress(number * len(batches) + done + 1, len(parts) * len(batches), "input moments")
        finally:
            for hook in hooks:
                hook.remove()
        size += _save(sums, tokens, out / f"moments-{number}.safetensors")
        where |= dict.fromkeys(part, f"moments-{number}.safetensors")
    index = {name: {"file": where[first], "tensor": first} for name, first in leader.items()}
    text = {"schema": 1, "documents": len(examples), "tokens": tokens, "layers": index}
    (out / "moments.json").write_text(json.dumps(text, indent=1) + "\n")
    return {
        "documents": len(examples),
        "tokens": tokens,
        "bytes": size,
        "layers": len(layers),
        "inputs": len(where),
        "passes": len(parts),
    }


def shared_inputs(model: nn.Module, layers: dict[str, nn.Module], examples: list[list[int]]) -> dict[str, str]:
    """By layer, the first layer that reads the very same tensor as it does, found in a pass over a few tokens."""
    first: dict[tuple, str] = {}
    leader: dict[str, str] = {}
    alive = []  # so that no later tensor takes the memory of an earlier one

    def look(name: str):
        def hook(module, args):
            x = args[0]
            alive.append(x)
            leader[name] = first.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype, x._version), name)

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in layers.items()]
    try:
        _run(model, [examples[0][:8]], {})
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name in layers if name not in leader]
    if unused:
        raise Unsupported(f"no input reaches {', '.join(unused[:6])}, so its moments cannot be measured")
    return {name: leader[name] for name in layers}


def _parts(widths: dict[str, int]) -> list[list[str]]:
    parts: list[list[str]] = []
    held = 0
    for name, width in widths.items():
        size = moments_bytes([width])
        if not parts or held + size > BUDGET:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


@torch.no_grad()
def _run(model: nn.Module, documents: list[list[int]], keep: dict[str, torch.Tensor]) -> None:
    """One pass; keep["real"] is then true at the real tokens of what every layer reads, (rows x positions)."""
    given, keep["real"] = text_inputs(model, documents)
    body(model)(**given)


def _add_product(name: str, sums: dict[str, torch.Tensor], keep: dict[str, torch.Tensor]):
    def hook(module, args):
        x = read(args[0], keep["real"], name, "its input moments are not those of the text")
        if name in sums:
            sums[name].addmm_(x.t(), x)
        else:
            sums[name] = x.t() @ x

    return hook


def _save(sums: dict[str, torch.Tensor], tokens: int, path: Path) -> int:
    from safetensors.torch import save_file

    means = {name: (total / tokens).cpu() for name, total in sums.items()}
    bad = [name for name, mean in means.items() if not bool(mean.isfinite().all())]
    if bad:
        raise StepFailed(f"the inputs of {', '.join(bad[:6])} are not finite")
    save_file(means, path)
    return path.stat().st_size


# -- compensation ------------------------------------------------------------------------------------------------------
def compensation(
    dense: Path,
    model: nn.Module,
    moments: Path | None,
    r: int,
    method: str,
    out: Path,
    progress: Progress,
    cuts: Cuts | None = None,
) -> dict:
    """Write to `out` the recovery (identity activation, scale 1) of rank `r` that reproduces the compression's error best.

    Args:
        dense: folder of the dense model; its weights are held in fp32 on the CPU for as long as this takes.
        model: the compressed model, resident.
        moments: what `input_moments` wrote (eora); None for svd, where H = 1. Of the dense model where layers lost inputs.
        cuts: what structural compression took out of `model`.
    A row of U1 has the norm that Kaiming-uniform gives, 1 / sqrt 3, and U2 the inverse. Where the error has a lower rank than
    r, the rest is an untrained recovery: a random row of U1 and a zero column of U2.

    Returns: facts: method, r, layers, seconds, error_before and error_after (mean squared error of the layers' outputs as a
        share of their mean square, over all layers), left (of a layer's error, a mean over the layers
        that have one; None where none has), left_by_kind.
    Raises: StepFailed, Unsupported: the two models have other layers or shapes, or a cut left no error that a layer could make
        up.
    """
    began = time.perf_counter()
    if (method == "eora") != (moments is not None):
        raise StepFailed(f"compensation {method} {'needs' if method == 'eora' else 'takes no'} input moments")
    original = block_linears(load_model(Path(dense)))
    layers = block_linears(model)
    origins = lost_inputs.origins(original, layers, cuts)
    about = json.loads(Path(moments, "moments.json").read_text()) if moments else {"layers": {}, "tokens": 0}
    index = about["layers"]
    read = {name: origin.name if index.keys() == original.keys() else name for name, origin in origins.items()}
    lost = any(origin.inputs is not None for origin in origins.values())
    if moments and index.keys() != original.keys() and (lost or index.keys() != layers.keys()):
        raise StepFailed("the input moments are those of another model")
    found = Found(r, method)
    reachable = 0.0
    h = root = held = None
    order = list(layers)
    if moments:  # those that share an input together, so that each root is found once
        places = {entry["tensor"]: i for i, entry in enumerate(index.values())}
        order.sort(key=lambda name: places[index[read[name]]["tensor"]])
    with torch.no_grad(), one_blas_thread():
        for done, name in enumerate(order):
            compressed, origin = dense_weight(layers[name]), origins[name]
            w = dense_weight(original[origin.name]).to(compressed.device)
            w = lost_inputs.as_it_was(w, origin, layers[name]) if cuts else w
            left = origin.inputs
            if moments and (index[read[name]], left) != held:
                held = index[read[name]], left
                h = _moment(Path(moments), held[0]).to(w.device)
                root = moment_root(h if left is None else lost_inputs.damped(h, left, about["tokens"]))
            wanted = w if left is None else lost_inputs.seen_from(w, left, h, root)
            u1, u2, sizes = found.factors(name, wanted - compressed, root)
            reachable += sizes[0]
            if left is not None:
                size, *sizes = lost_inputs.errors(w, left, h, compressed, compressed + u2 @ u1)
            else:
                size = float((w if root is None else w @ root).square().sum())
            found.count(name, size, *sizes)
            progress(done + 1, len(layers), name)
    if cuts and not reachable:
        hint = "; eora looks at how the inputs that a layer lost go with those left" if lost and not moments else ""
        raise Unsupported(f"each layer that is left computes what it did, so there is no error to make up{hint}")
    return found.saved(out) | {"seconds": time.perf_counter() - began}


class Found:
    """The factors of a compensation, layer by layer, and how much of the error they leave.

    shares: by kind of layer, of each layer that has an error, how much of it is left.
    """

    def __init__(self, r: int, method: str, sequential: bool = False):
        self.settings = RecoverSettings(r=r, act="identity", init=method, sequential=sequential)
        self.weights: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)
        self.shares: dict[str, list[float]] = {}
        self._whole = self._before = self._after = 0.0

    def factors(self, name: str, e: torch.Tensor, root: torch.Tensor | None) -> tuple:
        """`low_rank` of a layer's error, kept."""
        u1, u2, sizes = low_rank(e, root, self.settings.r, self._generator, name)
        self.weights[f"{name}.U1"], self.weights[f"{name}.U2"] = u1, u2
        return u1, u2, sizes

    def count(self, name: str, whole: float, before: float, after: float) -> None:
        """Mean squares of a layer's outputs: of themselves, and of their error before and after."""
        self._whole, self._before, self._after = self._whole + whole, self._before + before, self._after + after
        if before:
            self.shares.setdefault(name.rpartition(".")[2], []).append(after / before)

    def saved(self, out: Path) -> dict:
        """Facts, after the factors are written to `out`."""
        write(Path(out), self.weights, self.settings)
        every = [share for shares in self.shares.values() for share in shares]
        return {
            "method": self.settings.init,
            "r": self.settings.r,
            "layers": len(self.weights) // 2,
            "error_before": self._before / self._whole,
            "error_after": self._after / self._whole,
            "left": sum(every) / len(every) if every else None,
            "left_by_kind": {kind: sum(shares) / len(shares) for kind, shares in self.shares.items()},
        }


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for scipy, whose pool and torch's wait for each other: on two busy cores both pools took 15 times as long."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def _moment(folder: Path, entry: dict[str, str]) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(folder / entry["file"], framework="pt") as file:
        return file.get_tensor(entry["tensor"])


def moment_root(h: torch.Tensor) -> torch.Tensor:
    """L (fp32) with L LT = H, whose eigenvalues are raised to FLOOR of the largest."""
    h = h.double()
    h = (h + h.t()) / 2
    largest = _largest(h)
    if not largest > 0:
        raise StepFailed("all inputs of a layer are zero on the calibration documents")
    floor = FLOOR * largest
    shifted = h.clone()
    shifted.diagonal().sub_(floor)
    if int(torch.linalg.cholesky_ex(shifted)[1]):  # some eigenvalue is below the floor
        values, vectors = _below(h, floor)
        h = h + (vectors * (floor - values)) @ vectors.t()
    return torch.linalg.cholesky(h).float()


def _largest(h: torch.Tensor) -> float:
    """The largest eigenvalue of a symmetric non-negative matrix."""
    if len(h) < 64 or h.is_cuda:
        return float(torch.linalg.eigvalsh(h)[-1])
    import numpy as np
    from scipy.sparse.linalg import eigsh

    start = np.ones(len(h))  # else random, from a generator that is not ours
    return float(eigsh(h.numpy(), k=1, which="LA", v0=start, return_eigenvectors=False)[0])


def _below(h: torch.Tensor, floor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvalues of a symmetric matrix that are at most `floor`, and their vectors as columns."""
    if h.is_cuda:
        values, vectors = torch.linalg.eigh(h)
        return values[values <= floor], vectors[:, values <= floor]
    from scipy.linalg import eigh

    values, vectors = eigh(h.numpy(), subset_by_value=(-float("inf"), floor), check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def low_rank(e: torch.Tensor, root: torch.Tensor | None, r: int, generator: torch.Generator, name: str = "") -> tuple:
    """(U1 (r x in), U2 (out x r), (||E||_H^2, ||E - U2 U1||_H^2)) for an error e (out x in); root None: H = 1."""
    if not bool(e.isfinite().all()):
        raise StepFailed(f"the weights of {name or 'a layer'} are not finite")
    seen = e if root is None else e @ root
    vectors, found = _left_vectors(seen, r)
    rows = vectors.t() @ e
    norms = rows.norm(dim=1)
    u1 = kaiming_(torch.empty(r, e.shape[1]), generator).to(e.device)
    u2 = e.new_zeros(e.shape[0], r)
    real = (found > 0) & (norms > 0)
    unit = 3**-0.5
    at = torch.nonzero(real).flatten()
    u1[at] = rows[at] * (unit / norms[at])[:, None]
    u2[:, at] = vectors[:, at] * (norms[at] / unit)
    left = seen - u2 @ (u1 if root is None else u1 @ root)
    return u1, u2, (float(seen.square().sum()), float(left.square().sum()))


def _left_vectors(a: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first min(r, *a.shape) left singular vectors (columns) and singular values of a, largest first.

    By the Gram matrix of the shorter side, in fp64: squaring loses half of the digits, and fp32 has too few for that.
    Values that the rounding of fp32 alone explains are given as 0.
    """
    tall = a.shape[0] > a.shape[1]
    wide = (a.t() if tall else a).double()
    values, vectors = _top(wide @ wide.t(), min(r, len(wide)))
    values = values.clamp_min(0).sqrt()
    values[values <= 1e-6 * max(float(values.max()), 0.0)] = 0.0
    if tall:
        vectors = a.double() @ vectors
        vectors = vectors / vectors.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return vectors.to(a.dtype), values.to(a.dtype)


def _top(gram: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest eigenvalues of a symmetric matrix, largest first, and their vectors as columns."""
    n = len(gram)
    if gram.is_cuda or 4 * k > n:
        values, vectors = torch.linalg.eigh(gram)
        return values[-k:].flip(0), vectors[:, -k:].flip(1)
    from scipy.linalg import eigh

    values, vectors = eigh(gram.numpy(), subset_by_index=(n - k, n - 1), check_finite=False)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())
