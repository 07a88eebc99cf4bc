"""What a step will take, learnt from finished steps of its kind; before there are any, from rough figures per kind."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from .events import append
from .steps import Step
from .store import Store

# seconds to start with and seconds per unit of work (documents trained or scored; of a compression that trains, thousands of
# tokens), of a 135 M model on two CPU cores
PRIOR = {
    "model": (20.0, 0.0),
    "compress": (30.0, 6.0),
    "pairs": (2.0, 0.0005),
    "requests": (2.0, 0.001),
    "teacher": (2.0, 0.05),
    "moments": (5.0, 0.2),
    "compensation": (30.0, 0.0),
    "compensation sequential": (40.0, 0.5),
    "tune": (2.0, 0.11),
    "trial": (6.0, 0.13),
    "select": (0.5, 0.0),
    "rate": (0.1, 0.0),
    "responses": (2.0, 0.045),
    "metrics": (3.0, 0.001),
    "probe": (8.0, 0.0),
}
MEMORY = {"responses": 2e9, "teacher": 2e9, "probe": 2e9}
MEMORY |= dict.fromkeys(("tune", "trial", "moments", "compensation", "compress"), 3e9)
DISK = {"model": 5.4e8, "compress": 4e8, "teacher": 5e7, "moments": 4e8, "compensation": 3e7}
DISK |= dict.fromkeys(("tune", "trial", "select"), 2e7)


def trait(step: Step) -> str:
    """Steps of one trait take alike: its kind, with what changes its speed most."""
    s = step.settings
    if step.kind == "compress":
        return f"compress {s['backend']}"
    if step.kind in ("tune", "trial"):
        parts = [p for p in ("recover", "distill", "control") if p in s]
        return " ".join([step.kind, s["pet"]["method"], *parts])
    if step.kind == "compensation" and s.get("sequential"):
        return "compensation sequential"
    return step.kind


def _like(own: str, kind: str) -> str:
    """What a step of trait `own` is like before one of its trait was seen: its kind, or a trait with a prior only itself."""
    return own if own in PRIOR else kind


class Estimates:
    """Seconds, bytes of memory and of disk by step."""

    def __init__(self, store: Store):
        self.path = Path(store.scratch_root).parent / "history.jsonl"
        self.seen: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._scales: dict[str, float] = {}
        try:
            lines = self.path.read_text().splitlines()[-5000:]
        except OSError:
            lines = []
        for line in lines:
            try:
                row = json.loads(line)
                self.seen[row["trait"]].append(row)
                self.seen[_like(row["trait"], row["kind"])].append(row)
            except (ValueError, KeyError):
                continue  # a line cut off by a kill

    def learn(self, step: Step, seconds: float, peak: int, size: int) -> None:
        row = {"trait": trait(step), "kind": step.kind, "work": step.work, "seconds": seconds, "peak": peak, "bytes": size}
        self.seen[row["trait"]].append(row)
        self._scales.clear()
        try:
            with self.path.open("a+b", buffering=0) as f:
                append(f, json.dumps(row), "history")
        except OSError:
            pass  # an estimate is a convenience; a full disk is reported by the step that needs it

    def _rows(self, step: Step) -> list[dict[str, Any]]:
        own = trait(step)
        return (self.seen.get(own) or self.seen.get(_like(own, step.kind)) or [])[-20:]

    def seconds(self, step: Step) -> float:
        """Seconds on one worker: the prior's share of fixed and proportional cost, scaled to what was seen."""
        own = trait(step)
        fixed, each = PRIOR.get(_like(own, step.kind), (5.0, 0.0))
        scale = self._scales.get(own)
        if scale is None:
            rows = self._rows(step)
            scale = median(r["seconds"] / (fixed + each * r["work"]) for r in rows) if rows else 1.0
            self._scales[own] = scale
        return scale * (fixed + each * step.work)

    def memory(self, step: Step) -> float:
        rows = self._rows(step)
        return max(r["peak"] for r in rows) if rows else MEMORY.get(step.kind, 1e9)

    def disk(self, step: Step) -> float:
        rows = self._rows(step)
        return median(r["bytes"] for r in rows) if rows else DISK.get(step.kind, 1e6)
