"""PET modules on a model: every PEFT method by its name and own fields, put in place and taken off again.

PEFT replaces layers inside the model that it is given. So the model object stays the same one: `attach` returns it, and
whatever runs it (scorer, probes, training) needs to know nothing about PEFT. The wrapper is kept beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError, StepFailed, Unsupported
from ..models.arch import block_linears
from ..settings import PetSettings
from . import own, prompts, rewriting
from .layer_limits import name_ends, not_named
from .own import OWN, plain_name

_KEPT = "_cpet_pet"  # attribute of the model that holds PEFT's wrapper and what was there before


def attach(model: nn.Module, pet: PetSettings, *, targets: dict[str, int] | None = None, seed: int = 0) -> nn.Module:
    """Put a freshly initialised PET module on `model` (in place) and return `model`; its other weights are frozen.

    Args:
        targets: LoRA rank per layer (names as `block_linears` has them), for controls that are matched in size; alpha / r
            is held equal on all of them. A method other than LoRA has plain LoRA as its control.
        seed: of the random initialisation; the global generator is left as it was.
    Raises:
        InputError: unknown method or field, a target module that matches nothing (with the nearest names), or a rank above
            the width of a layer.
        Unsupported: PEFT cannot put this method on these layers; its own message is the reason.
    """
    from .ranks import check_ranks

    _refuse_recovery(model)
    method = plain_name(pet.method)
    if method in OWN:
        if targets is None:
            return own.implementation(own.MODULES[method]).attach(model, pet, seed)
        pet = PetSettings(method="lora", r=16, lora_alpha=16)
    config = _config(model, pet, targets)
    _check_targets(model, config)
    if targets is None:  # the ranks of a control follow from its size
        check_ranks(model, config)
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(rewriting.NEEDS_DATA):
        raise Unsupported(
            f"the initialisation {init} is made from a pass over data before the module is put on, which is not made here; "
            "pissa and olora start from the weights alone"
        )
    text = pet.fields.get("init_text") if config.is_prompt_learning else None
    _inject(model, config, "default", seed, text)
    return model


def attach_saved(model: nn.Module, folder: Path, *, trainable: bool, name: str = "default") -> nn.Module:
    """Put a saved PET module on `model` (in place) and return `model`. A second one, under another name, adds up.

    PEFT passes over shapes and names that do not fit (peft issue 1746); here they are an error that names them.

    Args:
        folder: PEFT's format, `adapter_config.json` and `adapter_model.safetensors`, or that of one of our methods (`pet.own`).
        trainable: whether its weights get gradients.
    Raises:
        StepFailed: names or shapes differ from what the model takes.
        InputError: the folder holds no such adapter.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    _refuse_recovery(model)
    ours = own.saved_in(folder)
    if ours:
        return own.implementation(ours).attach_saved(model, folder, trainable=trainable)
    weights = Path(folder, "adapter_model.safetensors")
    if not weights.is_file() or not Path(folder, "adapter_config.json").is_file():
        raise InputError(f"{folder} holds no PEFT adapter (adapter_config.json and adapter_model.safetensors).")
    config = PeftConfig.from_pretrained(str(folder))
    if why := rewriting.without_its_start(folder, vars(config)):
        raise StepFailed(why)
    # What is saved of virtual tokens is what their encoder gave; from then on they are trained themselves.
    config.inference_mode = not trainable or config.is_prompt_learning
    if config.is_prompt_learning:
        prompts.prepare(model, config)
    _inject(model, config, name, 0)
    if config.is_prompt_learning:
        prompts.set_trainable(model, trainable)
    getattr(model, _KEPT)["saved"] = True
    wrapper = getattr(model, _KEPT)["wrapper"]
    if config.peft_type.value == "ADALORA" and config.rank_pattern:  # else PEFT does it, by way of the model's state_dict
        wrapper.base_model.resize_modules_by_rank_pattern(config.rank_pattern, name)
    given = load_file(weights)
    expected = _state(wrapper, name)
    problems = differences({k: tuple(v.shape) for k, v in given.items()}, {k: tuple(v.shape) for k, v in expected.items()})
    if problems:
        detach(model)
        raise StepFailed(f"The adapter does not fit this model: {problems}")
    held = {id(t) for t in _tensors(wrapper).values()}
    if all(id(t) in held for t in expected.values()):
        with torch.no_grad():
            for key, tensor in expected.items():
                tensor.copy_(given[key])
    else:  # a method whose file holds something else than its weights
        set_peft_model_state_dict(wrapper, given, adapter_name=name)
    return model


