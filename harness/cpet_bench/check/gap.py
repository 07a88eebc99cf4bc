"""How much of what a compression lost each way of tuning brings back, and at what cost, over all seeds of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..records import read_records, run_folders
from .between import UNITS, seedless
from .pairs import Incomparable, difference
from .seeds import Estimate, Place, difference_over_seeds, mean_over_seeds, share_of_gap


@dataclass
class Row:
    """One way of tuning: its metric (a mean over seeds), what that is worth, and what it trained.

    above: minus vanilla, signed so that more is better. share: of the gap, where there is one. trained, flops and seconds: a
    mean over seeds, of the cell alone; inherited_flops: of the D it started from.
    """

    pet: str
    restoring: str
    seeds: list[int]
    value: Estimate
    above: Estimate | None = None
    share: Estimate | None = None
    trained: int | None = None
    steps: int | None = None
    flops: float | None = None
    seconds: float | None = None
    inherited_flops: float | None = None
    lr: list[float] = field(default_factory=list)
    note: str = ""


@dataclass
class Ladder:
    """All ways of tuning one compressed model for one task, and the two ends they are measured between.

    low: vanilla, the same PET on the compressed model from random weights. high: D, the same PET on the dense one.
    """

    model: str
    compression: str
    task: str
    pet: str
    metric: str
    unit: str | None
    low: Row
    high: Row
    gap: Estimate
    untuned: Row | None
    rows: list[Row]
    documents: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def gaps(run: str | Path, metric: str | None = None, level: float = 0.95) -> list[Ladder]:
    """A ladder for each (model, compression, PET, task) that has a vanilla cell and D at a seed at least.

    Args: metric: which (None: each task's primary one). level: of the intervals.

    Seeds are those that a row, vanilla and D all have. Raises InputError where the run has no such cells, or not the metric.
    """
    folders = run_folders(run)
    if len(folders) > 1 or folders[0] != Path(run):
        raise InputError(f"{run} holds several runs; name one", allowed=[str(f) for f in folders])
    records = {r["id"]: r for r in read_records(run) if r["status"] == "done"}
    groups: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    for record in records.values():
        ends = [record["references"].get(k) for k in ("vanilla", "dense_pet")]
        if ends[0] is None and record["references"].get("dense_pet") and record["settings"].get("compression"):
            ends[0] = record["id"]  # it is vanilla itself
        if all(e in records for e in ends):
            axes = record["axes"]
            key = tuple(str(axes[a]) for a in ("model", "compression", "pet", "task"))
            groups.setdefault(key, {}).setdefault(seedless(record), []).append(record)
    if not groups:
        raise InputError(f"{run} has no compressed cell beside both its vanilla one and D (the same PET on the dense model)")
    found = []
    for key, cells in groups.items():
        ladder = _ladder(Path(run), records, key, cells, metric, level)
        if ladder:
            found.append(ladder)
    if not found:
        every = [m for r in records.values() for m in r["metrics"].items()]
        known = sorted({name for name, m in every if m["higher_is_better"] is not None})
        raise InputError(f"no cell of {run} has a metric {metric!r}", given=metric or "", allowed=known)
    return found


def _ladder(run: Path, records: dict, key: tuple, cells: dict[str, list[dict]], metric: str | None, level: float):
    of_all = [r for group in cells.values() for r in group]
    vanillas = {r["references"].get("vanilla") or r["id"] for r in of_all}
    name = metric or next(r["primary"] for r in of_all)
    if any(name not in r["metrics"] for r in of_all):
        return None
    entry = of_all[0]["metrics"][name]
    low = _end(run, [records[v] for v in vanillas if v in records], name, entry, level)
    dense = {r["references"]["dense_pet"] for r in of_all}
    high = _end(run, [records[d] for d in dense], name, entry, level)
    rows, gap = [], None
    for group in cells.values():
        if group[0]["id"] in vanillas:
            continue
        row, own = _row(run, group, name, entry, level)
        rows.append(row)
        gap = gap or own
    if gap is None:
        own = [(run, v) for v in sorted(vanillas)]
        _, gap = share_of_gap(own, own, [(run, records[v]["references"]["dense_pet"]) for _, v in own], name, entry, level)
    untuned = sorted({u for r in of_all if (u := r["references"].get("untuned")) in records})
    bare = _end(run, [records[u] for u in untuned], name, entry, level) if untuned else None
    model, compression, pet, task = key
    unit = UNITS.get(name.rpartition("/")[2].partition(",")[0])
    return Ladder(model, compression, task, pet, name, unit, low, high, gap, bare, rows, low.value.n)


def _places(run: Path, records: Sequence[dict]) -> list[Place]:
    return [(run, r["id"]) for r in records]


def _end(run: Path, records: list[dict], name: str, entry: dict, level: float) -> Row:
    records = sorted(records, key=lambda r: int(r["axes"]["seed"]))
    return Row(**_about(records), value=_value(run, records, name, entry, level))


def _value(run: Path, records: list[dict], name: str, entry: dict, level: float) -> Estimate:
    """A mean over seeds; of one seed what its record has, which is conditional on it."""
    if len(records) > 1:
        return mean_over_seeds(_places(run, records), name, entry, level)
    m = records[0]["metrics"][name]
    return Estimate(m["value"], m["low"], m["high"], m["n"])


def _about(records: list[dict]) -> dict[str, Any]:
    axes, trainings = records[0]["axes"], [r["training"] or {} for r in records]

    def mean(*path: str) -> float | None:
        found = []
        for t in trainings:
            for part in path:
                t = (t or {}).get(part)
            found.append(t)
        return None if any(v is None for v in found) else sum(found) / len(found)

    trains = bool(mean("steps"))
    return {
        "pet": str(axes["pet"]),
        "restoring": str(axes["restoring"]),
        "seeds": [int(r["axes"]["seed"]) for r in records],
        "trained": round(mean("trainable_parameters")) if trains else 0,
        "steps": round(mean("steps") or 0),
        "flops": mean("flops") if trains else 0.0,
        "seconds": mean("seconds") if trains else 0.0,
        "inherited_flops": mean("inherited", "flops"),
        "lr": sorted({t["lr"] for t in trainings if t.get("lr") is not None}) if trains else [],
    }


def _row(run: Path, group: list[dict], name: str, entry: dict, level: float) -> tuple[Row, Estimate | None]:
    group = sorted(group, key=lambda r: int(r["axes"]["seed"]))
    own = _places(run, group)
    low, high = ([(run, r["references"][end]) for r in group] for end in ("vanilla", "dense_pet"))
    row = Row(**_about(group), value=_value(run, group, name, entry, level))
    try:
        if len(group) > 1:
            row.above = difference_over_seeds(own, low, name, entry, level)
        else:
            d = difference(own[0], low[0], name, entry, 0.0, level)
            p = 1.0 if d.value == d.low == d.high == 0 else min(1.0, 2 * min(d.p_worse, d.p_not_worse))
            row.above = Estimate(d.value, d.low, d.high, d.n, p)
        row.share, gap = share_of_gap(own, low, high, name, entry, level)
    except Incomparable as error:
        row.note = str(error)
        return row, None
    if row.share is None:
        row.note = "the gap itself could be chance"
    return row, gap
