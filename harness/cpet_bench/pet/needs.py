"""What fields of PEFT's methods ask of each other, so that PEFT takes them together. Nothing here loads torch or PEFT."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import InputError
from .catalogue import peft_fields
from .own import OWN, plain_name

if TYPE_CHECKING:
    from ..settings import PetSettings

# These refuse layers_to_transform beside a text; the others pass over it, or use it where they write `all-linear` out.
NAMES_ALONE = ("lora", "adalora", "c3a", "deft", "delora", "fourierft", "hira", "hra", "miss", "psoft", "shadow", "unilora")
NAMES_ALONE += ("waveft",)
_PATTERNS = ("target_modules", "exclude_modules")  # a text of these is a regular expression
_COUNTED = ("cartridge", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning")  # CPT counts its token_ids


def refuse_alone(pet: PetSettings, steps: int) -> None:
    """InputError where a fresh module of `pet` cannot be made whatever the model, after `steps` steps of training.

    A module that the user has (`inherit: {from: ...}`) has its own settings, and is not asked for these.
    """
    method, fields = plain_name(pet.method), pet.fields
    if method not in peft_fields() and method not in OWN:
        return
    _targets(method, fields)
    if method in _COUNTED and fields.get("num_virtual_tokens") is None:
        raise _refused("num_virtual_tokens", f"{method} needs a number of virtual tokens: write, say, num_virtual_tokens: 20")
    if method == "adalora":
        _adalora(fields, steps)
    if method == "oft":
        _oft(fields)


def _targets(method: str, fields: dict) -> None:
    wanted = fields.get("target_modules")
    if wanted in ([], "") and not fields.get("target_parameters"):
        message = "it names no layer: name some, write all-linear, or leave it out for those usual for the model"
        raise _refused("target_modules", message)
    for key in _PATTERNS:
        text = fields.get(key)
        if isinstance(text, str) and not (key == "target_modules" and text.lower() == "all-linear"):
            try:
                re.compile(text)
            except (re.error, OverflowError, RecursionError) as error:
                message = f"a text is a regular expression of whole names here, and {text[:80]!r} is none ({error})"
                raise _refused(key, f"{message}; names of layers stand in a list") from None
    if method in NAMES_ALONE and isinstance(wanted, str) and fields.get("layers_to_transform") is not None:
        message = f"PEFT's {method} takes it beside a list of target_modules alone, not beside the text {wanted[:80]!r}"
        raise _refused("layers_to_transform", message)


def _adalora(fields: dict, steps: int) -> None:
    total, warm, last = fields.get("total_step"), fields.get("tinit", 0), fields.get("tfinal", 0)
    if total is None:
        write = f"write total_step: {steps}" if steps else "write total_step"
        raise _refused("total_step", f"AdaLoRA needs the number of steps over which it deals out its ranks: {write}")
    if warm >= total - last:
        message = f"tinit ({warm}) and tfinal ({last}) leave none of the {total} steps (total_step) to deal out ranks in"
        raise _refused("tinit" if warm >= last else "tfinal", f"{message}: together they must be less than {total}")


def _oft(fields: dict) -> None:
    known = peft_fields()["oft"]
    r, size = (fields.get(key, known[key].get("default")) for key in ("r", "oft_block_size"))
    if r and size:
        given = "" if "oft_block_size" in fields else f" ({size} where it is not given)"
        raise _refused("oft_block_size", f"OFT takes either r or oft_block_size{given}: with r: {r} write oft_block_size: 0")
    if r == 0 and size == 0:
        raise _refused("oft_block_size", "OFT takes either r or oft_block_size, and one of the two must be more than 0")


def _refused(key: str, message: str) -> InputError:
    return InputError(message, key=f"pet.{key}")
