"""`run`: from a matrix to records. Computes what the store does not have yet, and nothing else."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from . import devices
from .cells import Cell, expand
from .errors import EXIT_DONE, EXIT_FAILED_CELLS, EXIT_INTERRUPTED, InputError, StopError
from .estimates import Estimates
from .events import Events
from .folders import count, finish_folder, read_json, start_folder, write_json
from .leases import Leases
from .matrix import Matrix, load_matrix
from .plan import Plan, Planner
from .recording import Recorder
from .schedule import Schedule
from .store import Store

BEAT = 5.0  # seconds between signs of life of a lease


@dataclass
class Prepared:
    """A matrix made ready to run: cells, steps, where results go, and what each step is estimated to take."""

    matrix: Matrix
    plan: Plan
    store: Store
    machine: dict[str, Any]
    folder: Path
    estimates: Estimates
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def recorded(self) -> dict[str, str]:
        """Cells whose record already says how they end with these very keys (id → done or unsupported)."""
        found = {}
        for cell_id, roles in self.plan.roles.items():
            old = read_json(self.folder / "records" / f"{cell_id}.json")
            if not isinstance(old, dict) or old.get("status") not in ("done", "unsupported"):
                continue
            kept = old["status"] != "done" or (self.folder / "outcomes" / f"{cell_id}.parquet").exists()
            if kept and (old.get("provenance") or {}).get("keys") == roles:
                found[cell_id] = old["status"]
        return found

    def missing(self) -> list[str]:
        """Keys of steps that must run: not in the store, and needed by a result that is neither there nor recorded."""
        wanted: set[str] = set()
        stack = [k for i, roles in self.plan.roles.items() if i not in self.recorded for k in roles.values()]
        while stack:
            key = stack.pop()
            if key not in wanted and not self.store.has(key):
                wanted.add(key)
                stack.extend(self.plan.steps[key].needs.values())
        return [key for key in self.plan.steps if key in wanted]


@dataclass
class RunResult:
    """What a run came to: records by status, where they are, and the exit code of the command."""

    folder: Path
    statuses: dict[str, str]
    exit_code: int
    computed: int
    seconds: float


def prepare(
    path: str | Path | Matrix,
    *,
    only: tuple[str, ...] = (),
    store: str | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    device: list[str] | None = None,
) -> Prepared:
    """Read and check a matrix and plan it. Raises InputError for whatever is wrong with it, before any work."""
    matrix = path if isinstance(path, Matrix) else load_matrix(Path(path), only=list(only))
    cells = expand(matrix)
    settings = matrix.device if device is None else matrix.device.model_copy(update={"devices": device})
    machine = devices.resolve(settings)
    plan = Planner(matrix, machine).build(cells)
    name = name or matrix.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name):
        raise InputError(f"A run cannot be named {name!r}: letters, digits and _ . + - only.", key="--name")
    opened = Store(store)
    estimates = Estimates(opened)
    seconds = {key: estimates.seconds(step) for key, step in plan.steps.items()}
    return Prepared(matrix, plan, opened, machine, Path(runs) / name, estimates, seconds)


class Runner:
    """Executes what is missing of a plan and writes a record as soon as a cell is complete."""

    def __init__(self, ready: Prepared, events: Events, executor):
        self.ready, self.events, self.executor = ready, events, executor
        self.plan, self.store = ready.plan, ready.store
        self.recorder = Recorder(
            ready.plan, ready.store, ready.folder, ready.machine, ready.folder.name, ready.matrix.name, ready.seconds
        )
        self.leases = Leases(ready.store)
        self.reasons: dict[str, dict[str, Any]] = {}  # failed step → why
        self.statuses: dict[str, str] = dict(ready.recorded)
        self.tries: dict[str, int] = {}
        self.stop_asked: str | None = None
        self.computed = 0
        missing = ready.missing()
        done = self.plan.steps.keys() - set(missing)
        self.schedule = Schedule(self.plan.steps, missing, done, ready.seconds)
        self.open_cells: dict[str, set[str]] = {}
        self.cells_of: dict[str, list[str]] = {}
        self.cells = {cell.id: cell for cell in self.plan.cells}
        for cell in self.plan.cells:
            if cell.id in self.statuses:
                continue
            self.open_cells[cell.id] = {k for k in self.plan.roles[cell.id].values() if k in self.schedule.left}
            for key in self.plan.closure(self.plan.roles[cell.id].values()):
                self.cells_of.setdefault(key, []).append(cell.id)

    # -- records -------------------------------------------------------------------------------------------------
    def _write(self, cell: Cell, record: dict[str, Any]) -> None:
        path = self.ready.folder / "records" / f"{cell.id}.json"
        write_json(path, record)
        self.statuses[cell.id] = record["status"]
        primary = record["primary"]
        value = record["metrics"][primary]["value"] if primary else None
        self.events.emit("cell", cell=cell.id, status=record["status"], metric=primary, value=value)

    def finish_cells(self) -> None:
        """Write the record of each cell that has all its results and is not written for these results yet."""
        for cell in self.plan.cells:
            if cell.id not in self.statuses and not self.open_cells[cell.id]:
                self._complete(cell)

    def _complete(self, cell: Cell) -> None:
        self.recorder.outcomes(cell)
        self._write(cell, self.recorder.done(cell))

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self) -> None:
        self.finish_cells()
        beat = 0.0
        leased: dict[str, float] = {}
        while not self.schedule.finished and not self.stop_asked:
            now = time.monotonic()
            if now - beat > BEAT:
                beat = now
                self.leases.beat()
                self._look_at_others(leased)
            for worker in self.executor.idle():
                self._give(worker, leased)
            for device, message in self.executor.wait(0.5):
                self._hear(self.executor.workers[device], message)
            self._time_limits()
        if self.stop_asked:
            self._wind_down()
        self.finish_cells()
        for cell in self.plan.cells:
            if cell.id not in self.statuses:
                self._write(cell, self.recorder.pending(cell))

    def _give(self, worker, leased: dict[str, float]) -> None:
        while True:
            key = self.schedule.next(worker.held, skip=leased)
            if key is None:
                return
            if self.store.has(key):  # another run made it meanwhile
                self._finished(key)
                continue
            if not self.leases.claim(key):
                leased[key] = time.monotonic()
                self.events.emit("waiting", key=key, label=self.plan.steps[key].label, why="another run computes it")
                continue
            if self.store.has(key):
                self.leases.release(key)
                self._finished(key)
                continue
            step = self.plan.steps[key]
            self.schedule.start(key)
            estimate = self.ready.seconds[key]
            self.events.emit(
                "start", key=key, kind=step.kind, label=step.label, device=worker.name, estimate=round(estimate, 2)
            )
            worker.run(step, self.ready.folder / "logs" / f"{key}.log", max(600.0, 20 * estimate))
            return

    def _look_at_others(self, leased: dict[str, float]) -> None:
        for key in list(leased):
            self.store._manifests.pop(key, None)
            if self.store.has(key) or not self.leases.others(key):
                del leased[key]

    def _finished(self, key: str) -> None:
        self.schedule.finish(key)
        for cell_id in self.cells_of.get(key, ()):
            waiting = self.open_cells[cell_id]
            waiting.discard(key)
            if not waiting and cell_id not in self.statuses:
                self._complete(self.cells[cell_id])

    def _hear(self, worker, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "exit":
            if worker.process is not None and message["pid"] == worker.process.pid and worker.running:
                self._died(worker, message["code"])
            return
        key = message.get("key")
        if key is None or key != worker.running:
            return
        step = self.plan.steps[key]
        if event == "progress":
            self.events.emit("progress", keep=False, device=worker.name, label=step.label, **_without(message, "event"))
            return
        worker.running = None
        self.leases.release(key)
        if event == "interrupted":
            self.schedule.back(key)
        elif event == "done":
            worker.held = message["held"]
            self.computed += 1
            self.store._manifests.pop(key, None)
            self.ready.estimates.learn(step, message["seconds"], message["peak"], message["bytes"])
            fields = {k: message[k] for k in ("seconds", "peak", "bytes")}
            self.events.emit("done", key=key, kind=step.kind, label=step.label, device=worker.name, **fields)
            self._finished(key)
        else:
            worker.held = []
            self._failed(key, message)

    def _died(self, worker, code: int) -> None:
        """The worker process is gone: its step is tried once more on a new one."""
        key, worker.running, worker.held = worker.running, None, []
        self.leases.release(key)
        self.tries[key] = self.tries.get(key, 0) + 1
        step = self.plan.steps[key]
        self.events.emit("worker-died", device=worker.name, key=key, label=step.label, code=code)
        if self.tries[key] <= 1:
            self.schedule.back(key)
            return
        text = f"The worker process ended twice while running this step (status {code})."
        self._failed(key, {"status": "failed", "type": "WorkerDied", "message": text})

    def _failed(self, key: str, message: dict[str, Any]) -> None:
        step, status = self.plan.steps[key], message["status"]
        if status == "stop":
            self.schedule.back(key)
            self.stop_asked = message["message"]
            self.events.emit("stop", why=message["message"])
            return
        if status == "damaged":
            self.store._manifests.pop(message["damaged"], None)
            why = message["message"]
            self.events.emit("damaged", key=message["damaged"], why=why)
            self.tries[message["damaged"]] = self.tries.get(message["damaged"], 0) + 1
            if self.tries[message["damaged"]] <= 2:
                self.schedule.redo(message["damaged"], key)
                return
            message = {**message, "status": "failed"}
        reason = {
            "type": message["type"],
            "message": message["message"],
            "step": step.label,
            "log": _tail(self.ready.folder / "logs" / f"{key}.log"),
        }
        lost = self.schedule.fail(key)
        self.events.emit("failed", key=key, kind=step.kind, label=step.label, **_without(reason, "log"), status=status)
        hit = {cell for k in lost for cell in self.cells_of.get(k, ())}
        for cell in self.plan.cells:
            if cell.id in hit and cell.id not in self.statuses:
                self._write(cell, self.recorder.failed(cell, "unsupported" if status == "unsupported" else "failed", reason))

    def _time_limits(self) -> None:
        for worker in self.executor.workers.values():
            if worker.running and time.monotonic() - worker.since > worker.limit:
                key, worker.running = worker.running, None
                worker.kill()
                self.leases.release(key)
                text = f"Killed: it took longer than its limit of {worker.limit:.0f} s."
                self._failed(key, {"status": "failed", "type": "TimeLimit", "message": text})

    def _wind_down(self) -> None:
        """Let workers save what they need to resume, then end."""
        self.executor.stop()
        for device, message in self.executor.wait(0.2):
            worker = self.executor.workers[device]
            if message["event"] == "done" and message.get("key") == worker.running:
                self._hear(worker, message)


def run_prepared(ready: Prepared, listeners=(), on_signal=None) -> RunResult:
    """Run a prepared matrix to its end, or as far as it goes; always leaves records of what is there."""
    from . import registry

    started = time.perf_counter()
    folder = ready.folder
    start_folder(ready)
    events = Events(folder / "events.jsonl", listeners)
    executor = registry.get("executor", "local")(ready.machine, ready.store.url, folder / "logs")
    runner = Runner(ready, events, executor)
    if on_signal:
        on_signal(runner)
    counts = {"cells": len(ready.plan.cells), "steps": len(ready.plan.steps), "missing": len(runner.schedule.left)}
    estimate = sum(ready.seconds[k] for k in runner.schedule.left)
    events.emit("run", name=folder.name, **counts, estimate=round(estimate, 1), machine=ready.machine)
    stopped = None
    try:
        runner.run()
    except StopError as error:
        stopped = error
    finally:
        executor.stop(5.0 if stopped else 1.0)
        runner.leases.release_all()
    statuses = {cell.id: runner.statuses.get(cell.id, "pending") for cell in ready.plan.cells}
    seconds = time.perf_counter() - started
    if stopped:
        raise stopped
    code = EXIT_DONE
    if runner.stop_asked:
        if runner.stop_asked != "interrupted":
            events.close()
            raise StopError(runner.stop_asked)
        code = EXIT_INTERRUPTED
    elif "failed" in statuses.values():
        code = EXIT_FAILED_CELLS
    events.emit("end", statuses=count(statuses), seconds=round(seconds, 3), computed=runner.computed, exit_code=code)
    events.close()
    if runner.computed or not (folder / "run.json").exists():
        finish_folder(ready, seconds)
    return RunResult(folder, statuses, code, runner.computed, seconds)


def _without(found: dict, *names: str) -> dict:
    return {k: v for k, v in found.items() if k not in names}


def _tail(path: Path, lines: int = 30) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
