"""Whether another model can teach: its tokens must be the student's. Nothing here loads torch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path


def differ(one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether a token that both have is another one's id: what only one of the files lists may still be added as it is read."""
    return any(other.get(token, i) != i for token, i in one.items())


@lru_cache(maxsize=8)
def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token → id, of a model folder's tokenizer files, with the added tokens; None where they do not show it."""
    try:
        file = json.loads(Path(folder, "tokenizer.json").read_text())
        known = file["model"]["vocab"]
        found = dict(known) if isinstance(known, dict) else {token: i for i, (token, *_) in enumerate(known)}
        found |= {one["content"]: one["id"] for one in file.get("added_tokens") or ()}
        settings = Path(folder, "tokenizer_config.json")
        if settings.is_file():
            added = json.loads(settings.read_text()).get("added_tokens_decoder") or {}
            found |= {one["content"]: int(i) for i, one in added.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


def other_tokens(student: str, teacher: str) -> str:
    """What is said of two models, by their names in the matrix, whose tokens differ."""
    return (
        f"the tokenizers of {student} and of its teacher {teacher} differ, and hidden states are compared token by token: "
        f"name a model with the tokenizer of {student}, or leave `teacher` out, and it is {student} itself with its D"
    )
