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
    """What a display shows, folded out of events alone: a run's log, read again, gives the same."""

    def __init__(self):
        self.total = self.done = self.failed = self.cells = self.cells_done = 0
        self.estimate = self.spent = self.started = self.ended = 0.0
        self.devices: dict[str, int] = {}  # worker → most memory a step of it took, in bytes
        self.running: dict[str, dict[str, Any]] = {}
        self.estimates: dict[str, float] = {}
        self.failures: list[str] = []

    def take(self, row: dict[str, Any]) -> None:
        event = row["event"]
        if event == "run":  # a log may hold several, one after another
            self.__init__()
            self.total, self.cells, self.cells_done = row["missing"], row["cells"], row["recorded"]
            self.estimate, self.started = row["estimate"], row["time"]
            self.devices = dict.fromkeys(row["machine"]["devices"], 0)
        elif event == "start":
            self.estimates[row["key"]] = row["estimate"]
            self.running[row["device"]] = {**row, "done": 0, "total": 0, "text": "", "memory": 0}
        elif event == "progress" and row["device"] in self.running:
            self.running[row["device"]] |= {k: row[k] for k in ("done", "total", "text", "memory")}
        elif event in ("done", "found"):
            self.done += 1
            self.spent += row["estimate"]
            self._rests(row["key"])
            if event == "done":
                self.devices[row["device"]] = max(self.devices.get(row["device"], 0), row["peak"])
        elif event == "failed":
            self.failed += row["lost"]
            self.spent += row["estimate"]
            self._rests(row["key"])
            if row["status"] != "unsupported":
                self.failures.append(f"{row['label']}: {row['message']}")
        elif event == "damaged":
            if row["again"]:
                self.total += 1
                self.estimate += row["estimate"]
            self._rests(row["user"])
        elif event in ("worker-died", "back"):
            self._rests(row["key"])
        elif event == "cell":
            self.cells_done += row["status"] != "pending"
        elif event == "end":
            self.ended = row["time"]

    def _rests(self, key: str) -> None:
        self.running = {device: row for device, row in self.running.items() if row["key"] != key}

    @property
    def waiting(self) -> int:
        return self.total - self.done - self.failed - len(self.running)

    def elapsed(self, now: float) -> float:
        """Seconds since the run began; `now` as the events' `time`."""
        return max(0.0, (self.ended or now) - self.started)

    def left(self, now: float) -> float:
        """Seconds still to go at `now`: by the estimates, at the rate at which they were worked off so far."""
        inner = sum(min(r["estimate"], max(0.0, now - r["time"])) for r in self.running.values())
        workers = max(1, len(self.devices))
        rate = (self.spent + inner) / max(self.elapsed(now), 1e-3) if self.spent > 5 else workers
        return max(0.0, self.estimate - self.spent - inner) / min(max(rate, workers / 5), workers * 5)


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


def lines(s: State, now: float) -> list[str]:
    """A line for each worker and one for the whole, as of `now`."""
    found = []
    for device, most in s.devices.items():
        row = s.running.get(device)
        if row is None:
            found.append(f"  {device:<8} idle")
            continue
        parts = [f"{row['done']}/{row['total']}" if row["total"] else "", row["text"]]
        parts.append(f"{clock(max(0.0, now - row['time']))} of about {clock(row['estimate'])}")
        memory = row["memory"] or most
        parts.append(f"{memory / 2**30:.1f} GiB" if memory else "")
        found.append(f"  {device:<8} {row['label']}  {'  '.join(p for p in parts if p)}")
    failed = f", {s.failed} failed" if s.failed else ""
    memory = psutil.virtual_memory()
    used = f"{(memory.total - memory.available) / 2**30:.1f} of {memory.total / 2**30:.0f} GiB"
    found.append(
        f"  steps {s.done} done{failed}, {len(s.running)} running, {s.waiting} waiting · cells {s.cells_done}/{s.cells}"
        f" · {clock(s.elapsed(now))} so far, about {clock(s.left(now))} left · memory {used}"
    )
    return found


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

        return Text("\n".join(lines(self.state, time.time())), no_wrap=True, overflow="ellipsis")

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
        out = f", {row['left_out']} cells left for later" if row["left_out"] else ""
        return (
            f"{row['cells']} cells, {row['steps']} steps, {row['missing']} to run, about {clock(row['needed'])}"
            f" on {', '.join(m['devices'])} in {m['dtype']}{out}"
        )
    if event == "done":
        return f"[{state.done + state.failed}/{state.total}] {row['label']}  {clock(row['seconds'])}"
    if event == "found":
        return f"[{state.done + state.failed}/{state.total}] {row['label']}  made by another run"
    if event == "failed":
        word = "unsupported" if row["status"] == "unsupported" else "FAILED"
        return f"[{state.done + state.failed}/{state.total}] {word}: {row['label']}: {row['message']}"
    if event == "cell" and row["status"] == "done" and row["value"] is not None:
        return f"      {row['cell']}: {row['metric']} {row['value']:.4f}"
    if event == "worker-died":
        return f"The worker on {row['device']} ended (status {row['code']}) during: {row['label']}"
    if event == "damaged":
        return f"Damaged in the store{', made again' if row['again'] else ''}: {row['why']}"
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
