"""Cells trained at several seeds: what is said of their mean, over documents and seeds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtr

from .. import stats
from .pairs import MASKED, RESAMPLES, Incomparable, Side, side_of

METHOD = "two-way analysis of variance over documents and seeds; interval by crossed bootstrap"
UNDEFINED = "the metric is undefined on the documents in common"
Place = tuple[Path, str]  # folder of a run, id of a cell


@dataclass
class Estimate:
    """A mean over seeds, its interval (None where there is none), and of a difference the two-sided p-value of 0."""

    value: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None


def aligned(places: Sequence[Place], name: str, entry: dict[str, Any]) -> tuple[list[Side], int]:
    """The outcomes of each cell in metric `name` for the documents that all of them have, in one order; how many those are.

    Raises Incomparable where they share fewer than two, or their right labels differ.
    """
    sides = [side_of(*place, name, entry) for place in places]
    common = set(sides[0].keys).intersection(*(s.keys for s in sides[1:]))
    keys = [key for key in sides[0].keys if key in common]
    if len(keys) < 2:
        raise Incomparable("the cells have no documents in common" if not keys else "the cells share one document only")
    found = []
    for side in sides:
        rows = {key: i for i, key in enumerate(side.keys)}
        found.append(side.at([rows[key] for key in keys]))
    if not all(np.array_equal(side.gold, found[0].gold) for side in found):
        raise Incomparable("the right labels differ")
    return found, len(keys)


def _statistic(side: Side, name: str, entry: dict[str, Any]) -> stats.Statistic:
    """Of a group's mean each task has the share it has there. Raises Incomparable where documents have no value."""
    metric = name.rpartition("/")[2].partition(",")[0]
    if np.isfinite(side.values).all():
        return stats.mean_of(side.values, _weights(side, entry))
    if metric not in MASKED or any(x is None for x in side.logprobs) or len({len(x) for x in side.logprobs}) != 1:
        raise Incomparable(f"{metric} has no value by document")
    x = np.array(side.logprobs, float)
    return MASKED[metric](x if metric == "auroc" else x.argmax(axis=1), side.gold)


def _weights(side: Side, entry: dict[str, Any]) -> np.ndarray | None:
    shares = entry.get("weights")
    if not shares:
        return None if (side.weights == side.weights[0]).all() else side.weights
    tasks = np.array([key[0] for key in side.keys])
    weights = np.zeros(len(tasks))
    for task in dict.fromkeys(tasks):
        rows = tasks == task
        weights[rows] = shares.get(task, 0.0) * side.weights[rows] / side.weights[rows].sum()
    return weights


