"""Whether an adapter that the user has is the PET method that the matrix says: what is written is what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError, StepFailed
from ..settings import PetSettings
from . import own
from .own import plain_name
from .rewriting import as_saved, without_its_start

# Fields that say how a fresh module starts, or what a base was called; an adapter that is loaded has started already.
_OF_THE_START = ("init", "task_type", "inference_mode", "base_model", "revision", "total_step", "seed")
_OF_THE_START += ("prompt_tuning_init", "tokenizer")


def differs(folder: Path, pet: PetSettings) -> str:
    """What of `pet` the adapter in `folder` is not, in words; empty where they agree as far as its settings say.

    Layers are compared where there is a model, see `check_given`. Raises InputError where the folder holds no adapter, or
    factors without the start that they were taken out of the base with.
    """
    ours = own.saved_in(folder)
    file = own.FILES[ours][0] if ours else "adapter_config.json"
    try:
        config = json.loads(Path(folder, file).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no PET adapter: {file} cannot be read") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder} holds no PET adapter: {file} is no mapping")
    if isinstance(config.get("settings"), dict):
        config |= config["settings"]  # where our own methods keep theirs
    method = plain_name(str(config.get("method", ours) if ours else config.get("peft_type")))
    wanted = plain_name(pet.method)
    if method != wanted:
        return f"it is {method}, and `pet` says {wanted}"
    if why := without_its_start(folder, config):
        raise InputError(why)
    fields = pet.fields if ours else as_saved(pet.fields)
    odd = [
        f"{key} is {_shown(config[key])}, and `pet` says {_shown(value)}"
        for key, value in fields.items()
        if key in config and key != "target_modules" and not _of_the_start(key) and not _same(config[key], value)
    ]
    return "; ".join(odd)


def check_local(source: str, base: Path, pet: PetSettings) -> None:
    """InputError where the adapter that `inherit: {from: local:FOLDER}` names is another than `pet`; base: FOLDER's start."""
    scheme, _, name = source.partition(":")
    found = differs(base / name, pet) if scheme == "local" else ""
    if found:
        raise InputError(f"{source} is not the module that is trained here: {found}. Write `pet` as the adapter is")


def check_given(folder: Path, pet: PetSettings, model: Any) -> None:
    """StepFailed where the adapter in `folder` is another method than `pet`, has other settings, or sits on other layers.

    model: the one it will be put on; its layers have the names that the adapter's have, but for blocks that were cut.
    """
    from safetensors import safe_open

    from ..models.arch import block_linears
    from . import methods
    from .layer_limits import kinds

    found = differs(folder, pet)
    if not found and not own.saved_in(folder) and pet.fields.get("target_modules"):
        every = set(kinds(block_linears(model)))
        with safe_open(Path(folder, "adapter_model.safetensors"), "pt") as file:
            held = every & {part for name in file.keys() for part in name.split(".")}
        fresh = methods.attach(model, pet)
        trained = [name for name, p in fresh.named_parameters() if p.requires_grad]
        methods.detach(fresh)
        wanted = every & {part for name in trained for part in name.split(".")}
        if held != wanted:
            both = [", ".join(sorted(names)) or "none of the linear layers" for names in (held, wanted)]
            found = f"it is on {both[0]}, and `pet` says {both[1]}"
    if found:
        raise StepFailed(found)


def _of_the_start(key: str) -> bool:
    return key.startswith(_OF_THE_START) and key != "init_r"  # AdaLoRA's rank


def _same(one: Any, other: Any) -> bool:
    if one in (None, [], {}) and other in (None, [], {}):
        return True
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return sorted(map(str, one)) == sorted(map(str, other))
    return one == other


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
