"""What the pruners share: the pattern, choosing what stays, checking the zeros, saving."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from ..errors import StepFailed, Unsupported
from ..settings import Settings
from .notes import write_note
from .rounding import PACKING
from .sizes import ModelSize

if TYPE_CHECKING:
    import torch


class PatternSettings(Settings):
    """Either `pattern: "n:m"` (n of every m consecutive inputs stay) or `sparsity` (the share that goes, per layer)."""

    pattern: str | None = None
    sparsity: float | None = Field(None, gt=0, lt=1)

    @field_validator("pattern")
    @classmethod
    def _shape(cls, value: str | None) -> str | None:
        if value is None:
            return None
        found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", value)
        if not found or int(found[1]) >= int(found[2]):
            raise ValueError(f"{value!r} is no n:m pattern with n < m, such as 2:4 (quote it: YAML reads 2:4 as a number)")
        return value

    @model_validator(mode="after")
    def _one(self):
        if (self.pattern is None) == (self.sparsity is None):
            raise ValueError("give either pattern (such as '2:4') or sparsity (such as 0.5)")
        return self

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n, m) of the pattern: n of m stay."""
        return tuple(map(int, self.pattern.split(":"))) if self.pattern else None


def refuse_packed(before: list[str]) -> str | None:
    """Why a mask cannot follow these backends."""
    packed = [name for name in before if name in PACKING]
    return f"pruning needs plain weights, and {packed[-1]} packs them; put the pruning first" if packed else None


def refuse_quantised(source: Path, what: str) -> None:
    """Unsupported where the model of a folder is quantised, saying that `what` needs plain weights."""
    from ..models.loading import load_config

    quantised = load_config(source).get("quantization_config")
    if quantised:
        raise needs_plain(what, quantised.get("quant_method"))


def needs_plain(what: str, method: str | None) -> Unsupported:
    """The error of `what` on a model that is quantised by `method`."""
    return Unsupported(f"{what} needs plain weights; the model is quantised ({method}): give the one it was made from")


def load_plain(source: Path, device: str, dtype: str, what: str = "pruning"):
    """A model whose block layers are all plain weights, and those layers; else Unsupported, saying that `what` needs them."""
    from ..models.arch import block_linears
    from ..models.loading import load_model

    refuse_quantised(source, what)
    model = load_model(source, device=device, dtype=dtype)
    return model, block_linears(model)


def fits(settings: PatternSettings, size: ModelSize) -> None:
    """Unsupported where a model of these sizes cannot be pruned so."""
    if size.quantised:
        raise needs_plain("pruning", size.quantised)
    check_widths({name: inputs for name, (inputs, _) in size.shapes.items()}, settings)


def inputs_of(layers: dict[str, Any]) -> dict[str, int]:
    """How many inputs each layer reads."""
    return {name: weight_out_in(module).shape[1] for name, module in layers.items()}


def check_widths(widths: dict[str, int], settings: PatternSettings) -> None:
    """Unsupported, naming the layer, where groups of m do not fill a layer's width."""
    m = settings.nm[1] if settings.nm else 1
    for name, width in widths.items():
        if width % m:
            fits = [str(n) for n in range(2, 33) if not any(w % n for w in widths.values())]
            would = f"n:m works with m of {', '.join(fits)}" if fits else "sparsity works with any width"
            raise Unsupported(
                f"{name} reads {width} inputs, which {m} does not divide, so {settings.pattern} cannot be; {would}"
            )


def stored_dtype(source: Path) -> str:
    """The number format the weights of a model folder are stored in."""
    from ..models.loading import load_config

    config = load_config(source)
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def keep_mask(score: torch.Tensor, settings: PatternSettings, per_row: bool) -> torch.Tensor:
    """True where a weight stays, for scores (out x in): the highest n of each group of m inputs, or the highest share.

    per_row: the share is of each output row (Wanda), not of the whole layer (magnitude).
    """
    import torch

    # not zeros_like: the scores may be a transposed view, and the mask is written to row by row
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if settings.nm:
        n, m = settings.nm
        if score.shape[1] % m:
            raise Unsupported(f"{m} does not divide a layer's width {score.shape[1]}, so {settings.pattern} cannot be")
        groups = score.reshape(score.shape[0], -1, m)
        top = groups.topk(n, dim=-1).indices
        return mask.view_as(groups).scatter_(-1, top, True).view_as(score)
    if per_row:
        keep = score.shape[1] - int(score.shape[1] * settings.sparsity)
        return mask.scatter_(1, score.topk(keep, dim=1).indices, True)
    keep = score.numel() - int(score.numel() * settings.sparsity)
    mask.view(-1)[score.flatten().topk(keep).indices] = True
    return mask


def weight_out_in(module) -> torch.Tensor:
    """The layer's own weight seen as (out x in); writing to it writes to the layer."""
    from transformers.pytorch_utils import Conv1D

    return module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data


class Zeros:
    """The zeros really there, counted layer by layer."""

    def __init__(self, settings: PatternSettings):
        self.settings = settings
        self.kinds: dict[str, list[int]] = {}

    def count(self, layers: dict[str, Any]) -> None:
        """Count those of pruned layers. Raises StepFailed where a group of an n:m pattern has more than n weights left."""
        for name, module in layers.items():
            weight = weight_out_in(module)
            zeros = int((weight == 0).sum())
            total = self.kinds.setdefault(name.rpartition(".")[2], [0, 0])
            total[0] += zeros
            total[1] += weight.numel()
            if self.settings.nm:
                n, m = self.settings.nm
                if int((weight.reshape(weight.shape[0], -1, m) != 0).sum(-1).max()) > n:
                    raise StepFailed(f"{name} has groups with more than {n} of {m} weights left")

    def facts(self) -> dict[str, Any]:
        """Their share, whole and by kind of layer."""
        done, every = sum(z for z, _ in self.kinds.values()), sum(t for _, t in self.kinds.values())
        by_kind = {name: round(z / t, 6) for name, (z, t) in self.kinds.items()}
        return {"sparsity": round(done / every, 6), "sparsity_by_kind": by_kind, "zeros_checked": True}


def save(model, source: Path, out: Path, note: dict[str, Any]) -> int:
    """Write the model in the number format of its source, with what was done to it (and to the source, as `before`).

    Returns bytes stored.
    """
    import torch

    from ..models.loading import load_tokenizer

    model.to(getattr(torch, stored_dtype(source)))
    model.save_pretrained(out, safe_serialization=True)
    load_tokenizer(source).save_pretrained(out)
    write_note(source, out, note)
    return sum(p.stat().st_size for p in out.glob("*.safetensors"))


def check_reload(folder: Path, wanted: torch.Tensor, device: str, dtype: str) -> None:
    """Unsupported where the saved model does not compute `wanted`, the pool's canary of the model as it was when saved."""
    from ..models.loading import load_model
    from ..models.pool import canary, differs

    model = load_model(folder, device=device, dtype=dtype)
    if differs(canary(model), wanted):
        raise Unsupported(f"{type(model).__name__} loads as another model than the one saved, so its blocks cannot be cut here")
