"""`cpet-bench check RUN --baseline RUN`."""

from __future__ import annotations

import argparse
import json


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("candidate", metavar="RUN", help="the folder of the run to judge")
    parser.add_argument("--baseline", required=True, metavar="RUN", help="the folder of the run it is compared with")
    parser.add_argument(
        "--margin", type=float, default=0.02, help="loss that still is none, in the metric's unit (default 0.02)"
    )
    parser.add_argument("--metric", help="the metric to compare (default: each cell's primary one)")
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="chance of a false verdict over all cells together (default 0.05)"
    )
    parser.add_argument(
        "--speed-margin", type=float, default=0.2, help="share of the speed that may be lost (default 0.2)"
    )
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")
    parser.epilog = "Exit status: 0 no regression, 1 a regression, 2 bad input, 3 nothing could be compared."


def run(args: argparse.Namespace) -> int:
    from ..check import compare

    report = compare(
        args.candidate,
        args.baseline,
        margin=args.margin,
        metric=args.metric,
        alpha=args.alpha,
        speed_margin=args.speed_margin,
    )
    if args.json:
        print(json.dumps(report.as_json(), indent=1, allow_nan=False))
    else:
        show(report)
    return report.exit_code


def show(report) -> None:
    """A line for each cell and speed that was looked at, then how many of each verdict."""
    for c in report.cells:
        text = f"{c.verdict}: {c.id}"
        if c.difference is not None:
            text += (
                f": {c.metric} {_number(c.baseline)} → {_number(c.candidate)}, {c.difference:+.4f} (more is better)"
                f" [{c.low:+.4f}, {c.high:+.4f}] on {c.documents} documents ({c.method})"
            )
        print(text + (f"; {c.note}" if c.note else ""))
    for s in report.speed:
        text = f"{s.verdict}: {s.id}: {s.what}"
        if s.ratio is not None:
            text += f" {s.baseline:,.0f} → {s.candidate:,.0f} tokens/s ({s.ratio:.2f}×)"
        print(text + (f"; {s.note}" if s.note else ""))
    for name, ids in (("baseline", report.only_baseline), ("candidate", report.only_candidate)):
        if ids:
            print(f"only in the {name}: {', '.join(ids)}")
    for what, found in (("quality", report.cells), ("speed", report.speed)):
        counts: dict[str, int] = {}
        for one in found:
            counts[one.verdict] = counts.get(one.verdict, 0) + 1
        print(f"{what}: " + (", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "nothing to compare"))
    print(
        f"margin {report.margin:g}, level {1 - report.alpha:g} over {report.family} cells (Holm),"
        f" speed margin {report.speed_margin:g}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
