"""The plan: cells become steps that share whatever their keys say is the same.

Nothing here imports torch, lm-eval or PEFT: a plan of a matrix whose results are all in the store takes milliseconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

from . import plan_parts, registry
from .cells import Cell
from .compression import calibrated, narrows
from .errors import InputError
from .evaluation.tasks import portable, task_spec
from .keys import Fixed, fixed, plain
from .matrix import AXES, Matrix
from .models.sources import adapter_identity
from .pet.given import check_local
from .pet.own import plain_name
from .pet.rewriting import as_saved, rewrites
from .plan_parts import adalora_settings, content_of, control_settings, cut_by, order_settings, replaces_weights, resized
from .plan_select import choose
from .settings import CalibrationSettings, DistillSettings, RecoverSettings, TaskSettings, TrainSettings
from .steps import Step, make_step


@dataclass
class Plan:
    """Steps by key, in an order in which each stands after what it needs, and what each cell is made of."""

    steps: dict[str, Step] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    roles: dict[str, dict[str, str]] = field(default_factory=dict)  # cell id → role → step key

    @cached_property
    def order(self) -> dict[str, int]:
        """Place of each step in the plan's order."""
        return {key: i for i, key in enumerate(self.steps)}

    def closure(self, keys) -> list[str]:
        """`keys` and everything they need, in plan order."""
        wanted: set[str] = set()
        stack = list(keys)
        while stack:
            key = stack.pop()
            if key not in wanted:
                wanted.add(key)
                stack.extend(self.steps[key].needs.values())
        return sorted(wanted, key=self.order.__getitem__)

    def users(self) -> Counter[str]:
        """How many cells each step is for."""
        return Counter(key for roles in self.roles.values() for key in self.closure(roles.values()))


def once(*axes: str):
    """A Planner's method whose result depends on these axes of the cell (and its other arguments) alone."""

    def wrap(method):
        name = method.__name__

        @wraps(method)
        def inner(self, cell: Cell, *args):
            at = (name, *[cell.axes[a] for a in axes], *args)
            found = self._made.get(at)
            if found is None:
                found = self._made[at] = method(self, cell, *args)
            return found

        return inner

    return wrap


