"""`cpet-bench export CELL --to FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from .common import no_runs
from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", metavar="CELL", help="the id of a tuned cell")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--run", metavar="RUN", help="the run it is of (default: the one run that has it)")
    parser.add_argument("--base", action="store_true", help="write the compressed model too, as base/")
    parser.add_argument("--merged", action="store_true", help="write the model with the modules in its weights too, as merged/")
    parser.add_argument("--store", help="where artifacts are kept: a folder or an fsspec URL (default: the user's cache)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> int:
    from ..export import export

    source = folder(args.run, Path(args.runs)) if args.run else _only(args.cell, Path(args.runs))
    written = export(source, args.cell, Path(args.to), store=args.store, base=args.base, merged=args.merged)
    print(f"{args.to}: {', '.join(name for name in written if '/' not in name)}")
    for part in ("base", "merged"):
        if any(name.startswith(f"{part}/") for name in written):
            print(f"{args.to}/{part}: a model folder")
    return 0


def _only(cell: str, runs: Path) -> Path:
    records = list(runs.glob("*/records/*.json"))
    found = [p for p in records if p.stem == cell]
    if not records:
        raise InputError(f"There is no cell {cell!r}. {no_runs(runs)}")
    if not found:
        raise InputError(f"There is no cell {cell!r} in any run of {runs}.", given=cell, allowed={p.stem for p in records})
    if len(found) > 1:
        names = [p.parents[1].name for p in found]
        raise InputError(f"Several runs have this cell: {', '.join(sorted(names))}. Say which.", key="--run")
    return found[0].parents[1]
