"""The event log: one JSON object a line, complete enough to rebuild the display from it."""

from __future__ import annotations

import json
import time
from io import FileIO
from pathlib import Path
from typing import Any

from .errors import StopError
from .failpoints import failpoint


def append(file: FileIO, line: str, what: str) -> None:
    """Add a line to an unbuffered file in one go, after ending one that a kill or a full disk cut off. Raises OSError."""
    failpoint(f"{what}.before")
    size = file.seek(0, 2)
    data = line.encode() + b"\n"
    if size:
        file.seek(size - 1)
        data = data if file.read(1) == b"\n" else b"\n" + data
    while data:
        data = data[file.write(data) :]
    failpoint(f"{what}.written", path=file.name, since=size)


class Events:
    """Appends events to a file and hands each to the listeners (the display, `--json`)."""

    def __init__(self, path: Path, listeners=()):
        self.listeners = list(listeners)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a+b", buffering=0)
        except OSError as error:
            raise StopError(f"Cannot write to {path}: {error.strerror}.") from error

    def emit(self, event: str, *, keep: bool = True, **fields: Any) -> None:
        """Record an event; `keep=False` (progress ticks) reaches the listeners only."""
        row = {"time": round(time.time(), 3), "event": event, **fields}
        if keep:
            try:
                append(self.file, json.dumps(row, default=str), "events")
            except OSError as error:
                raise StopError(f"Cannot write the event log {self.file.name}: {error.strerror}.") from error
        for listener in self.listeners:
            listener(row)

    def close(self) -> None:
        self.file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of a run, oldest first; a last line cut off by a kill is left out."""
    found = []
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
