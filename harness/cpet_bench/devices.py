"""Which devices and number format a run uses; found once per machine in a subprocess, then read from a small file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
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


def resolve(settings: DeviceSettings) -> dict[str, Any]:
    """The machine a plan is made for: device(s), name, dtype, attention, threads, and the batch plan's size."""
    found = facts()["devices"]
    wanted = list(settings.devices)
    if wanted == ["auto"]:
        wanted = [d for d in found if d != "cpu"] or ["cpu"]
    for device in wanted:
        if device not in found:
            raise InputError(f"There is no device {device!r} here.", key="device.devices", given=device, allowed=found)
    first = found[wanted[0]]
    dtype = first["dtype"] if settings.dtype == "auto" else settings.dtype
    return {
        "devices": wanted,
        "device": wanted[0].split(":")[0],
        "name": first["name"],
        "dtype": dtype,
        "attention": settings.attention,
        "tf32": settings.tf32,
        "threads": settings.threads or (os.cpu_count() if wanted[0] == "cpu" else None),
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
