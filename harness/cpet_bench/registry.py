"""One registry for everything that can be added: compression backends, PET methods, sources, probes, executors.

A built-in is named `module:Class` and imported when it is used, so that listing names never imports torch. A package
adds its own through an entry point of the group `cpet_bench.<kind>` (docs/plugin.md shows one, whole).
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from .errors import InputError

BUILTIN: dict[str, dict[str, str]] = {
    "compression": {
        "bitsandbytes": "cpet_bench.compression.bnb:BitsAndBytes",
        "depth": "cpet_bench.compression.depth:Depth",
        "gptq": "cpet_bench.compression.gptq:Gptq",
        "magnitude": "cpet_bench.compression.magnitude:Magnitude",
        "moefy": "cpet_bench.compression.moefy:Moefy",
        "rtn": "cpet_bench.compression.rtn:Rtn",
        "sparsegpt": "cpet_bench.compression.sparsegpt:SparseGpt",
        "structured": "cpet_bench.compression.structured:Structured",
        "student": "cpet_bench.compression.student:Student",
        "wanda": "cpet_bench.compression.wanda:Wanda",
    },
    "source": {
        "hf": "cpet_bench.models.sources:HubSource",
        "local": "cpet_bench.models.sources:LocalSource",
        "gguf": "cpet_bench.models.sources:GgufSource",
        "pypi": "cpet_bench.models.sources:PypiSource",
        "tiny": "cpet_bench.models.tiny:TinySource",
    },
    "executor": {"local": "cpet_bench.executors.local:LocalExecutor"},
}


@cache
def _found(kind: str) -> dict[str, Any]:
    named: dict[str, Any] = dict(BUILTIN.get(kind, {}))
    for point in entry_points(group=f"cpet_bench.{kind}"):
        named[point.name] = point
    return named


def names(kind: str) -> list[str]:
    """The names registered for `kind`, sorted; imports none of them."""
    return sorted(_found(kind))


@cache
def get(kind: str, name: str) -> Any:
    """The class registered as `name`; InputError with the nearest names where there is none."""
    found = _found(kind).get(name)
    if found is None:
        raise InputError(f"There is no {kind} named {name!r}.", given=name, allowed=names(kind))
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return found.load()
