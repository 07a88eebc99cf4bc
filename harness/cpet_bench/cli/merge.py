"""`cpet-bench merge A B [...] -o C`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", metavar="RUN", help="runs of one matrix, by name or folder")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the folder of the merged run; it must be new")
    parser.add_argument("--prefer", metavar="RUN", help="the run that wins where results differ (default: that is refused)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> int:
    from ..results.merge import merge

    runs = Path(args.runs)
    found = [folder(name, runs) for name in args.run]
    prefer = str(folder(args.prefer, runs)) if args.prefer and (runs / args.prefer).is_dir() else args.prefer
    statuses = merge(found, args.output, prefer=prefer)
    print(f"{args.output}: {', '.join(f'{n} {status}' for status, n in statuses.items())}")
    return 0
