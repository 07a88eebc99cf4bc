"""Records as tables: which columns, what each says, and what it is sorted by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import charts
from .text import MB, NONE, exists, figure, metric, natural

DEVICE = "device used"  # stands beside the axes where records are of several machines: their speeds cannot be compared
STATUSES = ("done", "failed", "unsupported", "pending")


@dataclass
class Entry:
    """A cell on the page: its record, the run it is of, and the record of D it is compared with."""

    record: dict[str, Any]
    run: str
    row: int = -1
    dense_pet: dict[str, Any] | None = None
    machine: str = ""  # its device, where the page shows several
    gap_ends: tuple[float, float] | None = None  # interval of the gap to D, paired by document

    @property
    def done(self) -> bool:
        return self.record["status"] == "done"

    def axis(self, name: str) -> str:
        value = {"run": self.run, DEVICE: self.machine}.get(name, self.record["axes"].get(name))
        return NONE if value is None else str(value)

    def metric(self, name: str | None) -> dict[str, Any] | None:
        return (self.record.get("metrics") or {}).get(name)

    def sibling(self, name: str) -> dict[str, Any] | None:
        """The metric `name` of the task that the primary metric is of (`task/acc` has `task/auroc` beside it)."""
        before, slash, _ = (self.record.get("primary") or "").rpartition("/")
        return self.metric(f"{before}{slash}{name}")

    def probe(self, name: str) -> float | None:
        return ((self.record.get("probes") or {}).get(name) or {}).get("value")

    def simulated(self, what: str, probe: str) -> bool:
        own = (self.record.get("probes") or {}).get(probe) or {}
        return bool(own.get("simulated")) or what in (self.record.get("simulated") or [])

    def training(self, *path: str) -> Any:
        return self._at("training", *path)

    def restoring(self, *path: str) -> Any:
        return self._at("settings", "restoring", *path)

    def _at(self, *path: str) -> Any:
        """What stands in the record under these keys; None where one of them is missing or null."""
        part: Any = self.record
        for name in path:
            part = (part or {}).get(name)
        return part

    def gap(self) -> float | None:
        """Primary metric minus that of D, the dense model with the same PET, task and seed."""
        name = self.record.get("primary")
        own, other = self.metric(name), ((self.dense_pet or {}).get("metrics") or {}).get(name)
        return own["value"] - other["value"] if own and other and exists(own["value"]) and exists(other["value"]) else None


@dataclass
class Column:
    """A column: its heading, and for an entry the value it sorts by and the text it shows."""

    key: str
    label: str
    group: str
    value: Callable[[Entry], Any]
    text: Callable[[Any], str] = str
    better: str = ""  # "higher" or "lower" where one of them is; decides what the first click on the heading does
    hint: str = ""
    unit: str = ""
    mark: Callable[[Entry], str] = lambda entry: ""
    optional: bool = True  # left out of a table where no cell has a value


def value(found: dict[str, Any] | None) -> float | None:
    return found["value"] if found and exists(found.get("value")) else None


def direction(found: dict[str, Any] | None) -> str:
    up = None if found is None else found.get("higher_is_better")
    return "" if up is None else "higher" if up else "lower"


def at_the_edge(entry: Entry) -> bool:
    """Whether what `select` chose for this cell is the smallest or largest that was tried."""
    return bool(entry.training("steps") and entry.training("selection", "at_the_edge"))


def number_columns(primary: str | None, better: str) -> list[Column]:
    """The columns after the axes."""

    def sim(what: str, probe: str):
        return lambda e: "sim." if e.simulated(what, probe) else ""

    def sized(key: str, label: str) -> Column:
        def text(v):
            return figure(v, MB)

        return Column(key, label, "Size", lambda e: e.probe(key), text, "lower", unit="MB", mark=sim("size", key))

    def speed(key: str) -> Column:
        return Column(key, key, "Speed", lambda e: e.probe(key), figure, "higher", unit="tokens/s", mark=sim("speed", key))

    def trainable(e: Entry) -> int | None:
        return e.training("trainable_parameters")

    def inherited(e: Entry) -> int | None:
        if not e.done or not e.record.get("training"):
            return None
        spent = e.training("inherited", "steps") or e.training("taught_by", "steps")
        if spent is None and isinstance(e.restoring("distill", "teacher"), str):  # records that do not say it themselves
            return ((e.dense_pet or {}).get("training") or {}).get("steps")
        return spent

    def compressing(e: Entry) -> float | None:
        return (e.record.get("compression") or {}).get("seconds")

    def of_primary(e: Entry) -> float | None:
        return value(e.metric(e.record.get("primary")))

    def cost(e: Entry) -> float | None:
        return (e.record.get("costs") or {}).get("seconds")

    def rate(e: Entry) -> float | None:
        return e.training("lr") if e.training("steps") else None

    def edge(e: Entry) -> str:
        return "edge" if at_the_edge(e) else ""

    note = f"95 % interval, {better} is better" if better else "95 % interval"
    to_d = "this cell's value minus that of D, the dense model with the same PET, task and seed"
    from_d = "steps spent on D, which this cell started from or was taught by"
    return [
        Column("primary", primary or "metric", "Quality", of_primary, metric, better, unit=note, optional=False),
        Column("auroc", "AUROC", "Quality", lambda e: value(e.sibling("auroc")), metric, "higher"),
        Column("log_loss", "log-loss", "Quality", lambda e: value(e.sibling("log_loss")), metric, "lower"),
        Column("gap", "gap to D", "Quality", Entry.gap, lambda v: metric(v, signed=True), better, to_d),
        Column("rate", "rate", "Tuning", rate, "{:g}".format, hint="learning rate", mark=edge),
        Column("trainable", "trainable", "Size", trainable, lambda v: figure(v, 1e6), "lower", unit="million"),
        sized("disk", "on disk"),
        sized("resident", "resident"),
        speed("prefill"),
        speed("decode"),
        Column("compress_seconds", "compressing", "Cost", compressing, figure, "lower", unit="s"),
        Column("train_seconds", "training", "Cost", lambda e: e.training("seconds"), figure, "lower", unit="s"),
        Column("inherited", "from D", "Cost", inherited, figure, "lower", from_d, "steps"),
        Column("seconds", "in all", "Cost", cost, figure, "lower", unit="s"),
    ]


@dataclass
class Table:
    """Everything about one (model, task)."""

    model: str
    task: str
    entries: list[Entry]
    columns: list[Column] = field(default_factory=list)
    axes: int = 0  # how many of the columns, at the beginning, are axes
    primary: str | None = None
    better: str = ""
    span: tuple[float, float] = (0.0, 1.0)  # of the bars; of logarithms where `log` says so
    log: bool = False
    ranks: list[list[int]] = field(default_factory=list)
    charts: list[charts.Chart] = field(default_factory=list)
    coloured: str = "compression"  # what colours stand for
    colours: list[tuple[str, int, int]] = field(default_factory=list)  # name, colour, shape
    shapes: list[tuple[str, int]] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings above the columns, each with how many it spans."""
        found = Counter(c.group for c in self.columns)
        return list(found.items())


