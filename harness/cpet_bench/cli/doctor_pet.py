"""What `cpet-bench doctor --pet` prints."""

from __future__ import annotations

import json

from ..pet.capability import PARTS


def run(methods: list[str], layers: list[str], fresh: bool, as_json: bool) -> int:
    """0 where any PET method works on any class of layer, 1 where none does."""
    from rich.console import Console

    from ..doctor_pet import examine

    console = Console(stderr=True)
    with console.status("PET methods are tried on tiny models; what was found is kept") as status:

        def told(layer: str, done: int, total: int) -> None:
            status.update(f"{layer}: {done} of {total} tried")

        found = examine(methods, layers, fresh=fresh, told=told)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if found["ok"] else 1


def show(found: dict) -> None:
    """A table (method × class of layer: which restorings work), and below it why the others do not."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("PET method")
    for shown in found["classes"].values():
        table.add_column(escape(shown), overflow="fold")
    states: dict[str, dict[str, dict[str, str]]] = {}
    reasons: dict[str, dict[str, None]] = {}
    for cell in found["cells"]:
        states.setdefault(cell["method"], {}).setdefault(cell["layer"], {})[cell["restoring"]] = cell["state"]
        if cell["state"] != "ok":
            reasons.setdefault(cell["reason"], {})[f"{cell['method']} on {found['classes'][cell['layer']]}"] = None
    for method, row in states.items():
        table.add_row(method, *(_cell(row[layer]) for layer in found["classes"] if layer in row))
    console.print(table)
    if reasons:
        console.print("\nWhy not:")
    for reason, cells in reasons.items():
        names = list(cells)
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        console.print(f"  {', '.join(names[:6])}{more}:\n    {reason}", highlight=False, markup=False)
    every = [cell["state"] for cell in found["cells"]]
    known = sum(cell["cached"] for cell in found["cells"])
    counts = ", ".join(f"{every.count(s)} {s}" for s in ("ok", "unsupported", "failed"))
    console.print(f"\n{counts} ({known} known from before), on {found['device']}; all: {', '.join(PARTS)}.", highlight=False)


def _cell(states: dict[str, str]) -> str:
    works = [part for part in PARTS if states.get(part) == "ok"]
    if len(works) == len(PARTS):
        return "[green]all[/]"
    return f"[yellow]{', '.join(works)}[/]" if works else "[red]–[/]"
