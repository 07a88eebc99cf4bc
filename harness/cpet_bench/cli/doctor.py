"""`cpet-bench doctor`."""

from __future__ import annotations

import argparse
import json

from ..errors import InputError
from .common import folders


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON on standard output, with the traces of what failed")
    text = "try PET methods (all, or those named) with each restoring on each class of linear layer, instead of the rest"
    parser.add_argument("--pet", nargs="*", metavar="METHOD", help=text)
    parser.add_argument("--layer", action="append", default=[], metavar="CLASS", help="with --pet: only on this class of layer")
    parser.add_argument("--fresh", action="store_true", help="with --pet: try anew what is known from before")
    folders(parser)


def run(args: argparse.Namespace) -> int:
    """0 where the core works (torch, training, lm-eval, the store), 1 where it does not."""
    if args.pet is not None:
        from .doctor_pet import run as pet

        return pet(args.pet, args.layer, args.fresh, args.json)
    if args.layer or args.fresh:
        raise InputError("--layer and --fresh go with --pet.", key="--pet")
    from ..doctor import examine

    found = examine(args.store, args.runs)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if found["ok"] else 1


def show(found: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for column in columns:
            made.add_column(column, overflow="fold")
        return made

    machine = table("device", "name", "memory", "formats")
    for name, facts in found["devices"].items():
        formats = ", ".join(f for f, works in facts["formats"].items() if works is True)
        memory = f"{facts['memory'] / 2**30:.0f} GiB"
        machine.add_row(name, escape(facts["name"]), memory, f"{formats} (auto: {facts['dtype']})")
    console.print(machine)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    system = f"{found['system']['platform']}, {found['system']['cores']} cores"
    console.print(f"\n{versions}\n{system}\n", highlight=False, markup=False)
    places = table("kept in", "folder", "free", "")
    for row in found["folders"]:
        free = "" if row["free"] is None else f"{row['free'] / 2**30:.1f} GiB"
        state = "" if row["writable"] else escape(row["reason"])
        places.add_row(row["what"], escape(row["path"]), free, state)
    console.print(places)
    console.print()
    colours = {"ok": "green", "unsupported": "yellow", "failed": "red"}
    rows = table("part", "name", "state", "what was seen, or why not; what to do")
    for row in found["rows"]:
        text = row["reason"] + (f"\n→ {row['remedy']}" if row["remedy"] else "")
        rows.add_row(row["part"], escape(row["name"]), f"[{colours[row['state']]}]{row['state']}[/]", escape(text))
    console.print(rows)
    states = [row["state"] for row in found["rows"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in colours)
    console.print(f"\n{counts}. The core {'works' if found['ok'] else 'does NOT work'}.", highlight=False)