class Planner:
    """Turns the cells of a matrix into steps. `machine` is what devices.resolve found: device, dtype, attention, threads."""

    def __init__(self, matrix: Matrix, machine: dict[str, Any]):
        self.matrix, self.machine = matrix, machine
        self.base, self.allow_code = matrix.path.parent, matrix.allow_code
        self.plan = Plan()
        self._made: dict[tuple, Any] = {}
        # What of the machine shapes numbers. Number formats add up differently on a processor and on a GPU.
        self.numeric = {k: machine[k] for k in ("dtype", "attention", "tf32")} | {"device": machine["device"]}
        self.scoring = fixed({"tokens_per_batch": machine["tokens_per_batch"], **self.numeric})

    def build(self, cells: list[Cell]) -> Plan:
        for cell in cells:
            self.plan.cells.append(cell)
            self.plan.roles[cell.id] = self._cell(cell)
        return self.plan

    # -- pieces --------------------------------------------------------------------------------------------------
    def add(self, kind: str, settings: Fixed | dict, needs: dict[str, str], label: str, **rest) -> str:
        step = make_step(kind, settings, needs, label, **rest)
        self.plan.steps.setdefault(step.key, step)
        return step.key

    def _placed(self, make, *place: str):
        """What `make` gives; its InputError gets the place in the matrix it is about."""
        try:
            return make()
        except InputError as error:
            raise self.matrix.place(error, *place) from None

    def name(self, cell: Cell) -> str:
        """A cell's names; the task's only where there are several."""
        skip = "task" if len(self.matrix.task) == 1 else None
        return " ".join(f"s{v}" if k == "seed" else str(v) for k, v in cell.axes.items() if k != skip)

    @once("task")
    def _spec(
        self, cell: Cell, other: str | None = None, split: str | None = None, place: tuple[str, ...] = ()
    ) -> tuple[dict, dict]:
        """The spec of the cell's task, or of another one that its files or lm-eval know; and params: where its folder is.

        split: one to score instead of the one that the task says. place: where the matrix names the other one.
        """
        task = TaskSettings(include=cell.task.include) if other else cell.task
        task = task.model_copy(update={"split": split}) if split else task
        name = other or cell.task_name
        spec = self._placed(lambda: task_spec(task, name, self.base, self.allow_code), *(place or ("task", cell.axes["task"])))
        spec, folder = portable(spec)
        return spec, {"task_folder": folder} if folder else {}

    @once("model")
    def model(self, cell: Cell) -> str:
        source = registry.get("source", cell.model.source.partition(":")[0])
        identity = self._placed(lambda: source().identity(cell.model, self.base), "model", cell.axes["model"])
        params = {"model": plain(cell.model), "base": str(self.base), "allow_code": self.allow_code}
        return self.add("model", identity, {}, f"model {cell.axes['model']}", params=params)

    @once("model", "task")
    def _pairs(self, cell: Cell, documents: int, max_tokens: int, task: str | None = None) -> str:
        data = cell.task.train_data if task is None else None
        name = task or (data.task if data and data.task else cell.task_name)
        other = data if data and not data.task else None
        spec, where = self._spec(cell, name)
        if other:  # the same rows are the same training data whatever task is then scored
            spec, where, name = None, {}, other.jsonl or other.dataset
        settings = {
            "spec": spec,
            "train_data": other and {k: v for k, v in plain(other).items() if v is not None},
            "split": data.split if data else "train",
            "prompt": cell.prompt,
            "documents": documents,
            "max_tokens": max_tokens,
        }
        if other and other.jsonl:
            file = self.base / other.jsonl
            settings["content"] = self._placed(lambda: content_of(file), "task", cell.axes["task"], "train_data", "jsonl")
        needs = {"tokenizer": self.model(cell)}
        label = f"training text of {name} ({documents})"
        return self.add("pairs", settings, needs, label, params={"base": str(self.base), **where}, work=documents)

    def _calibration(self, cell: Cell, calibration: CalibrationSettings, *place: str) -> str:
        """Training text for `calibration`, which stands at `place` in the matrix."""
        if calibration.task:
            self._spec(cell, calibration.task, None, (*place, "task"))
        return self._pairs(cell, calibration.documents, calibration.max_tokens, calibration.task)

    @once("model", "compression", "task")
    def _compressed(self, cell: Cell) -> str:
        key = self.model(cell)
        for i, choice in enumerate(cell.compression):
            backend = registry.get("compression", choice.name)
            settings = {
                "backend": choice.name,
                "backend_version": backend.version,
                "settings": choice.settings,
            }
            needs = {"source": key}
            if calibrated(backend, choice.settings):
                place = ("compression", cell.axes["compression"], *([i] if len(cell.compression) > 1 else []))
                needs["examples"] = self._calibration(cell, choice.settings.calibration, *place, "calibration")
                settings |= self.numeric
            label = f"compress {cell.axes['model']} to {cell.axes['compression']}"
            if len(cell.compression) > 1:
                label += f" ({i + 1} of {len(cell.compression)}, {choice.name})"
            work = backend.work(choice.settings) if hasattr(backend, "work") else 0.0
            key = self.add("compress", settings, needs, label, packages=backend.packages, work=work)
        return key

    @once("compression", "pet", "restoring", "task", "seed")
    def _tune_settings(self, cell: Cell) -> Fixed:
        restoring = cell.restoring
        settings: dict[str, Any] = {
            "pet": {"method": cell.pet.method, **cell.pet.fields},
            "train": {k: v for k, v in plain(cell.train).items() if k != "checkpoint_every"},
            "seed": cell.seed,
            **self.numeric,
        }
        if restoring.inherit and restoring.inherit.from_:
            place = ("restoring", cell.axes["restoring"], "inherit", "from")
            settings["inherit"] = self._placed(lambda: adapter_identity(restoring.inherit.from_, self.base), *place)
            self._placed(lambda: check_local(restoring.inherit.from_, self.base, cell.pet), *place)
        if restoring.recover:
            settings["recover"] = {"r": restoring.recover.r, "scale": restoring.recover.scale, "act": restoring.recover.act}
        if restoring.distill:
            # which model a teacher is enters by the step that makes its features, not by its name
            other = not isinstance(restoring.distill.teacher, str)
            settings["distill"] = restoring.distill.model_copy(update={"teacher": "dense"}) if other else restoring.distill
        if restoring.control:
            settings["control"] = self._control(cell)
        elif plain_name(cell.pet.method) == "adalora":
            settings["adalora"] = self._placed(lambda: adalora_settings(cell), "pet", cell.axes["pet"], "total_step")
        if replaces_weights(cell.pet):
            settings["masters"] = "float32"
        if rewrites(cell.pet.fields):
            settings["kept_as"] = "lora"  # earlier versions kept factors that meant nothing without their start
        return fixed(settings)

    @once(*AXES)
    def _tune(self, cell: Cell) -> str:
        if cell.select is None:
            settings, needs, params, work = self.training(cell)
        else:
            chosen = self._chosen(cell.first)
            if cell is cell.first:
                return chosen
            settings, needs, params, work = self.training(cell, {})
            label = f"the rate chosen for {self.name(cell.first)}"
            needs["rate"] = self.add("rate", {}, {"select": chosen}, label)
        return self.add("tune", settings, needs, f"tune {self.name(cell)}", params=params, work=work)

    @once("model", "compression", "pet", "restoring", "task")
    def _chosen(self, cell: Cell) -> str:
        return choose(self, cell)

    def training(self, cell: Cell, chosen: dict[str, float] | None = None) -> tuple[Fixed | dict, dict, dict, int]:
        """Settings, needs, params and work of the step that trains a cell.

        chosen: rate and weight of distillation in place of the cell's own; what is missing in it is left to another step.
        """
        restoring, train = cell.restoring, cell.train
        needs = {
            "model": self._compressed(cell),
            "pairs": self._pairs(cell, train.documents, train.max_tokens),
        }
        params: dict[str, Any] = {"checkpoint_every": train.checkpoint_every}
        if restoring.inherit:
            needs |= self._cut(cell, params)
            if restoring.inherit.from_:
                params |= {"base": str(self.base), "inherit": restoring.inherit.from_}
            else:
                needs["inherit"] = self._tune(cell.dense)
        if restoring.recover and restoring.recover.init != "zero":
            needs["init"] = self._compensation(cell, restoring.recover)
        if restoring.control:
            needs |= self._sized(cell, params, len(cell.compression))
        if restoring.distill:
            needs["features"] = self._teacher(cell, restoring.distill)
            if restoring.distill.layers == "all":  # the teacher itself as well, should its features be too many to be kept
                needs |= self._cut(cell, params)
                needs["teacher"] = self._compressed(cell) if restoring.distill.teacher == "compressed" else self.model(cell)
                needs["teacher_adapter"] = self._tune(cell.dense)
        settings = self._tune_settings(cell)
        if chosen is not None:
            settings = dict(settings.value)
            settings["train"] = {k: v for k, v in settings["train"].items() if k != "lr"}
            settings["train"] |= {"lr": chosen["lr"]} if "lr" in chosen else {}
            if "weight" in chosen:
                settings["distill"] = settings["distill"] | {"weight": chosen["weight"]}
        return settings, needs, params, max(1, train.work)

    def _cut(self, cell: Cell, params: dict[str, Any]) -> dict[str, str]:
        """What it takes to cut D as the cell's model was: the number of steps that did (to `params`), for DoRA M's weights."""
        params["compressions"] = len(cell.compression)
        dora = cell.pet.fields.get("use_dora") and any(narrows(c.name) for c in cell.compression)
        return {"dense": self.model(cell)} if dora else {}

    def _control(self, cell: Cell) -> dict[str, Any]:
        return self._placed(lambda: control_settings(cell, self.base), "restoring", cell.restoring.of, "inherit", "from")

    def _sized(self, cell: Cell, params: dict[str, Any], compressions: int) -> dict[str, str]:
        """What it takes to count what the cell that a control is matched to inherits, where fields do not say it."""
        if not resized(cell):
            return {}
        given = cell.control_of.restoring.inherit.from_
        params["compressions"] = compressions
        if given:
            params |= {"base": str(self.base), "of": given}
            return {}
        return {"of": self._tune(cell.control_of.dense)}

    def _teacher(self, cell: Cell, distill: DistillSettings) -> str:
        steps = cell.train.steps + (cell.dense.train.steps if cell.restoring.control == "longer" else 0)
        train = cell.train.model_copy(update={"steps": steps})
        if cell.teacher:
            return self._features(cell.teacher, self.model(cell.teacher), distill, train, cell)
        if distill.teacher == "compressed":
            return self._features(cell.dense, self._compressed(cell), distill, train, cell)
        return self._features(cell.dense, self.model(cell), distill, train)

    @once("model", "pet", "task", "seed")
    def _features(
        self, dense: Cell, model: str, distill: DistillSettings, train: TrainSettings, taught: Cell | None = None
    ) -> str:
        """taught: the cell that learns, where its teacher is not M + D but C + D, or another model."""
        settings = {
            "hidden": distill.hidden,
            "top_k": distill.kl.top_k if distill.kl else None,
            "order": order_settings(train),
            **({"layers": distill.layers} if distill.layers != "last" else {}),
            **self.numeric,
        }
        needs = {
            "model": model,
            "adapter": self._tune(dense),
            "pairs": self._pairs(taught or dense, train.documents, train.max_tokens),
        }
        params: dict[str, Any] = {}
        if taught and taught.teacher:
            needs["tokenizer"] = self.model(taught)
            params["names"] = {"student": taught.axes["model"], "teacher": dense.axes["model"]}
        elif taught:
            needs |= self._cut(taught, params)
        return self.add("teacher", settings, needs, f"teacher of {self.name(dense)}", params=params, work=train.work)

    @once("model", "compression", "task")
    def _compensation(self, cell: Cell, recover: RecoverSettings) -> str:
        compressed, (params, cuts, narrower), work = self._compressed(cell), cut_by(cell), 1
        needs, name = {"dense": self.model(cell), "model": compressed}, f"{cell.axes['model']} {cell.axes['compression']}"
        settings: dict[str, Any] = {"method": recover.init, "r": recover.r, "scale": recover.scale, **cuts}
        if recover.init == "eora":
            own, documents = plan_parts.calibration_settings(recover.calibration) | self.numeric, recover.calibration.documents
            pairs = self._calibration(cell, recover.calibration, "restoring", cell.axes["restoring"], "recover", "calibration")
            if recover.sequential:
                needs["pairs"], settings, work = pairs, settings | own | {"sequential": 2}, documents
            else:
                seen, of = (needs["dense"], cell.axes["model"]) if narrower else (compressed, name)
                label, inner = f"input moments of {of}", {"model": seen, "pairs": pairs}
                needs["moments"] = self.add("moments", own, inner, label, work=documents)
        return self.add("compensation", settings, needs, f"{recover.start} start for {name}", params=params, work=work)

    @once("compression", "pet", "restoring")
    def _probe_settings(self, cell: Cell) -> tuple[Fixed, tuple[str, ...]]:
        """Settings of a probe (its `structure` is what of the compression changes the kernels) and packages that shape it."""
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
            "pet": {"method": cell.pet.method, **as_saved(cell.pet.fields)} if cell.pet else None,
            "machine": {k: self.machine[k] for k in ("device", "name", "dtype", "attention", "tf32", "threads")},
        }
        if cell.restoring and cell.restoring.recover:
            settings["recover"] = {"r": cell.restoring.recover.r, "act": cell.restoring.recover.act}
        if cell.restoring and cell.restoring.control:
            settings["control"] = plan_parts.probed_control(self._control(cell))
        return fixed(settings), tuple(packages)

    @once("model", "compression", "pet", "restoring", "task")
    def _probe(self, cell: Cell) -> str:
        settings, packages = self._probe_settings(cell)
        params: dict[str, Any] = {}
        needs = {"model": self._compressed(cell) if settings.value["structure"] else self.model(cell)}
        if cell.restoring and cell.restoring.control:
            needs |= self._sized(cell, params, len(cell.compression) if settings.value["structure"] else 0)
        names = [str(cell.axes[k]) for k in ("model", "compression", "pet", "restoring")]
        return self.add("probe", settings, needs, f"probe {' '.join(names)}", params=params, packages=packages)

    @once("model", "task")
    def requests(self, cell: Cell, split: str | None = None, documents: int | None = None) -> tuple[str, Fixed, dict]:
        """Key, settings and params of the requests of a cell's task; of `documents` of another split where one is named."""
        spec, where = self._spec(cell, None, split)
        limit = documents if split else cell.task.limit
        shared = fixed({"spec": spec, "prompt": cell.prompt, "limit": limit})
        needs, label = {"tokenizer": self.model(cell)}, f"requests of {cell.axes['task']}" + (f" ({split})" if split else "")
        return self.add("requests", shared, needs, label, params=where, work=limit or 1000), shared, where

    def _cell(self, cell: Cell) -> dict[str, str]:
        roles = {"model": self.model(cell)}
        if cell.compression:
            roles["compress"] = self._compressed(cell)
        if cell.pet:
            roles["tune"] = self._tune(cell)
            if cell.restoring.inherit or (cell.restoring.distill and not cell.teacher):
                roles["dense_tune"] = self._tune(cell.dense)
            if cell.teacher:
                roles["teacher_tune"] = self._tune(cell.teacher)
        requests, shared, where = self.requests(cell)
        work, name = cell.task.limit or 1000, self.name(cell)
        needs = {"model": roles.get("compress", roles["model"]), "requests": requests}
        if "tune" in roles:
            needs["adapter"] = roles["tune"]
        roles["responses"] = self.add("responses", self.scoring, needs, f"score {name}", work=work)
        needs = {"requests": requests, "responses": roles["responses"], "tokenizer": roles["model"]}
        roles["metrics"] = self.add("metrics", shared, needs, f"metrics {name}", params=where, work=work)
        if cell.probes.throughput or cell.probes.memory:
            roles["probe"] = self._probe(cell)
        return roles
