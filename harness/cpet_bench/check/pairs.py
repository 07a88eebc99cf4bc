"""Outcomes of two runs of a cell, paired by document, and what can be said about their difference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from .. import stats
from ..errors import InputError
from ..records import outcomes_table, read_records, run_folders

RESAMPLES = 2000
MASKED = {"auroc": stats.macro_of, "f1": stats.f1_of, "mcc": stats.mcc_of}
"""Metrics that one document alone has no value of: found anew from the labels' log-probabilities."""


class Incomparable(Exception):
    """Why a cell's outcomes cannot be compared."""


@dataclass
class Side:
    """Outcomes of one run for one metric, by (task, document, repeat)."""

    keys: list[tuple[str, str, int]]
    values: np.ndarray
    weights: np.ndarray
    gold: np.ndarray
    logprobs: list[list[float] | None]

    def at(self, rows: list[int]) -> Side:
        i = np.asarray(rows, int)
        logprobs = [self.logprobs[r] for r in rows]
        return Side([self.keys[r] for r in rows], self.values[i], self.weights[i], self.gold[i], logprobs)


@dataclass
class Difference:
    """Candidate − baseline with the sign turned so that more is better; one-sided p-values against −margin."""

    value: float
    low: float
    high: float
    p_not_worse: float
    p_worse: float
    n: int
    unpaired: int
    method: str

    @property
    def p(self) -> float:
        """Two-sided, of no difference, where the margin is 0."""
        return 1.0 if self.value == self.low == self.high == 0 else min(1.0, 2 * min(self.p_worse, self.p_not_worse))


def one_run(path: str | Path) -> dict[str, dict[str, Any]]:
    """The records of a run by id. Raises InputError for a folder of several."""
    folders = run_folders(path)
    if len(folders) > 1 or folders[0] != Path(path):
        raise InputError(f"{path} holds several runs; name one", allowed=[str(f) for f in folders])
    return {record["id"]: record for record in read_records(path)}


def metric_of(name: str) -> str:
    """The metric in a record's name of it: without the task before it and the filter behind."""
    return name.rpartition("/")[2].partition(",")[0]


def difference(
    candidate: tuple[Path, str], baseline: tuple[Path, str], name: str, entry: dict[str, Any], margin: float, level: float
) -> Difference:
    """The difference of two cells, each (folder of its run, id), in a metric over the documents both have. Raises Incomparable.

    Accuracies and other 0/1 values: Tango's score test and interval. Other means: Student's t and the bootstrap by document.
    AUROC of two labels: DeLong. AUROC of more, F1, MCC: normal, with the paired bootstrap's standard error.
    Args: name, entry: the metric's in the baseline's record. level: of the two-sided interval.
    """
    new, old = (side_of(*place, name, entry) for place in (candidate, baseline))
    place = {key: i for i, key in enumerate(old.keys)}
    rows = [(i, place[key]) for i, key in enumerate(new.keys) if key in place]
    if len(rows) < 2:
        raise Incomparable("the runs have no documents in common" if not rows else "the runs share one document only")
    unpaired = len(new.keys) + len(old.keys) - 2 * len(rows)
    new, old = new.at([i for i, _ in rows]), old.at([j for _, j in rows])
    sign = -1.0 if entry["higher_is_better"] is False else 1.0
    found = _tested(new, old, metric_of(name), entry.get("weights"), sign, margin, level)
    return Difference(*found[:5], n=len(rows), unpaired=unpaired, method=found[5])


def side_of(folder: Path, cell: str, name: str, entry: dict[str, Any]) -> Side:
    table = outcomes_table(folder, cell)
    missing = {"task", "document", "metric", "filter", "repeat", "value", "gold", "logprobs"} - set(table.column_names)
    if missing:
        raise Incomparable(f"the outcomes have no {', '.join(sorted(missing))}")
    task, _, metric = name.removesuffix(f",{entry['filter']}").rpartition("/")
    table = table.filter(pc.and_(pc.equal(table["metric"], metric), pc.equal(table["filter"], entry["filter"])))
    if entry.get("weights"):
        import pyarrow as pa

        table = table.filter(pc.is_in(table["task"], value_set=pa.array(list(entry["weights"]))))
    elif task:
        table = table.filter(pc.equal(table["task"], task))
    if not table.num_rows:
        raise Incomparable(f"no outcomes of {name} were kept")
    column = {c: table[c].to_pylist() for c in table.column_names}
    return Side(
        keys=list(zip(column["task"], column["document"], column["repeat"], strict=True)),
        values=np.array([np.nan if v is None else v for v in column["value"]], float),
        weights=np.array(column.get("weight") or np.ones(table.num_rows), float),
        gold=np.array(column["gold"]),
        logprobs=column["logprobs"],
    )


