"""The kinds of step and what each one's result depends on. Importing this loads none of the libraries they use."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..keys import Fixed, fixed, versions

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


def _kind(name: str, version: int, packages: tuple[str, ...], run: str, *sources: str) -> Kind:
    return Kind(name, version, packages, f"steps.{run}", (*sources, f"steps.{run.partition(':')[0]}"))


_TEXT = ("lm-eval", "transformers", "datasets")
_TASKS = ("evaluation.tasks", "evaluation.task_files", "evaluation.encoding", "evaluation.requests")
_SCORING = tuple(f"evaluation.{m}" for m in ("scorer", "batching", "forward", "generation"))
_PASS = ("training_model", "training_rows", "models.arch")
_TRAIN = ("training", "training_losses", "training_masters", "training_scale", "training_state", "training_stopping", *_PASS)
_MORE = ("restoring.cuts", "restoring.inheriting", "restoring.projection", "restoring.layerwise")
_SEQUENTIAL = ("restoring.sequential", "restoring.recover", "compression.blockwise", "models.passes")
_START = ("restoring.compensate", "restoring.lost_inputs", "restoring.cuts", "models.arch", *_SEQUENTIAL)
_RESTORE = ("restoring.recover", "restoring.fairness", *_MORE)
_TUNE = (*_TRAIN, "pet.methods", "pet.nola", "pet.whole", "pet.prompts", "pet.allocating", *_RESTORE)
_METRICS = ("evaluation.metrics", "evaluation.intervals", "stats")
_ALL = [
    _kind("model", 1, (), "models:run_model", "models.sources", "models.pypi", "models.tiny"),
    _kind("compress", 1, TORCH, "models:run_compress", "models.loading", "models.arch", "models.routers", "compression.masks"),
    _kind("pairs", 1, _TEXT, "data:run_pairs", "evaluation.pairs", *_TASKS),
    _kind("requests", 1, _TEXT, "data:run_requests", *_TASKS),
    _kind(
        "teacher", 1, (*TORCH, "peft"), "tuning:run_teacher", "restoring.distill", "restoring.layerwise", "deployment", *_PASS
    ),
    _kind("moments", 1, TORCH, "tuning:run_moments", "restoring.compensate", "models.passes", "models.arch"),
    _kind("compensation", 1, TORCH, "tuning:run_compensation", *_START),
    _kind("tune", 1, (*TORCH, "peft", "bitsandbytes"), "tuning:run_tune", *_TUNE),
    _kind(
        "trial",
        1,
        (*TORCH, "peft", "bitsandbytes", "lm-eval"),
        "selecting:run_trial",
        *("steps.tuning", "steps.scoring", "steps.data", *_TUNE, "deployment", *_SCORING, *_METRICS),
    ),
    _kind("select", 1, (), "selecting:run_select"),
    _kind("rate", 1, (), "selecting:run_rate"),
    _kind("responses", 1, (*TORCH, "peft"), "scoring:run_responses", "deployment", *_SCORING),
    _kind("metrics", 1, ("lm-eval",), "data:run_metrics", *_METRICS),
    _kind("probe", 1, (*TORCH, "peft"), "scoring:run_probe", "probes.throughput", "probes.memory"),
]
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}


@dataclass(slots=True)
class Step:
    """One unit of work. Kind, settings, needs (role → key) and package versions make the key; `params` do not."""

    kind: str
    fixed: Fixed
    needs: dict[str, str]
    label: str
    shaped_by: Fixed  # versions of packages
    params: dict[str, Any] = field(default_factory=dict)
    work: float = 1.0
    key: str = ""

    def __post_init__(self):
        needs = [f"{role}={self.needs[role]}" for role in sorted(self.needs)]
        parts = [self.kind, str(KINDS[self.kind].version), self.fixed.digest, self.shaped_by.digest, *needs]
        self.key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @property
    def settings(self) -> dict[str, Any]:
        return self.fixed.value

    @property
    def versions(self) -> dict[str, str]:
        return self.shaped_by.value

    def identity(self) -> dict[str, Any]:
        """What makes the key, in full (the key hashes settings and versions by their own hashes)."""
        return {
            "kind": self.kind,
            "version": KINDS[self.kind].version,
            "settings": self.settings,
            "needs": self.needs,
            "versions": self.versions,
        }


@cache
def _versions(kind: str, packages: tuple[str, ...]) -> Fixed:
    return fixed(versions((*KINDS[kind].packages, *packages)))


def make_step(kind: str, settings: Fixed | dict, needs: dict[str, str], label: str, *, packages=(), **rest) -> Step:
    """A Step with the versions of the packages that shape it; `packages` adds those of a backend."""
    settings = settings if isinstance(settings, Fixed) else fixed(settings)
    return Step(kind, settings, needs, label, _versions(kind, tuple(packages)), **rest)
