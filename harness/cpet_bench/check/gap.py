"""How much of what a compression lost each way of tuning brings back, and at what cost, over all seeds of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import is_vanilla
from .between import UNITS, seedless
from .pairs import Incomparable, difference, metric_of, one_run
from .seeds import Estimate, Place, difference_over_seeds, mean_over_seeds, share_of_gap


@dataclass
class Row:
    """One way of tuning: its metric (a mean over seeds), what that is worth, and what it trained.

    above: minus vanilla, signed so that more is better. share: of the gap, where there is one. trained, flops and seconds: a
    mean over seeds, of the cell alone. dense_flops: those of D, which it starts from or is taught by, and of the D of another
    model that teaches it. per_million and per_tflop: the share, in percent, divided by millions of trained parameters and by
    10^12 operations of training, those of dense_flops included; None where nothing was trained or there is no share.
    at_the_edge: the rate, or another choice, is the smallest or largest that was tried.
    """

    pet: str
    restoring: str
    seeds: list[int]
    value: Estimate
    above: Estimate | None = None
    share: Estimate | None = None
    trained: int = 0
    steps: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    dense_flops: float | None = None
    per_million: float | None = None
    per_tflop: float | None = None
    lr: list[float] = field(default_factory=list)
    at_the_edge: bool = False
    note: str = ""


@dataclass
class Ladder:
    """All ways of tuning one compressed model for one task, and the two ends they are measured between.

    low: vanilla, the same PET on the compressed model from random weights. high: D, the same PET on the dense one. gap: their
    difference over the seeds of both, None with the reason in `note` where it has none. left_out: cells without an end.
    """

    model: str
    compression: str
    task: str
    pet: str
    metric: str
    higher_is_better: bool
    unit: str | None
    low: Row
    high: Row
    gap: Estimate | None
    untuned: Row | None
    rows: list[Row]
    documents: int
    left_out: list[str]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def gaps(run: str | Path, metric: str | None = None) -> list[Ladder]:
    """A ladder for each (model, compression, PET, task) with a vanilla cell and D at one seed at least. Intervals are of 95 %.

    Args: metric: which (None: each task's primary one).

    A row's seeds are those at which it, vanilla and D are done and have the metric. Raises InputError where the run has no such
    cells, or not the metric.
    """
    records = {cell: r for cell, r in one_run(run).items() if r["status"] == "done"}
    groups: dict[tuple[str, ...], list[dict]] = {}
    for record in records.values():
        if record["settings"].get("pet") and record["settings"].get("compression"):
            groups.setdefault(tuple(str(record["axes"][a]) for a in ("model", "compression", "pet", "task")), []).append(record)
    found = [ladder for key, cells in groups.items() if (ladder := _ladder(Path(run), records, key, cells, metric))]
    if not found:
        known = sorted({n for r in records.values() for n, m in r["metrics"].items() if m["higher_is_better"] is not None})
        if metric and metric not in known:
            raise InputError(f"no cell of {run} has a metric {metric!r}", given=metric, allowed=known)
        raise InputError(f"{run} has no compressed cell beside both its vanilla one and D (the same PET on the dense model)")
    return found


def _ladder(run: Path, records: dict[str, dict], key: tuple, cells: list[dict], metric: str | None) -> Ladder | None:
    name = metric or next((r["primary"] for r in cells if r["primary"]), None)

    def has(cell: str | None) -> bool:
        found = records[cell]["metrics"].get(name) if cell in records else None
        known = found and found["value"] is not None and found["higher_is_better"] is not None
        return bool(known) and isfinite(found["value"])

    # Of several restorings without a part (one with a `train` of its own), vanilla is the one that the others refer to.
    referred = [records[v] for r in cells if (v := r["references"].get("vanilla")) in records]
    plain = next((r["axes"]["restoring"] for r in referred), None)

    def ends(record: dict) -> tuple[str | None, str | None]:
        others = record["references"]
        own = is_vanilla(record["settings"].get("restoring")) and plain in (None, record["axes"]["restoring"])
        return record["id"] if own else others.get("vanilla"), others.get("dense_pet")

    whole = [r for r in cells if has(r["id"]) and all(map(has, ends(r)))]
    vanillas = [r for r in whole if ends(r)[0] == r["id"]]
    known = {r["id"] for r in vanillas}
    vanillas += [records[i] for i in dict.fromkeys(ends(r)[0] for r in whole) if i not in known]
    vanillas = [r for r in vanillas if has(ends(r)[1])]
    known = {r["id"] for r in vanillas}
    if not vanillas:
        return None
    denses = [records[i] for i in dict.fromkeys(ends(r)[1] for r in vanillas)]
    names: dict[str, list[dict]] = {}
    for record in whole:
        if record["id"] not in known:
            names.setdefault(seedless(record), []).append(record)
    entry = vanillas[0]["metrics"][name]
    gap, note = None, ""
    try:
        low = _places(run, vanillas)
        _, gap = share_of_gap(low, low, [(run, ends(r)[1]) for r in vanillas], name, entry)
    except Incomparable as error:
        note = str(error)
    untuned = [records[i] for i in dict.fromkeys(r["references"].get("untuned") for r in whole) if has(i)]
    model, compression, pet, task = key
    return Ladder(
        model,
        compression,
        task,
        pet,
        name,
        entry["higher_is_better"],
        UNITS.get(metric_of(name)),
        _about(run, vanillas, name, entry),
        _about(run, denses, name, entry),
        gap,
        _about(run, untuned, name, entry) if untuned else None,
        [_row(run, records, group, ends, name, entry) for group in names.values()],
        entry["n"],
        [r["id"] for r in cells if r not in whole],
        note,
    )


def _places(run: Path, records: Sequence[dict]) -> list[Place]:
    return [(run, r["id"]) for r in records]


def _about(run: Path, records: list[dict], name: str, entry: dict) -> Row:
    """A row without comparisons. Of one seed the value's interval is its record's, conditional on that seed."""
    records = sorted(records, key=lambda r: int(r["axes"]["seed"]))
    values = [r["metrics"][name]["value"] for r in records]
    value, note = Estimate(sum(values) / len(values), None, None, entry["n"]), ""
    if len(records) == 1:
        m = records[0]["metrics"][name]
        value = Estimate(m["value"], m["low"], m["high"], m["n"])
    elif metric_of(name) not in UNITS:  # whose outcomes are not in the metric's own unit
        try:
            value = mean_over_seeds(_places(run, records), name, entry)
        except Incomparable as error:
            note = str(error)
    axes, trainings = records[0]["axes"], [r["training"] or {} for r in records]

    def mean(part: str) -> float:
        return sum(t.get(part) or 0 for t in trainings) / len(trainings)

    row = Row(str(axes["pet"]), str(axes["restoring"]), [int(r["axes"]["seed"]) for r in records], value, note=note)
    if mean("steps"):
        row.trained, row.steps = round(mean("trainable_parameters")), round(mean("steps"))
        row.flops, row.seconds = mean("flops"), mean("seconds")
        row.lr = sorted({t["lr"] for t in trainings if t.get("lr") is not None})
        row.at_the_edge = any((t.get("selection") or {}).get("at_the_edge") for t in trainings)
    return row


def _row(run: Path, records: dict[str, dict], group: list[dict], ends, name: str, entry: dict) -> Row:
    group = sorted(group, key=lambda r: int(r["axes"]["seed"]))
    own, row = _places(run, group), _about(run, group, name, entry)
    low, high = ([(run, ends(r)[which]) for r in group] for which in (0, 1))
    restoring = group[0]["settings"].get("restoring") or {}
    given = (restoring.get("inherit") or {}).get("from")  # a module of the user's, whose cost is not known
    if restoring.get("distill") is not None or restoring.get("inherit") is not None and not given:
        of_d = [(records[d]["training"] or {}).get("flops") or 0 for _, d in high]
        spent = [_spent(r["training"] or {}) or d for r, d in zip(group, of_d, strict=True)]
        row.dense_flops = sum(spent) / len(spent)
    try:
        if len(group) > 1:
            row.above = difference_over_seeds(own, low, name, entry)
        else:
            d = difference(own[0], low[0], name, entry, 0.0, 0.95)
            row.above = Estimate(d.value, d.low, d.high, d.n, d.p)
        row.share, _ = share_of_gap(own, low, high, name, entry)
        if row.share and row.trained:
            row.per_million = 100 * row.share.value / (row.trained / 1e6)
            row.per_tflop = 100 * row.share.value / ((row.flops + (row.dense_flops or 0)) / 1e12)
    except Incomparable as error:
        row.note = str(error)
    return row


def _spent(training: dict[str, Any]) -> float:
    """Operations of the modules that a cell starts from and is taught by, each once; 0 where its record does not say."""
    stated = [training.get(part) or {} for part in ("inherited", "taught_by")]
    return sum({s.get("id"): s.get("flops") or 0 for s in stated}.values())
