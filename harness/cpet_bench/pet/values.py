"""What the fields of PEFT's methods take, by the index that `catalogue` keeps of its annotations. Nothing here loads torch.

Kinds are those of a matrix's values: int, float, bool, str, list, dict, none. Of `any` nothing is known and nothing is refused.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_SHOWN = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
    "none": "null",
}
_KINDS = {int: "int", float: "float", bool: "bool", str: "str", list: "list", dict: "dict", type(None): "none"}

# How many vectors there are, or steps: fewer than one is no module, whatever the method.
_COUNTS = ("r", "init_r", "target_r", "mini_r", "subspace_rank", "num_ranks", "num_virtual_tokens", "adapter_len", "total_step")
_PATTERNS = {  # fields that map layers to what another field is elsewhere
    "rank_pattern": "r",
    "alpha_pattern": "alpha",
    "lambda_pattern": "lambda",
    "n_frequency_pattern": "n_frequency",
    "block_size_pattern": "block_size",
}
_OTHER_RANKS = ("adalora", "osf")  # AdaLoRA's rank_pattern is what it found itself, OSF's has shares as well
_FACTORS = re.compile("alpha|lambda")  # PEFT says int of these, and only multiplies by them
_MORE_WORDS = {"init_lora_weights": ("lora_ga",)}  # that PEFT's annotation leaves out
_ANY_CASE = {"lora": ("gaussian", "mica", "olora"), "adalora": ("gaussian", "mica", "olora"), "hira": ("gaussian",)}
_COUNTED = re.compile(r"pissa_niter_\d+")


class Wrong(NamedTuple):
    """A value that is refused: the keys below the field where it stands, what it must be, itself, and the words it may be."""

    where: tuple[str | int, ...]
    must_be: str
    given: Any
    allowed: list[str] | None = None


def wrong(method: str, field: str, value: Any, takes: dict[str, Any]) -> Wrong | None:
    """Why PEFT's `method` cannot take `value` for its `field`; None where nothing speaks against it.

    takes: the entry of `catalogue.peft_fields` for this field.
    """
    kinds = set(takes.get("kinds", ()))
    if "int" in kinds and _FACTORS.search(field):
        kinds.add("float")
    if "any" in kinds or _is_word(method, field, value, takes):
        return None
    if "words" in takes and _kind(value, kinds) is None:
        return Wrong((), "", value, _allowed(field, kinds, takes["words"]))
    items = takes.get("items", ["any"])
    if _kind(value, kinds) is None:
        return Wrong((), _expected(kinds, items), value)
    if isinstance(value, list) and "any" not in items:
        for i, one in enumerate(value):
            if _kind(one, set(items)) is None:
                return Wrong((i,), _expected(set(items)), one)
    if isinstance(value, dict) and field in _PATTERNS and not (field == "rank_pattern" and method in _OTHER_RANKS):
        kind = {"float"} if _FACTORS.search(field) else {"int"}
        for layer, one in value.items():
            must_be = _expected(kind) if _kind(one, kind) is None else _range(method, _PATTERNS[field], one)
            if must_be:
                return Wrong((layer,), must_be, one)
    must_be = _range(method, field, value)
    return Wrong((), must_be, value) if must_be else None


def _range(method: str, field: str, value: Any) -> str | None:
    """What a number outside of the field's range must be; None for one inside, and for what is no number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    if field in _COUNTS:
        least = 0 if method == "oft" and field == "r" else 1  # OFT has either r or oft_block_size, and 0 for the other
        return f"at least {least}" if value < least else None
    if "dropout" in field and not 0 <= value <= 1:
        return "at least 0 and at most 1"
    return None


def _kind(value: Any, kinds: set[str]) -> str | None:
    """Which of `kinds` a value is, None where it is none of them; a whole number is a number, true and false are not."""
    kind = _KINDS.get(type(value))
    return "float" if kind == "int" and "float" in kinds else kind if kind in kinds else None


def _is_word(method: str, field: str, value: Any, takes: dict[str, Any]) -> bool:
    if not isinstance(value, str) or "words" not in takes:
        return False
    if field == "init_lora_weights" and _COUNTED.fullmatch(value):
        return True
    return value in (*takes["words"], *_MORE_WORDS.get(field, ())) or value.lower() in _ANY_CASE.get(method, ())


def _expected(kinds: set[str], items: list[str] | None = None) -> str:
    """`a whole number`, `a text, a list (each a text) or null`."""
    each = f" (each {_expected(set(items))})" if items and "any" not in items else ""
    found = [text + (each if kind == "list" else "") for kind, text in _SHOWN.items() if kind in kinds]
    if "float" in kinds and "int" in kinds:
        found.remove(_SHOWN["int"])
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def _allowed(field: str, kinds: set[str], words: list[str]) -> list[str]:
    """The words, and what else may stand there, as the message lists them."""
    found = [word.replace("[number of iters]", "N") for word in words] + list(_MORE_WORDS.get(field, ()))
    found += ["true", "false"] if "bool" in kinds else []
    return found + [_SHOWN[kind] for kind in _SHOWN if kind in kinds and kind != "bool"]
