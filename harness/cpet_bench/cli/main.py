"""The command line: one verb a file. Importing this loads none of the heavy libraries."""

from __future__ import annotations

import argparse
import importlib
import sys

from ..errors import EXIT_INPUT, EXIT_INTERRUPTED, CpetError, nearest

VERBS = {
    "run": "run a matrix: compute what is missing, write records, show the table and the page",
    "plan": "show cells and steps of a matrix, what is cached, why the rest will run, and what it takes",
    "status": "show how far a run is",
    "compare": "say whether cells of a run that differ in one axis differ in quality, document by document",
    "gap": "say how much of what a compression lost each restoring brings back, over seeds and documents",
    "check": "compare a run with a baseline; fails on a regression",
    "validate": "find what is wrong in the folder of a run: schema, hashes, outcomes, references",
    "merge": "make one run out of several of the same matrix",
    "publish": "copy a run to where results are shared",
    "reproduce": "run cells of a kept run again and compare them",
    "export": "write the modules tuned in a cell for others to load: PEFT adapter, recovery modules, model card",
    "leaderboard": "write the page of one or more runs",
    "init": "write a commented first matrix",
    "schema": "print the JSON Schema of a matrix or of a record",
    "doctor": "say what works on this machine, by trying it: devices, backends, PET methods, sources",
    "cache": "list, verify, prune or pin what the store keeps",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest spelling, and ends with status 2."""

    def error(self, message: str):
        self.exit(EXIT_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the verb that is called is imported."""
    top = Parser(prog="cpet-bench", description="Benchmark of parameter-efficient tuning on compressed language models.")
    top.add_argument("--version", action="store_true", help="print the version")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for name, text in VERBS.items():
        own = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name == verb:
            importlib.import_module(f"cpet_bench.cli.{name}").add(own)
    return top


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 2 bad input, 4 failed cells, 5 stopped, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    verb = next((a for a in argv if not a.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        close = nearest(verb, VERBS)
        hint = f" Did you mean {close[0]}?" if close else ""
        print(f"cpet-bench: there is no verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.", file=sys.stderr)
        return EXIT_INPUT
    top = parser(verb)
    args = top.parse_args(argv)
    if args.version:
        from .. import __version__

        print(f"cpet-bench {__version__}")
        return 0
    if not args.verb:
        top.print_help()
        return 0
    try:
        return importlib.import_module(f"cpet_bench.cli.{args.verb}").run(args)
    except CpetError as error:
        print(f"cpet-bench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("cpet-bench: interrupted; the next run goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0


def entry() -> None:
    sys.exit(main())


if __name__ == "__main__":
    entry()
