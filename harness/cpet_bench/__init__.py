"""cpet-bench: which compression, which PET method and which restoring gives the best quality for its speed and memory.

`run(matrix)`, `plan(matrix)` and `load_records(path)` are the whole API; none of them loads torch unless it must.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import pandas

    from .runner import Prepared, RunResult

__version__ = "0.1.0"
__all__ = ["load_records", "plan", "run"]


def plan(matrix: str | Path, **options: Any) -> Prepared:
    """Read a matrix and say what running it takes.

    Options as of `cpet_bench.runner.prepare`: only, store, runs, name, device, sample, budget. `.missing()` of what it
    returns are the keys of the steps that would run, `.plan.steps` all of them, `.seconds` their estimates. Raises InputError.
    """
    from .runner import prepare

    return prepare(matrix, **options)


def run(matrix: str | Path, *, listeners=(), **options: Any) -> RunResult:
    """Run a matrix: compute what the store does not have, write records to runs/NAME.

    Options as of `plan`; `listeners` are called with each event (a dict). Raises InputError, StopError.
    """
    from .runner import prepare, run_prepared

    return run_prepared(prepare(matrix, **options), listeners)


def load_records(path: str | Path) -> pandas.DataFrame:
    """The records of a run folder (or of a folder of those), one row a cell: axes, status, metrics, probes, costs."""
    from .records import load_records as load

    return load(path)


class _Package(ModuleType):
    """Keeps the functions above: importing the submodule of the same name would put itself in the place of `plan`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
