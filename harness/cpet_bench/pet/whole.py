"""Full fine-tuning and BitFit (arXiv 2106.10199), the references: differences to a model's weights, or to its biases alone.

What is trained is D, in fp32 and zero at the start, beside weights W that stay as they are: the model computes with W + D,
rounded once to W's format, so that no step is too small for bf16; D alone is saved, and taking it off leaves the very weights
that were there. (So weight decay pulls towards the model that training started from, not towards zero.)

full: every floating-point weight in the blocks (linear layers, norms, their biases) and the norms after them; embeddings and
the head stay, which compression leaves alone too. While a module runs, hooks put W + D in the place of W. Where nothing is
trained, W + D lies there all the time, and costs what W costs. bitfit: the biases of linear layers and norms, added to what
the layer gives, and so beside layers of any class.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StepFailed, Unsupported
from ..models.arch import _ADAPTER_PARTS, block_lists, features, is_linear
from ..restoring.recover import _device, _key, _name, linears
from ..settings import PetSettings
from .methods import differences
from .own import FILES as ALL_FILES
from .own import own_settings, plain_name

_KEPT = "_cpet_whole"  # attribute of the model: hooks, parameters that were replaced, what was put on
FILES = ALL_FILES["whole"]
PRUNED = 0.01  # the share of exact zeros from which on a linear layer is taken for a pruned one
Places = dict[str, tuple[nn.Module, tuple[int, ...]]]  # by name of a weight: the module it is (or acts) in, its shape


def attach(model: nn.Module, pet: PetSettings, seed: int = 0) -> nn.Module:
    """Put differences of zero on `model` (in place) and return it; its own weights are frozen. Nothing is drawn at random.

    Raises: InputError for a field; Unsupported where weights are packed (full) or there are no biases (bitfit).
    """
    method = plain_name(pet.method)
    settings = own_settings(method, pet.fields).model_dump(mode="json")
    places = _places(model, method, settings)
    _install(model, places, {n: torch.zeros(shape) for n, (_, shape) in places.items()}, method, settings, trainable=True)
    return model


def attach_saved(model: nn.Module, folder: Path, *, trainable: bool) -> nn.Module:
    """Put saved differences on `model` and return it; several folders add up.

    Zeros of a pruned model stay zero, whatever the file has for them.

    Raises: StepFailed where names or shapes differ from what the model has; Unsupported as `attach`.
    """
    from safetensors.torch import load_file

    about, given = json.loads(Path(folder, FILES[0]).read_text()), load_file(Path(folder, FILES[1]))
    method, settings = about["method"], about["settings"]
    places = _places(model, method, settings)
    problems = differences({n: tuple(d.shape) for n, d in given.items()}, {n: shape for n, (_, shape) in places.items()})
    if problems:
        raise StepFailed(f"What {method} trained does not fit this model: {problems}")
    _install(model, places, given, method, settings, trainable)
    return model


def save(model: nn.Module, folder: Path) -> None:
    """Write whole.safetensors (differences by the weights' names, fp32) and whole.json (method, settings, shapes).

    whole.json also says which weights kept their zeros (`zeros`; differences are zero there), and which biases the model
    does not have itself (`added`).
    """
    from safetensors.torch import save_file

    folder, kept = Path(folder), model.__dict__[_KEPT]
    folder.mkdir(parents=True, exist_ok=True)
    found = {f"{_name(key)}.{part}": d for key, parts in model.cpet_whole["0"].items() for part, d in parts.items()}
    found = {name: d.detach().to("cpu", torch.float32, copy=True).contiguous() for name, d in sorted(found.items())}
    save_file(found, folder / FILES[1], metadata={"format": "pt"})
    text = {
        "schema": 1,
        **kept["about"],
        "shapes": {name: list(d.shape) for name, d in found.items()},
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    }
    (folder / FILES[0]).write_text(json.dumps(text, indent=1) + "\n")


def merge(model: nn.Module, folder: Path) -> None:
    """Add what is saved to the weights of `model`, all of which it must have (`added` in whole.json is empty)."""
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, d in load_file(Path(folder, FILES[1])).items():
            weight = model.get_parameter(name)
            weight.copy_(weight + d.to(weight.device))


def cannot_merge(folder: Path) -> str | None:
    """Why what is saved cannot be merged into a model's weights; None where it can."""
    added = json.loads(Path(folder, FILES[0]).read_text())["added"]
    if not added:
        return None
    return f"{len(added)} layers got a bias that the model's class has not, {added[0].rpartition('.')[0]} the first"


def costs(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By layer (as named in the model) the numbers beside it that a token is multiplied with, none, and those trained."""
    sets = model.cpet_whole.values()
    return {_name(key): (0, sum(d.numel() for d in m.values() if d.requires_grad)) for s in sets for key, m in s.items()}


def detach(model: nn.Module) -> None:
    """Take the differences off: the parameters are the objects that were there before, and never changed."""
    kept = model.__dict__.pop(_KEPT, None)
    if kept is None:
        return
    for hook in kept["hooks"]:
        hook.remove()
    for module, part, parameter in reversed(kept["replaced"]):
        module._parameters[part] = parameter
    del model.cpet_whole
    for weight, wanted in kept["grad"]:
        weight.requires_grad_(wanted)
        weight.grad = None


# -- which weights -----------------------------------------------------------------------------------------------------
def _places(model: nn.Module, method: str, settings: dict[str, Any]) -> Places:
    return _weights(model) if method == "full" else _biases(model, settings["where"])


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules in the blocks, and the norms after them, by the names they have in the bare model; no embeddings."""
    blocks = tuple(f"{name}." for name in block_lists(model))
    for name, module in model.named_modules():
        adapter = any(part.startswith(_ADAPTER_PARTS) for part in name.split("."))
        if adapter or isinstance(module, nn.Embedding):
            continue
        if name.startswith(blocks) or (_is_norm(module) and "emb" not in name):
            yield name.replace(".base_layer", ""), module


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _weights(model: nn.Module) -> Places:
    found: Places = {}
    for name, module in _modules(model):
        if is_linear(module):
            _refuse_packed(name, module)
        for part, weight in module._parameters.items():
            if weight is not None and weight.is_floating_point():
                found[f"{name}.{part}"] = (module, tuple(weight.shape))
    return found


def _refuse_packed(name: str, module: nn.Module) -> None:
    weight, (n_in, n_out) = module._parameters.get("weight"), features(module)
    plain = weight is not None and weight.is_floating_point() and weight.numel() == n_in * n_out
    if not plain or hasattr(weight, "quant_state"):
        raise Unsupported(
            f"full fine-tuning needs plain weights, and those of {name} are packed ({type(module).__name__}): lora, nola, or "
            "bitfit with where: all can be trained beside them"
        )


def _biases(model: nn.Module, where: str) -> Places:
    found: Places = {}
    for name, module in linears(model).items():
        if where == "all" or _bias(module) is not None:
            found[f"{name}.bias"] = (module, (features(module)[1],))
    for name, module in _modules(model):
        if _is_norm(module) and _bias(module) is not None:
            found[f"{name}.bias"] = (module, tuple(_bias(module).shape))
    if not found:
        raise Unsupported(
            f"the blocks of {type(model).__name__} have no biases for bitfit to train; where: all adds one, starting from "
            "zero, to each of their linear layers"
        )
    return found


def _bias(module: nn.Module) -> torch.Tensor | None:
    return getattr(getattr(module, "base_layer", module), "bias", None)


# -- putting them on ---------------------------------------------------------------------------------------------------
def _install(model: nn.Module, places: Places, given: dict, method: str, settings: dict, trainable: bool) -> None:
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        kept = model.__dict__[_KEPT] = {"hooks": [], "replaced": [], "grad": [(p, p.requires_grad) for p in model.parameters()]}
        added = [n for n, (m, _) in places.items() if method == "bitfit" and _bias(m) is None]
        kept["about"] = {"method": method, "settings": settings, "zeros": [], "added": added}
        model.requires_grad_(False)
        model.cpet_whole = nn.ModuleDict()
    beside = nn.ModuleDict()
    owners: dict[str, tuple[nn.Module, dict[str, torch.Tensor]]] = {}
    for name, (module, _) in places.items():
        owner, _, part = name.rpartition(".")
        owners.setdefault(owner, (module, {}))[1][part] = given[name].to(_device(module), torch.float32)
    for owner, (module, parts) in owners.items():
        if method == "full":
            zeros = {p for p in parts if settings["zeros"] == "keep" and _is_pruned(module, p)}
            kept["about"]["zeros"] += sorted(f"{owner}.{p}" for p in zeros)
            for p in zeros:  # D of a dense model has differences there
                parts[p] = parts[p].masked_fill(module._parameters[p] == 0, 0)
            if not trainable:
                _settle(module, parts, zeros, kept["replaced"])
                continue
        held = nn.ParameterDict({p: nn.Parameter(d, requires_grad=trainable) for p, d in parts.items()})
        beside[_key(owner)] = held
        kept["hooks"] += (
            _in_its_place(module, held, zeros) if method == "full" else [module.register_forward_hook(_adding(held))]
        )
    model.cpet_whole[str(len(model.cpet_whole))] = beside


def _is_pruned(module: nn.Module, part: str) -> bool:
    weight = module._parameters[part]
    if part != "weight" or not is_linear(module):
        return False
    return weight.numel() - int(torch.count_nonzero(weight)) >= PRUNED * weight.numel()


def _sum(weight: torch.Tensor, difference: torch.Tensor, keep_zeros: bool) -> torch.Tensor:
    """W + D in W's format; where W is zero, zero and no gradient if `keep_zeros`."""
    total = (weight + difference).to(weight.dtype)
    return total.masked_fill(weight == 0, 0) if keep_zeros else total


def _settle(module: nn.Module, parts: dict[str, torch.Tensor], zeros: set[str], replaced: list) -> None:
    for part, d in parts.items():
        weight = module._parameters[part]
        replaced.append((module, part, weight))
        with torch.no_grad():
            module._parameters[part] = nn.Parameter(_sum(weight, d, part in zeros), requires_grad=False)


def _in_its_place(module: nn.Module, parts: nn.ParameterDict, zeros: set[str]) -> list:
    """Hooks: W + D is the module's parameter while it runs, whatever else reads the model sees W. Also after an error."""
    own = {part: module._parameters[part] for part in parts}

    def before(module, args):
        for part, d in parts.items():
            module._parameters[part] = _sum(module._parameters[part], d, part in zeros)

    def after(module, args, output):
        module._parameters.update(own)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]


def _adding(parts: nn.ParameterDict):
    def hook(module, args, output):
        return output + parts["bias"].to(output.dtype)

    return hook
