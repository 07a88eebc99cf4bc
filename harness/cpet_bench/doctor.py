"""`doctor`: what works on this machine, found by trying it. Each group of tries has a process; nothing heavy is loaded here."""

from __future__ import annotations

import json
import os
import platform
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import registry
from .devices import cache_root, cpu_name
from .keys import version
from .recording import PACKAGES
from .store import default_root

LANES = (("core", "source"), ("compression", "pet"))  # groups of tries that run one after another; the lanes run at once
PATIENCE = 240.0  # seconds a try may be silent: on a busy machine importing torch alone can take a minute
CRASHES = 3  # after so many in one group, its other tries are not begun


class Child:
    """One process of tries: what it printed, line by line, and how it ended."""

    def __init__(self, group: str, folder: Path, skip: list[str], module: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `stop`)
        own = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
        own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # tiny models; several threads would wait for each other
        own |= {} if group == "source" else {"HF_HUB_OFFLINE": "1"}  # what lm-eval asks the hub for is not needed here
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, group, str(folder), *skip],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **own},
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put(None)

    def next(self) -> dict[str, Any] | None:
        """The next message; None where the process has ended, or was silent for too long."""
        try:
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            return None
        return None if line is None else json.loads(line)

    def stop(self) -> tuple[str, str]:
        """How it ended in words, and the end of what it printed."""
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        with self.errors:
            self.errors.seek(0)
            told = [line for line in self.errors if not line.startswith("Extension modules:")]  # the longest of a crash
            tail = "".join(told)[-3000:]
        if code is None:
            return f"no answer within {PATIENCE:.0f} s", tail
        if code < 0:
            return f"the process was ended by {signal.Signals(-code).name}", tail
        return f"the process ended with status {code}: {(tail.strip().splitlines() or ['no output'])[-1][:300]}", tail


def tries(
    group: str,
    folder: Path,
    module: str = "cpet_bench.doctor_tries",
    each: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Rows of one group of `module`. What takes the process down is a failed row, and the others are tried in a fresh one."""
    rows: list[dict[str, Any]] = []
    crashes = 0
    while True:
        child, begun, ended = Child(group, folder, [row["name"] for row in rows], module), None, False
        started = time.monotonic()
        while (message := child.next()) is not None:
            if "begin" in message:
                begun, started = message["begin"], time.monotonic()
            elif "row" in message:
                rows.append(message["row"])
                each(message["row"])
                begun = None
            else:
                ended = True
        how, tail = child.stop()
        if ended:
            return rows
        crashes += 1
        part, name = begun or (group, "(all others)" if rows else "(all)")
        seconds = round(time.monotonic() - started, 2)
        if child.process.returncode == -signal.SIGKILL and "no answer" not in how:
            how += " (out of memory?)"
        remedy = "reinstall the library that the trace (--json) names; leave it out of the matrix till then"
        rows.append({"part": part, "name": name, "state": "failed", "reason": how, "remedy": remedy, "seconds": seconds})
        rows[-1]["trace"] = tail
        if begun is None:
            return rows
        if crashes == CRASHES:
            reason = f"not tried: {CRASHES} tries of this group took their process down"
            rows.append({**rows[-1], "name": "(all others)", "reason": reason, "seconds": 0.0})
            return rows


def folders(store: str | None, runs: str) -> list[dict[str, Any]]:
    """Where things are kept: whether a file can be written there, and how many bytes are free."""
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface", "hub")
    wanted = {"store": store or default_root(), "cache": cache_root(), "runs": Path(runs).absolute(), "hub's cache": hub}
    found = []
    for what, place in wanted.items():
        row: dict[str, Any] = {"what": what, "path": str(place), "writable": None, "free": None, "reason": ""}
        found.append(row)
        if "://" in str(place):
            row["reason"] = "not on this machine's disks; not looked at"
            continue
        folder = Path(place).expanduser()
        while not folder.exists():  # it is made when it is needed: what counts is the nearest folder that is there
            folder = folder.parent
        try:
            row["free"] = shutil.disk_usage(folder).free
            probe = folder / f".cpet-doctor-{uuid.uuid4().hex}"
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
            row["writable"] = True
        except OSError as error:
            row |= {"writable": False, "reason": f"{folder}: {error.strerror or error}"}
    return found


def examine(store: str | None = None, runs: str = "runs") -> dict[str, Any]:
    """The whole report: {"ok", "devices", "versions", "folders", "rows"}; `ok` is whether the core works."""
    with tempfile.TemporaryDirectory(prefix="cpet-doctor-") as temporary:
        base = Path(temporary)

        def lane(groups: tuple[str, ...]) -> list[dict[str, Any]]:
            found = []
            for group in groups:
                folder = base / group
                folder.mkdir()
                found += tries(group, folder)
            return found

        with ThreadPoolExecutor(len(LANES)) as pool:
            rows = [row for found in pool.map(lane, LANES) for row in found]
        try:
            devices = json.loads((base / "core/devices.json").read_text())
        except (OSError, ValueError):
            devices = {}
    places = folders(store, runs)
    for place in places:
        if place["what"] == "store":
            state = "failed" if place["writable"] is False else "ok"
            remedy = "name another with --store or $CPET_BENCH_STORE" if state == "failed" else ""
            core = {"part": "core", "name": "store", "state": state, "reason": place["reason"] or "a file was written"}
            rows.append(core | {"remedy": remedy, "seconds": 0.0})
    order = {"core": 0, "compression": 1, "pet": 2, "source": 3}
    rows.sort(key=lambda row: order[row["part"]])
    core = [row for row in rows if row["part"] == "core"]
    more = [p for name in registry.names("compression") for p in _packages(name)]
    names = dict.fromkeys([*PACKAGES, *more])
    return {
        "ok": all(row["state"] == "ok" for row in core),
        "devices": devices,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "system": {"platform": platform.platform(), "processor": cpu_name(), "cores": os.cpu_count()},
        "folders": places,
        "rows": rows,
    }


def _packages(name: str) -> tuple[str, ...]:
    try:
        return tuple(registry.get("compression", name).packages)
    except BaseException:  # its row says so
        return ()
