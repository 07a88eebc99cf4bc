"""`cpet-bench gap RUN`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .leaderboard import folder


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run's name or folder")
    parser.add_argument("--metric", help="the metric to measure it in (default: each task's primary one)")
    parser.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="as JSON on standard output")
    how.add_argument("--markdown", action="store_true", help="as Markdown tables")
    parser.epilog = (
        "The gap is what D (the same PET on the dense model) is better than vanilla (the same PET on the compressed model, "
        "from random weights). Intervals are of 95 %, over documents, and over seeds where there are several. The last two "
        "columns are the share for each million of trained parameters, and for each 10^12 operations of training, D's too."
    )


def run(args: argparse.Namespace) -> int:
    from ..check import gaps

    found = gaps(folder(args.run, Path(args.runs)), args.metric)
    if args.json:
        print(json.dumps([ladder.as_json() for ladder in found], indent=1, allow_nan=False))
        return 0
    for ladder in found:
        (markdown if args.markdown else show)(ladder)
    return 0


HEADINGS = ("restoring", "seeds", "value (95 %)", "above vanilla", "p", "of the gap, %")
HEADINGS += ("trained", "rate", "TFLOP", "D's TFLOP", "%/million", "%/TFLOP")


def lines(ladder) -> list[tuple[str, ...]]:
    """The rows of a ladder's table, best first, as text."""
    rows = sorted(ladder.rows, key=lambda r: r.value.value, reverse=ladder.higher_is_better)
    found = [_line("D (dense)", ladder.high), *(_line(r.restoring, r) for r in rows), _line(ladder.low.restoring, ladder.low)]
    if ladder.untuned:
        found.append(_line("untuned", ladder.untuned))
    return found


def _line(name: str, row) -> tuple[str, ...]:
    above = p = share = ""
    if row.above:
        a = row.above
        above, p = f"{a.value:+.4f} [{a.low:+.4f}, {a.high:+.4f}]", "< .0001" if a.p < 0.0001 else f"{a.p:.4f}"
    if row.share:
        ends = ("" if end is None else f"{100 * end:.1f}" for end in (row.share.low, row.share.high))
        share = f"{100 * row.share.value:.1f} [{', '.join(ends)}]"
    v = row.value
    ends = f" [{v.low:.4g}, {v.high:.4g}]" if v.low is not None else ""
    return (
        name,
        " ".join(map(str, row.seeds)),
        f"{v.value:.4g}{ends}",
        above,
        p,
        share or "–",
        f"{row.trained:,}" if row.trained else "–",
        (" ".join(f"{lr:g}" for lr in row.lr) or "–") + "*" * row.at_the_edge,
        f"{row.flops / 1e12:.3g}" if row.flops else "–",
        f"{row.dense_flops / 1e12:.3g}" if row.dense_flops else "–",
        *("–" if x is None else f"{x:.1f}" for x in (row.per_million, row.per_tflop)),
    )


def title(ladder) -> str:
    where = ", ".join((ladder.model, ladder.compression, ladder.pet, ladder.task))
    where += f": {ladder.metric} on {ladder.documents:,} documents"
    unit = f" {ladder.unit}" if ladder.unit else ""
    gap = ladder.gap
    if gap is None:
        return f"{where}; the gap is unknown: {ladder.note}"
    chance = "" if gap.low > 0 else ", so there is none to have shares of"
    return f"{where}; the gap is {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]{unit}{chance}"


def notes(ladder) -> list[str]:
    """What stands below the table."""
    found = [f"{row.restoring}: {row.note}" for row in [ladder.high, *ladder.rows, ladder.low] if row.note]
    if any(row.at_the_edge for row in (ladder.high, *ladder.rows, ladder.low)):
        found.append("*: the lowest or highest that was tried, so that a better one may lie outside")
    if ladder.left_out:
        found.append(f"left out, without its vanilla cell or D: {', '.join(ladder.left_out)}")
    return found


def show(ladder) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..table import uncut

    console = uncut()
    print(title(ladder))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(HEADINGS):
        table.add_column(escape(name), justify="right" if i > 1 else "left", no_wrap=True)
    for line in lines(ladder):
        table.add_row(*map(escape, line))
    console.print(table)
    print(*notes(ladder), "", sep="\n")


def markdown(ladder) -> None:
    print(f"{title(ladder)}\n\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for line in lines(ladder):
        print(f"| {' | '.join(text.replace('|', chr(92) + '|') for text in line)} |")
    print("", *(f"- {note}" for note in notes(ladder)), "", sep="\n")
