"""Statistics of scores: intervals and tests for one system and for two on the same documents. numpy and scipy only.

Levels are shares (0.95), p-values one-sided where a margin is tested. What cannot be estimated is nan, never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import bdtr, expit, logit, ndtr, ndtri, stdtr

Statistic = Callable[[np.ndarray], np.ndarray]
"""How often each document was drawn (resamples × documents) → the statistic of each resample."""

NAN = (float("nan"), float("nan"))


def quantile(level: float) -> float:
    """The normal quantile of a two-sided interval (1.96 at 0.95)."""
    return float(ndtri(0.5 + level / 2))


# -- proportions -----------------------------------------------------------------------------------------------------
def wilson(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, JASA 22:209)."""
    if n < 1:
        return NAN
    z, p = quantile(level), successes / n
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if successes == 0 else float(max(low, 0.0)), 1.0 if successes == n else float(min(high, 1.0)))


def tango_score(gained: int, lost: int, n: int, difference: float) -> float:
    """Score statistic, standard normal where the difference of two paired proportions is `difference`.

    Tango 1998, Statistics in Medicine 17:891, eq. 7: `gained` of n documents are right in the first system alone, `lost` in
    the second alone; the nuisance probability is its maximum-likelihood estimate under that difference.
    """
    b, c, d = float(gained), float(lost), float(difference)
    rest = b - c - n * d
    linear = -b - c + (2 * n - b + c) * d
    constant = -c * d * (1 - d)
    nuisance = (np.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * nuisance + d * (1 - d))
    if variance <= 1e-12 * n:
        return 0.0 if abs(rest) < 1e-9 else float(np.copysign(np.inf, rest))
    return float(rest / np.sqrt(variance))


