"""The part of a plan that chooses learning rates: a trial for each candidate, and the step that takes the best one."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from .cells import Cell
from .errors import InputError
from .settings import SelectSettings

if TYPE_CHECKING:
    from .plan import Planner


TWO_WEIGHTS = (
    "an encoder-decoder model is distilled with encoder_weight and decoder_weight, which `select` cannot choose: leave its "
    "`weight` out there, and write both under `distill`"
)


def grid(select: SelectSettings, distilled: bool) -> list[dict[str, float]]:
    """The candidates: every rate, with every weight of distillation where something is distilled."""
    if not (distilled and select.weight):
        return [{"lr": lr} for lr in select.lr]
    return [{"lr": lr, "weight": weight} for lr, weight in itertools.product(select.lr, select.weight)]


def choose(planner: Planner, cell: Cell) -> str:
    """Key of the step that has the best of the cell's candidates, trained at the first seed.

    Raises InputError where the deciding split is the one that is reported.
    """
    select = cell.select
    if cell.task.split == select.on:
        message = f"the rate is chosen on the {select.on} split, which is the one this task reports (split: {cell.task.split})"
        raise planner.matrix.place(InputError(message), "task", cell.axes["task"], "split")
    requests, shared, where = planner.requests(cell, select.on, select.documents)
    candidates = grid(select, bool(cell.restoring.distill))
    needs: dict[str, str] = {}
    for i, candidate in enumerate(candidates):
        settings, own, params, work = planner.training(cell, candidate)
        settings |= shared.value | planner.scoring.value
        params |= {"tried": "weight"} if "weight" in candidate else {}
        own |= {"requests": requests, "tokenizer": planner.model(cell)}
        named = " ".join(f"{k} {v:g}" for k, v in candidate.items())
        label = f"try {named} for {planner.name(cell)}"
        work += select.documents
        needs[f"trial{i}"] = planner.add("trial", settings, own, label, params=params | where, work=work)
    chosen: dict[str, Any] = {"grid": candidates, "on": select.on, "documents": select.documents}
    return planner.add("select", chosen, needs, f"choose the rate of {planner.name(cell)}")