def pseudo_values(statistic: stats.Statistic, n: int) -> np.ndarray:
    """What each of n documents adds to a statistic (of a mean: its terms): n × it − (n − 1) × it without the document.

    Tukey's (1958, Ann. Math. Stat. 29:614) pseudo-values, one a document.
    """
    rows = max(1, 4_000_000 // n)
    left = np.concatenate([statistic(stats.without(n, start, rows)) for start in range(0, n, rows)])
    return n * float(statistic(np.ones((1, n)))[0]) - (n - 1) * left


def two_way(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, standard error, degrees of freedom) of a table documents × seeds, both drawn at random, one value a cell.

    Variances of documents, seeds and the rest add up: (MSdocuments + MSseeds − MSrest) / (n S), not less than either of the
    first two alone; degrees of freedom by Satterthwaite (1946, Biometrics Bulletin 2:110).
    """
    n, s = values.shape
    mean, by_document, by_seed = values.mean(), values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    documents = s * float(((by_document - mean) ** 2).sum()) / (n - 1)
    seeds = n * float(((by_seed - mean) ** 2).sum()) / (s - 1)
    rest = float(((values - by_document - by_seed + mean) ** 2).sum()) / ((n - 1) * (s - 1))
    top, floor = documents + seeds - rest, max(documents, seeds)
    if top > floor:
        parts = documents**2 / (n - 1) + seeds**2 / (s - 1) + rest**2 / ((n - 1) * (s - 1))
        freedom = top**2 / parts
    else:
        top, freedom = floor, float(n - 1 if documents >= seeds else s - 1)
    return float(mean), float(np.sqrt(top / (n * s))), freedom


def mean_over_seeds(cells: Sequence[Place], name: str, entry: dict[str, Any]) -> Estimate:
    """The mean of a metric over one cell's seeds, with its 95 % interval over seeds and documents. Raises Incomparable."""
    sides, n = aligned(cells, name, entry)
    found = [_statistic(side, name, entry) for side in sides]
    value = float(np.mean([float(s(np.ones((1, n)))[0]) for s in found]))
    return _finite(Estimate(value, *stats.crossed_interval(found, n, resamples=RESAMPLES), n))


def difference_over_seeds(first: Sequence[Place], second: Sequence[Place], name: str, entry: dict[str, Any]) -> Estimate:
    """Mean difference of two cells over their seeds, paired by seed and document; the sign turned so that more is better.

    p: two-sided, of no difference, by `two_way` and Student's t; the 95 % interval resamples seeds and documents (crossed
    bootstrap), which sees (S − 1) / S of the variance between S seeds. Raises Incomparable.
    """
    sides, n = aligned([*first, *second], name, entry)
    sign = -1.0 if entry["higher_is_better"] is False else 1.0
    pairs = list(zip(sides[: len(first)], sides[len(first) :], strict=True))
    parts = [_signed(sign, stats.difference_of(_statistic(a, name, entry), _statistic(b, name, entry))) for a, b in pairs]
    value = float(np.mean([float(d(np.ones((1, n)))[0]) for d in parts]))
    if all(np.isfinite(s.values).all() and _weights(s, entry) is None for s in sides):
        table = np.stack([sign * (a.values - b.values) for a, b in pairs], axis=1)
    else:
        table = np.stack([pseudo_values(d, n) for d in parts], axis=1)
    if not np.isfinite(table).all():
        raise Incomparable(UNDEFINED)
    _, error, freedom = two_way(table)
    p = 1.0 if value == 0 else 0.0 if error == 0 else 2 * float(stdtr(freedom, -abs(value) / error))
    return _finite(Estimate(value, *stats.crossed_interval(parts, n, resamples=RESAMPLES), n, p))


def _finite(found: Estimate) -> Estimate:
    if not np.isfinite([found.value, found.low, found.high]).all():
        raise Incomparable(UNDEFINED)
    return found


def _signed(sign: float, statistic: stats.Statistic) -> stats.Statistic:
    return lambda counts: sign * statistic(counts)


def share_of_gap(
    cell: Sequence[Place], low: Sequence[Place], high: Sequence[Place], name: str, entry: dict[str, Any]
) -> tuple[Estimate | None, Estimate]:
    """(cell − low) / (high − low), each a mean over seeds, and high − low, with 95 % intervals over seeds and documents.

    One joint bootstrap: numerator and denominator of the same seeds and documents, and never a mean of ratios. The share is
    None where the gap's interval does not lie above 0. One seed: over documents alone. Raises Incomparable.
    """
    sides, n = aligned([*cell, *low, *high], name, entry)
    found, s = [_statistic(side, name, entry) for side in sides], len(cell)
    drawn = np.stack([stats.replicates(one, n, RESAMPLES) for one in found], axis=1)
    plain = np.array([float(one(np.ones((1, n)))[0]) for one in found])
    top, bottom = _parts(drawn, plain, s, 0), _parts(drawn, plain, s, 2)
    picked = np.random.default_rng([0, 1]).integers(0, s, (RESAMPLES, s))
    tops, bottoms = (np.take_along_axis(part[0], picked, axis=1).mean(axis=1) for part in (top, bottom))
    sign = -1.0 if entry["higher_is_better"] is False else 1.0
    gap = _finite(Estimate(sign * float(bottom[1].mean()), *stats.percentiles(sign * bottoms), n))
    if gap.low <= 0:
        return None, gap
    interval = stats.percentiles(tops / np.where(bottoms == 0, np.nan, bottoms))
    return _finite(Estimate(float(top[1].mean() / bottom[1].mean()), *interval, n)), gap


def _parts(drawn: np.ndarray, plain: np.ndarray, s: int, which: int) -> tuple[np.ndarray, np.ndarray]:
    """A cell (0) or the upper end (2) minus the lower end (1), by seed: of the resamples, and as they are."""
    own, low = slice(which * s, (which + 1) * s), slice(s, 2 * s)
    return drawn[:, own] - drawn[:, low], plain[own] - plain[low]
