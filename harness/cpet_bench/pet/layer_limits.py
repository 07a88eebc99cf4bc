"""Layers that a PET method is to be put on and a model does not have, and OFT's blocks that do not fill a layer.

Told from the files of a model alone, as ranks are (`rank_limits`). Nothing here loads torch or PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .catalogue import peft_fields, pet_methods, usual_targets
from .own import plain_name
from .rank_limits import is_target, target_names

if TYPE_CHECKING:
    from ..compression.sizes import ModelSize
    from ..settings import PetSettings

# Modules that need no tensor in a model's files: a head that shares the embeddings' table, activations, dropout.
_WITHOUT = re.compile("head|embed|shared|wte|wpe|act|drop|rotary|output")
_NORM = re.compile("norm|^ln")
_WHOLE = ("model.", "transformer.", "gpt_neox.")  # names of blocks that begin so are those that the model has
OFT_FIELDS = ("oft_block_size", "r")


def told(pet: PetSettings, size: ModelSize, *, same_names: bool, same_shapes: bool) -> None:
    """InputError where `pet` names layers or blocks that a model has not, blocks of OFT that do not fill a layer, or as many
    virtual tokens as the model reads at once.

    same_names, same_shapes: whether its compression leaves the layers their names, and their numbers of inputs.
    """
    method, fields = plain_name(pet.method), pet.fields
    # Files of some models have other names than the model that is made of them.
    usual = usual_targets("lora").get(size.model_type)
    known = isinstance(usual, list) and bool(usual) and all(any(is_target(n, [u]) for n in size.shapes) for u in usual)
    # Not of adaption_prompt, which takes the end of a name; of those without the field there is nothing to be told.
    if known and same_names and method != "adaption_prompt":
        refuse_names(fields.get("target_modules"), size)
    refuse_unusual(method, fields, size)
    refuse_indices(method, fields, size)
    count = fields.get("num_virtual_tokens")
    if isinstance(count, int) and size.positions and (why := no_room(size.positions, count)):
        raise InputError(why, key="pet.num_virtual_tokens")
    if method == "oft" and same_shapes:
        names = target_names(method, fields, size.shapes, size.model_type)
        inputs = ((name, size.shapes[name][0]) for name in names or ())
        refuse_oft(fields, inputs)


def no_room(positions: int, count: int) -> str | None:
    """Why `count` virtual tokens are too many for a model that reads `positions` tokens at once; None where they are not."""
    if positions - count >= 2:
        return None
    return f"the model reads {positions} tokens at once, and {count} virtual tokens leave no room for a document"


def refuse_names(wanted: list[str] | str | None, size: ModelSize) -> None:
    """InputError for target modules of which no module of the model has the name, as far as its files tell that."""
    if not wanted or isinstance(wanted, str) and (wanted.lower() == "all-linear" or _WITHOUT.search(wanted)):
        return
    if isinstance(wanted, str):
        whole = all(name.startswith(_WHOLE) for name in size.shapes)
        try:
            missing = [wanted] if whole and not any(re.fullmatch(wanted, name) for name in size.modules) else []
        except re.error:  # no regular expression, which is said elsewhere
            return
    else:
        ends = name_ends(size.modules)
        missing = sorted(w for w in wanted if not _WITHOUT.search(w) and _within(w) not in ends)
    if missing:
        raise not_named(missing, size.shapes)


def refuse_unusual(method: str, fields: Mapping[str, Any], size: ModelSize) -> None:
    """InputError where a method's layers have to be named: PEFT has none that are usual for models of this type."""
    if method == "osf":  # PEFT's own choice there is all of the linear ones
        return
    by_field = {"target_modules": method}
    if method == "ia3":
        by_field["feedforward_modules"] = "ia3_feedforward"
    for key, mapping in by_field.items():
        usual = usual_targets(mapping)
        takes = key in pet_methods().get(method, ()) and fields.get(key) is None and not fields.get("target_parameters")
        if not (takes and usual and size.model_type) or size.model_type in usual:
            continue
        norms = [name for name in size.modules if _NORM.search(name.rpartition(".")[2])]
        message = f"PEFT has no usual layers for {method} on models of type {size.model_type}: name some"
        raise InputError(message, key=f"pet.{key}", allowed=kinds(norms if method == "ln_tuning" else size.shapes) or None)


def kinds(layers: Iterable[str]) -> list[str]:
    """What layers of these names are called within their blocks."""
    return sorted({name.rpartition(".")[2] for name in layers})


def refuse_indices(method: str, fields: Mapping[str, Any], size: ModelSize) -> None:
    """InputError where layers_to_transform names none of the blocks that there are; PEFT passes over one among others."""
    indices, wanted = fields.get("layers_to_transform"), fields.get("target_modules")
    if wanted is None:
        wanted = usual_targets(method).get(size.model_type)
    # A whole name of a layer counts whatever its block; a text does where PEFT takes both.
    if not isinstance(wanted, list) or any(re.search(r"(^|\.)\d+\.", w) for w in wanted) or fields.get("target_parameters"):
        return
    asked = [indices] if isinstance(indices, int) else indices or []
    if fields.get("layers_pattern"):
        parts = {int(part) for name in size.modules for part in name.split(".") if part.isdigit()}
        blocks = max(parts, default=-1) + 1
    else:
        blocks = max(size.lists.values(), default=0)
    if blocks and asked and not any(0 <= i < blocks for i in asked):
        message = f"its blocks are 0 to {blocks - 1}; there is no block {', '.join(map(str, asked))} to put a module on"
        raise InputError(message, key="pet.layers_to_transform", given=asked[0])


def refuse_oft(fields: Mapping[str, Any], inputs: Iterable[tuple[str, int]]) -> None:
    """InputError where a number of OFT does not divide a layer's inputs: PEFT would take another that does, and not say so.

    A number that is PEFT's default is its own to change: that one was asked for cannot be told from a configuration.
    """
    known = peft_fields()["oft"]
    for key in OFT_FIELDS:
        n = fields.get(key)
        if not isinstance(n, int) or n < 1 or n == known[key].get("default"):
            continue
        for name, width in inputs:
            if width % n:
                fits = [i for i in range(1, width + 1) if not width % i]
                near = [max((i for i in fits if i < n), default=1), min((i for i in fits if i > n), default=width)]
                message = f"{name} has {width} inputs, which {n} does not divide, and PEFT would take another number"
                raise InputError(f"{message}: it can be {' or '.join(map(str, dict.fromkeys(near)))}.", key=f"pet.{key}")
        return


def name_ends(names: Iterable[str]) -> set[str]:
    """What target modules may be called: the names of modules from any of their parts on."""
    return {".".join(parts[i:]) for parts in (name.split(".") for name in names) for i in range(len(parts))}


def not_named(missing: list[str], layers: Iterable[str]) -> InputError:
    """That no module has the names `missing`; layers: names of those that there are."""
    message = f"No module of the model is named {', '.join(map(repr, missing))}."
    return InputError(message, key="pet.target_modules", given=missing[0], allowed=kinds(layers))


def _within(wanted: str) -> str:
    """A target's name from its last number on: what comes before may be other in files than in the model."""
    parts = wanted.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] :]) if numbers else wanted
