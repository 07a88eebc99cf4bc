"""`cpet-bench reproduce RUN [--cell ID]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name or folder")
    parser.add_argument("--cell", action="append", default=[], metavar="ID", help="a cell, globs work; repeat (default: all)")
    parser.add_argument("--store", help="where artifacts are kept (default: a fresh store, dropped afterwards)")
    parser.add_argument("--devices", help="devices, as in cuda:0 or cpu (default: the matrix's)")
    parser.add_argument("--allow-code", action="store_true", help="run the matrix though it brings code of its own")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the new run in this folder")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")
    parser.epilog = "Exit status: 0 reproduced, 1 not, 2 bad input, 5 stopped by disk, store or network."


def run(args: argparse.Namespace) -> int:
    from ..display import make
    from ..results.reproduce import reproduce
    from .run import handle_signals

    source, display = folder(args.run, Path(args.runs)), make(False)
    try:
        report = reproduce(
            source,
            cells=args.cell,
            store=args.store,
            device=args.devices.split(",") if args.devices else None,
            allow_code=args.allow_code,
            keep=args.keep,
            listeners=[display],
            on_signal=handle_signals,
        )
    finally:
        display.close()
    if args.json:
        print(json.dumps(report.as_json(), indent=1, allow_nan=False))
    else:
        show(report)
    if report.interrupted:
        print("cpet-bench: interrupted", file=sys.stderr)
    return report.exit_code


def show(report) -> None:
    """A table for each cell, and a line with the verdict."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for cell in report.cells:
        table = Table(title=escape(cell.id), title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in ("metric", "kept (95 %)", "now", "within"):
            table.add_column(name, no_wrap=True)
        for m in cell.metrics:
            span = "" if m.low is None else f" [{m.low:.4f}, {m.high:.4f}]"
            table.add_row(escape(m.name), _number(m.kept) + escape(span), _number(m.now), "yes" if m.within else "NO")
        console.print(table)
        if cell.equal is not None:
            print(f"  equal outcomes: {cell.equal:.1%} of {cell.documents} documents (at least {cell.required:.0%})")
        if cell.logprob_max is not None:
            print(f"  log-probabilities differ by at most {cell.logprob_max:.2g}, on average {cell.logprob_mean:.2g}")
        if cell.changed:
            print(f"  changed since: {', '.join(cell.changed)}")
        print("  reproduced" if cell.reproduced else f"  NOT reproduced: {'; '.join(cell.why)}")
    good = sum(cell.reproduced for cell in report.cells)
    skipped = f"; not done there, so not run: {', '.join(report.skipped)}" if report.skipped else ""
    print(f"{good} of {len(report.cells)} cells reproduced{skipped}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
