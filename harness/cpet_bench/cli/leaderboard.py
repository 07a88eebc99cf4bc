"""`cpet-bench leaderboard RUN [RUN ...]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from .common import no_run


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help="a run's name or folder; several go on one page")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page (default: leaderboard.html in the folder of the run)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> int:
    from cpet_leaderboard import build

    folders = [folder(name, Path(args.runs)) for name in args.run]
    if args.output is None and len(folders) > 1:
        raise InputError("Several runs on one page: say where it goes.", key="--output")
    page = build(folders, Path(args.output) if args.output else folders[0] / "leaderboard.html")
    print(page)
    return 0


def folder(name: str, runs: Path) -> Path:
    """The folder of a run, by its name in `runs` or by its path. Raises InputError with the nearest names."""
    for found in (runs / name, Path(name)):
        if found.is_dir():
            return found
    raise no_run(name, runs, (p.parent.name for p in runs.glob("*/records")))
