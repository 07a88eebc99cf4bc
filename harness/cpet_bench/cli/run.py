"""`cpet-bench run MATRIX`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from .cache import human, size
from .common import left_out, matrix_options, prepared, unfit

MOST = 300  # rows of the table on the terminal


def add(parser: argparse.ArgumentParser) -> None:
    matrix_options(parser)
    parser.add_argument("--json", action="store_true", help="events as JSON lines on standard output")
    parser.add_argument("--no-page", action="store_true", help="leave the leaderboard page out")
    parser.add_argument(
        "--quota",
        metavar="SIZE",
        default=os.environ.get("CPET_BENCH_QUOTA"),
        help="what the store may hold after the run, as in 20G: the longest unused goes (default: $CPET_BENCH_QUOTA)",
    )


def run(args: argparse.Namespace) -> int:
    from ..display import make
    from ..runner import run_prepared

    quota = size(args.quota) if args.quota else None
    ready = prepared(args)
    for line in unfit(ready):
        print(f"cpet-bench: {line}", file=sys.stderr)
    display = make(args.json)
    try:
        result = run_prepared(ready, [display], on_signal=handle_signals)
    finally:
        display.close()
    if quota is not None and (dropped := ready.store.prune(quota)):
        freed = human(sum(m.bytes for m in dropped))
        print(f"cpet-bench: {len(dropped)} artifacts dropped from the store for the quota, {freed}", file=sys.stderr)
    page = None
    if not args.no_page and (result.computed or not (result.folder / "leaderboard.html").exists()):
        from cpet_leaderboard import build

        page = build([result.folder], result.folder / "leaderboard.html")
    elif not args.no_page:
        page = result.folder / "leaderboard.html"
    if not args.json:
        from ..records import read_record
        from ..table import print_table

        paths = [result.folder / "records" / f"{cell}.json" for cell in result.statuses]
        print_table([read_record(path) for path in paths[:MOST] if path.exists()])
        if len(paths) > MOST:
            print(f"and {len(paths) - MOST:,} cells more, all of them on the page")
        print(f"records: {result.folder / 'records'}" + (f"   page: {page}" if page else ""))
    later = left_out(ready, [i for i, status in result.statuses.items() if status == "pending"])
    if later and result.exit_code != 130:
        print(f"cpet-bench: {later}", file=sys.stderr)
    if result.exit_code == 130:
        print("cpet-bench: interrupted; the next run goes on from here", file=sys.stderr)
    return result.exit_code


def handle_signals(runner) -> None:
    """The first Ctrl-C or SIGTERM ends the run cleanly, a second one at once."""

    def stop(number, frame):
        if runner.stop_asked:
            for worker in runner.executor.workers.values():
                worker.kill()
            raise KeyboardInterrupt
        runner.stop_asked = "interrupted"
        runner.events.emit("interrupted", signal=signal.Signals(number).name)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
