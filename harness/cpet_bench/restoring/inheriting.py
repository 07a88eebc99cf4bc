"""D on a model that structural compression made smaller: its tensors cut by the blocks, neurons and heads that were kept.

CPET inherits the dense model's module as it is (arXiv 2307.07705, 3.1). Where whole neurons, heads or blocks went, what D says
about those goes too: the inputs of a layer that are gone from LoRA's A, its outputs from B. The result computes what D
computes on the dense model with the same groups' activations set to zero and the same blocks passed over.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compression.notes import every_note
from ..errors import StepFailed, Unsupported

PREFIX = "base_model.model."
REFUSED = "refused"
# By what a tensor is called below its layer: the dimension that counts the layer's outputs, and the one for its inputs. None:
# it has no such dimension, and stays right without those that are gone.
SLICES: dict[str, tuple[Any, Any]] = {
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_B.bias": (0, None),
    "lora_A": (None, 1),  # AdaLoRA's
    "lora_B": (0, None),
    "lora_E": (None, None),
    "ranknum": (None, None),
    "hada_w1_a": (0, None),  # LoHa: the product of two products, outputs x inputs each
    "hada_w1_b": (None, 1),
    "hada_w2_a": (0, None),
    "hada_w2_b": (None, 1),
    "oft_R.weight": (None, REFUSED),  # rotates inputs
    "oft_R.rows": (None, REFUSED),
    "oft_R.cols": (None, REFUSED),
    "bias": (0, None),
    "base_layer.bias": (0, None),
}
MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


@dataclass(frozen=True)
class Cut:
    """What is left of a layer's outputs and inputs, as places in the dense layer (None: all).

    runs: how many like runs the outputs are made of (3 where one layer makes q, k and v), each cut alike; outputs, of:
    places in one run and its length, or of inputs; `of` is None where the compression did not note it.
    """

    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None
    runs: int = 1
    of: int | None = None


@dataclass
class Cuts:
    """blocks: by list of blocks, dense index → index here; before: how many the dense model has, where it was noted.
    layers: by their names here, those that lost inputs or outputs."""

    blocks: dict[str, dict[int, int]] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    layers: dict[str, Cut] = field(default_factory=dict)

    @property
    def renames(self) -> bool:
        """Whether some block is gone."""
        return bool(self.blocks)

    def renamed(self, name: str) -> str | None:
        """The name here of a module or tensor of the dense model; None where its block is gone."""
        for blocks, places in self.blocks.items():
            if name.startswith(f"{blocks}."):
                number, _, rest = name[len(blocks) + 1 :].partition(".")
                if blocks in self.before and int(number) >= self.before[blocks]:
                    raise StepFailed(f"it has {name}, and the dense model {self.before[blocks]} blocks in {blocks}")
                return f"{blocks}.{places[int(number)]}.{rest}" if int(number) in places else None
        return name

    def layer(self, name: str) -> tuple[str, str] | None:
        """The layer that a tensor of this name belongs to, and the rest of its name; None where that layer is whole."""
        parts = name.split(".")
        for i in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:i]) in self.layers:
                return ".".join(parts[:i]), ".".join(parts[i:])
        return None


def read_cuts(model: nn.Module, folder: Path, steps: int) -> Cuts | None:
    """What the last `steps` compressions took out of `model`, the model of `folder`; None where all of it is still there.

    Raises StepFailed where the notes of the folder do not describe this model.
    """
    from ..models.arch import block_lists
    from ..models.widths import parts

    did: list[tuple[str, dict, dict]] = []  # what each did: blocks first, then groups within those left
    for note in every_note(folder)[-steps:] if steps else []:
        if note.get("kept_blocks"):
            did.append(("blocks", note["kept_blocks"], note.get("blocks", {})))
        if note.get("kept"):
            did.append(("groups", note["kept"], note.get("groups", {})))
    if not did:
        return None
    cuts = Cuts()
    for blocks in block_lists(model) if any(kind == "blocks" for kind, *_ in did) else []:
        places = list(range(len(model.get_submodule(blocks))))
        for kind, kept, before in reversed(did):
            if kind == "blocks" and blocks in kept:
                places = _earlier(places, kept[blocks], blocks)
                cuts.before |= {blocks: before[blocks]} if blocks in before else {}
        cuts.blocks[blocks] = {dense: here for here, dense in enumerate(places)}
    seen = set()
    for part in parts(model, plain=False):
        label, groups, of, touched = part.label, list(range(part.groups)), None, False
        for number, (kind, kept, before) in reversed(list(enumerate(did))):
            if kind == "blocks":
                label = _name_before(label, kept)
            elif label in kept:
                groups, of, touched = _earlier(groups, kept[label], label), before.get(label), True
                seen.add((number, label))
        if touched and of != part.groups:
            for layer, (starts, run) in part.rows.items():
                kept = tuple(g * run + i for g in groups for i in range(run))
                cuts.layers[f"{part.name}.{layer}"] = Cut(kept, None, len(starts), of and of * run)
            cuts.layers[f"{part.name}.{part.reader}"] = Cut(None, tuple(part.inputs(groups)), 1, of and of * part.columns)
    for number, (kind, kept, _) in enumerate(did):
        later = [k for other, k, _ in did[number + 1 :] if other == "blocks"]
        odd = [label for label in kept if kind == "groups" and (number, label) not in seen and not _gone(label, later)]
        if odd:
            raise StepFailed(f"the compression notes what it kept of {odd[0]}, which the compressed model does not have")
    return cuts


def _earlier(places: list[int], kept: list[int], what: str) -> list[int]:
    """Where `places` in what was kept were before."""
    if len(places) > len(kept):
        raise StepFailed(f"the compression notes {len(kept)} groups kept of {what}, and the model has more")
    return [kept[i] for i in places]


def _name_before(name: str, kept: dict[str, list[int]]) -> str:
    for blocks, indices in kept.items():
        if name.startswith(f"{blocks}."):
            number, _, rest = name[len(blocks) + 1 :].partition(".")
            return f"{blocks}.{indices[int(number)]}.{rest}"
    return name


def _gone(label: str, later: list[dict[str, list[int]]]) -> bool:
    """Whether one of the cuts of blocks that came later took the block of a part."""
    for kept in later:
        for blocks, indices in kept.items():
            if label.startswith(f"{blocks}."):
                number, _, rest = label[len(blocks) + 1 :].partition(".")
                if int(number) not in indices:
                    return True
                label = f"{blocks}.{indices.index(int(number))}.{rest}"
                break
    return False


def fits(model: nn.Module, folder: Path) -> bool:
    """Whether the adapter of `folder` has the names and shapes that `model` takes."""
    from ..pet import methods

    try:
        methods.attach_saved(model, folder, trainable=False)
    except StepFailed:
        return False
    methods.detach(model)
    return True


def start_of(folder: Path, model: nn.Module, cuts: Cuts, out: Path, dense: Path | None, *, own: bool) -> tuple[Path, dict]:
    """The folder of the adapter that `model` inherits, and facts of what was cut (`cut_adapter`; empty where it fits as it is).

    own: the user's adapter, not the plan's D: one that was trained on this compressed model, and fits it as it is, is taken
        so where cutting it as the dense model's does not give what fits.
    """
    try:
        facts = cut_adapter(folder, model, cuts, out, dense)
    except StepFailed as error:
        if own and fits(model, folder):
            return folder, {}
        raise StepFailed(f"The adapter was not trained on the dense model that was compressed: {error}") from error
    if own and not fits(model, out) and fits(model, folder):
        return folder, {}
    return out, facts


def cut_adapter(folder: Path, model: nn.Module, cuts: Cuts, out: Path, dense: Path | None = None) -> dict[str, Any]:
    """Write to `out` the adapter of `folder`, trained on the dense model, as it fits `model`, which lost what `cuts` say.

    Args:
        dense: folder of the dense model. DoRA needs its weights where layers lose inputs: what it normalises by then is
            smaller, and its magnitude is scaled as much, so that the outputs stay what they were.
    Returns: facts: tensors (cut, renamed, gone), parameters (before, after).
    Raises:
        StepFailed: the adapter was trained on a model of other widths or depth; its tensor is named.
        Unsupported: a tensor that cannot be cut by inputs or outputs, such as LoKr's factors.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads(Path(folder, "adapter_config.json").read_text())
    given = load_file(Path(folder, "adapter_model.safetensors"))
    written: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}  # of tensors, as they were → as they are
    counts, weights = {"cut": 0, "renamed": 0, "gone": 0}, Dense(dense)
    for key, tensor in given.items():
        name = key.removeprefix(PREFIX)
        here = cuts.renamed(name) if key.startswith(PREFIX) else name
        if here is None:
            counts["gone"] += 1
            continue
        found, value = cuts.layer(here), tensor
        if found:
            layer, rest = found
            value = _cut(tensor, cuts.layers[layer], rest, f"{config.get('peft_type')}: {name}")
            if rest in MAGNITUDE and cuts.layers[layer].inputs is not None:
                value = value * _norm_left(given, key, config, cuts.layers[layer], weights)
        counts["cut"] += value.shape != tensor.shape
        counts["renamed"] += here != name
        names[name] = here
        written[key.removesuffix(name) + here] = value.contiguous()
    if cuts.renames:
        config |= _renamed_config(config, model, cuts, names, written)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(written, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    sizes = [sum(t.numel() for t in tensors.values()) for tensors in (given, written)]
    return {"tensors": counts, "parameters": sizes}


def _cut(tensor: torch.Tensor, cut: Cut, rest: str, what: str) -> torch.Tensor:
    """`tensor`, called `rest` below its layer, without the layer's inputs and outputs that are gone."""
    if rest == "ia3_l":
        outputs, inputs = (0, None) if tensor.shape[1] == 1 else (None, 1)
    elif rest in MAGNITUDE:
        outputs, inputs = tensor.dim() - 1, None
    else:
        outputs, inputs = SLICES.get(rest, (REFUSED, REFUSED))
    dim, kept = (outputs, cut.outputs) if cut.outputs is not None else (inputs, cut.inputs)
    if dim is None:
        return tensor
    if dim == REFUSED:
        lost = "outputs" if cut.outputs is not None else "inputs"
        raise Unsupported(
            f"{what} cannot be cut: the layer lost {lost} in the compression, which this tensor does not have one by one; "
            "leave the layer out of target_modules, or do not inherit"
        )
    if tensor.shape[dim] % cut.runs:
        raise StepFailed(f"{what} has {tensor.shape[dim]} entries, which are no {cut.runs} like runs")
    length = tensor.shape[dim] // cut.runs
    if length != (cut.of or length) or max(kept) >= length:
        wanted = f"{cut.of * cut.runs}" if cut.of else f"more than {max(kept) * cut.runs}"
        raise StepFailed(f"{what} has {tensor.shape[dim]} entries where the dense model has {wanted}")
    index = torch.tensor([run * length + i for run in range(cut.runs) for i in kept])
    return tensor.index_select(dim, index)


class Dense:
    """Weights of the dense model's layers, (outputs x inputs, fp32); the model is loaded when the first is asked for."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    @cached_property
    def model(self) -> nn.Module:
        from ..models.loading import load_model

        return load_model(self.folder)

    def weight(self, layer: str) -> torch.Tensor:
        from ..models.arch import dense_weight

        if self.folder is None:
            raise Unsupported(
                f"{layer} lost inputs, and DoRA's needs the dense weights then: say use_dora: true in the PET settings"
            )
        return dense_weight(self.model.get_submodule(layer)).cpu()


def _norm_left(given: dict, key: str, config: dict, cut: Cut, dense: Dense) -> torch.Tensor:
    """By output of a DoRA layer, the norm of W + s B A over the inputs that are left, as a share of that over all of them."""
    whole = key[: key.index("lora_magnitude_vector")]
    layer = whole.removeprefix(PREFIX).removesuffix(".")
    a, b = (given[f"{whole}lora_{x}.weight"].float() for x in "AB")
    alpha = _pattern(config, "alpha_pattern", layer, config["lora_alpha"])
    scale = alpha / (a.shape[0] ** (0.5 if config.get("use_rslora") else 1.0))
    weight = dense.weight(layer) + scale * (b @ a)
    return (weight[:, list(cut.inputs)].norm(dim=1) / weight.norm(dim=1).clamp_min(1e-12)).to(given[key].dtype)


def _pattern(config: dict[str, Any], which: str, layer: str, default: Any) -> Any:
    """What a PEFT config's pattern (regular expression of layers → value) says for a layer."""
    from peft.utils.other import get_pattern_key

    pattern = config.get(which) or {}
    return pattern.get(get_pattern_key(pattern.keys(), layer), default)


def _renamed_config(config: dict[str, Any], model: nn.Module, cuts: Cuts, names: dict[str, str], written: dict) -> dict:
    """Fields of an adapter's config that name layers by their blocks, with the names they have now.

    names: of the adapter's tensors in the dense model → here. Raises Unsupported for fields whose meaning goes with all blocks.
    """
    odd = [k for k in ("layer_replication", "target_parameters") if config.get(k)]
    odd += [k for k in ("modules_to_save",) if any(map(_numbered, config.get(k) or []))]
    if odd:
        raise Unsupported(f"an adapter with {odd[0]} cannot be inherited by a model that lost blocks")
    modules = dict(model.named_modules())
    layers: dict[str, str] = {}  # those with tensors of the adapter: as they are called here → in the dense model
    for was, here in names.items():
        parts = here.split(".")
        layer = next((x for i in range(len(parts) - 1, 0, -1) if (x := ".".join(parts[:i])) in modules), None)
        if layer:
            layers[layer] = was.removesuffix(here[len(layer) :])
    changed: dict[str, Any] = {}
    for which in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(which)
        if not pattern:
            continue
        if any(isinstance(v, list) for v in pattern.values()):  # AdaLoRA: ranks in use, by tensor
            moved = {k: cuts.renamed(k.removeprefix(PREFIX)) for k in pattern}
            changed[which] = {here: pattern[k] for k, here in moved.items() if here}
        else:
            found = {here: _pattern(config, which, was, None) for here, was in layers.items()}
            changed[which] = {re.escape(here): value for here, value in found.items() if value is not None}
    chosen = [config.get(k) for k in ("target_modules", "exclude_modules", "feedforward_modules")]
    entries = [e for given in chosen for e in (given if isinstance(given, list) else [])]
    if config.get("layers_to_transform") is not None or any(map(_numbered, entries)) or any(isinstance(c, str) for c in chosen):
        own = {k for k in config if k in ("exclude_modules", "layers_to_transform", "layers_pattern")}
        changed |= {"target_modules": sorted(layers), **dict.fromkeys(own)}
        if config.get("feedforward_modules"):
            wide = [here for here in layers if (v := written.get(f"{PREFIX}{here}.ia3_l")) is not None and v.shape[0] == 1]
            changed["feedforward_modules"] = sorted(wide)
    return changed


def _numbered(name: str) -> bool:
    """Whether a name of modules says which block."""
    return any(part.isdigit() for part in name.split("."))
