"""`cpet-bench validate RUN`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name or folder")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")
    parser.epilog = "Exit status: 0 nothing is wrong, 1 faults (all are listed), 2 bad input."


def run(args: argparse.Namespace) -> int:
    from ..results.validate import validate

    report = validate(folder(args.run, Path(args.runs)))
    if args.json:
        print(json.dumps(report.as_json(), indent=1, allow_nan=False))
        return report.exit_code
    for fault in report.faults:
        print(f"{fault.file}: {fault.what}")
    counts = ", ".join(f"{n} {status}" for status, n in report.statuses.items())
    faults = "no faults" if not report.faults else "1 fault" if len(report.faults) == 1 else f"{len(report.faults)} faults"
    print(f"{report.run}: {faults}; cells: {counts or 'none'}")
    if report.unchecked:
        print(f"not found anew from outcomes: {', '.join(report.unchecked)}")
    return report.exit_code