def _tested(new: Side, old: Side, metric: str, shares: dict | None, sign: float, margin: float, level: float) -> tuple:
    """(value, low, high, p not worse, p worse, method)."""
    both = zip(new.logprobs, old.logprobs, strict=True)
    labelled = all(x is not None and y is not None and len(x) == len(y) for x, y in both)
    if np.array_equal(new.values, old.values, equal_nan=True) and labelled and new.logprobs == old.logprobs:
        return 0.0, 0.0, 0.0, 0.0, 1.0, "outcomes are identical"
    if np.isfinite(new.values).all() and np.isfinite(old.values).all():
        return _means(new, old, shares, sign, margin, level)
    if metric not in MASKED or not labelled or len({len(x) for x in new.logprobs}) != 1:
        raise Incomparable(f"{metric} has no value by document")
    if not np.array_equal(new.gold, old.gold):
        raise Incomparable("the right labels differ")
    return _labels(new, old, metric, sign, margin, level)


def _means(new: Side, old: Side, shares: dict | None, sign: float, margin: float, level: float) -> tuple:
    d = sign * (new.values - old.values)
    tasks = np.array([key[0] for key in new.keys])
    groups = {t: np.flatnonzero(tasks == t) for t in dict.fromkeys(tasks)}
    n, sizes = len(d), {t: len(i) for t, i in groups.items()}
    share = {t: (shares or {}).get(t, sizes[t] / n) for t in groups}
    share = {t: s / sum(share.values()) for t, s in share.items()}
    pooled = all(abs(share[t] - sizes[t] / n) < 1e-9 for t in groups)
    binary = np.isin(new.values, (0.0, 1.0)).all() and np.isin(old.values, (0.0, 1.0)).all()
    if binary and pooled:
        gained, lost = int((d > 0).sum()), int((d < 0).sum())
        interval = stats.tango_interval(gained, lost, n, level)
        return (gained - lost) / n, *interval, *stats.tango_test(gained, lost, n, margin), "Tango's score test"
    if len(groups) == 1 and (new.weights == new.weights[0]).all():
        interval = stats.bootstrap_interval(stats.mean_of(d), n, level, resamples=RESAMPLES)
        value, fine, worse = stats.mean_test(d, margin)
        return value, *interval, fine, worse, "Student's t; interval by paired bootstrap"
    value, variance, found = 0.0, 0.0, np.zeros(RESAMPLES)
    for k, (t, rows) in enumerate(groups.items()):
        own, w = d[rows], new.weights[rows]
        mean = float((w @ own) / w.sum())
        value += share[t] * mean
        variance += share[t] ** 2 * float(((w * (own - mean)) ** 2).sum()) / w.sum() ** 2 * len(w) / max(len(w) - 1, 1)
        found += share[t] * stats.replicates(stats.mean_of(own, w), len(rows), RESAMPLES, seed=k)
    tested = stats.normal_test(value, float(np.sqrt(variance)), margin)
    return value, *stats.percentiles(found, level), *tested, "normal; interval by paired bootstrap within tasks"


def _labels(new: Side, old: Side, metric: str, sign: float, margin: float, level: float) -> tuple:
    x, y = np.array(new.logprobs, float), np.array(old.logprobs, float)
    if metric == "auroc" and x.shape[1] == 2:
        value, error = stats.delong_difference(x[:, 1] - x[:, 0], y[:, 1] - y[:, 0], new.gold == 1)
        half = stats.quantile(level) * error
        if not np.isfinite(error):
            raise Incomparable("the documents in common have one label only")
        return value, value - half, value + half, *stats.normal_test(value, error, margin), "DeLong's test"
    if metric != "auroc":
        x, y = x.argmax(axis=1), y.argmax(axis=1)
    statistic = stats.difference_of(MASKED[metric](x, new.gold), MASKED[metric](y, new.gold))
    found = sign * stats.replicates(statistic, len(new.gold), RESAMPLES)
    value, interval = sign * float(statistic(np.ones((1, len(new.gold))))[0]), stats.percentiles(found, level)
    if not np.isfinite([value, *interval]).all():
        raise Incomparable(f"{metric} is undefined on the documents in common")
    return value, *interval, *stats.normal_test(value, float(np.nanstd(found, ddof=1)), margin), "normal; paired bootstrap"
