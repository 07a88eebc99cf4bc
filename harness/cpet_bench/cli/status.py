"""`cpet-bench status [RUN]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import InputError
from .common import folders, no_run, no_runs


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="the run's name or folder (default: every run)")
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")
    folders(parser)


def run(args: argparse.Namespace) -> int:
    found = [status(folder) for folder in chosen(args.run, Path(args.runs))]
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for row in found:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(row["cells"].items()))
        print(f"{row['name']}: {row['state']}; cells: {counts or 'none yet'}; {row['steps_done']} steps computed")
        for line in row["failures"]:
            print(f"  {line}")
    return 0


def chosen(name: str | None, runs: Path) -> list[Path]:
    """The folder of one run, or of all."""
    all_runs = sorted(p.parent for p in runs.glob("*/events.jsonl"))
    if name is None:
        if not all_runs:
            raise InputError(no_runs(runs))
        return all_runs
    for folder in (runs / name, Path(name)):
        if (folder / "events.jsonl").exists():
            return [folder]
    raise no_run(name, runs, (p.name for p in all_runs))


def status(folder: Path) -> dict:
    """Counts of a run folder, from its event log alone."""
    from ..events import read_events

    cells: dict[str, str] = {}
    failures: dict[str, str] = {}
    state, done, running = "not started", 0, {}
    for row in read_events(folder / "events.jsonl"):
        event = row["event"]
        if event == "run":
            state, running, failures = f"started, {row['missing']} steps to run", {}, {}
        elif event == "start":
            running[row["key"]] = row["label"]
        elif event in ("done", "failed"):
            running.pop(row["key"], None)
            done += event == "done"
            if event == "failed":
                failures[row["key"]] = f"{row['status']}: {row['label']}: {row['message']}"
        elif event == "cell":
            cells[row["cell"]] = row["status"]
        elif event == "stop":
            state = f"stopped: {row['why']}"
        elif event == "end":
            state, cells = f"ended in {row['seconds']:.0f} s", dict(cells)
        if event in ("start", "done") and running:
            state = "at " + ", ".join(running.values())
    counts: dict[str, int] = {}
    for value in cells.values():
        counts[value] = counts.get(value, 0) + 1
    return {"name": folder.name, "state": state, "cells": counts, "steps_done": done, "failures": list(failures.values())}
