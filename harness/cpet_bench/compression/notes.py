"""cpet_compression.json of a model folder: what was done to the model, and which blocks and neurons of its source it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTE = "cpet_compression.json"


def read_note(folder: Path) -> dict[str, Any] | None:
    """The note of a model folder, or None where there is none."""
    path = Path(folder, NOTE)
    return json.loads(path.read_text()) if path.is_file() else None


def write_note(source: Path, out: Path, note: dict[str, Any]) -> None:
    """Write `note` into `out`, with the notes of what was done before it, first to last, under `before`."""
    earlier = read_note(source)
    if earlier:
        note = {**note, "before": [*earlier.pop("before", []), earlier]}
    Path(out, NOTE).write_text(json.dumps(note, indent=1) + "\n")