def axis_names(entries: list[Entry]) -> list[str]:
    """Axes in the records' own order; the run first, where there is more than one."""
    names = list(dict.fromkeys(name for e in entries for name in e.record["axes"]))
    names += [DEVICE] if len({e.machine for e in entries}) > 1 else []
    return (["run"] if len({e.run for e in entries}) > 1 else []) + names


def tables(entries: list[Entry]) -> list[Table]:
    """One table for each (model, task), and each entry's row counted through all of them."""
    axes = [a for a in axis_names(entries) if a not in ("model", "task")]
    parted: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        parted.setdefault((entry.axis("model"), entry.axis("task")), []).append(entry)
    found, row = [], 0
    for (model, task), own in parted.items():
        for entry in own:
            entry.row, row = row, row + 1
        found.append(fill(Table(model, task, own), axes))
    return found


def fill(table: Table, axes: list[str]) -> Table:
    """Work out a table's columns, ranks, scales and charts."""
    done = [e for e in table.entries if e.done]
    names = Counter(e.record["primary"] for e in done if e.record.get("primary"))
    table.primary = names.most_common(1)[0][0] if names else None
    table.better = next((direction(e.metric(table.primary)) for e in done if e.metric(table.primary)), "")
    of_axes = [_axis_column(name) for name in axes]
    numbers = number_columns(table.primary, table.better)
    numbers = [c for c in numbers if not c.optional or any(exists(c.value(e)) for e in done)]
    table.axes, table.columns = len(of_axes), of_axes + numbers
    table.ranks = [rank([c.value(e) for e in table.entries]) for c in of_axes]
    machines = [e.machine for e in table.entries]
    several = len(set(machines)) > 1
    for column in numbers:
        values = [column.value(e) if e.done else None for e in table.entries]
        apart = several and column.group == "Speed"
        table.ranks.append(rank_apart(values, machines) if apart else rank(values))
        column.hint = "of each device by itself: speeds of different ones cannot be compared" if apart else column.hint
    shown = [e.metric(table.primary) for e in done if e.metric(table.primary)]
    values = [v for m in shown for v in (m["value"], m.get("low"), m.get("high"))]
    table.log = charts.wide(values)
    table.span = charts.log_domain(values) if table.log else charts.domain(values)
    _charts(table, done)
    return table


