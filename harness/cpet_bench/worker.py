"""The worker: a resident process that owns a device, keeps loaded models and runs steps one after another.

It reads commands as JSON lines from standard input and answers with JSON lines on a descriptor of its own; whatever
libraries print goes to the step's log. It ends when its input closes, so that it cannot outlive a killed runner.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import queue
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .devices import give_back
from .errors import InputError, StepFailed, StopError, Stopping, Unsupported
from .models.loading import allow_code
from .steps import KINDS
from .store import Damaged, Store


class Worker:
    """Runs steps that arrive on `commands` and reports through `send`."""

    def __init__(self, out):
        self.out = out
        self.lock = threading.Lock()
        self.commands: queue.Queue = queue.Queue()
        self.stopping = threading.Event()
        self.pool: Any = None
        self.store: Store | None = None

    def send(self, **message: Any) -> None:
        with self.lock:
            self.out.write(json.dumps(message, default=str) + "\n")
            self.out.flush()

    def listen(self) -> None:
        """Reads commands; the end of input means that the runner is gone."""
        for line in sys.stdin:
            message = json.loads(line)
            if message["op"] == "stop":
                self.stopping.set()
            self.commands.put(message)
        os._exit(0)

    def run(self) -> None:
        while True:
            message = self.commands.get()
            if message["op"] == "stop":
                self.send(event="stopped")
                return
            if message["op"] == "setup":
                self.setup(message)
            elif message["op"] == "run" and not self.stopping.is_set():
                self.step(message)

    def setup(self, message: dict) -> None:
        self.machine = {"owns": [message["machine"]["device"]], **message["machine"]}
        self.store = Store(message["store"])
        self.store.fs.invalidate_cache()
        allow_code(self.machine.get("allow_code", False))

    def _prepare(self) -> None:
        """Load torch once, when the first step that wants it comes."""
        if self.pool is not None:
            return
        import torch

        from .models.pool import ModelPool

        if self.machine["threads"]:
            torch.set_num_threads(self.machine["threads"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bool(self.machine["tf32"])
        if self.machine["device"].startswith("cuda"):
            torch.cuda.set_device(self.machine["device"])  # libraries that ask for the current device get this worker's
        self.pool = ModelPool()

    def step(self, message: dict) -> None:
        step, started = message["step"], time.perf_counter()
        key = step["key"]
        log = Path(message["log"])
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", buffering=1) as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            self._prepare()
            self.send(event="begun", key=key)
            manifest = self._run(step)
            self.send(
                event="done",
                key=key,
                seconds=time.perf_counter() - started,
                peak=manifest.costs["peak_memory"],
                bytes=manifest.bytes,
                held=self.pool.held(),
            )
        except Stopping:
            self.send(event="interrupted", key=key)
        except BaseException as error:
            with suppress(OSError):  # the disk of the log may be full
                traceback.print_exc()
            self.pool and self.pool.clear()
            self.send(event="failed", key=key, seconds=time.perf_counter() - started, **describe(error))

    def _run(self, step: dict):
        key, kind, store = step["key"], KINDS[step["kind"]], self.store
        scratch, out = store.scratch(key), store.out(key)
        try:
            return self._compute(step, kind, scratch, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def _compute(self, step: dict, kind, scratch: Path, out: Path):
        from .steps.context import Context

        key, store, last = step["key"], self.store, 0.0

        def progress(done: int, total: int, text: str = "") -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last > 0.2 or done >= total:
                last = now
                memory = memory_now(self.machine["owns"])
                self.send(event="progress", key=key, done=done, total=total, text=text, memory=memory)

        needs = step["needs"]
        context = Context(
            kind=step["kind"],
            settings=step["settings"],
            params=step["params"],
            inputs={role: store.materialise(k) for role, k in needs.items()},
            facts={role: store.manifest(k).facts for role, k in needs.items()},
            keys=needs,
            out=out,
            scratch=scratch,
            machine=self.machine,
            pool=self.pool,
            progress=progress,
            should_stop=self.stopping.is_set,
        )
        if step["kind"] == "compress":  # wants the memory, and its peak is a figure of the backend
            self.pool.clear()
        reset_peak(self.machine["owns"])
        started, cpu = time.perf_counter(), time.process_time()
        facts = kind.function()(context)
        costs = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_memory": peak_memory(self.machine["owns"]),
            "work": step["work"],
        }
        made = {"identity": step["identity"], "label": step["label"], "machine": self.machine}
        return store.commit(key, step["kind"], out, facts=facts or {}, costs=costs, made=made)


_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)  # libraries in other languages give only their text
_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc")


def describe(error: BaseException) -> dict[str, Any]:
    """How a failed step is reported: its status, the exception's type and first line, and whether the run must end."""
    name, text = type(error).__name__, " ".join(str(error).split())[:600]
    status = "failed"
    if isinstance(error, Unsupported):
        status = "unsupported"
    elif isinstance(error, StopError):
        status = "stop"
    elif isinstance(error, OSError) and error.errno in _DISK or any(words in text for words in map(os.strerror, _DISK)):
        what = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.filename else text
        status, text = "stop", f"The disk cannot be written: {what}."
    elif isinstance(error, Damaged):
        return {"status": "damaged", "type": name, "message": text, "damaged": error.key}
    elif isinstance(error, MemoryError) or any(words in text.lower() for words in _MEMORY):
        name, text = "OutOfMemory", f"Out of memory: {text or name}"
    elif isinstance(error, NotImplementedError) or " not implemented for '" in text or _not_ours(error):
        status, text = "unsupported", f"{name}: {text}"  # a library that is not there, or what it does not do on this device
    elif not isinstance(error, (StepFailed, InputError)):
        text = f"{name}: {text}"
    return {"status": status, "type": name, "message": text}


def _not_ours(error: BaseException) -> bool:
    """Whether it says that a library is missing or broken."""
    return isinstance(error, ImportError) and not str(error.name or "").startswith("cpet_")


def reset_peak(devices: Sequence[str]) -> None:
    """Start counting peak memory anew: of these devices, and of this process where the system can reset it.

    What earlier steps freed goes back to the system first, or it would be counted as this step's.
    """
    gc.collect()
    give_back()
    for device in devices:
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_memory(devices: Sequence[str]) -> int:
    """Peak bytes since reset_peak: allocated on GPUs, or resident in this process where there is none among `devices`."""
    gpus = [d for d in devices if d.startswith("cuda")]
    if gpus:
        import torch

        return sum(torch.cuda.max_memory_allocated(d) for d in gpus)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_now(devices: Sequence[str]) -> int:
    """Bytes allocated on GPUs now, or resident in this process."""
    gpus = [d for d in devices if d.startswith("cuda")]
    if gpus:
        import torch

        return sum(torch.cuda.memory_allocated(d) for d in gpus)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def main() -> None:
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(private)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: (worker.stopping.set(), worker.commands.put({"op": "stop"})))
    threading.Thread(target=worker.listen, daemon=True).start()
    worker.run()
    os._exit(0)  # nothing is left to save; taking torch down in good order takes a second


if __name__ == "__main__":
    main()
