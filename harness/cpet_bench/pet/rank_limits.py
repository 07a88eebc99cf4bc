"""Ranks above what a layer's weight can have, told from the shapes of the layers alone. Nothing here loads torch or PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .catalogue import peft_fields, usual_targets
from .own import OWN, own_settings, plain_name

if TYPE_CHECKING:
    from ..settings import PetSettings


# Methods whose rank is that of a product of an (out x r) and an (r x in) matrix, or of parts of the weight's own SVD (PSOFT):
# more than a weight's rank only adds weights. HRA's are reflections of the input and MiSS's are parts of it. SHiRA's stand for
# entries, as many as LoRA would train. Left out, since a higher rank is a choice there or is cut by PEFT itself: VeRA and its
# kin (shared random bases), LoKr (a Kronecker product), RandLoRA, OFT, DEFT, TinyLoRA, AdaMSS, PEANuT (a network's width).
_PRODUCTS = "lora adalora nola loha hira delora glora gralora lily poly psoft supertuning unilora vblora"
LIMITS: dict[str, Callable[[int, int], int]] = dict.fromkeys(_PRODUCTS.split(), min)
LIMITS |= {
    "hra": lambda n_in, _: n_in,
    "miss": lambda n_in, _: n_in,
    "shira": lambda n_in, n_out: n_in * n_out // (n_in + n_out),
}
FIELD = {"adalora": "init_r"}  # what the rank is called that a method starts with; `r` elsewhere
GATE = 16  # gates and routers have an output for each expert, and take no rank that suits the layers beside them


def refuse_ranks(method: str, ranks: Iterable[tuple[str, Any, tuple[int, int]]]) -> None:
    """InputError where a PET method's rank is more than a weight can have. The layer that can have least is named.

    ranks: by layer its name, rank and (inputs, outputs). A rank that is no number is PEFT's to refuse.
    """
    limit = LIMITS[method]
    high = [(limit(*shape), name, r, shape) for name, r, shape in ranks if isinstance(r, int) and r > limit(*shape)]
    if high:
        largest, name, r, shape = min(high, key=lambda found: found[0])
        remedy = f"give at most {largest}, or leave this layer out of target_modules"
        raise _refused(name, r, shape, remedy, f"pet.{FIELD.get(method, 'r')}")


def refuse_recovery(r: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """The same for recovery modules of rank `r` beside these layers, name → (inputs, outputs).

    Layers narrower than GATE do not count where others are wider.
    """
    wide = {name: shape for name, shape in shapes.items() if min(shape) >= GATE} or shapes
    name = min(wide, key=lambda n: min(wide[n]), default=None)
    if name is not None and r > min(wide[name]):
        raise _refused(name, r, wide[name], f"give at most {min(wide[name])}", "recover.r")


def _refused(name: str, r: int, shape: tuple[int, int], remedy: str, key: str) -> InputError:
    has = f"{name} has {shape[0]} inputs and {shape[1]} outputs"
    return InputError(f"{has}, so a rank of {r} is more than its weight can have: {remedy}.", key=key)


def told(pet: PetSettings, shapes: Mapping[str, tuple[int, int]], model_type: str) -> None:
    """`refuse_ranks` for `pet` on the layers of a model's files, as far as their names say which of them it is put on.

    Names in files may lack the beginning that they have in a model (`h.0.attn.c_attn`). What may depend on that is not told
    here: the cell says it when it runs.
    """
    method = plain_name(pet.method)
    if method not in LIMITS:
        return
    fields = own_settings(method, pet.fields).model_dump() if method in OWN else pet.fields
    rank = FIELD.get(method, "r")
    r = fields.get(rank, peft_fields().get(method, {}).get(rank, {}).get("default"))
    names = None if r is None else target_names(method, fields, shapes, model_type)
    own = {} if method == "adalora" else fields.get("rank_pattern") or {}
    try:
        ranks = [(name, _rank_of(name, r, own), shapes[name]) for name in names or ()]
    except re.error:  # no regular expression, which PEFT says
        return
    refuse_ranks(method, ranks)


def target_names(
    method: str, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], model_type: str
) -> list[str] | None:
    """Which of these layers a method with these fields is put on; None where their names in files do not tell it."""
    wanted, left = fields.get("target_modules"), fields.get("exclude_modules") or []
    if wanted is None and not fields.get("target_parameters"):
        wanted = usual_targets(method).get(model_type)
    narrower = fields.get("modules_to_save") or fields.get("layers_to_transform") not in (None, [])
    if not wanted or isinstance(left, str) or narrower:
        return None
    try:
        return [name for name in shapes if is_target(name, wanted) and not is_target(name, left)]
    except re.error:  # no regular expression, which PEFT says
        return None


def is_target(name: str, wanted: list[str] | str) -> bool:
    """Whether PEFT takes a layer of this name for one of `wanted` (or leaves it out, where those are to be left out)."""
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") or w.endswith(f".{name}") for w in wanted)


def _rank_of(name: str, r: int, own: dict[str, int]) -> int:
    """A layer's rank, or the smallest that it may have, where `own` has ranks of some layers' own."""
    for key, value in own.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return min([r, *(value for key, value in own.items() if "." in key)])
