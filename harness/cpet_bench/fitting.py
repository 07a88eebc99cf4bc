"""Compressions, PET methods and recoveries that a model's layers cannot take, told from its files before anything is run."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from . import registry
from .compression import narrows
from .errors import InputError, Unsupported
from .pet import layer_limits, rank_limits
from .pet.needs import refuse_alone
from .plan_select import TWO_WEIGHTS
from .restoring.teachers import differ, other_tokens, vocabulary

if TYPE_CHECKING:
    from .cells import Cell
    from .compression.sizes import ModelSize
    from .prepared import Prepared
    from .steps import Step

SAME_SHAPES = ("magnitude", "wanda", "sparsegpt", "depth")  # after these the layers have the shapes they had
# What comes of a layer that cannot take it: `fits` of a backend says what it does not do, a rank too high is a mistake.
WHAT = {"compression": ("compressed", "be unsupported"), "pet": ("tuned", "fail"), "restoring": ("restored", "fail")}
Unfit = dict[tuple[str, str, str], str]  # (model, axis, name on that axis) → why


def unfit(ready: Prepared) -> Unfit:
    """Why a model cannot be compressed, tuned or restored so, of what has to be run and can be told.

    A model that is still to be fetched shows its shapes then: what is wrong with its cells is said once it is there.

    Raises: InputError: no model of the matrix that goes with a compression (or PET method, or recovery) can take it; with its
        place in the file.
    """
    found: dict[tuple[str, str, str], Exception] = {}
    models: dict[tuple[str, str], set[str]] = defaultdict(set)
    fine: set[tuple[str, str, str]] = set()
    for cell in ready.plan.cells:
        for axis, (role, look) in _LOOKS.items():
            key, name = ready.plan.roles[cell.id].get(role), cell.axes[axis]
            at = (cell.axes["model"], axis, name)
            if key is None or at in fine or at in found:
                continue
            models[axis, name].add(at[0])
            error = None if ready.has(key) or cell.id in ready.recorded else look(ready, cell)
            if error is None:
                fine.add(at)
            else:
                found[at] = error
    for (axis, name), there in models.items():
        if all((model, axis, name) in found for model in there):
            first = found[min(there), axis, name]
            rest = {part: getattr(first, part, None) for part in ("key", "given", "allowed")}
            error = InputError(f"{min(there)} cannot be {WHAT[axis][0]} so: {_said(first)}", **rest)
            raise ready.matrix.place(error, axis, name)
    return {at: _said(error) for at, error in found.items()}


def check_teachers(ready: Prepared) -> None:
    """InputError where another model of the matrix is to teach one that reads other tokens, as far as both are here.

    Else it would be known once the teacher's own module had been trained.
    """
    for cell in ready.plan.cells:
        roles = ready.plan.roles[cell.id]
        if not cell.teacher or cell.id in ready.recorded or ready.has(roles["tune"]):
            continue
        teacher = ready.plan.steps[roles["teacher_tune"]]
        models = [ready.plan.steps[key] for key in (roles["model"], _model_of(ready, teacher))]
        found = [vocabulary(folder) if (folder := ready.model_folder(step)) else None for step in models]
        if None not in found and differ(*found):
            error = InputError(other_tokens(cell.axes["model"], cell.teacher.axes["model"]))
            raise ready.matrix.place(error, "restoring", cell.axes["restoring"], "distill", "teacher")


def _model_of(ready: Prepared, step: Step) -> str:
    """Key of the step that has the model which a training is of; a choice has it by its trials."""
    while "model" not in step.needs:
        step = ready.plan.steps[next(iter(step.needs.values()))]
    return step.needs["model"]


def _said(error: Exception) -> str:
    return error.message if isinstance(error, InputError) else str(error)


def _compression(ready: Prepared, cell: Cell) -> Unsupported | None:
    step = ready.plan.steps[ready.plan.roles[cell.id]["compress"]]
    size = ready.size(step)
    before: list[str] = []
    for chosen in cell.compression if size else ():
        backend = registry.get("compression", chosen.name)
        if hasattr(backend, "fits") and all(name in SAME_SHAPES for name in before):
            try:
                backend.fits(chosen.settings, size)
            except Unsupported as error:
                return error
        before.append(chosen.name)
    return None


def _pet(ready: Prepared, cell: Cell) -> InputError | None:
    if cell.restoring.inherit and cell.restoring.inherit.from_:  # the module the user has, with a rank of its own
        return None
    try:
        refuse_alone(cell.pet, cell.train.steps)
    except InputError as error:
        return error
    before = {chosen.name for chosen in cell.compression}

    def check(size: ModelSize) -> None:
        narrower = "moefy" in before or any(map(narrows, before))
        layer_limits.told(cell.pet, size, same_names="moefy" not in before, same_shapes=not narrower)
        rank_limits.told(cell.pet, size.shapes, size.model_type)

    return _rank(ready, cell, check)


def _restoring(ready: Prepared, cell: Cell) -> InputError | None:
    recover, select = cell.restoring.recover, cell.select

    def check(size: ModelSize) -> None:
        if recover:
            rank_limits.refuse_recovery(recover.r, size.shapes)
        if size.pairs and select and select.weight and cell.restoring.distill:
            raise InputError(TWO_WEIGHTS)

    return _rank(ready, cell, check)


def _rank(ready: Prepared, cell: Cell, check) -> InputError | None:
    """What `check` says of the layers of the cell's model, which our own compressions make narrower at most."""
    if any(chosen.name not in registry.BUILTIN["compression"] for chosen in cell.compression):
        return None
    size = ready.size(ready.plan.steps[ready.plan.roles[cell.id]["model"]])
    if size is None or size.mixture:
        return None
    try:
        check(size)
    except InputError as error:
        return error
    return None


_LOOKS = {"compression": ("compress", _compression), "pet": ("tune", _pet), "restoring": ("tune", _restoring)}
