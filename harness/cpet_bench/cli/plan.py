"""`cpet-bench plan MATRIX`."""

from __future__ import annotations

import argparse
import json

from .common import left_out, matrix_options, prepared, unfit


def add(parser: argparse.ArgumentParser) -> None:
    matrix_options(parser)
    parser.add_argument("--json", action="store_true", help="as JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from ..explain import reason
    from ..folders import read_json

    ready = prepared(args)
    before = read_json(ready.folder / "plan.json")
    missing = set(ready.missing())
    rows, users = [], ready.plan.users()
    later = set(ready.plan.closure(k for i in ready.left_out for k in ready.plan.roles[i].values()))
    for key, step in ready.plan.steps.items():
        cached = ready.has(key)
        if not cached and key not in missing:
            why = "left out" if key in later else "not needed: what follows from it is there"
        else:
            why = "taken from an earlier run" if key in ready.known else "cached" if cached else reason(step, before)
        rows.append(
            {
                "key": key,
                "kind": step.kind,
                "label": step.label,
                "cells": users[key],
                "cached": cached,
                "runs": key in missing,
                "why": why,
                "seconds": round(ready.seconds[key], 1),
                "memory": int(ready.memory(step)),
                "disk": int(ready.estimates.disk(step)),
                "needs": step.needs,
            }
        )
    total = {
        "cells": len(ready.plan.cells),
        "steps": len(rows),
        "run": len(missing),
        "left_out": len(ready.left_out.keys() - ready.recorded.keys()),
        "seconds": round(ready.time_needed(list(missing)), 1),
        "memory": max((r["memory"] for r in rows if r["runs"]), default=0),
        "disk": sum(r["disk"] for r in rows if r["runs"]),
    }
    if args.json:
        cells = {cell.id: ready.plan.roles[cell.id] for cell in ready.plan.cells}
        refused = [{"model": model, axis: name, "reason": why} for (model, axis, name), why in ready.unfit.items()]
        found = {"total": total, "machine": ready.machine, "cells": cells, "unfit": refused, "steps": rows}
        print(json.dumps(found, indent=1))
        return 0
    show(ready, rows, total)
    return 0


def show(ready, rows: list[dict], total: dict) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..display import clock

    console = Console()
    table = Table(box=None, pad_edge=False)
    for name, justify in (("step", "left"), ("cells", "right"), ("time", "right"), ("memory", "right"), ("why", "left")):
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        shown = row["runs"]
        table.add_row(
            escape(f"{row['kind']}: {row['label']}"),
            str(row["cells"]),
            clock(row["seconds"]) if shown else "",
            f"{row['memory'] / 2**30:.1f} GiB" if shown else "",
            escape(row["why"]),
        )
    console.print(f"{total['cells']} cells:")
    for cell in ready.plan.cells:
        console.print("  " + escape(cell.id), highlight=False)
    console.print()
    console.print(table)
    for line in filter(None, [*unfit(ready), left_out(ready, [i for i in ready.left_out if i not in ready.recorded])]):
        console.print("\n" + escape(line), highlight=False)
    console.print(
        f"\n{total['steps']} steps, {total['run']} to run: about {clock(total['seconds'])}, up to"
        f" {total['memory'] / 2**30:.1f} GiB of memory, {total['disk'] / 2**30:.2f} GiB of disk,"
        f" on {', '.join(ready.machine['devices'])} ({ready.machine['name']}) in {ready.machine['dtype']}",
        highlight=False,
    )
