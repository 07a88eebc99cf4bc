"""Cells of one run that differ in one axis, paired by document: is what they differ by real?"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..stats import holm
from .pairs import Incomparable, difference, metric_of, one_run
from .seeds import METHOD, difference_over_seeds

# Perplexities are compared by what they are the exponential of; so are bits per byte, which lm-eval makes of the same sums.
UNITS = {"word_perplexity": "nats/word", "byte_perplexity": "nats/byte", "bits_per_byte": "nats/byte"}


@dataclass
class Pair:
    """Two cells in one metric.

    difference: the first minus the second, the sign turned so that more is better, with its 95 % interval, in `unit` where
    that is not the metric's own. p: two-sided, of no difference; p_holm: after Holm's method over all pairs in this metric.
    seeds: over which a mean was taken; its first and second are then no ids, but what the cells have in common.
    """

    first: str
    second: str
    metric: str
    note: str = ""
    values: tuple[float, float] | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    documents: int | None = None
    method: str | None = None
    unit: str | None = None
    seeds: list[int] | None = None


@dataclass
class Comparison:
    """Pairs of a run whose cells agree in every axis but one; over_seeds: means of those that agree in all but the seed."""

    axis: str
    names: tuple[str, str]
    pairs: list[Pair] = field(default_factory=list)
    over_seeds: list[Pair] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def between(run: str | Path, first: str, second: str, *, metric: str | None = None, level: float = 0.95) -> Comparison:
    """Compare cells of a run that differ in one axis only; and tuned cells with the untuned one of their model.

    Args:
        first, second: `AXIS=NAME` twice, of one axis. metric: which (None: all that both have). level: of the intervals.

    Cells with one seed say nothing about other seeds; where there are several, the cells' means over them are compared too.
    Raises InputError for an axis, name or metric that the run has not.
    """
    records = one_run(run)
    axis, names = _axis(records, first, second)
    found = Comparison(axis, names)
    groups: dict[tuple, dict[str, str]] = {}
    for cell, record in records.items():
        rest = tuple((k, str(v)) for k, v in record["axes"].items() if k != axis)
        groups.setdefault(rest, {})[str(record["axes"][axis])] = cell
    pairs = [[group[name] for name in names if name in group] for group in groups.values()]
    pairs += _untuned(records, axis, names)
    partnered = {cell for cells in pairs if len(cells) == 2 for cell in cells}
    for cells in pairs:
        if len(cells) == 2:
            found.pairs += _pairs(Path(run), *(records[c] for c in cells), metric, level)
        else:
            found.alone += [cell for cell in cells if cell not in partnered]
    if not found.pairs:
        what = f" with a metric {metric!r}" if metric else ""
        raise InputError(f"no two cells of {run}{what} differ in {axis} alone ({names[0]} and {names[1]})")
    if axis != "seed":
        found.over_seeds = _over_seeds(Path(run), records, [c for c in pairs if len(c) == 2], metric)
    for family in (found.pairs, found.over_seeds):
        for name in dict.fromkeys(p.metric for p in family):
            tested = [p for p in family if p.metric == name and p.p is not None]
            for pair, p in zip(tested, holm([p.p for p in tested]), strict=True):
                pair.p_holm = float(p)
    return found


def _over_seeds(run: Path, records: dict[str, dict], pairs: list[list[str]], metric: str | None) -> list[Pair]:
    """The means of pairs that differ in the seed alone, by metric. A cell that is held against several may be of one seed."""
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for cells in pairs:
        if all(records[c]["status"] == "done" for c in cells):
            groups.setdefault(tuple(seedless(records[c]) for c in cells), []).append(cells)
    found = []
    for names, group in groups.items():
        if len(group) < 2:
            continue
        # of one that is held against several seeds, these are the other's
        seeds = max((sorted({int(records[c]["axes"]["seed"]) for c in side}) for side in zip(*group, strict=True)), key=len)
        one = records[group[0][1]]["metrics"]
        for name, entry in one.items():
            values = [[records[c]["metrics"].get(name, {}).get("value") for c in side] for side in zip(*group, strict=True)]
            missing = any(v is None for side in values for v in side)
            if missing or (metric and name != metric) or entry["higher_is_better"] is None:
                continue
            means = tuple(sum(side) / len(side) for side in values)
            try:
                d = difference_over_seeds([(run, a) for a, _ in group], [(run, b) for _, b in group], name, entry)
            except Incomparable as error:
                found.append(Pair(*names, name, str(error), means, seeds=seeds))
                continue
            unit = UNITS.get(metric_of(name))
            most = max(records[c]["metrics"][name]["n"] for cells in group for c in cells)
            note = f"{most - d.n} documents are not in all cells" if most > d.n else ""
            found.append(Pair(*names, name, note, means, d.value, d.low, d.high, d.p, None, d.n, METHOD, unit, seeds))
    return found


def seedless(record: dict[str, Any]) -> str:
    """What cells that differ in the seed alone have in common: their id without it."""
    return "--".join(str(v) for k, v in record["axes"].items() if k != "seed")


def _untuned(records: dict[str, dict], axis: str, names: tuple[str, str]) -> list[list[str]]:
    """Cells that are tuned, each with the untuned one: it has neither a PET nor a restoring, so that two axes always differ."""
    found = []
    for cell, record in records.items():
        base = record["references"].get("untuned")
        if base in records and base != cell:
            here, there = (str(records[c]["axes"][axis]) for c in (cell, base))
            if {here, there} == set(names):
                found.append([cell, base] if here == names[0] else [base, cell])
    return found


def _axis(records: dict[str, dict], first: str, second: str) -> tuple[str, tuple[str, str]]:
    axes = {axis for record in records.values() for axis in record["axes"]}
    split = [text.partition("=") for text in (first, second)]
    for text, (axis, equals, name) in zip((first, second), split, strict=True):
        if not equals:
            raise InputError(f"{text!r} is no AXIS=NAME, such as compression=nf4", given=text, allowed=sorted(axes))
        if axis not in axes:
            raise InputError(f"no cell has an axis {axis!r}", given=axis, allowed=sorted(axes))
        known = {str(record["axes"][axis]) for record in records.values()}
        if name not in known:
            raise InputError(f"no cell has {text}", given=name, allowed=sorted(known))
    if split[0][0] != split[1][0] or split[0][2] == split[1][2]:
        raise InputError(f"{first} and {second} must be two names on one axis")
    return split[0][0], (split[0][2], split[1][2])


def _pairs(run: Path, first: dict, second: dict, metric: str | None, level: float) -> list[Pair]:
    ids = first["id"], second["id"]
    undone = [r for r in (first, second) if r["status"] != "done"]
    if undone:
        return [Pair(*ids, metric or "", f"{undone[0]['id']} is {undone[0]['status']}")]
    found = []
    for name, entry in second["metrics"].items():
        if name not in first["metrics"] or (metric and name != metric) or entry["higher_is_better"] is None:
            continue
        values = first["metrics"][name]["value"], entry["value"]
        try:
            d = difference((run, ids[0]), (run, ids[1]), name, entry, 0.0, level)
        except Incomparable as error:
            found.append(Pair(*ids, name, str(error), values))
            continue
        note = f"{d.unpaired} documents in one cell only" if d.unpaired else ""
        unit = UNITS.get(metric_of(name))
        found.append(Pair(*ids, name, note, values, d.value, d.low, d.high, d.p, None, d.n, d.method, unit))
    return found
