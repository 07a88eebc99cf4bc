"""Problems that pydantic finds, in the words of a matrix: no class names, regular expressions or Python types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic.fields import FieldInfo

from .settings_base import is_switched

_KINDS = {"model_type": "a mapping", "dict_type": "a mapping", "tuple_type": "a list", "list_type": "a list"}
_COUNTS = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}


def sentence(problem: Mapping[str, Any], field: FieldInfo | None, shown: str) -> str | None:
    """What is wrong, where pydantic's own sentence does not serve; None where it does.

    field: the setting it is about, where there is one. shown: the value that stands there, as messages show it.
    """
    sort, given = problem["type"], problem["input"]
    if sort in _COUNTS:
        bound, name = _COUNTS[sort]
        n = problem["ctx"][name]
        return f"it should have {bound} {n} item{'' if n == 1 else 's'}, not {len(given)}"
    if sort in _KINDS:
        also = "true, false or " if field is not None and is_switched(field) else ""
        return f"it must be {also}{_KINDS[sort]}, not {shown}"
    if sort == "string_pattern_mismatch" and field is not None and field.description:
        return f"it must be {field.description}, not {shown}"
    return None
