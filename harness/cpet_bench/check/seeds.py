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
Place = tuple[Path, str]  # folder of a run, id of a cell


@dataclass
class Estimate:
    """A mean over seeds, its interval, and (of a difference) the two-sided p-value of 0."""

    value: float
    low: float
    high: float
    n: int
    p: float | None = None


def aligned(places: Sequence[Place], name: str, entry: dict[str, Any]) -> tuple[list[stats.Statistic], int, int]:
    """The statistic of each cell in metric `name` over the documents that all of them have; documents, and those left out.

    Raises Incomparable where they share fewer than two, or the metric has no statistic of documents.
    """
    sides = [side_of(*place, name, entry) for place in places]
    common = set(sides[0].keys).intersection(*(s.keys for s in sides[1:]))
    keys = [key for key in sides[0].keys if key in common]
    if len(keys) < 2:
        raise Incomparable("the cells have no documents in common" if not keys else "the cells share one document only")
    found = []
    for side in sides:
        rows = {key: i for i, key in enumerate(side.keys)}
        found.append(_statistic(side.at([rows[key] for key in keys]), name, entry))
    return found, len(keys), len(set().union(*(s.keys for s in sides))) - len(keys)


def _statistic(side: Side, name: str, entry: dict[str, Any]) -> stats.Statistic:
    metric = name.rpartition("/")[2].partition(",")[0]
    if np.isfinite(side.values).all():
        tasks = [key[0] for key in side.keys]
        shares = entry.get("weights") or {}
        if any(abs(share - tasks.count(t) / len(tasks)) > 1e-9 for t, share in shares.items()):
            raise Incomparable("a mean of tasks by weights of their own is not compared over seeds")
        return stats.mean_of(side.values, None if (side.weights == side.weights[0]).all() else side.weights)
    if metric not in MASKED or any(x is None for x in side.logprobs) or len({len(x) for x in side.logprobs}) != 1:
        raise Incomparable(f"{metric} has no value by document")
    x = np.array(side.logprobs, float)
    return MASKED[metric](x if metric == "auroc" else x.argmax(axis=1), side.gold)


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


def mean_over_seeds(cells: Sequence[Place], name: str, entry: dict[str, Any], level: float = 0.95) -> Estimate:
    """The mean of a metric over one cell's seeds, with its interval over seeds and documents."""
    found, n, _ = aligned(cells, name, entry)
    values = [float(s(np.ones((1, n)))[0]) for s in found]
    return Estimate(float(np.mean(values)), *stats.crossed_interval(found, n, level, resamples=RESAMPLES), n)


def difference_over_seeds(
    first: Sequence[Place], second: Sequence[Place], name: str, entry: dict[str, Any], level: float = 0.95
) -> Estimate:
    """Mean difference of two cells over their seeds, paired by seed and document; the sign turned so that more is better.

    p: two-sided, of no difference, by `two_way` and Student's t; the interval resamples seeds and documents (crossed
    bootstrap), which sees (S − 1) / S of the variance between S seeds. Raises Incomparable.
    """
    both, n, _ = aligned([*first, *second], name, entry)
    sign = -1.0 if entry["higher_is_better"] is False else 1.0
    parts = [_signed(sign, stats.difference_of(a, b)) for a, b in zip(both[: len(first)], both[len(first) :], strict=True)]
    value = float(np.mean([float(d(np.ones((1, n)))[0]) for d in parts]))
    table = np.stack([pseudo_values(d, n) for d in parts], axis=1)
    interval = stats.crossed_interval(parts, n, level, resamples=RESAMPLES)
    if not np.isfinite([value, *interval]).all() or not np.isfinite(table).all():
        raise Incomparable("the metric is undefined on the documents in common")
    _, error, freedom = two_way(table)
    p = 1.0 if value == 0 else 0.0 if error == 0 else 2 * float(stdtr(freedom, -abs(value) / error))
    return Estimate(value, *interval, n, p)


def _signed(sign: float, statistic: stats.Statistic) -> stats.Statistic:
    return lambda counts: sign * statistic(counts)


def share_of_gap(
    cell: Sequence[Place],
    low: Sequence[Place],
    high: Sequence[Place],
    name: str,
    entry: dict[str, Any],
    level: float = 0.95,
) -> tuple[Estimate | None, Estimate]:
    """(cell − low) / (high − low), each a mean over seeds, and high − low, both with intervals over seeds and documents.

    One joint bootstrap: numerator and denominator of the same seeds and documents, and never a mean of ratios. The share is
    None where the denominator's interval has 0: then there is no gap to speak of. One seed: over documents alone.
    """
    found, n, _ = aligned([*cell, *low, *high], name, entry)
    s = len(cell)
    drawn = np.stack([stats.replicates(one, n, RESAMPLES) for one in found], axis=1)
    plain = np.array([float(one(np.ones((1, n)))[0]) for one in found])
    top, bottom = _parts(drawn, plain, s, 0), _parts(drawn, plain, s, 2)
    picked = np.random.default_rng([0, 1]).integers(0, s, (RESAMPLES, s))
    tops, bottoms = (np.take_along_axis(part[0], picked, axis=1).mean(axis=1) for part in (top, bottom))
    sign = -1.0 if entry["higher_is_better"] is False else 1.0
    ends = sorted(sign * x for x in stats.percentiles(bottoms, level))
    gap = Estimate(sign * float(bottom[1].mean()), *ends, n)
    if not np.isfinite(ends).all() or ends[0] <= 0 <= ends[1]:
        return None, gap
    interval = stats.percentiles(tops / np.where(bottoms == 0, np.nan, bottoms), level)
    return Estimate(float(top[1].mean() / bottom[1].mean()), *interval, n), gap


def _parts(drawn: np.ndarray, plain: np.ndarray, s: int, which: int) -> tuple[np.ndarray, np.ndarray]:
    """A cell (0) or the upper end (2) minus the lower end (1), by seed: of the resamples, and as they are."""
    own, low = slice(which * s, (which + 1) * s), slice(s, 2 * s)
    return drawn[:, own] - drawn[:, low], plain[own] - plain[low]
