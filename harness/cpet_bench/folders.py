"""The folder of a run: runs/NAME/ with run.json, plan.json, events.jsonl, records/, outcomes/, losses/ and logs/."""

from __future__ import annotations

import datetime
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import StopError
from .failpoints import failpoint
from .keys import plain, version
from .plan import Plan
from .recording import PACKAGES

BESIDE = ("outcomes", "losses")  # folders with a file for each cell that is done


def start_folder(ready) -> None:
    try:
        (ready.folder / "records").mkdir(parents=True, exist_ok=True)
        wanted = {cell.id for cell in ready.plan.cells}
        for path in (ready.folder / "records").glob("*.json"):
            if path.stem not in wanted:  # a cell this matrix no longer has
                path.unlink()
                drop_beside(ready.folder, path.stem)
    except OSError as error:
        raise StopError(f"Cannot write to {ready.folder}: {error.strerror or error}.") from error


def finish_folder(ready, seconds: float) -> None:
    from .results import files, standalone

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    old = read_json(ready.folder / "run.json") or {}
    body = {
        "schema": 1,
        "name": ready.folder.name,
        "matrix": plain(ready.matrix),
        **standalone.keep(ready.matrix, ready.plan.steps.values(), ready.folder),
        "created": old.get("created", now),
        "finished": now,
        "seconds": round(old.get("seconds", 0.0) + seconds, 1),
        "cells": [cell.id for cell in ready.plan.cells],
        "device": ready.machine,
        "versions": {p: version(p) for p in PACKAGES},
        "events": "events.jsonl",
    }
    write_json(ready.folder / "run.json", body)
    write_json(ready.folder / "plan.json", snapshot(ready.plan))
    files.write_manifest(ready.folder)


def unfinish(folder: Path) -> None:
    """Take the manifest away before anything it lists changes: a run that is killed then is not taken for whole."""
    try:
        (folder / "manifest.json").unlink(missing_ok=True)
    except OSError as error:
        raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error


def drop_beside(folder: Path, cell_id: str) -> None:
    """Outcomes and loss curve of a cell that is no longer done, or no longer there."""
    try:
        for name in BESIDE:
            (folder / name / f"{cell_id}.parquet").unlink(missing_ok=True)
    except OSError as error:
        raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error


def is_finished(ready) -> bool:
    """Whether the folder already says all about these cells: run.json names them, the manifest lists just what is there."""
    from .results import files

    info = read_json(ready.folder / "run.json") or {}
    return info.get("cells") == [cell.id for cell in ready.plan.cells] and files.is_current(ready.folder)


def snapshot(plan: Plan) -> dict[str, Any]:
    """What the next `plan` is compared with, to say why a step will run: role by role, the steps of each cell."""
    return {
        "steps": {k: {**s.identity(), "label": s.label} for k, s in plan.steps.items()},
        "labels": {f"{s.kind} {s.label}": k for k, s in plan.steps.items()},
    }


def count(statuses: dict[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for status in statuses.values():
        found[status] = found.get(status, 0) + 1
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, body: Any) -> None:
    """Write a JSON document whole: a kill leaves the old one or the new one. StopError where the disk will not."""
    what = "record" if path.parent.name == "records" else path.stem
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")  # two runs may write here at once
    try:
        failpoint(f"{what}.before")
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(body, indent=1, default=str, allow_nan=False) + "\n")
        failpoint(f"{what}.written", path=fresh)
        os.replace(fresh, path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise StopError(f"Cannot write {path}: {error.strerror or error}.") from error
    failpoint(f"{what}.after")
