"""MoEfication (arXiv 2110.01786): each feed-forward network becomes equal experts, and a router picks a share of them.

Experts are balanced k-means clusters of neurons by the rows of W_in (of a gated network: of the gate). The weights stay as
they are: what is added is a router per network, trained to say from its input which experts will be active.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..errors import StepFailed, Unsupported
from ..settings import CalibrationSettings, Natural, Positive, Rate, Settings
from .sizes import F32, ModelSize, whole

if TYPE_CHECKING:
    import torch

NEURONS = 32  # of an expert, where no number of experts is given: as in the paper (4.1)
KEPT = 2 << 30  # bytes of calibration inputs held at once; where all of them are more, the documents are run again for the rest


class MoefySettings(Settings):
    """experts: of each network (None: of 32 neurons each, as in the paper). top: the share of them computed for a token.

    calibration: the text whose activations the routers learn to predict. epochs over its tokens, batch (tokens a step) and
    lr (of Adam) are those of the authors' code. seed: of the clusters' start and the order of tokens.
    """

    experts: int | None = Field(None, ge=2, le=65536)
    top: float = Field(0.2, gt=0, le=1)
    calibration: CalibrationSettings = CalibrationSettings()
    epochs: Positive = 30
    batch: Positive = 512
    lr: Rate = 1e-2
    seed: Natural = 0


class Moefy:
    """Routers learn from what the dense model computes, network by network, as in the authors' code."""

    name = "moefy"
    version = 1
    packages = ("torch", "transformers", "scipy")
    calibrated = True
    tries = ({"experts": 4, "top": 0.5, "epochs": 2},)  # settings that `doctor` tries
    Settings = MoefySettings

    @staticmethod
    def min_tokens(settings) -> int:
        return min(settings.batch, 512)  # one step of a router's training, with the authors' batch

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return {"experts": settings.experts, "top": settings.top}

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        if "moefy" in before:
            return "the feed-forward networks are split into experts already"
        return None  # packed weights stay as they are too: experts are clusters of what they stand for

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of the whole model in float32, and of what the networks that are learnt at once read."""
        tokens = settings.calibration.documents * settings.calibration.max_tokens
        experts = settings.experts or size.widest // NEURONS
        each = F32 * tokens * (size.width + experts)
        return whole(size, settings.calibration) + max(each, min(KEPT, size.depth * each))

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: MoefySettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Cluster, train the routers, and write the source's own files with the routers beside them.

        Facts: experts, experts_used (for each token), neurons (of an expert), activation, extension (what is beyond the
        paper: other activations than ReLU, gated networks), routers (each network's figures and their means, see
        `train_router`), calibration documents and tokens, router_parameters, router_bytes, bytes.
        """
        import torch

        from ..models.arch import dense_weight, features
        from ..models.loading import load_model
        from ..models.passes import held_out
        from ..models.routers import feed_forwards, save_routers

        if not examples:
            raise StepFailed("MoEfication needs calibration documents, and there are none")
        model = load_model(source, device=device, dtype="float32")
        networks = feed_forwards(model)
        widths = {f.name: features(_child(model, f, f.w_in))[1] for f in networks}
        sizes = {name: experts_of(name, width, settings.experts) for name, width in widths.items()}
        experts = next(iter(sizes.values()))
        k = max(1, round(settings.top * experts))
        if len(set(sizes.values())) > 1:
            raise Unsupported(f"its networks' widths differ ({sorted(set(widths.values()))}): give the number of `experts`")
        generator = torch.Generator().manual_seed(settings.seed)
        routers, figures = {}, {}
        tokens = sum(map(len, examples))
        groups = in_groups(model, networks, tokens, experts)
        for group in groups:
            for f in group:
                progress(len(routers), len(networks), f"experts of {f.name}")
                routers[f.name] = start_router(dense_weight(_child(model, f, f.w_in)), experts, k, settings.seed)
            seen = watch(model, group, routers, examples, progress)
            for f in group:
                progress(len(figures), len(networks), f"router of {f.name}")
                figures[f.name] = train_router(routers[f.name], *seen.pop(f.name), settings, generator)
        copy_model(source, out)
        kind = type(_child(model, networks[0], networks[0].act)).__name__
        neurons = sorted({width // experts for width in widths.values()})
        about = {"experts": experts, "experts_used": k, "neurons": neurons[0] if len(neurons) == 1 else neurons}
        added = save_routers(routers, out, about)
        means = {key: sum(f[key] for f in figures.values()) / len(figures) for key in next(iter(figures.values()))}
        held = sum(held_out(examples))
        return {
            **about,
            "activation": kind,
            "extension": extension(kind, networks[0].gate is not None),
            "routers": {**means, "measured_on": "held-out documents" if held else "training documents", "each": figures},
            "calibration_documents": len(examples),
            "held_out_documents": held,
            "calibration_tokens": tokens,
            "router_parameters": sum(r.first.numel() + r.second.numel() for r in routers.values()),
            "router_bytes": added,
            "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
            "simulated": ["speed"],  # all neurons are computed, and those of the other experts multiplied by zero
        }


def _child(model, network, name: str):
    return model.get_submodule(f"{network.name}.{name}")


def experts_of(name: str, width: int, experts: int | None) -> int:
    """How many experts a network of `width` neurons is split into; Unsupported, naming what fits, where they can't be equal."""
    wanted = experts or width // NEURONS
    if wanted >= 2 and width % wanted == 0:
        return wanted
    fits = sorted((n for n in range(2, width + 1) if width % n == 0), key=lambda n: (abs(n - wanted), n))[:6]
    raise Unsupported(
        f"{name}: {width} neurons cannot be split into {wanted} equal experts; {', '.join(map(str, sorted(fits)))} would do"
    )


def extension(activation: str, gated: bool) -> str | None:
    """What of a network is not the paper's case, which is two layers with ReLU between them."""
    if "relu" in activation.lower() and not gated:
        return None
    how = "gated: experts are clusters of the gate's rows, their activity is the size of the product" if gated else "not gated"
    return f"the method is made for ReLU; here {activation}, {how}"


# -- experts -----------------------------------------------------------------------------------------------------------
def balanced_clusters(rows: torch.Tensor, experts: int, seed: int, rounds: int = 20):
    """K-means of unit `rows` (n x d) into clusters of equal size. Returns (each row's cluster, centroids experts x d).

    Each round assigns optimally: every centroid stands n / experts times in a linear assignment. Since all clusters are of
    one size, the sum of |c|^2 is the same for every assignment, and the least squared distance is the largest x.c.
    """
    import numpy as np
    import torch
    from scipy.optimize import linear_sum_assignment

    x = rows.double().cpu().numpy()
    size = len(x) // experts
    draw = np.random.default_rng(seed)
    centroids = x[_spread(x, experts, draw)]
    expert = None
    for _ in range(rounds):
        _, place = linear_sum_assignment(np.repeat(x @ centroids.T, size, axis=1), maximize=True)
        if expert is not None and np.array_equal(expert, place // size):
            break
        expert = place // size
        centroids = x[np.argsort(expert, kind="stable")].reshape(experts, size, -1).mean(1)
    return torch.from_numpy(expert), torch.from_numpy(centroids).float()


def _spread(x, count: int, draw) -> list[int]:
    """Indices of `count` rows to start from, each drawn by its squared distance to those before it (k-means++)."""
    import numpy as np

    chosen = [int(draw.integers(len(x)))]
    nearest = ((x - x[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count:
        left = np.setdiff1d(np.arange(len(x)), chosen)
        weight = nearest[left]
        share = weight / weight.sum() if weight.sum() > 0 else None
        chosen.append(int(draw.choice(left, p=share)))
        nearest = np.minimum(nearest, ((x - x[chosen[-1]]) ** 2).sum(1))
    return chosen


def start_router(w_in: torch.Tensor, experts: int, k: int, seed: int):
    """The untrained router of a network with these rows (neurons x width): centroids, then the identity."""
    import torch

    from ..models.routers import Router

    rows = torch.nn.functional.normalize(w_in, dim=1)
    expert, centroids = balanced_clusters(rows, experts, seed)
    return Router(centroids, torch.eye(experts), expert, k).to(w_in.device)


# -- what the dense model does ------------------------------------------------------------------------------------------
def in_groups(model, networks: list, tokens: int, experts: int) -> list[list]:
    """Networks whose calibration inputs are held at the same time."""
    from ..models.arch import features

    groups: list[list] = []
    held = 0
    for f in networks:
        size = 4 * tokens * (features(_child(model, f, f.w_in))[0] + experts)
        if not groups or held + size > KEPT:
            groups.append([])
            held = 0
        groups[-1].append(f)
        held += size
    return groups


def watch(model, networks: list, routers: dict, examples: list[list[int]], progress) -> dict[str, tuple]:
    """Run the dense model over the documents. By network: inputs (tokens x width), and each expert's mass (tokens x experts).

    An expert's mass is the sum of |h| over its neurons, h being what the output layer reads (for ReLU networks, their
    activations; for gated ones, the product). Third: whether the token's document is held out.
    """
    import torch

    from ..models.arch import body
    from ..models.passes import held_out, text_inputs
    from .blockwise import grouped

    found: dict[str, tuple[list, list]] = {f.name: ([], []) for f in networks}
    now: dict[str, torch.Tensor] = {}

    def real(tensor: torch.Tensor, name: str) -> torch.Tensor:
        flat = tensor.reshape(-1, tensor.shape[-1])
        if len(flat) != now["real"].numel():
            raise Unsupported(f"not every token goes through {name}, so its router cannot be trained")
        return flat[now["real"].reshape(-1).to(flat.device)].float()

    def look(f):
        router = routers[f.name]
        members = torch.nn.functional.one_hot(router.expert, len(router.second)).float()
        x, mass = found[f.name]
        return (
            _child(model, f, f.w_in).register_forward_pre_hook(lambda m, args: x.append(real(args[0], f.name))),
            _child(model, f, f.w_out).register_forward_pre_hook(
                lambda m, args: mass.append(real(args[0], f.name).abs() @ members)
            ),
        )

    hooks = [hook for f in networks for hook in look(f)]
    batches = grouped(examples)
    try:
        with torch.no_grad():
            for done, batch in enumerate(batches):
                given, now["real"] = text_inputs(model, batch)
                body(model)(**given)
                progress(done, len(batches), f"what {len(networks)} networks read")
    finally:
        for hook in hooks:
            hook.remove()
    flags = held_out(examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]), reverse=True)  # as `grouped` has them
    held = torch.cat([torch.full((len(examples[i]),), flags[i]) for i in order])
    together = {name: (torch.cat(x), torch.cat(mass)) for name, (x, mass) in found.items()}
    for name, (x, mass) in together.items():
        if not bool(x.isfinite().all() and mass.isfinite().all()):
            raise StepFailed(f"what {name} computes is not finite")
    return {name: (x, mass, held.to(x.device)) for name, (x, mass) in together.items()}


# -- routers -----------------------------------------------------------------------------------------------------------
def train_router(
    router, x: torch.Tensor, mass: torch.Tensor, held: torch.Tensor, settings: MoefySettings, generator: torch.Generator
) -> dict[str, float]:
    """Train `router` in place with binary cross-entropy on each token's masses, divided by the token's largest.

    (The authors' code divides by the largest of a batch, of unit inputs; with biases a network is not homogeneous, so the
    inputs here are as they are.) The weights after the epoch with the lowest loss on what is held out are kept.

    Args:
        x: inputs (tokens x width); mass: (tokens x experts), not negative; held: true at tokens not trained on.

    Returns: bce_start, bce_end: mean loss of the training tokens. Of the held-out ones (of all where none are): recall
        (share of the experts with the most mass that are picked), mass (share of the mass that is), and each of a random pick.
    """
    import torch
    from torch.nn import functional as F

    target = mass / mass.amax(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    train = torch.nonzero(~held).flatten()
    judge = torch.nonzero(held).flatten() if bool(held.any()) else train
    weights = [router.first.requires_grad_(), router.second.requires_grad_()]
    optimizer = torch.optim.Adam(weights, lr=settings.lr)

    def loss(index: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(router.scores(x[index]), target[index])

    @torch.no_grad()
    def mean_loss(index: torch.Tensor) -> float:
        return sum(float(loss(part)) * len(part) for part in index.split(8192)) / len(index)

    start, best = mean_loss(train), (float("inf"), [])
    for _ in range(settings.epochs):
        order = train[torch.randperm(len(train), generator=generator).to(train.device)]
        for batch in order.split(settings.batch):
            optimizer.zero_grad(set_to_none=True)
            loss(batch).backward()
            optimizer.step()
        now = mean_loss(judge)
        if now < best[0]:
            best = (now, [w.detach().clone() for w in weights])
    if not best[1]:
        raise StepFailed("a router's loss is not finite; a lower lr may help")
    for w, kept in zip(weights, best[1], strict=True):
        w.requires_grad_(False).grad = None
        w.copy_(kept)
    return {"bce_start": start, "bce_end": mean_loss(train), **quality(router, x[judge], mass[judge])}


def quality(router, x: torch.Tensor, mass: torch.Tensor) -> dict[str, float]:
    """Shares of the most massive experts, and of the mass, that the router picks; tokens without any mass do not count."""
    import torch

    some = mass.sum(1) > 0
    x, mass, k = x[some], mass[some], router.k
    if not len(x):
        return {"recall": 1.0, "mass": 1.0, "recall_random": k / mass.shape[1]}
    picked = torch.zeros_like(mass, dtype=torch.bool).scatter_(1, router.scores(x).topk(k, dim=1).indices, True)
    true = torch.zeros_like(picked).scatter_(1, mass.topk(k, dim=1).indices, True)
    return {
        "recall": float((picked & true).sum() / true.sum()),
        "mass": float(((mass * picked).sum(1) / mass.sum(1)).mean()),
        "recall_random": k / mass.shape[1],
    }


def copy_model(source: Path, out: Path) -> None:
    """The files of a model folder (weights, config, tokenizer), byte for byte."""
    from ..models.sources import HUB_FILES

    out.mkdir(parents=True, exist_ok=True)
    for path in {p for pattern in HUB_FILES for p in Path(source).glob(pattern) if p.is_file()}:
        shutil.copyfile(path, out / path.name)