def tango_interval(gained: int, lost: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of the difference of paired proportions (Tango 1998): the differences that its test does not reject."""
    if n < 1:
        return NAN
    z, estimate = quantile(level), (gained - lost) / n

    def border(end: float, wanted: float) -> float:
        inside, outside = estimate, end
        for _ in range(60):  # the statistic falls as the difference grows
            middle = (inside + outside) / 2
            if (tango_score(gained, lost, n, middle) - wanted) * np.sign(wanted) < 0:
                inside = middle
            else:
                outside = middle
        return float((inside + outside) / 2)

    return border(-1.0, z), border(1.0, -z)


def tango_test(gained: int, lost: int, n: int, margin: float = 0.0) -> tuple[float, float]:
    """One-sided p-values (not worse, worse) of paired proportions against a margin, by Tango's score test.

    not worse: small where first − second > −margin (non-inferiority is shown); worse: small where it is < −margin.
    """
    z = tango_score(gained, lost, n, -margin)
    return float(ndtr(-z)), float(ndtr(z))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test: whether two paired proportions differ at all (McNemar 1947)."""
    n = gained + lost
    return min(1.0, 2 * float(bdtr(min(gained, lost), n, 0.5))) if n else 1.0


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number (Holm 1979, Scand. J. Statist. 6:65); in the order given."""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


# -- means -----------------------------------------------------------------------------------------------------------
def mean_test(differences: np.ndarray, margin: float = 0.0) -> tuple[float, float, float]:
    """(mean, p not worse, p worse) of paired differences against a margin, one-sided, by Student's t test."""
    d = np.asarray(differences, float)
    mean, n = float(d.mean()), len(d)
    error = float(d.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    if n > 1 and error == 0.0:
        return mean, float(mean <= -margin), float(mean >= -margin)
    t = (mean + margin) / error
    return mean, float(stdtr(n - 1, -t)), float(stdtr(n - 1, t))


def normal_test(estimate: float, error: float, margin: float = 0.0) -> tuple[float, float]:
    """One-sided p-values (not worse, worse) of an estimate with a standard error against a margin."""
    if error == 0.0:
        return float(estimate <= -margin), float(estimate >= -margin)
    z = (estimate + margin) / error
    return float(ndtr(-z)), float(ndtr(z))


def mover(weights, values, lows, highs) -> tuple[float, float]:
    """Interval of Σ weight × value (weights ≥ 0) from those of its independent parts (Zou & Donner 2008, SiM 27:1693)."""
    w, v, low, high = (np.asarray(x, float) for x in (weights, values, lows, highs))
    middle = float(w @ v)
    return middle - float(np.sqrt(((w * (v - low)) ** 2).sum())), middle + float(np.sqrt(((w * (high - v)) ** 2).sum()))


# -- area under the ROC curve ----------------------------------------------------------------------------------------
def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half; nan where there is only one class."""
    return float(auroc_of(scores, positive)(np.ones((1, len(np.asarray(scores)))))[0])


def auroc_macro(logprobs: np.ndarray, gold: np.ndarray) -> float:
    """Mean over the classes of each one's AUROC against the rest; see macro_of."""
    return float(macro_of(logprobs, gold)(np.ones((1, len(np.asarray(gold)))))[0])


def delong(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROCs (k) of k systems on the same documents and their covariance (k × k).

    DeLong et al. 1988, Biometrics 44:837, by midranks (Sun & Xu 2014, IEEE Signal Process. Lett. 21:1389).

    Args:
        scores: k × documents. positive: documents, true where the label is the positive one.
    """
    s, y = np.atleast_2d(np.asarray(scores, float)), np.asarray(positive, bool)
    m, n = int(y.sum()), int((~y).sum())
    if not m or not n:
        return np.full(len(s), np.nan), np.full((len(s), len(s)), np.nan)
    every = np.stack([_midranks(row) for row in s])
    own_positive = np.stack([_midranks(row[y]) for row in s])
    own_negative = np.stack([_midranks(row[~y]) for row in s])
    v10 = (every[:, y] - own_positive) / n
    v01 = 1.0 - (every[:, ~y] - own_negative) / m
    return v10.mean(axis=1), _mean_covariance(v10) + _mean_covariance(v01)


def delong_interval(scores: np.ndarray, positive: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """DeLong's interval of one AUROC, on the logit scale so that it stays inside (0, 1); nan where the AUROC is 0 or 1."""
    area, covariance = delong(scores, positive)
    a, error = float(area[0]), float(np.sqrt(covariance[0, 0]))
    if not 0 < a < 1 or not np.isfinite(error):
        return NAN
    half = quantile(level) * error / (a * (1 - a))
    return float(expit(logit(a) - half)), float(expit(logit(a) + half))


def delong_difference(first: np.ndarray, second: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """AUROC of the first system − that of the second on the same documents, and its standard error (DeLong 1988)."""
    areas, covariance = delong(np.stack([first, second]), positive)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return float(areas[0] - areas[1]), float(np.sqrt(max(variance, 0.0)))


def _mean_covariance(v: np.ndarray) -> np.ndarray:
    """Covariance of the row means of v (k × observations)."""
    k, n = v.shape
    return np.cov(v).reshape(k, k) / n if n > 1 else np.full((k, k), np.nan)


def _midranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    values, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2.0)[inverse] if len(values) else np.zeros(0)


# -- statistics of resamples -----------------------------------------------------------------------------------------
def mean_of(values: np.ndarray, weights: np.ndarray | None = None) -> Statistic:
    """The mean of `values`, or Σ weight × value / Σ weight (a ratio: both sums change with the resample)."""
    v = np.asarray(values, float)
    w = np.ones_like(v) if weights is None else np.asarray(weights, float)
    return lambda counts: _divide(counts @ (w * v), counts @ w)


def auroc_of(scores: np.ndarray, positive: np.ndarray) -> Statistic:
    """AUROC with ties counting half; nan for resamples that have only one class."""
    s, y = np.asarray(scores, float), np.asarray(positive, float)
    order = np.argsort(s, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(s[order]) != 0])

    def of(counts: np.ndarray) -> np.ndarray:
        drawn = counts[:, order].astype(float)
        right = np.add.reduceat(drawn * y[order], starts, axis=1)
        wrong = np.add.reduceat(drawn * (1 - y[order]), starts, axis=1)
        below = np.cumsum(wrong, axis=1) - wrong / 2
        return _divide((right * below).sum(axis=1), right.sum(axis=1) * wrong.sum(axis=1))

    return of


def macro_of(logprobs: np.ndarray, gold: np.ndarray) -> Statistic:
    """Mean over classes of the AUROC of each one's probability against the rest (macro one-vs-rest; Fawcett 2006, 10.2).

    logprobs: documents × classes, each row normalised. Two classes: the one AUROC that both have, of the log-odds. Classes
    that no document has are left out; resamples that miss one of the others are nan.
    """
    x, y = np.asarray(logprobs, float), np.asarray(gold)
    if x.shape[1] == 2:
        return auroc_of(x[:, 1] - x[:, 0], y == 1)
    parts = [auroc_of(x[:, k], y == k) for k in range(x.shape[1]) if (y == k).any()]
    return lambda counts: np.mean([part(counts) for part in parts], axis=0)


def f1_of(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """F1 of class 1 (0 where no document is or is called 1, as scikit-learn has it)."""
    p, y = np.asarray(predicted) == 1, np.asarray(gold) == 1
    both, either = (p & y).astype(float), p.astype(float) + y.astype(float)

    def of(counts: np.ndarray) -> np.ndarray:
        total = counts @ either
        return np.where(total > 0, 2 * (counts @ both) / np.maximum(total, 1e-300), 0.0)

    return of


def mcc_of(predicted: np.ndarray, gold: np.ndarray) -> Statistic:
    """Matthews' correlation of any number of classes (Gorodkin 2004, Comput. Biol. Chem. 28:367); 0 where it is undefined."""
    p, y = np.asarray(predicted), np.asarray(gold)
    classes = np.union1d(p, y)
    is_p, is_y = ((x[:, None] == classes).astype(float) for x in (p, y))
    right = (p == y).astype(float)

    def of(counts: np.ndarray) -> np.ndarray:
        n, c, called, truly = counts.sum(axis=1), counts @ right, counts @ is_p, counts @ is_y
        top = c * n - (called * truly).sum(axis=1)
        bottom = (n * n - (called**2).sum(axis=1)) * (n * n - (truly**2).sum(axis=1))
        return np.where(bottom > 0, top / np.sqrt(np.maximum(bottom, 1e-300)), 0.0)

    return of


def function_of(aggregate: Callable[[list], float], items: Sequence) -> Statistic:
    """Any function of a list of documents' items; slow, one call a resample."""
    n = range(len(items))
    return lambda counts: np.array([aggregate([items[i] for i in np.repeat(n, row.astype(int))]) for row in counts], float)


def difference_of(first: Statistic, second: Statistic) -> Statistic:
    """first − second of the same resamples, so that the pairing by document stays."""
    return lambda counts: first(counts) - second(counts)


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.where(bottom != 0, top / np.where(bottom != 0, bottom, 1.0), np.nan)


# -- the bootstrap ---------------------------------------------------------------------------------------------------
def draws(n: int, resamples: int, seed: int = 0, cells: int = 4_000_000):
    """Counts of drawing n documents with replacement (chunk × n), in chunks of at most `cells` numbers."""
    rng = np.random.default_rng(seed)
    chunk = max(1, cells // max(n, 1))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        picked = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * n).reshape(rows, n).astype(float)


def replicates(statistic: Statistic, n: int, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """The statistic of each of `resamples` resamples of n documents (Efron 1979); the same for the same seed."""
    return np.concatenate([statistic(counts) for counts in draws(n, resamples, seed)])


def percentiles(found: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of replicates; nan where more than one in twenty of them is."""
    good = found[np.isfinite(found)]
    if len(good) < 0.95 * len(found) or not len(good):
        return NAN
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    statistic: Statistic, n: int, level: float = 0.95, *, resamples: int = 2000, seed: int = 0, bca: bool = False
) -> tuple[float, float]:
    """Interval of a statistic of n documents by resampling documents; nan for fewer than two.

    Percentiles, or with `bca` bias-corrected and accelerated ones (Efron 1987, JASA 82:171; the acceleration by leaving out
    one document at a time). Where the correction is undefined, as when all replicates are equal, percentiles stay.
    """
    if n < 2:
        return NAN
    found = replicates(statistic, n, resamples, seed)
    plain = percentiles(found, level)
    if not bca or not np.isfinite(plain[0]):
        return plain
    good = found[np.isfinite(found)]
    estimate = float(statistic(np.ones((1, n)))[0])
    below = ((good < estimate).mean() + (good <= estimate).mean()) / 2
    if not 0 < below < 1:
        return plain
    chunk = max(1, 4_000_000 // n)
    left = np.concatenate([statistic(without(n, i, chunk)) for i in range(0, n, chunk)])
    centred = left.mean() - left
    spread = (centred**2).sum()
    if not np.isfinite(spread) or spread == 0:
        return plain
    acceleration, bias = (centred**3).sum() / (6 * spread**1.5), ndtri(below)
    z = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(good, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def without(n: int, start: int, rows: int) -> np.ndarray:
    """Counts (≤ rows × n) with document start, start + 1, ... left out of all n."""
    counts = np.ones((min(rows, n - start), n))
    counts[np.arange(len(counts)), np.arange(start, start + len(counts))] = 0.0
    return counts
