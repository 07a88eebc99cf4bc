"""The table a run ends with on the terminal: per model and task a block, per compression a ladder up to the best cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .display import clock
from .machines import labels

if TYPE_CHECKING:
    from rich.console import Console

BLOCK = ("model", "task")  # axes that a block is for
BESIDE = ("auroc", "log_loss")
LEFT_OUT = ("time", "stored", "log_loss", "auroc", "decode/s", "prefill/s", "trainable")  # first to last on narrow terminals
WIDE = 200  # columns where the output is no terminal, so that nothing is cut off in logs


def print_table(records: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print records as tables on `console` (None: standard output).

    A row: the other axes, primary metric with its interval, AUROC and log-loss of the labels, trainable parameters, bytes
    stored (model and adapter), prefill and decode in tokens/s (`sim.` where the compression only simulates speed), seconds
    over all its steps, status. Compressions keep the matrix's order; inside one, worse cells come before better ones and
    those without a value last. Where the records are of several machines a column says which: speeds of different ones cannot
    be compared. The reason of each failed or unsupported cell stands under its block. What a narrow terminal
    has no room for is left out, column by column, and named.
    """
    from rich.console import Console

    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDE)
    of = dict(zip(map(id, records), labels(records), strict=True))
    machines = of if len(set(of.values())) > 1 else {}
    blocks: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        blocks.setdefault(tuple(record["axes"].get(axis) for axis in BLOCK), []).append(record)
    for names, block in blocks.items():
        title, out = " · ".join(str(n) for n in names), 0
        while _table(title, block, machines, LEFT_OUT[:out]).__rich_measure__(console, console.options).maximum > console.width:
            if out == len(LEFT_OUT):
                break
            out += 1
        console.print(_table(title, block, machines, LEFT_OUT[:out]))
        if out:
            console.print(f"  no room here for: {', '.join(LEFT_OUT[:out])}", style="dim", highlight=False)
        for record in block:
            if record["reason"] and record["status"] != "pending":
                reason, step = record["reason"], record["reason"]["step"]
                line = f"  {_cell_name(record)}: {record['status']} at {step}: {reason['message']}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)


def uncut():
    """A rich console for tables whose every figure counts: lines longer than the terminal's are folded by it, not cut off."""
    from rich.console import Console

    return Console(width=max(400, Console().width))


def ladder(block: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of one model and task in the order of their rows."""
    order = {c: i for i, c in enumerate(dict.fromkeys(r["axes"].get("compression") for r in block))}

    def place(record: dict[str, Any]) -> tuple:
        metric = _metric(record, record["primary"])
        value = metric and metric["value"]
        if value is None:
            return order[record["axes"].get("compression")], 1, 0.0
        return order[record["axes"].get("compression")], 0, value if metric["higher_is_better"] is not False else -value

    return sorted(block, key=place)


def _table(title: str, block: list[dict[str, Any]], machines: dict[int, str], left_out: tuple[str, ...] = ()):
    from rich.markup import escape
    from rich.table import Table

    axes = [a for a in dict.fromkeys(a for r in block for a in r["axes"]) if a not in BLOCK]
    if len({r["axes"].get("seed") for r in block}) == 1 and "seed" in axes:
        axes.remove("seed")
    primaries = list(dict.fromkeys(r["primary"] for r in block if r["primary"]))
    beside = [m for m in BESIDE if any(m in r["metrics"] and m != r["primary"] for r in block)]
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for axis in axes:
        table.add_column(escape(axis), no_wrap=True)
    main = f"{primaries[0] if len(primaries) == 1 else 'metric'} (95 %)"
    names = [main, *beside, "trainable", "stored", "prefill/s", "decode/s", "time"]
    if machines:
        table.add_column("device")
    for name in names:
        if name not in left_out:
            table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for record in ladder(block):
        quality = _interval(_metric(record, record["primary"]))
        if len(primaries) > 1 and record["primary"]:
            quality = f"{record['primary']} {quality}"
        numbers = [quality, *(_plain(_metric(record, m)) for m in beside)]
        numbers += [_short((record["training"] or {}).get("trainable_parameters")), _short(_probe(record, "disk"), "B")]
        numbers += [_speed(record, "prefill"), _speed(record, "decode"), clock(record["costs"]["seconds"])]
        cells = [str(record["axes"].get(axis, "")) for axis in axes]
        cells += [machines[id(record)]] if machines else []
        cells += [number for name, number in zip(names, numbers, strict=True) if name not in left_out]
        status = record["status"]
        style = {"failed": "red", "unsupported": "yellow", "pending": "dim"}.get(status)
        table.add_row(*map(escape, cells), status, style=style)
    return table


def _cell_name(record: dict[str, Any]) -> str:
    return " ".join(f"s{v}" if k == "seed" else str(v) for k, v in record["axes"].items() if k not in BLOCK)


def _metric(record: dict[str, Any], name: str | None) -> dict[str, Any] | None:
    return record["metrics"].get(name) if name else None


def _interval(metric: dict[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    if metric["low"] is None:
        return f"{metric['value']:.4g}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def _plain(metric: dict[str, Any] | None) -> str:
    return "–" if metric is None or metric["value"] is None else f"{metric['value']:.3f}"


def _probe(record: dict[str, Any], name: str) -> float | None:
    return record["probes"].get(name, {}).get("value")


def _speed(record: dict[str, Any], name: str) -> str:
    value = _probe(record, name)
    if value is None:
        return "–"
    return f"{value:,.0f}" + (" sim." if record["probes"][name].get("simulated") else "")


def _short(number: float | None, unit: str = "") -> str:
    """A count with three digits: 4.88 M, 269 MB."""
    if number is None:
        return "–"
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()
