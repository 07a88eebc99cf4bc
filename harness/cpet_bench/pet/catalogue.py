"""Which PET methods there are and what fields each has; PEFT's are asked of it once per version in a subprocess and kept."""

from __future__ import annotations

from functools import cache

from ..devices import kept_index
from ..keys import version
from .own import BESIDE, OWN

_SCRIPT = """
import dataclasses, json
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as kinds
print(json.dumps({k.value.lower(): sorted(f.name for f in dataclasses.fields(c)) for k, c in kinds.items()}))
"""


@cache
def peft_methods() -> dict[str, list[str]]:
    """Method (PEFT's type in lower case) → names of the fields of its configuration. StopError where PEFT cannot be asked."""
    return kept_index(f"peft-{version('peft')}", _SCRIPT, "PEFT's list of methods")


def pet_methods() -> dict[str, list[str]]:
    """PEFT's methods and our own, with the names of their fields."""
    found = {name: sorted([*fields, *BESIDE.get(name, ())]) for name, fields in peft_methods().items()}
    return found | {name: sorted(cls.model_fields) for name, cls in OWN.items()}
