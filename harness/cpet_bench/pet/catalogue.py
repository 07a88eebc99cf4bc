"""Which PET methods there are and what fields each has; PEFT's are asked of it once per version in a subprocess and kept."""

from __future__ import annotations

from functools import cache
from typing import Any

from ..devices import kept_index
from ..keys import version
from .own import BESIDE, OWN

# What a field takes is what its annotation and its default say: `kinds` of values (`any`: it cannot be told, as of a class of
# PEFT's own), `words` where only some texts are taken, `items`: kinds of a list's elements, `default` where it is a number.
_SCRIPT = """
import dataclasses, enum, json, types, typing
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as kinds
from peft.utils import constants

NAMES = {int: "int", float: "float", bool: "bool", str: "str", dict: "dict", type(None): "none"}
NAMES |= dict.fromkeys((list, tuple, set), "list")

def look(of, found):
    origin, args = typing.get_origin(of), typing.get_args(of)
    if origin in (typing.Union, types.UnionType):
        for one in args:
            look(one, found)
    elif origin is typing.Literal:
        for one in args:
            found["words"].append(one) if isinstance(one, str) else found["kinds"].append(NAMES.get(type(one), "any"))
    elif isinstance(of, type) and issubclass(of, enum.Enum):
        found["words"] += [one.value for one in of]
    elif (origin or of) in (list, tuple, set):
        inner = {"kinds": [], "words": [], "items": []}
        for one in args:
            look(one, inner)
        found["kinds"].append("list")
        found["items"] += inner["kinds"] if args and not inner["words"] else ["any"]
    else:
        found["kinds"].append(NAMES.get(origin or of, "any"))

def fields(cls):
    try:
        hints = typing.get_type_hints(cls)
    except Exception:
        hints = {}
    for field in dataclasses.fields(cls):
        found = {"kinds": [], "words": [], "items": []}
        look(hints.get(field.name, typing.Any), found)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is not dataclasses.MISSING and not isinstance(default, enum.Enum) and default not in found["words"]:
            found["kinds"].append(NAMES.get(type(default), "any"))
        if found["words"]:  # PEFT writes `str | Enum` for the words of that
            found["kinds"] = [k for k in found["kinds"] if k != "str"]
        found = {k: sorted(set(v)) for k, v in found.items() if v}
        yield field.name, found | ({"default": default} if type(default) in (int, float) else {})

found = {"methods": {k.value.lower(): dict(fields(c)) for k, c in kinds.items()}, "targets": {}}
MAPPING = "TRANSFORMERS_MODELS_TO_{}_MODULES_MAPPING"
for name in [*found["methods"], "ia3_feedforward"]:
    word = "IA3_FEEDFORWARD" if name == "ia3_feedforward" else f"{name.upper()}_TARGET"
    usual = getattr(constants, MAPPING.format(word.replace("LN_TUNING", "LNTUNING")), {})
    found["targets"][name] = {k: v if isinstance(v, str) else sorted(v) for k, v in usual.items()}
print(json.dumps(found))
"""


@cache
def _peft() -> dict[str, Any]:
    """What _SCRIPT says. StopError where PEFT cannot be asked."""
    return kept_index(f"peft-methods-{version('peft')}", _SCRIPT, "PEFT's list of methods")


def peft_fields() -> dict[str, dict[str, dict[str, Any]]]:
    """Method (PEFT's type in lower case) → field of its configuration → what it takes: see above, and `values`."""
    return _peft()["methods"]


def usual_targets(method: str) -> dict[str, list[str] | str]:
    """By a model's type, the layers that a method is put on where the matrix names none; our own have those of LoRA.

    `ia3_feedforward`: those of IA3's layers whose inputs it scales.
    """
    return _peft()["targets"].get("lora" if method in OWN else method, {})


def pet_methods() -> dict[str, list[str]]:
    """PEFT's methods and our own, with the names of their fields."""
    found = {name: sorted([*fields, *BESIDE.get(name, ())]) for name, fields in peft_fields().items()}
    return found | {name: sorted(cls.model_fields) for name, cls in OWN.items()}
