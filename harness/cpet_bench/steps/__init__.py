"""The kinds of step and what each one's result depends on. Importing this loads none of the libraries they use."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..keys import digest, versions

TORCH = ("torch", "transformers")


@dataclass(frozen=True)
class Kind:
    """A kind of step.

    version: raised whenever a change of the source changes results; tests/unit/test_kinds.py holds it against `sources`.
    packages: those whose version shapes the result. run: `module:function`, called with a steps.context.Context.
    """

    name: str
    version: int
    packages: tuple[str, ...]
    run: str
    sources: tuple[str, ...]

    def source_hash(self) -> str:
        """Hash of the modules that make the result."""
        found = hashlib.sha256()
        for module in self.sources:
            found.update(Path(find_spec(f"cpet_bench.{module}").origin).read_bytes())
        return found.hexdigest()[:16]

    def function(self):
        module, _, name = self.run.partition(":")
        return getattr(importlib.import_module(f"cpet_bench.{module}"), name)


_ALL = [
    Kind("model", 1, (), "steps.models:run_model", ("models.sources", "models.pypi", "models.tiny")),
    Kind("compress", 1, TORCH, "steps.models:run_compress", ("models.loading", "models.arch")),
    Kind("pairs", 1, ("lm-eval", "transformers", "datasets"), "steps.data:run_pairs", ("evaluation.pairs",)),
    Kind("requests", 1, ("lm-eval", "transformers", "datasets"), "steps.data:run_requests", ("evaluation.requests",)),
    Kind("teacher", 1, (*TORCH, "peft"), "steps.tuning:run_teacher", ("restoring.distill",)),
    Kind("moments", 1, TORCH, "steps.tuning:run_moments", ("restoring.compensate",)),
    Kind("compensation", 1, TORCH, "steps.tuning:run_compensation", ("restoring.compensate",)),
    Kind("tune", 1, (*TORCH, "peft", "bitsandbytes"), "steps.tuning:run_tune", ("training", "restoring.recover")),
    Kind("responses", 1, (*TORCH, "peft"), "steps.scoring:run_responses", ("evaluation.scorer",)),
    Kind("metrics", 1, ("lm-eval",), "steps.data:run_metrics", ("evaluation.metrics", "stats")),
    Kind("probe", 1, (*TORCH, "peft"), "steps.scoring:run_probe", ("probes.throughput", "probes.memory")),
]
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}


@dataclass
class Step:
    """One unit of work. `settings` and `needs` (role → key) make the key; `params` are for this run alone."""

    kind: str
    settings: dict[str, Any]
    needs: dict[str, str]
    label: str
    versions: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    work: float = 1.0
    cells: list[str] = field(default_factory=list)
    key: str = ""

    def __post_init__(self):
        self.key = digest(self.identity())

    def identity(self) -> dict[str, Any]:
        """What the key is the hash of."""
        return {
            "kind": self.kind,
            "version": KINDS[self.kind].version,
            "settings": self.settings,
            "needs": self.needs,
            "versions": self.versions,
        }


def make_step(kind: str, settings: dict, needs: dict[str, str], label: str, *, packages=(), **rest) -> Step:
    """A Step with the versions of the packages that shape it; `packages` adds those of a backend."""
    return Step(kind, settings, needs, label, versions((*KINDS[kind].packages, *packages)), **rest)