def _axis_column(name: str) -> Column:
    label = {"pet": "PET"}.get(name, name)
    return Column(name, label, "Cell", lambda e: e.axis(name), optional=False)


def rank(values: list[Any]) -> list[int]:
    """Place of each value among the distinct ones, counted from 0; −1 for none. Texts are ordered as a person would."""
    there = {v for v in values if v is not None and (isinstance(v, str) or exists(v))}
    order = sorted(there, key=lambda v: (1, natural(v)) if isinstance(v, str) else (0, v))
    places = {v: i for i, v in enumerate(order)}
    return [places.get(v, -1) if v is None or isinstance(v, str) or exists(v) else -1 for v in values]


def rank_apart(values: list[Any], groups: list[str]) -> list[int]:
    """As `rank`, within each group; the groups follow one another in the order they appear."""
    found, before = [-1] * len(values), 0
    for group in dict.fromkeys(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        own = rank([values[i] for i in rows])
        for i, place in zip(rows, own, strict=True):
            found[i] = place + before if place >= 0 else -1
        before += max(own, default=-1) + 1
    return found


def method(entry: Entry) -> str:
    """PET and restoring in one word: what a marker's shape stands for."""
    if (entry.record.get("settings") or {}).get("pet") is None:
        return "no PET"
    return f"{entry.axis('pet')} · {entry.axis('restoring')}"


def _charts(table: Table, done: list[Entry]) -> None:
    shown = [e for e in done if e.metric(table.primary)]
    references = {e.dense_pet["id"]: value(e.dense_pet["metrics"].get(table.primary)) for e in shown if e.dense_pet}
    line = next(iter(references.values())) if len(references) == 1 else None
    y_label = f"{table.primary} ({table.better} is better)" if table.better else str(table.primary)
    look = _looks(table, shown)

    def points(x: Callable[[Entry], float | None], unit: float, of: list[Entry], sim=lambda e: False) -> list[dict[str, Any]]:
        found = []
        for e in of:
            m, v = e.metric(table.primary), x(e)
            found.append(
                {
                    "x": v / unit if exists(v) else None,
                    "y": m["value"],
                    "low": m.get("low"),
                    "high": m.get("high"),
                    "colour": look(e)[0],
                    "shape": look(e)[1],
                    "simulated": sim(e),
                    "row": e.row,
                    "text": f"{e.record['id']}: {metric(m['value'])} at {figure(v, unit)}",
                }
            )
        return found

    def probed(name: str, unit: float, what: str, of: list[Entry]) -> list[dict[str, Any]]:
        return points(lambda e: e.probe(name), unit, of, lambda e: e.simulated(what, name))

    drawn = []
    if len({_trained(e) for e in shown if _trained(e)}) > 1:
        trained = [e for e in shown if _trained(e)]
        title, least = "Quality by trained parameters", min(map(_trained, trained))
        unit, label = (1e6, "million trained parameters") if least >= 1e4 else (1e3, "thousand trained parameters")
        drawn.append(charts.scatter(points(_trained, unit, trained), title, label, y_label, line))
    drawn.append(charts.scatter(probed("disk", MB, "size", shown), "Quality by size on disk", "MB on disk", y_label, line))
    machines = list(dict.fromkeys(e.machine for e in shown))
    for one in machines:  # a chart each: speeds of different machines cannot be compared
        own = probed("decode", 1.0, "speed", [e for e in shown if e.machine == one])
        title = "Quality by decoding speed" + (f" on {one}" if len(machines) > 1 else "")
        drawn.append(charts.scatter(own, title, "decoded tokens per second", y_label, line))
    table.charts = [c for c in drawn if c]


def _trained(entry: Entry) -> int | None:
    """Parameters that the cell really trained: none where it put together what was trained elsewhere."""
    return entry.training("trainable_parameters") if entry.training("steps") else None


def _looks(table: Table, shown: list[Entry]) -> Callable[[Entry], tuple[int, int]]:
    """Fill the table's legends, and return what gives an entry's colour and shape.

    Colours stand for compressions, shapes for PET and restoring; where there is one of the one, both stand for the other.
    """
    compressions = {n: i for i, n in enumerate(dict.fromkeys(e.axis("compression") for e in table.entries))}
    methods = {n: i for i, n in enumerate(dict.fromkeys(method(e) for e in shown))}
    used = {e.axis("compression") for e in shown}

    def both(place: int) -> tuple[int, int]:
        return place % charts.COLOURS, place // charts.COLOURS % charts.SHAPES

    if len(used) == 1 and len(methods) > 1:
        table.coloured = "PET and restoring"
        table.colours = [(name, *both(i)) for name, i in methods.items()]
        return lambda e: both(methods[method(e)])
    alone = len(methods) == 1
    table.colours = [(n, both(i)[0], both(i)[1] if alone else 0) for n, i in compressions.items() if n in used]
    if not alone or len(used) <= charts.COLOURS:
        table.shapes = [(n, i % charts.SHAPES) for n, i in methods.items()]

    def look(e: Entry) -> tuple[int, int]:
        colour, shape = both(compressions[e.axis("compression")])
        return colour, shape if alone else methods[method(e)] % charts.SHAPES

    return look


def cells_of(table: Table, entry: Entry) -> list[dict[str, Any]]:
    """The number cells of a done entry after the primary metric, as the template writes them."""
    found, group = [], "Quality"
    for column in table.columns[table.axes + 1 :]:
        v = column.value(entry)
        mark = column.mark(entry) if exists(v) else ""
        quiet = column.key == "gap" and entry.gap_ends is not None and entry.gap_ends[0] <= 0 <= entry.gap_ends[1]
        kinds = [name for name, holds in (("n", True), ("first", column.group != group), ("quiet", quiet)) if holds]
        found.append({"text": column.text(v) if exists(v) else NONE, "mark": mark, "kinds": " ".join(kinds)})
        group = column.group
    return found


def span(low: float, high: float) -> str:
    """An interval in words: a dash between its ends, `to` where one is negative."""
    return f"{metric(low)}{'–' if low >= 0 else ' to '}{metric(high)}"


def primary_cell(table: Table, entry: Entry) -> dict[str, Any]:
    """The primary metric with its interval, written and drawn."""
    name = entry.record.get("primary")
    found = entry.metric(name)
    if not found or not exists(found.get("value")):
        return {"text": NONE, "interval": "", "bar": None, "name": ""}
    low, high = found.get("low"), found.get("high")
    written = span(low, high) if exists(low) and exists(high) else "no interval"
    same = name == table.primary
    reference = value(((entry.dense_pet or {}).get("metrics") or {}).get(name))
    drawn = charts.bar(found["value"], low, high, reference, table.span, table.log) if same else None
    return {"text": metric(found["value"]), "interval": written, "bar": drawn, "name": "" if same else name}


def why(record: dict[str, Any]) -> dict[str, str]:
    """What a cell that is not done says in its row: kind and message, cut to a line or two."""
    reason = record.get("reason")
    if not reason:
        return {"type": "", "message": "not run yet" if record["status"] == "pending" else "no reason was recorded", "step": ""}
    message = " ".join(str(reason.get("message", "")).split())
    short = message if len(message) <= 240 else message[:239] + "…"
    return {"type": str(reason.get("type") or ""), "message": short, "step": str(reason.get("step") or "")}
