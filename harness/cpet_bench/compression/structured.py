"""Structured pruning as LLM-Pruner does it (arXiv 2305.11627): MLP neurons and attention heads go whole, layer by layer.

The result is a smaller dense model. Groups are found by the layers' names and shapes (models/widths.py), and checked: the
narrowed model must compute what the model computes with the removed groups' columns set to zero. (Tracing by Torch-Pruning
1.6.1 finds the same groups, but does not end on rotary attention with grouped keys, nor know GPT-2's layers.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..errors import StepFailed, Unsupported
from ..settings import CalibrationSettings, Natural, Positive, Settings, Share
from .importance import GRADIENT
from .masks import load_plain, refuse_packed, save
from .sizes import F32, ModelSize, whole

if TYPE_CHECKING:
    from ..models.widths import Part

Progress = Callable[[int, int, str], None]


Importance = Literal["vector", "element1", "element2", "mixed", "l1", "l2", "random"]
TEXTS = CalibrationSettings(documents=10, max_tokens=64)  # the authors' ten texts


class StructuredSettings(Settings):
    """ratio: the share of the blocks' parameters that goes, reached as nearly as whole groups allow.

    parts: what may go; auto is both, or the MLP alone where a model's heads cannot go one by one.
    spare: blocks left whole at both ends of each stack; None: 4 first and 3 last of 32, scaled to the depth, at least one
    each from 6 blocks on. multiple: neurons that stay are a multiple of this, for the sake of fast products.
    calibration: the text whose loss gives the gradients. l1, l2 and random read none: what is given there changes nothing.
    """

    ratio: Share
    importance: Importance = "element1"
    group: Literal["sum", "mean", "max", "prod"] = "sum"
    parts: Literal["auto", "both", "mlp", "heads"] = "auto"
    spare: tuple[Natural, Natural] | None = None
    multiple: Positive = 8
    seed: Natural = Field(0, description="of importance random")
    calibration: CalibrationSettings = TEXTS

    @field_validator("calibration")
    @classmethod
    def _unread(cls, value: CalibrationSettings, info: ValidationInfo) -> CalibrationSettings:
        return value if info.data.get("importance") in GRADIENT else TEXTS


class Structured:
    """Neurons and heads of lowest importance of each block that is not spared; head and embeddings stay."""

    name = "structured"
    version = 1
    packages = ("torch", "transformers")
    min_tokens = 64  # one of the authors' ten texts
    narrows = True  # layers lose inputs and outputs
    tries = ({"ratio": 0.25}, {"ratio": 0.4, "parts": "mlp", "importance": "l2"})  # settings that `doctor` tries
    Settings = StructuredSettings

    @staticmethod
    def calibrated(settings: StructuredSettings) -> bool:
        return settings.importance in GRADIENT

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return settings.model_dump(mode="json", include={"ratio", "parts", "spare", "multiple"})

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        masked = [name for name in before if name in ("magnitude", "wanda", "sparsegpt")]
        if masked:
            return f"taking columns out breaks the pattern and the share of zeros that {masked[-1]} left; put structured first"
        if "moefy" in before:
            return "moefy's routers are of the neurons that it saw; put structured first"
        return refuse_packed(before)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of the whole model in float32, with gradients where the importance needs them."""
        from .importance import GRADIENT, SQUARED

        found, tokens = whole(size), settings.calibration.max_tokens
        if settings.importance in GRADIENT:
            found += F32 * size.blocks * (3 if settings.importance in SQUARED else 2)
            found += F32 * tokens * (size.depth * (10 * size.width + 4 * size.widest) + 3 * size.vocabulary)
        return found

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: StructuredSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Progress,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Prune and save. Facts: the share of the blocks' parameters that went, parameters before and after, groups left
        by kind, blocks spared, bytes. The indices kept are in cpet_compression.json, by part."""
        if settings.importance in GRADIENT and not examples:
            raise StepFailed("structured pruning needs calibration documents, and there are none")
        model, _ = load_plain(source, device, "float32")
        before = block_parameters(model)
        narrowable, spared = choose_parts(model, settings)
        kept = prune(model, narrowable, widths_for(model, narrowable, before, settings), settings, examples, progress)
        from ..models.widths import note_widths, parts

        rest = note_widths(model)
        after = block_parameters(model)
        left = {kind: sorted({p.groups for p in parts(model) if p.kind == kind}) for kind in ("mlp", "heads")}
        facts = {
            "ratio_reached": round(1 - after / before, 6),
            "block_parameters": [before, after],
            "parts": sorted({p.kind for p in narrowable}),
            "groups_left": left,
            "spared": spared,
            "uniform": not rest,
            "groups_checked": True,
        }
        given = settings.model_dump(mode="json")
        if settings.importance in GRADIENT:
            facts |= {"calibration_documents": len(examples), "calibration_tokens": sum(map(len, examples))}
        else:
            del given["calibration"]
        note = {"backend": "structured", **given, **facts, "kept": kept}
        note["groups"] = {p.label: p.groups for p in narrowable}
        return {**facts, "bytes": save(model, source, out, note), "simulated": []}


def block_parameters(model) -> int:
    """Parameters of the encoder's and decoder's blocks."""
    from ..models.arch import block_lists

    return sum(p.numel() for name in block_lists(model) for p in model.get_submodule(name).parameters())


def spared_ends(depth: int) -> tuple[int, int]:
    """Blocks left whole at the start and the end: 4 and 3 of 32, scaled and rounded, at least one from 6 blocks on."""
    least = int(depth >= 6)
    return max(least, int(depth * 4 / 32 + 0.5)), max(least, int(depth * 3 / 32 + 0.5))


def choose_parts(model, settings: StructuredSettings) -> tuple[list[Part], list[str]]:
    """The parts that may be narrowed, and the names of the blocks spared. Unsupported where there are none of a kind asked."""
    from ..models.arch import block_lists
    from ..models.blocks import linears_in
    from ..models.widths import heads_refused, parts

    spared = []
    for name in block_lists(model):
        depth = len(model.get_submodule(name))
        first, last = settings.spare if settings.spare is not None else spared_ends(depth)
        if first + last >= depth:
            raise Unsupported(f"spare [{first}, {last}] leaves none of the {depth} blocks of {name}; give smaller numbers")
        spared += [f"{name}.{i}" for i in (*range(first), *range(depth - last, depth))]
    there = [p for p in parts(model) if not any(f"{p.name}.".startswith(f"{block}.") for block in spared)]
    mlps, heads = ([p for p in there if p.kind == kind] for kind in ("mlp", "heads"))
    cls, here = type(model).__name__, linears_in(model, f"{block_lists(model)[0]}.0")
    if not mlps and settings.parts != "heads":
        raise Unsupported(
            f"{cls}: no MLP of plain linear layers known here (gate_proj, up_proj, down_proj; fc1, fc2; ...): {here}; "
            "depth drops whole blocks of any model"
        )
    unknown = "no attention of plain linear layers known here (q_proj, k_proj, v_proj, o_proj; c_attn; ...)"
    unknown = None if heads else f"{unknown}: {here}"
    refused = next(filter(None, (heads_refused(model, p) for p in heads)), unknown)
    if settings.parts in ("both", "heads") and refused:
        raise Unsupported(f"{cls}: {refused}; parts: mlp prunes the neurons alone")
    wanted = {"mlp": mlps, "heads": heads, "both": [*mlps, *heads], "auto": [*mlps, *([] if refused else heads)]}
    return wanted[settings.parts], spared


def group_size(model, part: Part) -> int:
    """Parameters (weights and biases) that one group of a part has."""
    from ..models.arch import features
    from .importance import layers_of

    count = 0
    for name, layer in layers_of(model, part).items():
        width_in, width_out = features(layer)
        if name in part.rows:
            count += len(part.outputs(name, [0])) * (width_in + (layer.bias is not None))
        else:
            count += part.columns * width_out
    return count


def widths_for(model, chosen: list[Part], total: int, settings: StructuredSettings) -> dict[str, int]:
    """Groups to keep by part (`name.kind`). Every part loses the same share; what whole heads cannot reach, the MLPs carry.

    total: parameters of all blocks. Raises Unsupported, with the nearest ratios that work, where this one does not.
    """
    sizes = {p.label: group_size(model, p) for p in chosen}
    heads, mlps = ([p for p in chosen if p.kind == kind] for kind in ("heads", "mlp"))
    target = settings.ratio * total
    share = target / sum(p.groups * sizes[p.label] for p in chosen)
    most = max((p.groups for p in heads), default=1)
    ends = []  # the least and the most that can go with each number of heads
    for level in sorted(range(most), key=lambda k: abs(k / most - share)):  # whole heads to take, the fitting number first
        keep = {p.label: max(1, p.groups - int(level / most * p.groups + 0.5)) for p in heads}
        rest = target - sum((p.groups - keep[p.label]) * sizes[p.label] for p in heads)
        room = sum((p.groups - min(settings.multiple, p.groups)) * sizes[p.label] for p in mlps)
        ends += [(target - rest) / total, (target - rest + room) / total]
        if 0 <= rest <= room if mlps else abs(level / most - share) <= 0.5 / most:
            break
    else:
        below = [f"{math.floor(1000 * e) / 1000:g}" for e in sorted(ends) if 0 < e < settings.ratio][-1:]
        above = [f"{math.ceil(1000 * e) / 1000:g}" for e in sorted(ends) if e > settings.ratio][:1]
        near = " and ".join([*below, *above])
        raise Unsupported(f"ratio {settings.ratio:g} is out of reach for these blocks and parts; the nearest that work: {near}")
    every = sum(p.groups * sizes[p.label] for p in mlps)
    for p in mlps:
        step = min(settings.multiple, p.groups)
        keep[p.label] = min(p.groups, max(step, int(p.groups * (1 - rest / every) / step + 0.5) * step))
    if all(keep[p.label] == p.groups for p in chosen):
        raise Unsupported(f"ratio {settings.ratio:g} is less than half a step (a head, or `multiple` neurons) in each block")
    return keep


def prune(model, chosen: list[Part], keep: dict[str, int], settings, examples, progress: Progress) -> dict[str, list[int]]:
    """Narrow the parts of `model` in place to the groups of highest importance. Returns their indices by part.

    Raises StepFailed where the result is not what the model computes with the same groups' columns set to zero.
    """
    import torch

    from ..models.pool import canary
    from ..models.widths import narrow
    from .importance import SQUARED, gradients, importance

    found = {}
    if settings.importance in GRADIENT:
        found = gradients(model, chosen, examples, settings.importance in SQUARED, progress)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = {}
    for part in chosen:
        score = importance(model, part, settings, found, generator)
        if not torch.isfinite(score).all():
            raise StepFailed(f"{part.name}: importance is not finite")
        name = part.label
        kept[name] = sorted(score.topk(keep[name]).indices.tolist())
    del found
    for part in chosen:
        zero_columns(model, part, kept[part.label])
    wanted = canary(model)
    for part in chosen:
        narrow(model, part, kept[part.label])
    off = float((canary(model) - wanted).abs().max())
    if not off <= 1e-3 * float(wanted.abs().max()):
        raise StepFailed(f"{type(model).__name__}: its groups are coupled in a way not known here (logits off by {off:.3g})")
    return kept


def zero_columns(model, part: Part, kept: list[int]) -> None:
    """Set to zero what the reading layer takes from all groups but `kept`."""
    import torch

    from .masks import weight_out_in

    weight = weight_out_in(getattr(model.get_submodule(part.name), part.reader))
    mask = torch.zeros(weight.shape[1], device=weight.device)
    mask[torch.tensor(part.inputs(kept), device=weight.device)] = 1
    weight.mul_(mask)
