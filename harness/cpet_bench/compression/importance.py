"""Importance of coupled groups as LLM-Pruner has it (arXiv 2305.11627, section 3.2): neurons, and key heads with their queries.

w is a weight, g its gradient of the language-modelling loss, F the mean over documents of the squared gradient. By row of a
layer that makes a group (column of the one that reads it): `vector` |sum w g|, `element1` sum |w g|, `element2` sum |w F w|,
`mixed` sum |w g - w F w / 2|, `l1` sum |w|, `l2` sum w^2 (as the authors' code, without the root).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import StepFailed

if TYPE_CHECKING:
    import torch

GRADIENT = ("vector", "element1", "element2", "mixed")
SQUARED = ("element2", "mixed")


def layers_of(model, part) -> dict[str, Any]:
    """Layers of a part by their names within it: those that make its groups, then the one that reads them."""
    module = model.get_submodule(part.name)
    return {name: getattr(module, name) for name in (*part.rows, part.reader)}


def gradients(model, parts: list, examples: list[list[int]], squared: bool, progress) -> dict[Any, tuple]:
    """By layer of `parts`: (g, F or None), each shaped as `layer.weight`, on its device, in fp32.

    The loss is the mean over documents of the mean over their tokens; an encoder-decoder model reads a document and
    writes it again. Documents of one token say nothing of a next one and are left out.
    Raises: StepFailed: no document is left, or a loss is not finite.
    """
    import torch

    texts = [tokens for tokens in examples if len(tokens) > 1]
    if not texts:
        raise StepFailed("the calibration documents have a single token each, which gives no loss to take gradients of")
    layers = [layer for part in parts for layer in layers_of(model, part).values()]
    weights = [layer.weight.requires_grad_(True) for layer in layers]
    more = {} if model.config.is_encoder_decoder else {"use_cache": False}
    try:
        first = [torch.zeros_like(w, dtype=torch.float32, requires_grad=False) for w in weights]
        second = [torch.zeros_like(f) for f in first] if squared else [None] * len(first)
        for done, tokens in enumerate(texts):
            ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
            loss = model(input_ids=ids, labels=ids, **more).loss
            if not torch.isfinite(loss):
                raise StepFailed(f"the loss of calibration document {done + 1} is not finite")
            for f, s, grad in zip(first, second, torch.autograd.grad(loss, weights), strict=True):
                f.add_(grad.float(), alpha=1 / len(texts))
                if s is not None:
                    s.add_(grad.float().square(), alpha=1 / len(texts))
            progress(done + 1, len(texts), "gradients")
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return dict(zip(layers, zip(first, second, strict=True), strict=True))


def importance(model, part, settings, found: dict[Any, tuple], generator: torch.Generator) -> torch.Tensor:
    """One score (fp32, on the CPU) for each group of `part`; the lowest go first.

    settings: `importance` and `group`: how the layers' scores of one group are joined (sum, mean, max, prod); within a
    layer the rows of a head are added up. found: what `gradients` gave; generator: for `random`.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    if settings.importance == "random":
        return torch.rand(part.groups, generator=generator)
    scores = []
    for name, layer in layers_of(model, part).items():
        weight, (g, f) = layer.weight.detach().float(), found.get(layer, (None, None))
        value = _elements(settings.importance, weight, g, f)
        makes = name in part.rows
        if makes == isinstance(layer, Conv1D):
            value = value.t()
        rows = value.sum(1).abs() if settings.importance == "vector" else value.abs().sum(1)
        groups = [(part.outputs(name, [i]) if makes else part.inputs([i])) for i in range(part.groups)]
        scores.append(rows.cpu()[torch.tensor(groups)].sum(1))
    table = torch.stack(scores)
    return {"sum": table.sum, "mean": table.mean, "max": table.amax, "prod": table.prod}[settings.group](0)


def _elements(kind: str, w, g, f) -> torch.Tensor:
    if kind in ("vector", "element1"):
        return w * g
    if kind == "element2":
        return w * f * w
    if kind == "mixed":
        return w * g - 0.5 * w * f * w
    return w if kind == "l1" else w.square()
