"""`cpet-bench compare RUN AXIS=NAME AXIS=NAME`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name or folder")
    parser.add_argument("first", metavar="AXIS=NAME", help="as in restoring=cpet")
    parser.add_argument("second", metavar="AXIS=NAME", help="another name on that axis, as in restoring=matched")
    parser.add_argument("--metric", help="the metric to compare (default: all that both cells have)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")
    parser.epilog = (
        "Differences are the first minus the second, more is better, with 95 % intervals. p is of no difference. Where "
        "the cells have several seeds, their means are compared as well, over seeds and documents."
    )


def run(args: argparse.Namespace) -> int:
    from ..check import between

    found = between(folder(args.run, Path(args.runs)), args.first, args.second, metric=args.metric)
    if args.json:
        print(json.dumps(found.as_json(), indent=1, allow_nan=False))
    else:
        show(found)
    return 0


def show(found) -> None:
    """A table for each pair of cells, with a row for each metric."""
    from rich.markup import escape
    from rich.table import Table

    from ..table import uncut

    console = uncut()
    everything = found.pairs + found.over_seeds
    for first, second in dict.fromkeys((pair.first, pair.second) for pair in everything):
        rows = [pair for pair in everything if (pair.first, pair.second) == (first, second)]
        documents = max((pair.documents or 0 for pair in rows), default=0)
        title = f"{first} against {found.names[1]}" + (f", {documents:,} documents" if documents else "")
        title += f", mean of seeds {', '.join(map(str, rows[0].seeds))}" if rows[0].seeds else ""
        print(title)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("metric", *found.names, "difference (95 %)", "p", "p (Holm)"):
            table.add_column(escape(name), justify="left" if name == "metric" else "right", no_wrap=True)
        for pair in rows:
            values = [f"{v:.4g}" for v in pair.values] if pair.values else ["–", "–"]
            if pair.difference is None:
                table.add_row(escape(pair.metric), *values, escape(pair.note), "", "")
            else:
                span = f"{pair.difference:+.4f} [{pair.low:+.4f}, {pair.high:+.4f}]"
                span += f" {pair.unit}" if pair.unit else ""
                table.add_row(escape(pair.metric), *values, span, _p(pair.p), _p(pair.p_holm))
        console.print(table)
    if found.alone:
        print(f"without a partner: {', '.join(found.alone)}")


def _p(value: float) -> str:
    return "< .0001" if value < 0.0001 else f"{value:.4f}"
