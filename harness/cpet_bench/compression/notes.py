"""cpet_compression.json of a model folder: what was done to the model, and which blocks and neurons of its source it keeps.

A backend that makes a model smaller notes, for what was trained on its source to be cut alike (restoring/inheriting.py):
`kept_blocks`, by list of blocks the indices that stay, and `blocks`, how many there were; then `kept`, by part (its label in
models/widths.py, in the model without the blocks that went) the groups that stay, and `groups`, how many there were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTE = "cpet_compression.json"


def read_note(folder: Path) -> dict[str, Any] | None:
    """The note of a model folder, or None where there is none."""
    path = Path(folder, NOTE)
    return json.loads(path.read_text()) if path.is_file() else None


def every_note(folder: Path) -> list[dict[str, Any]]:
    """The notes of a model folder, first to last."""
    note = read_note(folder)
    return [] if note is None else [*note.pop("before", []), note]


def carry_note(source: Path, out: Path, backend: str) -> None:
    """See that the notes of what was done before are in `out` as well, where a backend wrote none, only its own, or copied."""
    earlier, note = read_note(source), read_note(out)
    if note == earlier:
        note = None
    if earlier and "before" not in (note or {}):
        write_note(source, out, note or {"backend": backend})


def write_note(source: Path, out: Path, note: dict[str, Any]) -> None:
    """Write `note` into `out`, with the notes of what was done before it, first to last, under `before`."""
    earlier = read_note(source)
    if earlier:
        note = {**note, "before": [*earlier.pop("before", []), earlier]}
    Path(out, NOTE).write_text(json.dumps(note, indent=1) + "\n")
