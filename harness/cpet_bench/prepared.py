"""A matrix made ready to run: cells, steps, what is missing, what it takes, and what is left for a later run."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from . import choice, devices, registry
from .cells import expand
from .compression.sizes import LIBRARIES, ModelSize
from .errors import InputError
from .estimates import Estimates
from .fitting import Unfit, check_teachers, unfit
from .folders import read_json
from .known_rates import known_rates
from .matrix import Matrix, load_matrix
from .plan import Plan, Planner
from .settings import seconds_of
from .steps import Step
from .store import Store


@dataclass
class Prepared:
    """A matrix made ready to run: cells, steps, where results go, and what each step is estimated to take."""

    matrix: Matrix
    plan: Plan
    store: Store
    machine: dict[str, Any]
    folder: Path
    estimates: Estimates
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # cell id → why it is left for a later run
    budget: float | None = None  # seconds after which no further step is begun
    known: dict[str, dict[str, Any]] = field(default_factory=dict)  # key of a `rate` step → facts an earlier run states
    unfit: Unfit = field(default_factory=dict)  # what of the matrix a model cannot take, and why
    _sizes: dict[str, ModelSize | None] = field(default_factory=dict)  # by the key of a model's step

    @cached_property
    def recorded(self) -> dict[str, str]:
        """Cells whose record already says how they end with these very keys (id → done or unsupported)."""
        found = {}
        for cell_id, roles in self.plan.roles.items():
            old = read_json(self.folder / "records" / f"{cell_id}.json")
            if not isinstance(old, dict) or old.get("status") not in ("done", "unsupported"):
                continue
            kept = old["status"] != "done" or (self.folder / "outcomes" / f"{cell_id}.parquet").exists()
            if kept and (old.get("provenance") or {}).get("keys") == roles:
                found[cell_id] = old["status"]
        return found

    def has(self, key: str) -> bool:
        """Whether a step's result is there: in the store, or stated by an earlier run."""
        return key in self.known or self.store.has(key)

    def missing(self) -> list[str]:
        """Keys of steps that must run: not in the store, and needed by a result that is neither there nor recorded."""
        wanted: set[str] = set()
        open_ = (roles for i, roles in self.plan.roles.items() if i not in self.recorded and i not in self.left_out)
        stack = [key for roles in open_ for key in roles.values()]
        while stack:
            key = stack.pop()
            if key not in wanted and not self.has(key):
                wanted.add(key)
                stack.extend(self.plan.steps[key].needs.values())
        return [key for key in self.plan.steps if key in wanted]

    def choose(self, part: str | None, seed: int, budget: str | None) -> None:
        """Leave cells out: all but a balanced part of them, then those that do not fit into the time."""
        if part is not None:
            kept = choice.sample(self.plan.cells, choice.share(part), seed)
            self.left_out = {cell.id: f"left out by --sample {part}" for cell in self.plan.cells if cell.id not in kept}
        if budget is None:
            return
        try:
            self.budget = seconds_of(budget)
        except ValueError as error:
            raise InputError(f"{error}.", key="--budget") from None
        missing = self.missing()
        asked = [c for c in choice.useful(self.plan, missing, self.seconds) if c.id not in self.left_out]
        clock = choice.Clock(self.plan, missing, self.seconds, self.machine)
        fits = choice.within(self.plan, asked, missing, clock, self.budget)
        self.left_out |= {cell.id: f"left out by --budget {budget}" for cell in asked if cell.id not in fits}

    def memory(self, step: Step) -> float:
        """Bytes that a step takes: of a compression by its backend's formula, where the model is there to be looked at."""
        found = None
        if step.kind == "compress":
            backend = registry.get("compression", step.settings["backend"])
            size = self.size(step)
            if size is not None and hasattr(backend, "memory"):
                settings = backend.Settings.model_validate(step.settings["settings"])
                found = backend.memory(settings, size) + (LIBRARIES if self.machine["device"] == "cpu" else 0)
        return self.estimates.memory(step) if found is None else found

    def size(self, step: Step) -> ModelSize | None:
        """The sizes of the model that a compression, or the first of a mixture, starts from."""
        while step.kind == "compress":
            step = self.plan.steps[step.needs["source"]]
        if step.key not in self._sizes:
            folder = self.model_folder(step)
            self._sizes[step.key] = ModelSize.of(folder) if folder else None
        return self._sizes[step.key]

    def model_folder(self, step: Step) -> Path | None:
        """Where the files of a model lie; None where they are still to be fetched."""
        manifest = self.store.manifest(step.key)
        scheme, _, rest = step.params["model"]["source"].partition(":")
        if manifest is None and scheme == "local":
            return Path(step.params["base"], rest)
        if manifest is not None and "path" in manifest.facts:
            return Path(manifest.facts["path"])
        if manifest is not None and self.store.local:
            return self.store.materialise(step.key, verify=False)
        return None

    def time_needed(self, missing: list[str]) -> float:
        """Seconds that running these steps takes at least, by the estimates, on the workers there are."""
        return choice.Clock(self.plan, missing, self.seconds, self.machine).after(missing) if missing else 0.0


def prepare(
    path: str | Path | Matrix,
    *,
    only: tuple[str, ...] = (),
    store: str | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    device: list[str] | None = None,
    cells: Collection[str] | None = None,
    sample: str | None = None,
    sample_seed: int = 0,
    budget: str | None = None,
    rates: Collection[str | Path] = (),
) -> Prepared:
    """Read and check a matrix and plan it. Raises InputError for whatever is wrong with it, before any work.

    only: rules AXIS=NAME. cells: ids of those to plan (None: all). device: names of devices instead of the matrix's.
    sample: a balanced part of the cells, as in `20%`; budget: the time to spend, as in `2h`. What these two leave out is
    pending in the records. rates: runs whose records state choices of rates that hold here too.
    """
    matrix = path if isinstance(path, Matrix) else load_matrix(Path(path), only=list(only))
    chosen = [cell for cell in expand(matrix) if cells is None or cell.id in cells]
    settings = matrix.device if device is None else matrix.device.model_copy(update={"devices": device})
    try:
        machine = devices.resolve(settings) | ({"allow_code": True} if matrix.allow_code else {})
    except InputError as error:
        placed = matrix.place(error, "device", "devices") if device is None else error.at(key="--devices")
        raise placed from None
    plan = Planner(matrix, machine).build(chosen)
    name = name or matrix.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name):
        raise InputError(f"A run cannot be named {name!r}: letters, digits and _ . + - only.", key="--name")
    opened = Store(store)
    estimates = Estimates(opened)
    seconds = {key: estimates.seconds(step) for key, step in plan.steps.items()}
    ready = Prepared(matrix, plan, opened, machine, Path(runs) / name, estimates, seconds, known=known_rates(plan, rates))
    check_teachers(ready)
    ready.unfit = unfit(ready)
    ready.choose(sample, sample_seed, budget)
    return ready
