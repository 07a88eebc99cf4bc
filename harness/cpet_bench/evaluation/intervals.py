"""Intervals of lm-eval's aggregates, and what one document alone contributes to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from lm_eval.api import metrics as lm_eval_metrics

from .. import stats

LEVEL = 0.95
RESAMPLES, SLOW_RESAMPLES = 2000, 200

Interval = tuple[float, float, str | None]
"""(low, high, how it was found); nan, nan, None where nothing honest is known."""

NONE: Interval = (*stats.NAN, None)


def number(value: Any) -> float | None:
    """A finite float, or None: JSON has no other."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _scalars(items: list) -> np.ndarray | None:
    if all(isinstance(i, (bool, int, float, np.bool_, np.integer, np.floating)) for i in items):
        return np.asarray(items, float)
    return None


def by_document(aggregate: Callable, items: list) -> list[tuple[Any, float]]:
    """(value, weight) of each document in a metric; value None where a document alone has none.

    Of perplexities and bits per byte the value is the loss in nats per word or byte, the weight how many those are.
    """
    m, found = lm_eval_metrics, []
    for item in items:
        pair = isinstance(item, (list, tuple))
        if aggregate is m.perplexity and not pair:
            found.append((number(-item), 1.0))
        elif aggregate in (m.weighted_perplexity, m.bits_per_byte) and pair and item[1]:
            found.append((number(-item[0] / item[1]), float(item[1])))
        elif aggregate is m.brier_score:
            found.append((number(aggregate([item])), 1.0))
        elif isinstance(item, list) and item and _scalars(item) is not None:
            found.append(([number(x) for x in item], 1.0))
        else:
            found.append((None if pair else number(item), 1.0))
    return found


def interval_of(aggregate: Callable, items: list) -> Interval:
    """(low, high, how) of an lm-eval aggregate over documents' items; nan where nothing honest is known about it."""
    n, m = len(items), lm_eval_metrics
    scalars = _scalars(items)
    if scalars is not None and aggregate in (m.mean, m.nanmean):
        scalars = scalars[np.isfinite(scalars)] if aggregate is m.nanmean else scalars
        if len(scalars) and np.isin(scalars, (0.0, 1.0)).all():
            return *stats.wilson(scalars.sum(), len(scalars), LEVEL), "Wilson score"
        return resampled(stats.mean_of(scalars), len(scalars))
    if scalars is not None and aggregate is m.perplexity:
        return _falling(resampled(stats.mean_of(scalars), n), lambda x: math.exp(-x))
    if aggregate in (m.weighted_perplexity, m.bits_per_byte):
        sums, weights = np.asarray(items, float).T
        ratio = resampled(stats.mean_of(np.divide(sums, weights, where=weights > 0, out=np.zeros_like(sums)), weights), n)
        bits = aggregate is m.bits_per_byte
        return _falling(ratio, lambda x: -x / math.log(2) if bits else math.exp(-x))
    if aggregate in (m.f1_score, m.matthews_corrcoef):
        gold, called = (np.asarray(x) for x in zip(*items, strict=True))
        if gold.ndim == called.ndim == 1:
            return resampled((stats.f1_of if aggregate is m.f1_score else stats.mcc_of)(called, gold), n)
    if aggregate is m.brier_score:
        return resampled(stats.mean_of([aggregate([item]) for item in items]), n)
    if aggregate in (m.median, m.bleu, m.chrf, m.chrfpp, m.ter):
        return resampled(stats.function_of(aggregate, items), n, SLOW_RESAMPLES)
    return NONE


def resampled(statistic: stats.Statistic, n: int, resamples: int = RESAMPLES) -> Interval:
    """The bootstrap's interval of a statistic of n documents."""
    bca = n <= 2000 and resamples == RESAMPLES  # beyond that the correction is too small to see, and slow
    low, high = stats.bootstrap_interval(statistic, n, LEVEL, resamples=resamples, bca=bca)
    return low, high, f"bootstrap by document ({'BCa' if bca else 'percentile'}, {resamples} resamples)"


def _falling(interval: Interval, function: Callable[[float], float]) -> Interval:
    """The interval of a falling function of what `interval` is about."""
    low, high, how = interval
    try:
        return function(high), function(low), how
    except OverflowError:
        return NONE
