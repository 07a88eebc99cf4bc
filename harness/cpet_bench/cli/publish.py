"""`cpet-bench publish RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name or folder")
    parser.add_argument("--to", default="results", metavar="FOLDER", help="where results are published (default: results)")
    parser.add_argument("--name", help="its name there (default: the run's)")
    parser.add_argument("--partial", action="store_true", help="publish though some cells are pending")
    parser.add_argument("--force", action="store_true", help="replace a published run that has other results")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")


def run(args: argparse.Namespace) -> int:
    from ..results.publish import publish

    source = folder(args.run, Path(args.runs))
    done = publish(source, args.to, name=args.name, partial=args.partial, force=args.force)
    counts = ", ".join(f"{n} {status}" for status, n in done.statuses.items())
    print(f"{done.folder}: {counts}" + ("" if done.fresh else "; it was published before, just so"))
    return 0
