"""`run`: from a matrix to records. Computes what the store does not have yet, and nothing else."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import choice
from .cells import Cell
from .errors import EXIT_DONE, EXIT_FAILED_CELLS, EXIT_INTERRUPTED, StopError
from .events import Events
from .folders import count, drop_beside, finish_folder, is_finished, start_folder, unfinish, write_json
from .known_rates import keep
from .leases import Leases
from .prepared import Prepared, prepare
from .recording import Recorder
from .schedule import ALONE, Schedule
from .store import Damaged

__all__ = ["Prepared", "RunResult", "Runner", "prepare", "run_prepared"]
BEAT, LOOK = 5.0, 1.0  # seconds between signs of life of a lease, and between looks at what other runs compute
GRACE = 30.0  # seconds a worker has to save what it needs to go on later
START = 600.0  # seconds a fresh worker has to load its libraries


@dataclass
class RunResult:
    """What a run came to: records by status, where they are, and the exit code of the command."""

    folder: Path
    statuses: dict[str, str]
    exit_code: int
    computed: int
    seconds: float


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
        order = choice.first_use(self.plan, choice.useful(self.plan, missing, ready.seconds)) if missing else {}
        shared = len(ready.machine["devices"]) > 1 and ready.machine["device"] == "cpu"
        self.schedule = Schedule(
            self.plan.steps,
            missing,
            done,
            ready.seconds,
            first=order,
            workers=len(ready.machine["devices"]),
            alone=ALONE if shared else (),
        )
        self.open_cells: dict[str, set[str]] = {}
        self.cells_of: dict[str, list[str]] = {}
        self.cells = {cell.id: cell for cell in self.plan.cells}
        for cell in self.plan.cells:
            if cell.id in self.statuses:
                continue
            keys = self.plan.roles[cell.id].values()
            there = self.store.has if cell.id in ready.left_out else self.schedule.done.__contains__
            self.open_cells[cell.id] = {k for k in keys if not there(k)}
            for key in self.plan.closure(self.plan.roles[cell.id].values()):
                self.cells_of.setdefault(key, []).append(cell.id)

    # -- records -------------------------------------------------------------------------------------------------
    def _write(self, cell: Cell, record: dict[str, Any]) -> None:
        path = self.ready.folder / "records" / f"{cell.id}.json"
        unfinish(self.ready.folder)
        write_json(path, record)
        if record["status"] != "done":
            drop_beside(self.ready.folder, cell.id)
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
        try:
            self.recorder.outcomes(cell)
            self.recorder.losses(cell)
        except Damaged as error:
            if self._again(error.key, str(error)):
                return
            reason = {"type": "Damaged", "message": str(error), "step": self.plan.steps[error.key].label, "log": ""}
            self._write(cell, self.recorder.failed(cell, "failed", reason))
            return
        self._write(cell, self.recorder.done(cell))

    def _again(self, key: str, why: str, user: str | None = None) -> bool:
        """An artifact turned out damaged (when step `user` wanted it): it is made again, twice at most. False after that."""
        self.store._manifests.pop(key, None)
        self.tries[key] = self.tries.get(key, 0) + 1
        again = self.tries[key] <= 2
        self.events.emit("damaged", key=key, user=user, estimate=self._estimate(key), again=again, why=why)
        if again:
            self.schedule.redo(key, user or key)
            for cell in self.plan.cells:
                if cell.id in self.open_cells and cell.id not in self.statuses and key in self.plan.roles[cell.id].values():
                    self.open_cells[cell.id].add(key)
        return again

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self) -> None:
        self.finish_cells()
        beat = look = 0.0
        leased: dict[str, float] = {}
        deadline = time.monotonic() + (self.ready.budget or float("inf"))
        while not self.schedule.finished and not self.stop_asked:
            now = time.monotonic()
            if now > deadline and not self.schedule.running:
                break
            if now - beat > BEAT:
                beat = now
                self.leases.beat()
            if leased and now - look > LOOK:
                look = now
                self._look_at_others(leased)
            for worker in self.executor.idle() if now <= deadline else ():
                self._give(worker, leased)
            for device, message in self.executor.wait(0.5):
                self._hear(self.executor.workers[device], message)
            self._time_limits()
        if self.stop_asked:
            self._wind_down()
        self.finish_cells()
        for cell in self.plan.cells:
            if cell.id not in self.statuses:
                over = "the time of --budget was over before this" if time.monotonic() > deadline else None
                self._write(cell, self.recorder.pending(cell, self.ready.left_out.get(cell.id, over)))

    def _give(self, worker, leased: dict[str, float]) -> None:
        while True:
            key = self.schedule.next(worker.held)
            if key is None:
                return
            if self.store.has(key):  # another run made it meanwhile
                self._found(key)
                continue
            if not self.leases.claim(key):
                leased[key] = time.monotonic()
                self.schedule.park(key)
                self.events.emit("waiting", key=key, label=self.plan.steps[key].label, why="another run computes it")
                continue
            if self.store.has(key):
                self.leases.release(key)
                self._found(key)
                continue
            step = self.plan.steps[key]
            self.schedule.start(key)
            estimate = self._estimate(key)
            self.events.emit("start", key=key, kind=step.kind, label=step.label, device=worker.name, estimate=estimate)
            worker.run(step, self.ready.folder / "logs" / f"{key}.log", self.ready.matrix.limits.of(step.kind, estimate))
            return

    def _look_at_others(self, leased: dict[str, float]) -> None:
        for key in list(leased):
            self.store._manifests.pop(key, None)
            if self.store.has(key) or not self.leases.others(key):
                del leased[key]
                self.schedule.unpark(key)

    def _found(self, key: str) -> None:
        self.events.emit("found", key=key, label=self.plan.steps[key].label, estimate=self._estimate(key))
        self._finished(key)

    def _estimate(self, *keys: str) -> float:
        return round(sum(self.ready.seconds[key] for key in keys), 2)

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
        if event == "begun":
            worker.begun, worker.since = True, time.monotonic()
            return
        if event == "progress":
            self.events.emit("progress", keep=False, device=worker.name, label=step.label, **_without(message, "event"))
            return
        worker.running = None
        self.leases.release(key)
        if event == "interrupted":
            self.schedule.back(key)
            self.events.emit("back", key=key, label=step.label, device=worker.name)
        elif event == "done":
            worker.held = message["held"]
            self.computed += 1
            self.store._manifests.pop(key, None)
            self.ready.estimates.learn(step, message["seconds"], message["peak"], message["bytes"])
            fields = {k: message[k] for k in ("seconds", "peak", "bytes")} | {"estimate": self._estimate(key)}
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
        if self._made(key):
            return
        if self.tries[key] <= 1:
            self.schedule.back(key)
            return
        text = f"The worker process ended twice while running this step ({_ending(code)})."
        self._failed(key, {"status": "failed", "type": "WorkerDied", "message": text})

    def _failed(self, key: str, message: dict[str, Any]) -> None:
        step, status = self.plan.steps[key], message["status"]
        if status not in ("stop", "damaged") and self._made(key):
            return
        if status == "stop":
            self.schedule.back(key)
            self.events.emit("back", key=key, label=step.label)
            self.stop_asked = message["message"]
            self.events.emit("stop", why=message["message"])
            return
        if status == "damaged":
            if self._again(message["damaged"], message["message"], key):
                return
            message = {**message, "status": "failed"}
        reason = {
            "type": message["type"],
            "message": message["message"],
            "step": step.label,
            "log": _tail(self.ready.folder / "logs" / f"{key}.log"),
        }
        lost = self.schedule.fail(key)
        gone = {"lost": len(lost), "estimate": self._estimate(*lost), "status": status}
        self.events.emit("failed", key=key, kind=step.kind, label=step.label, **_without(reason, "log"), **gone)
        hit = {cell for k in lost for cell in self.cells_of.get(k, ())}
        for cell in self.plan.cells:
            if cell.id in hit and cell.id not in self.statuses:
                self._write(cell, self.recorder.failed(cell, "unsupported" if status == "unsupported" else "failed", reason))

    def _made(self, key: str) -> bool:
        """Whether the artifact is there all the same: the worker ended after its commit, or another run made it."""
        self.store._manifests.pop(key, None)
        if self.store.has(key):
            self._found(key)
            return True
        return False

    def _time_limits(self) -> None:
        for worker in self.executor.workers.values():
            limit = worker.limit if worker.begun else max(worker.limit, START)
            if worker.running and time.monotonic() - worker.since > limit:
                key, worker.running = worker.running, None
                worker.kill()
                self.leases.release(key)
                text = f"Killed: it took longer than its limit of {limit:.0f} s."
                self._failed(key, {"status": "failed", "type": "TimeLimit", "message": text})

    def _wind_down(self) -> None:
        """Let workers save what they need to resume, then end."""
        ending = threading.Thread(target=self.executor.stop, args=(GRACE,))
        ending.start()
        while ending.is_alive():
            ending.join(BEAT)
            self.leases.beat()
        while heard := self.executor.wait(0.2):
            for device, message in heard:
                worker = self.executor.workers[device]
                if message["event"] in ("done", "interrupted") and message.get("key") == worker.running:
                    self._hear(worker, message)


def run_prepared(ready: Prepared, listeners=(), on_signal=None) -> RunResult:
    """Run a prepared matrix to its end, or as far as it goes; always leaves records of what is there."""
    from . import registry

    started = time.perf_counter()
    folder = ready.folder
    start_folder(ready)
    keep(ready.store, ready.plan, ready.known)
    events = Events(folder / "events.jsonl", listeners)
    executor = registry.get("executor", "local")(ready.machine, ready.store.url, folder / "logs")
    runner = Runner(ready, events, executor)
    if on_signal:
        on_signal(runner)
    counts = {"cells": len(ready.plan.cells), "steps": len(ready.plan.steps), "missing": len(runner.schedule.left)}
    counts |= {"recorded": len(ready.recorded), "left_out": len(ready.left_out.keys() - ready.recorded.keys())}
    times = {"estimate": sum(ready.seconds[k] for k in runner.schedule.left), "needed": ready.time_needed(ready.missing())}
    times = {name: round(seconds, 1) for name, seconds in times.items()}
    for key in sorted(ready.store.broken & runner.schedule.left):
        estimate = runner._estimate(key)
        why = f"artifact {key}: manifest.json is not as it was written"
        events.emit("damaged", key=key, user=None, estimate=estimate, again=True, why=why)
    events.emit("run", name=folder.name, **counts, **times, machine=ready.machine)
    stopped = None
    try:
        runner.run()
    except StopError as error:
        stopped = error
    finally:
        executor.stop(GRACE)
        runner.leases.release_all()
        ready.store.tidy()
    statuses = {cell.id: runner.statuses.get(cell.id, "pending") for cell in ready.plan.cells}
    seconds = time.perf_counter() - started
    if stopped:
        events.close()
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
    if runner.computed or not is_finished(ready):
        finish_folder(ready, seconds)
    return RunResult(folder, statuses, code, runner.computed, seconds)


def _without(found: dict, *names: str) -> dict:
    return {k: v for k, v in found.items() if k not in names}


def _ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return name + (", as systems end what takes too much memory" if code == -signal.SIGKILL else "")


def _tail(path: Path, lines: int = 30) -> str:
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
