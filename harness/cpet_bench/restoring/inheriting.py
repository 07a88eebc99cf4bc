"""D on a model that structural compression made smaller: its tensors cut by the blocks, neurons and heads that were kept.

CPET inherits the dense model's module as it is (arXiv 2307.07705, 3.1). Where whole neurons, heads or blocks went, what D says
about those goes too: the inputs of a layer that are gone from LoRA's A, its outputs from B. The result computes what D
computes on the dense model with the same groups' activations set to zero and the same blocks passed over.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StepFailed, Unsupported
from .cuts import Cut, Cuts

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

    if Path(folder, "nola.json").is_file():
        return _cut_nola(Path(folder), cuts, Path(out))
    if Path(folder, "whole.json").is_file():
        return _cut_whole(Path(folder), model, cuts, Path(out))
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
            value = _cut(tensor, cuts.layers[layer], _dims(tensor, rest), f"{config.get('peft_type')}: {name}")
            if rest in MAGNITUDE and cuts.layers[layer].inputs is not None:
                value = value * _norm_left(given, key, config, cuts.layers[layer], weights)
        elif name == "prompt_embeddings" and config.get("peft_type") in ("PREFIX_TUNING", "CARTRIDGE"):
            value, more = _cut_prefix(tensor, config, cuts)
            config |= more
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


def _dims(tensor: torch.Tensor, rest: str) -> tuple[Any, Any]:
    """The dimensions of PEFT's tensor, called `rest` below its layer, that count the layer's outputs and its inputs."""
    if rest == "ia3_l":
        return (0, None) if tensor.shape[1] == 1 else (None, 1)
    return (tensor.dim() - 1, None) if rest in MAGNITUDE else SLICES.get(rest, (REFUSED, REFUSED))


def _cut(tensor: torch.Tensor, cut: Cut, dims: tuple[Any, Any], what: str) -> torch.Tensor:
    """`tensor`, whose `dims` count its layer's outputs and inputs, without those that are gone."""
    outputs, inputs = dims
    dim, kept = (outputs, cut.outputs) if cut.outputs is not None else (inputs, cut.inputs)
    if dim is None:
        return tensor
    if dim == REFUSED:
        lost = "outputs" if cut.outputs is not None else "inputs"
        raise Unsupported(
            f"{what} cannot be cut: the layer lost {lost} in the compression, which this tensor does not have one by one; "
            "leave the layer out of target_modules, or do not inherit"
        )
    index = torch.tensor(cut.over_runs(kept, tensor.shape[dim], what))
    return tensor.index_select(dim, index)


def _cut_prefix(tensor: torch.Tensor, config: dict[str, Any], cuts: Cuts) -> tuple[torch.Tensor, dict[str, Any]]:
    """Prefix tuning's keys and values (virtual tokens x blocks 2 width) of the blocks that are left, and their number."""
    heads = [name for name, cut in cuts.layers.items() if re.search(r"attn|attention", name, re.IGNORECASE)]
    if heads or len(cuts.blocks) > 1:
        why = f"{heads[0]} lost heads" if heads else "the model has two stacks of blocks"
        raise Unsupported(f"prefix tuning's keys and values cannot be cut where {why}; do not inherit")
    kept = [i for places in cuts.blocks.values() for i in sorted(places)]
    if not kept:
        return tensor, {}
    before = config["num_layers"]
    if max(kept) >= before or tensor.shape[1] % before:
        raise StepFailed(f"its prefix is for {before} blocks, and the dense model has others: {sorted(cuts.before.values())}")
    index = torch.tensor(kept)
    return tensor.view(len(tensor), before, -1).index_select(1, index).flatten(1), {"num_layers": len(kept)}


def _cut_whole(folder: Path, model: nn.Module, cuts: Cuts, out: Path) -> dict[str, Any]:
    """Differences to weights and biases (full fine-tuning, BitFit), without the inputs and outputs that are gone."""
    from safetensors.torch import load_file, save_file
    from transformers.pytorch_utils import Conv1D

    about, given = json.loads((folder / "whole.json").read_text()), load_file(folder / "whole.safetensors")
    names = {was: here for was in given if (here := cuts.renamed(was))}
    written, count = {}, 0
    for was, here in names.items():
        value, found = given[was], cuts.layer(here)
        if found:
            layer, part = found
            conv = isinstance(model.get_submodule(layer), Conv1D)  # keeps its weight as inputs x outputs
            dims = (0, None) if part == "bias" else (1, 0) if conv else (0, 1)
            value = _cut(value, cuts.layers[layer], dims, f"{about['method']}: {was}")
        count += value.shape != given[was].shape
        written[here] = value.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(written, out / "whole.safetensors", metadata={"format": "pt"})
    about["shapes"] = {name: list(value.shape) for name, value in written.items()}
    about |= {key: [names[was] for was in about[key] if was in names] for key in ("zeros", "added")}
    (out / "whole.json").write_text(json.dumps(about, indent=1) + "\n")
    sizes = [sum(t.numel() for t in tensors.values()) for tensors in (given, written)]
    renamed = sum(was != here for was, here in names.items())
    return {"tensors": {"cut": count, "renamed": renamed, "gone": len(given) - len(written)}, "parameters": sizes}


def _cut_nola(folder: Path, cuts: Cuts, out: Path) -> dict[str, Any]:
    """NOLA's coefficients (`LAYER.alpha`, `LAYER.beta`) under the names that layers have now.

    Raises Unsupported where a layer was cut: its random bases are drawn for its width, and have other values at another.
    """
    from safetensors.torch import load_file, save_file

    saved, given = json.loads((folder / "nola.json").read_text()), load_file(folder / "nola.safetensors")
    names = {was: here for was in saved["layers"] if (here := cuts.renamed(was))}
    odd = [was for was, here in names.items() if here in cuts.layers]
    if odd:
        raise Unsupported(f"NOLA's random bases go with a layer's width, which {odd[0]} lost; leave it out of target_modules")
    written, renamed = {}, 0
    for key, tensor in given.items():
        layer, _, coefficients = key.rpartition(".")
        if layer in names:
            written[f"{names[layer]}.{coefficients}"] = tensor
            renamed += names[layer] != layer
    out.mkdir(parents=True, exist_ok=True)
    save_file(written, out / "nola.safetensors", metadata={"format": "pt"})
    saved["layers"] = {names[was]: shape for was, shape in saved["layers"].items() if was in names}
    (out / "nola.json").write_text(json.dumps(saved, indent=1) + "\n")
    sizes = [sum(t.numel() for t in tensors.values()) for tensors in (given, written)]
    return {"tensors": {"cut": 0, "renamed": renamed, "gone": len(given) - len(written)}, "parameters": sizes}


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
