"""Compression backends: each a class with a settings model (docs/plugin.md), named in `registry`."""

from __future__ import annotations

from typing import Any

from .. import registry


def calibrated(backend: Any, settings: Any) -> bool:
    """Whether `compress` is to be given calibration documents: its `calibrated`, a constant or a function of the settings."""
    wanted = getattr(backend, "calibrated", False)
    return bool(wanted(settings) if callable(wanted) else wanted)


def narrows(name: str) -> bool:
    """Whether a backend may take inputs and outputs out of layers: its `narrows`."""
    return bool(getattr(registry.get("compression", name), "narrows", False))
