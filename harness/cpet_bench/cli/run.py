"""`cpet-bench run MATRIX`."""

from __future__ import annotations

import argparse
import signal
import sys

from .common import matrix_options, prepared


def add(parser: argparse.ArgumentParser) -> None:
    matrix_options(parser)
    parser.add_argument("--json", action="store_true", help="events as JSON lines on standard output")
    parser.add_argument("--no-page", action="store_true", help="leave the leaderboard page out")


def run(args: argparse.Namespace) -> int:
    from ..display import make
    from ..runner import run_prepared

    ready = prepared(args)
    display = make(args.json)
    try:
        result = run_prepared(ready, [display], on_signal=handle_signals)
    finally:
        display.close()
    page = None
    if not args.no_page and (result.computed or not (result.folder / "leaderboard.html").exists()):
        from cpet_leaderboard import build

        page = build([result.folder], result.folder / "leaderboard.html")
    elif not args.no_page:
        page = result.folder / "leaderboard.html"
    if not args.json:
        from ..records import read_records
        from ..table import print_table

        print_table(read_records(result.folder))
        print(f"records: {result.folder / 'records'}" + (f"   page: {page}" if page else ""))
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
