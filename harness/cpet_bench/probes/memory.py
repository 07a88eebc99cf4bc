"""Memory of a deployment: what its weights take as they lie there, and the peaks while it ran."""

from __future__ import annotations

from typing import Any


def measure(model, load_seconds: float | None = None) -> dict[str, Any]:
    """`resident` (bytes of parameters and buffers as stored, each storage once), peaks since reset, `load` (seconds)."""
    from ..models.arch import resident_bytes
    from ..worker import peak_memory

    devices = sorted({str(p.device) for p in model.parameters()})
    found: dict[str, Any] = {"resident": {"value": resident_bytes(model), "unit": "bytes"}}
    if any(device.startswith("cuda") for device in devices):
        found["peak_device"] = {"value": peak_memory(devices), "unit": "bytes"}
    found["peak_process"] = {"value": peak_memory(["cpu"]), "unit": "bytes"}
    if load_seconds is not None:
        found["load"] = {"value": load_seconds, "unit": "s"}
    return found
