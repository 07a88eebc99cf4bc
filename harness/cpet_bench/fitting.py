"""Compressions that a model's layers cannot take, told from the files' headers before anything is run."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from . import registry
from .errors import InputError, Unsupported

if TYPE_CHECKING:
    from .cells import Cell
    from .prepared import Prepared

SAME_SHAPES = ("magnitude", "wanda", "sparsegpt", "depth")  # after these the layers have the shapes they had


def unfit(ready: Prepared) -> dict[tuple[str, str], str]:
    """Why a model cannot be compressed so, by (model, compression), of what has to be run and can be told.

    A model that is still to be fetched shows its shapes then: its cells are `unsupported` once it is there.

    Raises: InputError: no model of the matrix that goes with a compression can take it; with its place in the file.
    """
    found: dict[tuple[str, str], str] = {}
    models: dict[str, set[str]] = defaultdict(set)
    for cell in ready.plan.cells:
        at = (cell.axes["model"], cell.axes["compression"])
        key = ready.plan.roles[cell.id].get("compress")
        if key is None or at[0] in models[at[1]]:
            continue
        models[at[1]].add(at[0])
        if not ready.has(key) and cell.id not in ready.recorded and (why := _reason(ready, cell)):
            found[at] = why
    for compression, there in models.items():
        if all((model, compression) in found for model in there):
            model = sorted(there)[0]
            error = InputError(f"{model} cannot be compressed so: {found[model, compression]}")
            raise ready.matrix.place(error, "compression", compression)
    return found


def _reason(ready: Prepared, cell: Cell) -> str | None:
    step = ready.plan.steps[ready.plan.roles[cell.id]["compress"]]
    size = ready.size(step)
    before: list[str] = []
    for chosen in cell.compression if size else ():
        backend = registry.get("compression", chosen.name)
        if hasattr(backend, "fits") and all(name in SAME_SHAPES for name in before):
            try:
                backend.fits(chosen.settings, size)
            except Unsupported as error:
                return str(error)
        before.append(chosen.name)
    return None
