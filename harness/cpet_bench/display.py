"""Live progress of a run: a line per device on a terminal, plain lines elsewhere. Rebuilt from events alone."""

from __future__ import annotations

import sys
import time
from typing import Any

import psutil


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 42 s, 3:05 min, 2:10 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d} h"


class State:
    """What a display shows, folded out of events."""

    def __init__(self):
        self.total = self.done = self.failed = self.cells = self.cells_done = 0
        self.estimate = self.spent = 0.0
        self.started = time.monotonic()
        self.running: dict[str, dict[str, Any]] = {}
        self.estimates: dict[str, float] = {}

    def take(self, row: dict[str, Any]) -> None:
        event = row["event"]
        if event == "run":
            self.total, self.cells, self.estimate = row["missing"], row["cells"], row["estimate"]
        elif event == "start":
            self.estimates[row["key"]] = row["estimate"]
            self.running[row["device"]] = {**row, "done": 0, "total": 0, "text": "", "since": time.monotonic()}
        elif event == "progress" and row["device"] in self.running:
            self.running[row["device"]] |= {k: row[k] for k in ("done", "total", "text")}
        elif event in ("done", "failed"):
            self.done += event == "done"
            self.failed += event == "failed"
            self.spent += self.estimates.get(row["key"], 0.0)
            self.running = {d: r for d, r in self.running.items() if r["key"] != row["key"]}
        elif event == "worker-died":
            self.running.pop(row["device"], None)
        elif event == "cell":
            self.cells_done += row["status"] != "pending"

    def left(self) -> float:
        """Seconds still to go, by the estimates scaled to how the finished steps went."""
        elapsed = time.monotonic() - self.started
        inner = sum(min(self.estimates.get(r["key"], 0.0), time.monotonic() - r["since"]) for r in self.running.values())
        scale = elapsed / (self.spent + inner) if self.spent > 5 else 1.0
        return max(0.0, self.estimate - self.spent - inner) * min(max(scale, 0.2), 5.0)


class Plain:
    """One line for each thing that happened; for logs and pipes."""

    def __init__(self, stream=None):
        self.state, self.stream = State(), stream or sys.stderr

    def __call__(self, row: dict[str, Any]) -> None:
        self.state.take(row)
        text = describe(row, self.state)
        if text:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        pass


class Live:
    """A display that redraws itself: finished steps scroll by, running ones stay at the bottom."""

    def __init__(self):
        from rich.console import Console
        from rich.live import Live as RichLive

        self.state = State()
        self.console = Console(stderr=True)
        self.live = RichLive(console=self.console, refresh_per_second=4, get_renderable=self.draw, transient=True)
        self.live.start()

    def draw(self):
        from rich.text import Text

        s, lines = self.state, []
        for device, row in s.running.items():
            share = f"{row['done']}/{row['total']}" if row["total"] else ""
            took = clock(time.monotonic() - row["since"])
            lines.append(f"  {device:<8} {row['label']}  {share} {row['text']}  {took} of about {clock(row['estimate'])}")
        waiting = s.total - s.done - s.failed - len(s.running)
        failed = f", {s.failed} failed" if s.failed else ""
        memory = psutil.virtual_memory()
        used = f"{(memory.total - memory.available) / 2**30:.1f} of {memory.total / 2**30:.0f} GiB"
        lines.append(
            f"  steps {s.done} done{failed}, {len(s.running)} running, {waiting} waiting · cells {s.cells_done}/{s.cells}"
            f" · {clock(time.monotonic() - s.started)} so far, about {clock(s.left())} left · memory {used}"
        )
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    def __call__(self, row: dict[str, Any]) -> None:
        self.state.take(row)
        text = describe(row, self.state)
        if text:
            self.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self.live.stop()


def describe(row: dict[str, Any], state: State) -> str | None:
    """An event as a line, or None for those that are not worth one."""
    event = row["event"]
    if event == "run":
        if not row["missing"]:
            return f"{row['cells']} cells, {row['steps']} steps: everything is in the store"
        m = row["machine"]
        return (
            f"{row['cells']} cells, {row['steps']} steps, {row['missing']} to run, about {clock(row['estimate'])}"
            f" on {', '.join(m['devices'])} in {m['dtype']}"
        )
    if event == "done":
        return f"[{state.done + state.failed}/{state.total}] {row['label']}  {clock(row['seconds'])}"
    if event == "failed":
        word = "unsupported" if row["status"] == "unsupported" else "FAILED"
        return f"[{state.done + state.failed}/{state.total}] {word}: {row['label']}: {row['message']}"
    if event == "cell" and row["status"] == "done" and row["value"] is not None:
        return f"      {row['cell']}: {row['metric']} {row['value']:.4f}"
    if event == "worker-died":
        return f"The worker on {row['device']} ended (status {row['code']}) during: {row['label']}"
    if event == "damaged":
        return f"Damaged in the store, made again: {row['why']}"
    if event == "waiting":
        return f"Waiting: {row['label']} ({row['why']})"
    return None


def make(json_lines: bool) -> Any:
    """The display for where the output goes."""
    if json_lines:
        return JsonLines()
    return Live() if sys.stderr.isatty() else Plain()


class JsonLines:
    """Every event as a JSON line on standard output."""

    def __call__(self, row: dict[str, Any]) -> None:
        import json

        print(json.dumps(row, default=str), flush=True)

    def close(self) -> None:
        pass
