"""Cells: the points of a matrix that are run, one for each combination of names that its rules leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from .errors import InputError
from .matrix import AXES, Choice, Matrix
from .settings import (
    ModelSettings,
    PetSettings,
    ProbeSettings,
    PromptSettings,
    RestoringSettings,
    SelectSettings,
    TaskSettings,
    TrainSettings,
)

NOTHING = RestoringSettings()


@dataclass(eq=False)
class Cell:
    """One point. axes: name of each axis's value, in the order of the id; what is not tuned has `restoring: none`."""

    matrix: Matrix = field(repr=False)
    axes: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """Readable, the same in every run of the matrix, safe as a file name."""
        return cell_id(self.axes)

    @property
    def model(self) -> ModelSettings:
        return self.matrix.model[self.axes["model"]]

    @property
    def compression(self) -> tuple[Choice, ...]:
        """The compression steps in order; empty for none."""
        return self.matrix.compression.get(self.axes["compression"], ())

    @property
    def pet(self) -> PetSettings | None:
        return self.matrix.pet[self.axes["pet"]]

    @property
    def restoring(self) -> RestoringSettings | None:
        """None where nothing is tuned."""
        return None if self.pet is None else self.matrix.restoring.get(self.axes["restoring"], NOTHING)

    @property
    def task(self) -> TaskSettings:
        return self.matrix.task[self.axes["task"]]

    @property
    def task_name(self) -> str:
        """lm-eval's name of the task."""
        return self.task.name or self.axes["task"]

    @property
    def seed(self) -> int:
        return self.axes["seed"]

    @property
    def prompt(self) -> PromptSettings:
        return self.matrix.prompt

    @property
    def probes(self) -> ProbeSettings:
        return self.matrix.probes

    @property
    def is_dense(self) -> bool:
        """Whether this is D: a PET module on the dense model, nothing restored."""
        return self.pet is not None and not self.compression and not self.restoring.parts

    @cached_property
    def train(self) -> TrainSettings:
        """The matrix's `train`, then the task's own, the PET method's own, and (but for D) the restoring's own."""
        changes: dict[str, Any] = {}
        if self.pet is not None:
            changes |= self.task.train.changes
            changes |= self.pet.train.changes
            if not self.is_dense:
                changes |= self.restoring.train.changes
        found = self.matrix.train.model_copy(update=changes) if changes else self.matrix.train
        if found.early_stop and found.early_stop.documents >= found.documents:
            held, all_ = found.early_stop.documents, found.documents
            message = f"{held} documents are held out of the {all_} there are (train.documents): nothing is left to train on"
            raise self.matrix.place(InputError(message), "train", "early_stop", "documents")
        return found

    @cached_property
    def select(self) -> SelectSettings | None:
        """What its learning rate is chosen from; None where it is given.

        The nearest setting counts: the restoring's (but for D), the PET method's, the task's, the matrix's; at each a
        `train.lr` leaves nothing to choose.
        """
        if self.pet is None or not self.train.steps:
            return None
        for level in [self.pet] if self.is_dense else [self.restoring, self.pet]:
            if "select" in level.model_fields_set:
                return level.select
            if level.train.lr is not None:
                return None
        return None if self.task.train.lr is not None else self.matrix.select

    @property
    def first(self) -> Cell:
        """This cell at the matrix's first seed, at which rates are chosen."""
        seed = self.matrix.seed[0]
        return self if self.seed == seed else self._other({**self.axes, "seed": seed})

    @cached_property
    def dense(self) -> Cell | None:
        """The cell that trains D; None where nothing is tuned. It need not be one of the matrix's own cells."""
        if self.pet is None:
            return None
        if self.is_dense:
            return self
        plain = self.matrix.nothing
        return self._other({**self.axes, "compression": plain["compression"], "restoring": plain["restoring"]})

    @cached_property
    def teacher(self) -> Cell | None:
        """The cell that trains the D of another model, where distillation's teacher is that; else None."""
        distill = self.restoring.distill if self.pet is not None else None
        other = getattr(distill and distill.teacher, "model", self.axes["model"])
        return None if other == self.axes["model"] else self._other({**self.dense.axes, "model": other})

    @cached_property
    def control_of(self) -> Cell | None:
        """The cell a control is matched to."""
        if self.pet is None or self.restoring.control is None:
            return None
        return self._other({**self.axes, "restoring": self.restoring.of})

    def _other(self, axes: dict[str, Any]) -> Cell:
        """The cell at these axes, one object for all that refer to it."""
        return self.matrix.others.setdefault(tuple(axes.values()), Cell(self.matrix, axes))


def cell_id(axes: dict[str, Any]) -> str:
    """The id of the cell at these axes."""
    return "--".join(f"s{v}" if k == "seed" else str(v) for k, v in axes.items())


def expand(matrix: Matrix) -> list[Cell]:
    """The cells of a matrix: every combination that `include`, `exclude` and `--only` leave.

    What nothing is tuned on has one cell, whatever the restorings and seeds. Raises InputError where none is left.
    """
    names = {axis: list(getattr(matrix, axis)) for axis in AXES}
    rules = Rules(matrix)
    found = []
    for combination in itertools.product(*names.values()):
        axes = dict(zip(AXES, combination, strict=True))
        if matrix.pet[axes["pet"]] is None:
            if axes["restoring"] != names["restoring"][0] or axes["seed"] != names["seed"][0]:
                continue
            axes["restoring"] = "none"
        if rules.allow(axes):
            found.append(Cell(matrix, axes))
    if not found:
        given = "--only, include and exclude" if matrix.only else "include and exclude"
        raise InputError(f"no cell is left after {given}", file=matrix.path)
    return found


class Rules:
    """`include`, `exclude` and `--only` of a matrix, as one test of a cell's axes.

    A rule names axes and the names (globs work) that it is about; a cell matches when every axis does.
    """

    def __init__(self, matrix: Matrix):
        self.include = [self._rule(r) for r in matrix.include]
        self.exclude = [self._rule(r) for r in matrix.exclude]
        self.only = [self._rule(r) for r in matrix.only]
        self._kept: dict[tuple[str, ...], bool] = {}

    @staticmethod
    def _rule(rule: dict[str, list[str]]) -> list[tuple[str, Callable[[str], bool]]]:
        return [(axis, _matcher(wanted)) for axis, wanted in rule.items()]

    def allow(self, axes: dict[str, Any]) -> bool:
        words = {axis: str(value) for axis, value in axes.items()}

        def matches(rule) -> bool:
            return all(test(words[axis]) for axis, test in rule)

        if self.include and not any(map(matches, self.include)):
            return False
        return not any(map(matches, self.exclude)) and all(map(matches, self.only))


def _matcher(wanted: Iterable[str]) -> Callable[[str], bool]:
    names = list(wanted)
    exact = {n for n in names if not any(c in n for c in "*?[")}
    globs = [n for n in names if n not in exact]
    return lambda name: name in exact or any(fnmatchcase(name, g) for g in globs)
