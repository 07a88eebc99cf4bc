"""The plan: cells become steps that share whatever their keys say is the same.

Nothing here imports torch, lm-eval or PEFT: a plan of a matrix whose results are all in the store takes milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import registry
from .cells import Cell
from .errors import InputError
from .evaluation.tasks import task_spec
from .keys import canonical, plain
from .matrix import Matrix
from .settings import CalibrationSettings, DistillSettings, TaskSettings, TrainSettings
from .steps import Step, make_step


@dataclass
class Plan:
    """Steps by key, in an order in which each stands after what it needs, and what each cell is made of."""

    steps: dict[str, Step] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    roles: dict[str, dict[str, str]] = field(default_factory=dict)  # cell id → role → step key

    def closure(self, keys) -> list[str]:
        """`keys` and everything they need, in plan order."""
        wanted: set[str] = set()
        stack = list(keys)
        while stack:
            key = stack.pop()
            if key not in wanted:
                wanted.add(key)
                stack.extend(self.steps[key].needs.values())
        return [key for key in self.steps if key in wanted]


class Planner:
    """Turns the cells of a matrix into steps. `machine` is what devices.resolve found: device, dtype, attention, threads."""

    def __init__(self, matrix: Matrix, machine: dict[str, Any]):
        self.matrix, self.machine = matrix, machine
        self.base, self.allow_code = matrix.path.parent, matrix.allow_code
        self.plan = Plan()
        self._cache: dict[str, Any] = {}

    def build(self, cells: list[Cell]) -> Plan:
        for cell in cells:
            self.plan.cells.append(cell)
            self.plan.roles[cell.id] = self._cell(cell)
        return self.plan

    # -- pieces --------------------------------------------------------------------------------------------------
    def _memo(self, name: str, value: Any, place: tuple[str, str], make):
        """What `make` gives, once for each `value`; its InputError gets the place in the matrix it is about."""
        at = f"{name}:{canonical(value)}"
        if at not in self._cache:
            try:
                self._cache[at] = make()
            except InputError as error:
                raise self.matrix.place(error, *place) from None
        return self._cache[at]

    def _add(self, cell: Cell, kind: str, settings: dict, needs: dict[str, str], label: str, **rest) -> str:
        step = make_step(kind, plain(settings), needs, label, **rest)
        step = self.plan.steps.setdefault(step.key, step)
        if not step.cells or step.cells[-1] != cell.id:
            step.cells.append(cell.id)
        return step.key

    def _numeric(self) -> dict[str, Any]:
        """What of the machine shapes numbers."""
        return {"dtype": self.machine["dtype"], "attention": self.machine["attention"], "tf32": self.machine["tf32"]}

    def _spec(self, cell: Cell, task: TaskSettings, name: str) -> dict:
        place = ("task", cell.axes["task"])
        return self._memo("spec", [task, name], place, lambda: task_spec(task, name, self.base, self.allow_code))

    def _model(self, cell: Cell) -> str:
        source = registry.get("source", cell.model.source.partition(":")[0])
        identity = self._memo(
            "identity", cell.model, ("model", cell.axes["model"]), lambda: source().identity(cell.model, self.base)
        )
        params = {"model": plain(cell.model), "base": str(self.base), "allow_code": self.allow_code}
        return self._add(cell, "model", identity, {}, f"model {cell.axes['model']}", params=params)

    def _pairs(self, cell: Cell, documents: int, max_tokens: int, task: str | None = None) -> str:
        data = cell.task.train_data if task is None else None
        name = task or (data.task if data and data.task else cell.task_name)
        spec = self._spec(cell, TaskSettings(include=cell.task.include), name)
        other = data if data and not data.task else None
        settings = {
            "spec": spec,
            "train_data": other,
            "split": data.split if data else "train",
            "prompt": cell.prompt,
            "documents": documents,
            "max_tokens": max_tokens,
        }
        if other and other.jsonl:
            settings["content"] = self._memo(
                "file", other.jsonl, ("task", cell.axes["task"]), lambda: _content(self.base / other.jsonl)
            )
        needs = {"tokenizer": self._model(cell)}
        params = {"base": str(self.base)}
        label = f"training text of {name} ({documents})"
        return self._add(cell, "pairs", settings, needs, label, params=params, work=documents)

    def _calibration(self, cell: Cell, calibration: CalibrationSettings) -> str:
        return self._pairs(cell, calibration.documents, calibration.max_tokens, calibration.task)

    def _compressed(self, cell: Cell) -> str:
        key = self._model(cell)
        for i, choice in enumerate(cell.compression):
            backend = registry.get("compression", choice.name)
            settings = {
                "backend": choice.name,
                "backend_version": backend.version,
                "settings": choice.settings,
            }
            needs = {"source": key}
            if getattr(backend, "calibrated", False):
                needs["examples"] = self._calibration(cell, choice.settings.calibration)
                settings |= self._numeric()
            label = f"compress {cell.axes['model']} by {choice.name}"
            if len(cell.compression) > 1:
                label += f" ({i + 1} of {len(cell.compression)})"
            key = self._add(cell, "compress", settings, needs, label, packages=backend.packages)
        return key

    def _tune(self, cell: Cell) -> str:
        restoring, train = cell.restoring, cell.train
        settings: dict[str, Any] = {
            "pet": {"method": cell.pet.method, **cell.pet.fields},
            "train": _shaping(train),
            "seed": cell.seed,
            **self._numeric(),
        }
        needs = {
            "model": self._compressed(cell),
            "pairs": self._pairs(cell, train.documents, train.max_tokens),
        }
        params: dict[str, Any] = {"checkpoint_every": train.checkpoint_every}
        if restoring.inherit:
            if restoring.inherit.from_:
                settings["inherit"] = restoring.inherit.from_
                params["base"] = str(self.base)
            else:
                needs["inherit"] = self._tune(cell.dense)
        if restoring.recover:
            settings["recover"] = {"r": restoring.recover.r, "scale": restoring.recover.scale, "act": restoring.recover.act}
            if restoring.recover.init != "zero":
                needs["init"] = self._compensation(cell)
        if restoring.distill:
            settings["distill"] = restoring.distill
            needs["features"] = self._teacher(cell, restoring.distill)
        if restoring.control:
            settings["control"] = control_settings(cell)
        label = f"tune {_name(cell)}"
        work = train.steps * train.batch
        return self._add(cell, "tune", settings, needs, label, params=params, work=max(work, 1))

    def _teacher(self, cell: Cell, distill: DistillSettings) -> str:
        order = {k: getattr(cell.train, k) for k in ("steps", "batch", "order_seed", "max_tokens")}
        if cell.restoring.control == "longer":
            order["steps"] += cell.dense.train.steps
        settings = {
            "hidden": distill.hidden,
            "top_k": distill.kl.top_k if distill.kl else None,
            "order": order,
            **self._numeric(),
        }
        needs = {
            "model": self._model(cell) if distill.teacher == "dense" else self._compressed(cell),
            "adapter": self._tune(cell.dense),
            "pairs": self._pairs(cell, cell.train.documents, cell.train.max_tokens),
        }
        work = cell.train.steps * cell.train.batch
        return self._add(cell, "teacher", settings, needs, f"teacher of {_name(cell.dense)}", work=work)

    def _compensation(self, cell: Cell) -> str:
        recover = cell.restoring.recover
        compressed = self._compressed(cell)
        needs = {"dense": self._model(cell), "model": compressed}
        if recover.init == "eora":
            calibration = recover.calibration
            own = {"documents": calibration.documents, "max_tokens": calibration.max_tokens, "seed": calibration.seed}
            inner = {"model": compressed, "pairs": self._calibration(cell, calibration)}
            label = f"input moments of {cell.axes['model']} {cell.axes['compression']}"
            needs["moments"] = self._add(
                cell, "moments", own | self._numeric(), inner, label, work=calibration.documents
            )
        settings = {"method": recover.init, "r": recover.r, "scale": recover.scale}
        label = f"{recover.init} start for {cell.axes['model']} {cell.axes['compression']}"
        return self._add(cell, "compensation", settings, needs, label)

    def _probe(self, cell: Cell) -> str:
        structure, packages = [], []
        for choice in cell.compression:
            backend = registry.get("compression", choice.name)
            shape = backend.structure(choice.settings)
            if shape:
                structure.append({choice.name: shape})
                packages.extend(backend.packages)
        settings = {
            "probes": cell.probes,
            "structure": structure,
            "pet": {"method": cell.pet.method, **cell.pet.fields} if cell.pet else None,
            "machine": {k: self.machine[k] for k in ("device", "name", "dtype", "attention", "tf32", "threads")},
        }
        if cell.restoring and cell.restoring.recover:
            settings["recover"] = {"r": cell.restoring.recover.r, "act": cell.restoring.recover.act}
        if cell.restoring and cell.restoring.control:
            settings["control"] = {k: v for k, v in control_settings(cell).items() if k != "extra_steps"}
        needs = {"model": self._compressed(cell) if structure else self._model(cell)}
        return self._add(cell, "probe", settings, needs, f"probe {_structure_name(cell)}", packages=packages)

    def _cell(self, cell: Cell) -> dict[str, str]:
        roles = {"model": self._model(cell)}
        if cell.compression:
            roles["compress"] = self._compressed(cell)
        if cell.pet:
            roles["tune"] = self._tune(cell)
            if cell.restoring.inherit or cell.restoring.distill:
                roles["dense_tune"] = self._tune(cell.dense)
        spec, tokenizer = self._spec(cell, cell.task, cell.task_name), {"tokenizer": roles["model"]}
        shared = {"spec": spec, "prompt": cell.prompt, "limit": cell.task.limit}
        limit = cell.task.limit or 1000
        task = cell.axes["task"]
        requests = self._add(cell, "requests", shared, tokenizer, f"requests of {task}", work=limit)
        needs = {"model": roles.get("compress", roles["model"]), "requests": requests}
        if "tune" in roles:
            needs["adapter"] = roles["tune"]
        own = {"tokens_per_batch": self.machine["tokens_per_batch"], **self._numeric()}
        roles["responses"] = self._add(cell, "responses", own, needs, f"score {_name(cell)}", work=limit)
        needs = {"requests": requests, "responses": roles["responses"], **tokenizer}
        roles["metrics"] = self._add(cell, "metrics", shared, needs, f"metrics {_name(cell)}", work=limit)
        if cell.probes.throughput or cell.probes.memory:
            roles["probe"] = self._probe(cell)
        return roles


def control_settings(cell: Cell) -> dict[str, Any]:
    """What a control is matched to: the parts of cell `of` that have parameters, and D's steps where they are added."""
    other = cell.control_of
    recover = other.restoring.recover
    found = {
        "control": cell.restoring.control,
        "pet": {"method": other.pet.method, **other.pet.fields},
        "recover": {"r": recover.r} if recover else None,
    }
    if cell.restoring.control == "longer":
        found["extra_steps"] = cell.dense.train.steps
    return found


def _shaping(train: TrainSettings) -> dict[str, Any]:
    return {k: v for k, v in plain(train).items() if k != "checkpoint_every"}


def _content(path: Path) -> str:
    from .store import sha256_file

    if not path.is_file():
        raise InputError(f"There is no file {path}.", key="train_data.jsonl")
    return sha256_file(path)


def _name(cell: Cell) -> str:
    return " ".join(str(v) for k, v in cell.axes.items() if k != "task")


def _structure_name(cell: Cell) -> str:
    return " ".join(str(cell.axes[k]) for k in ("model", "compression", "pet", "restoring"))