def _state(wrapper: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names PEFT saves them under.

    Never by way of the model's `state_dict()`: bitsandbytes (0.50) unpacks 4-bit weights that were packed for evaluation
    when it is called, but not their scales, and the model computes something else from then on.
    """
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapper, state_dict=_tensors(wrapper), adapter_name=name, save_embedding_layers=False)


def _tensors(wrapper: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers themselves, by their names."""
    return dict(wrapper.named_parameters(remove_duplicate=False)) | dict(wrapper.named_buffers(remove_duplicate=False))


def differences(given: dict[str, tuple], expected: dict[str, tuple], shown: int = 6) -> str:
    """What of `given` (tensor name to shape) does not fit `expected`, in words; empty where all of it fits."""

    def some(names: list[str]) -> str:
        return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")

    missing = sorted(expected.keys() - given.keys())
    extra = sorted(given.keys() - expected.keys())
    wrong = sorted(k for k in given.keys() & expected.keys() if tuple(given[k]) != tuple(expected[k]))
    parts = []
    if wrong:
        parts.append("other shapes: " + some([f"{k} is {list(given[k])}, here {list(expected[k])}" for k in wrong]))
    if missing:
        parts.append("not in the file: " + some(missing))
    if extra:
        parts.append("not in the model: " + some(extra))
    return "; ".join(parts)


def save(model: nn.Module, folder: Path, name: str = "default") -> None:
    """Write the PET module in PEFT's own format (or in ours, `pet.own`); the same weights and settings give the same bytes.

    What started from a part of the base weights (PiSSA and others) is written as plain LoRA of twice the rank, see `rewriting`.
    """
    from safetensors.torch import save_file

    for ours in own.put_on(model):
        return own.implementation(ours).save(model, folder)
    wrapper = getattr(model, _KEPT)["wrapper"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state, start = _state(wrapper, name), getattr(model, _KEPT).get("start")
    settings = prompts.portable(_plain(wrapper.peft_config[name].to_dict()))
    if start:
        state, settings = rewriting.difference(state, start), rewriting.as_saved(settings)
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in sorted(state.items())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # The base's folder on this machine means nothing elsewhere, and would make equal adapters differ.
    settings |= {"inference_mode": True, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def detach(model: nn.Module) -> nn.Module:
    """Take every PET module off `model`: its layers are the very objects that were there before, its weights the same."""
    for ours in own.put_on(model):
        own.implementation(ours).detach(model)
    prompts.detach(model)
    kept = model.__dict__.pop(_KEPT, None)
    if kept is None:
        return model
    for parent, children in kept["children"]:
        parent._modules.clear()
        parent._modules.update(children)
    for ours in own.FILES:  # put on before PEFT's, and taken off above
        model._modules.pop(f"cpet_{ours}", None)
    with torch.no_grad():
        for weight, copy in kept["weights"]:
            weight.copy_(copy)
    for weight, wanted in kept["grad"]:
        weight.requires_grad_(wanted)
        weight.grad = None
    if "peft_config" in model.__dict__:
        del model.peft_config
    return model


def _plain(value: Any) -> Any:
    """PEFT's settings as JSON; sets in a fixed order, since theirs differs from process to process."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.value if hasattr(value, "value") else value


def _refuse_recovery(model: nn.Module) -> None:
    if hasattr(model, "cpet_recovery"):
        raise ValueError("put the PET module on before the recovery modules, which sit beside the whole of a layer")


def _config(model: nn.Module, pet: PetSettings, targets: dict[str, int] | None):
    """PEFT's configuration object of `pet` for this model."""
    from dataclasses import fields

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from transformers.pytorch_utils import Conv1D

    known = {t.value.lower(): c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method, given = plain_name(pet.method), pet.fields
    if method not in known:
        raise InputError(f"There is no PET method {pet.method!r}.", key="pet.method", given=method, allowed=[*known, *OWN])
    if targets is not None:
        if method != PeftType.LORA.value.lower():
            method, given = PeftType.LORA.value.lower(), {"r": 16, "lora_alpha": 16}
        given = {**given, **_per_layer(given, targets)}
    cls = known[method]
    allowed, ours = {f.name for f in fields(cls)}, own.BESIDE.get(method, ())
    for key in given:
        if key not in allowed and key not in ours:
            raise InputError(f"{cls.__name__} has no field {key!r}.", key=f"pet.{key}", given=key, allowed=[*allowed, *ours])
    given = {key: value for key, value in given.items() if key not in ours}
    if "task_type" not in given:
        given = {**given, "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"}
    if "fan_in_fan_out" in allowed and "fan_in_fan_out" not in given:
        given = {**given, "fan_in_fan_out": any(isinstance(m, Conv1D) for m in block_linears(model).values())}
    if given.get("prompt_tuning_init") == "TEXT" and "tokenizer_name_or_path" not in given:
        given = {**given, "tokenizer_name_or_path": model.name_or_path}
    try:
        config = cls(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{cls.__name__}: {error}", key="pet") from error
    if config.is_prompt_learning:
        prompts.prepare(model, config)
    return config


def _per_layer(given: dict[str, Any], targets: dict[str, int]) -> dict[str, Any]:
    """LoRA fields that give each layer its own rank at one alpha / r (alpha / sqrt r where `use_rslora` says so)."""
    r, alpha = given.get("r", 8), given.get("lora_alpha", 8)
    ranks = list(targets.values())
    base = max(set(ranks), key=lambda k: (ranks.count(k), k))

    def scaled(rank: int) -> float:
        return alpha * (rank / r) ** (0.5 if given.get("use_rslora") else 1.0)

    other = {re.escape(name): rank for name, rank in targets.items() if rank != base}
    return {
        "target_modules": sorted(targets),
        "r": base,
        "lora_alpha": scaled(base),
        "rank_pattern": other,
        "alpha_pattern": {name: scaled(rank) for name, rank in other.items()},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _check_targets(model: nn.Module, config) -> None:
    """Every target module named must match something: PEFT only minds when none of them does."""
    wanted = getattr(config, "target_modules", None)
    if not wanted or isinstance(wanted, str) and wanted.lower() == "all-linear":
        return
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(wanted, str):
        missing = [] if any(re.fullmatch(wanted, name) for name in names) else [wanted]
    else:
        ends = name_ends(names)
        missing = sorted(t for t in wanted if t not in ends)
    if missing:
        raise not_named(missing, block_linears(model))


def _is_packed(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "PackedLinear" or weight is None or not weight.is_floating_point()


def _inject(model: nn.Module, config, name: str, seed: int, text: str | None = None) -> None:
    from peft import get_peft_model

    kept = model.__dict__.get(_KEPT)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fresh = kept is None
    if fresh:
        init = getattr(config, "init_lora_weights", None)
        rewrites = rewriting.rewrites(vars(config))
        if init == "loftq":
            raise Unsupported(
                "LoftQ quantises the base weights itself, which is what `compression:` is for here: choose nf4 there, and "
                "recovery that starts from its error (`recover: {init: svd}`, which is LoftQ's first step)"
            )
        if rewrites and any(map(_is_packed, block_linears(model).values())):  # PEFT would not always notice
            raise Unsupported(f"the initialisation {init} changes the base weights, which are packed integers here")
        if rewrites and init.lower() == "olora" and getattr(config, "fan_in_fan_out", False):
            raise Unsupported("PEFT's olora does not know layers that keep their weight as inputs x outputs (Conv1D)")
        kept = {
            "children": [(module, dict(module._modules)) for module in model.modules()],
            "grad": [(p, p.requires_grad) for p in model.parameters()],
            "weights": [(p, p.detach().clone()) for p in model.parameters()] if rewrites else [],
        }
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            if fresh:
                kept["wrapper"] = get_peft_model(model, config, adapter_name=name)
                if rewrites and model.config.tie_word_embeddings and hasattr(model.get_output_embeddings(), "base_layer"):
                    raise ValueError(f"{init} would be taken out of the embeddings, which the head shares: leave the head out")
                if rewrites:
                    kept["start"] = {k: v.detach().clone() for k, v in _state(kept["wrapper"], name).items() if "lora_" in k}
                if config.is_prompt_learning:
                    prompts.install(model, kept["wrapper"], name, text)
            elif config.is_prompt_learning:
                raise ValueError("a model takes the virtual tokens of one module at a time")
            else:
                kept["wrapper"].add_adapter(name, config)
                kept["wrapper"].base_model.set_adapter([*kept["wrapper"].active_adapters, name])
    except Exception as error:
        model.__dict__[_KEPT] = kept
        detach(model)
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "target_modules" in text or "Target modules" in text:
            raise InputError(text, key="pet.target_modules") from error
        raise Unsupported(f"PEFT's {config.peft_type.value} cannot be put on this model: {text}") from error
    model.__dict__[_KEPT] = kept
    model.train(model.training)  # what was added follows the model's own mode
