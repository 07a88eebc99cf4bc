"""Which devices and number format a run uses; found once per machine in a subprocess, then read from a small file."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError, StopError
from .keys import digest, version
from .settings import DeviceSettings


def cache_root() -> Path:
    """$CPET_BENCH_CACHE, else `cpet-bench` in the user's cache folder: downloads, indexes, what the machine is."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("CPET_BENCH_CACHE") or Path(cache, "cpet-bench")).expanduser()


def kept_index(name: str, script: str, what: str) -> Any:
    """What `script` prints as JSON in a fresh interpreter, asked once and kept in the cache folder as `name`.

    For facts that a heavy library owns (its version belongs into `name`), so that reading them never imports it.
    StopError names `what` could not be read.
    """
    kept = cache_root() / "indexes" / f"{name}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        pass
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StopError(f"{what} could not be read: {last}")
    found = json.loads(lines[-1])
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_name(f"{kept.name}.{os.getpid()}")
        fresh.write_text(json.dumps(found))
        os.replace(fresh, kept)
    except OSError:
        pass  # only slower the next time
    return found


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _fingerprint() -> str:
    nodes = sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*"))
    return digest([version("torch"), cpu_name(), os.cpu_count(), nodes, os.environ.get("CUDA_VISIBLE_DEVICES")])


def facts() -> dict[str, Any]:
    """{"devices": {"cpu": {...}, "cuda:0": {...}}}: each with its name, bytes of memory and best number format."""
    path = cache_root() / "machines" / f"{_fingerprint()}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass
    done = subprocess.run([sys.executable, "-m", "cpet_bench.devices"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        tail = done.stderr.strip().splitlines()[-1:] or ["no output"]
        raise StopError(f"torch cannot be used here: {tail[0]}")
    found = json.loads(done.stdout.splitlines()[-1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
    except OSError:
        pass  # found again next time
    return found


def workers(wanted: list[str], found: Mapping[str, Any]) -> list[str]:
    """One name per worker for what a matrix or `--devices` asks for.

    `auto`: every GPU, else the processor. `cpu:N`: N workers that share the processor. `cuda:0+cuda:1`: one worker that owns
    both, for a model too large for one. InputError for what is not there, twice, or of two kinds (their numbers differ); the
    caller knows its place.
    """

    def wrong(message: str, given: str) -> InputError:
        return InputError(message, given=given, allowed=[*found, "auto", "cpu:N"])

    if list(wanted) == ["auto"]:
        wanted = [d for d in found if d != "cpu"] or ["cpu"]
    names: list[str] = []
    for word in wanted:
        share = re.fullmatch(r"cpu:([1-9]\d{0,3})", word)
        if share and len(wanted) == 1:
            return ["cpu"] if share[1] == "1" else [f"cpu:{i}" for i in range(int(share[1]))]
        if kind(word) == "cpu" and len(wanted) > 1:
            raise wrong("The processor stands alone (cpu, or cpu:N for N workers): speeds of two kinds do not compare.", word)
        for part in word.split("+"):
            if part not in found or (part == "cpu" and part != word):
                raise wrong(f"There is no device {part!r} here.", part)
            if any(part in owns(name) for name in names) or word.split("+").count(part) > 1:
                raise wrong(f"{part} is named twice.", part)
        names.append(word)
    if not names:
        raise wrong("No device is named.", "")
    return names


def kind(worker: str) -> str:
    """`cpu` or `cuda`: the kind of device of a worker."""
    return worker.partition(":")[0]


def owns(worker: str) -> list[str]:
    """torch's names of the devices of a worker: cpu for `cpu:1`, both for `cuda:0+cuda:1`."""
    return ["cpu"] if kind(worker) == "cpu" else worker.split("+")


def shares(worker: str) -> str:
    """What a worker has to itself but for others of the same name here: the processor, or its own GPUs."""
    return "cpu" if kind(worker) == "cpu" else worker


def of_worker(machine: dict[str, Any], worker: str) -> dict[str, Any]:
    """`machine` as one worker sees it: `device` is torch's name, `owns` all that it has."""
    return {**machine, "device": owns(worker)[0], "owns": owns(worker), "worker": worker}


def resolve(settings: DeviceSettings) -> dict[str, Any]:
    """The machine a plan is made for: workers, kind of device, name, dtype, attention, threads, and the batch plan's size.

    `threads` are those of one worker; on a processor that several share, its own or the settings' are divided.
    """
    found = facts()["devices"]
    names = workers(settings.devices, found)
    cpu = kind(names[0]) == "cpu"
    first = found[owns(names[0])[0]]
    dtype = first["dtype"] if settings.dtype == "auto" else settings.dtype
    threads = settings.threads or (os.cpu_count() if cpu else None)
    return {
        "devices": names,
        "device": kind(names[0]),
        "name": first["name"],
        "dtype": dtype,
        "attention": settings.attention,
        "tf32": settings.tf32,
        "threads": max(1, threads // len(names)) if threads and cpu else threads,
        "tokens_per_batch": settings.tokens_per_batch,
        "deterministic": settings.deterministic,
    }


def _look() -> dict[str, Any]:
    import psutil
    import torch

    from .models.loading import pick_dtype

    memory = psutil.virtual_memory().total
    found = {"cpu": {"name": cpu_name(), "memory": memory, "dtype": pick_dtype("auto", "cpu")}}
    for i in range(torch.cuda.device_count()):
        facts_ = torch.cuda.get_device_properties(i)
        name = f"cuda:{i}"
        found[name] = {"name": facts_.name, "memory": facts_.total_memory, "dtype": pick_dtype("auto", name)}
    return {"devices": found}


if __name__ == "__main__":
    print(json.dumps(_look()))


def give_back() -> None:
    """Give memory that was freed back to the system; glibc keeps it, in pieces that later tensors do not fit into."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library
