"""Local execution: one resident worker process per device."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..devices import of_worker
from ..errors import StopError
from ..steps import Step


class LocalWorker:
    """A worker process on one device: what it runs, since when, and which models it holds."""

    def __init__(self, name: str, machine: dict[str, Any], store: str, folder: Path, inbox: queue.Queue):
        self.name, self.machine, self.store, self.folder, self.inbox = name, machine, store, folder, inbox
        self.held: list[str] = []
        self.running: str | None = None
        self.since = 0.0
        self.limit = float("inf")
        self.begun = True  # false while a fresh worker still loads its libraries
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        path = self.folder / f"worker-{self.name.replace(':', '')}.log"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            log = path.open("a")
        except OSError as error:
            raise StopError(f"Cannot write {path}: {error.strerror or error}.") from error
        own = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cpet_bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **own, **self._threads()},
                start_new_session=True,  # Ctrl-C reaches the runner alone; it tells the worker
            )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()
        self.send(op="setup", machine=self.machine, store=self.store)

    def _threads(self) -> dict[str, str]:
        """Libraries that make their own threads get as many as this worker has, unless the user's environment says."""
        threads = self.machine["threads"]
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads else ()
        return {name: os.environ.get(name, str(threads)) for name in names}

    def _listen(self, process: subprocess.Popen) -> None:
        with process.stdout:
            for line in process.stdout:
                try:
                    self.inbox.put((self.name, json.loads(line)))
                except ValueError:
                    continue  # a line cut off by a kill
        process.wait()
        with suppress(OSError):
            process.stdin.close()
        self.inbox.put((self.name, {"event": "exit", "code": process.returncode, "pid": process.pid}))

    def send(self, **message: Any) -> None:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):  # a pipe that is broken, or closed
            pass  # its exit is reported by the listener

    def run(self, step: Step, log: Path, limit: float) -> None:
        if self.process is None or self.process.poll() is not None:
            self.held = []
            self.start()
        self.running, self.since, self.limit, self.begun = step.key, time.monotonic(), limit, False
        wire = {
            "key": step.key,
            "kind": step.kind,
            "settings": step.settings,
            "params": step.params,
            "needs": step.needs,
            "work": step.work,
            "label": step.label,
            "identity": step.identity(),
        }
        self.send(op="run", step=wire, log=str(log))

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # until it is gone, the next step would be sent to a dying process
                self.process.wait(5)

    def stop(self, grace: float) -> None:
        """Ask for an end (training saves a checkpoint first); after `grace` seconds kill."""
        if self.process is None or self.process.poll() is not None:
            return
        self.send(op="stop")
        try:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            self.kill()
        except ProcessLookupError:
            pass


class LocalExecutor:
    """One worker per name in `machine["devices"]`; `events()` waits for what they report."""

    name = "local"

    def __init__(self, machine: dict[str, Any], store: str, folder: Path):
        self.inbox: queue.Queue = queue.Queue()
        self.workers = {}
        for name in machine["devices"]:
            self.workers[name] = LocalWorker(name, of_worker(machine, name), store, folder, self.inbox)

    def idle(self) -> list[LocalWorker]:
        return [w for w in self.workers.values() if w.running is None]

    def wait(self, seconds: float) -> list[tuple[str, dict]]:
        """What workers reported, after at most `seconds`."""
        found = []
        try:
            found.append(self.inbox.get(timeout=seconds))
            while True:
                found.append(self.inbox.get_nowait())
        except queue.Empty:
            return found

    def stop(self, grace: float = 30.0) -> None:
        for worker in self.workers.values():
            threading.Thread(target=worker.stop, args=(grace,), daemon=True).start()
        for worker in self.workers.values():
            if worker.process:
                try:
                    worker.process.wait(grace + 5)
                except subprocess.TimeoutExpired:
                    worker.kill()
