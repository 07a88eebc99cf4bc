"""Options that several verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError


def matrix_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("matrix", metavar="MATRIX", help="the matrix file (YAML)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="AXIS=NAME", help="only these cells; repeat, lists and globs work"
    )
    parser.add_argument("--name", help="name of the run (default: the matrix's)")
    parser.add_argument(
        "--devices",
        help="a worker for each of these: cuda:0,cuda:1 or cpu; cpu:2 for two on the processor, cuda:0+cuda:1 for one that"
        " owns both (default: the matrix's)",
    )
    parser.add_argument("--budget", metavar="TIME", help="only cells that fit into this time by the estimates, as in 2h")
    parser.add_argument("--sample", metavar="SHARE", help="only a balanced part of the cells, as in 20%% (the rest is pending)")
    parser.add_argument("--sample-seed", type=int, default=0, metavar="N", help="another part of the same size (default 0)")
    parser.add_argument(
        "--rates",
        action="append",
        default=[],
        metavar="RUN",
        help="take the rates that `select` chose from the records of this run, so that more seeds need no trials again",
    )
    folders(parser)


def folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="where artifacts are kept: a folder or an fsspec URL (default: the user's cache)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")


def no_run(name: str, runs: Path, known: Iterable[str]) -> InputError:
    """That there is no run `name`, with the nearest of the `known` ones in the folder `runs`."""
    known = list(known)
    if not known:
        return InputError(f"There is no run {name!r}. {no_runs(runs)}")
    return InputError(f"There is no run {name!r}.", given=name, allowed=known)


def no_runs(runs: Path) -> str:
    return f"There are no runs in the folder {str(runs)!r}."


def prepared(args: argparse.Namespace):
    """The matrix of the command line, read, checked and planned."""
    from ..runner import prepare

    devices = args.devices.split(",") if args.devices else None
    return prepare(
        args.matrix,
        only=tuple(args.only),
        store=args.store,
        runs=args.runs,
        name=args.name,
        device=devices,
        sample=args.sample,
        sample_seed=args.sample_seed,
        budget=args.budget,
        rates=args.rates,
    )


def unfit(ready) -> list[str]:
    """Which models cannot be compressed, tuned or restored as the matrix says, a line each."""
    from ..fitting import WHAT

    return [f"{model} × {name} will {WHAT[axis][1]}: {why}" for (model, axis, name), why in ready.unfit.items()]


def left_out(ready, pending: list[str]) -> str | None:
    """Which cells stay pending for a later run, in a line; None where none do."""
    if not pending:
        return None
    why = ", ".join(sorted({ready.left_out.get(i, "the time was over") for i in pending}))
    shown = ", ".join(pending[:5]) + (f" and {len(pending) - 5} more" if len(pending) > 5 else "")
    return f"{len(pending)} of {len(ready.plan.cells)} cells stay pending ({why}): {shown}"
