"""Statistics against published tables, brute force and other libraries; coverage by simulation."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm, ttest_1samp

from cpet_bench import stats


# -- proportions -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 29), (15, 148), (81, 263), (20, 20), (500, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_scipys(k, n, level):
    wanted = binomtest(k, n).proportion_ci(level, method="wilson")
    assert stats.wilson(k, n, level) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_published():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (k, n), wanted in published.items():
        assert stats.wilson(k, n) == pytest.approx(wanted, abs=5e-5)


def profile_score(b: int, c: int, n: int, d: float) -> float:
    """The score statistic with its nuisance parameter found by maximising the likelihood numerically."""
    low, high = max(0.0, -d), min(1.0, (1 - d) / 2)

    def loss(q: float) -> float:
        p12, p21 = q + d, q
        cells = [(b, p12), (c, p21), (n - b - c, 1 - p12 - p21)]
        return -sum(k * np.log(max(p, 1e-300)) for k, p in cells if k)

    q = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return (b - c - n * d) / np.sqrt(n * (2 * q + d - d * d))


@pytest.mark.parametrize(("b", "c", "n"), [(1, 7, 21), (8, 16, 86), (40, 20, 160), (0, 3, 44), (12, 0, 50), (0, 0, 30)])
def test_tango_is_the_profile_likelihoods(b, c, n):
    for d in (-0.4, -0.2, -0.05, -0.02, 0.01, 0.1, 0.3):
        assert stats.tango_score(b, c, n, d) == pytest.approx(profile_score(b, c, n, d), abs=2e-3)
    low, high = stats.tango_interval(b, c, n)
    assert stats.tango_score(b, c, n, low) == pytest.approx(1.959964, abs=1e-5)
    assert stats.tango_score(b, c, n, high) == pytest.approx(-1.959964, abs=1e-5)


def test_tango_published():
    # Fagerland et al. 2014, Statistics in Medicine 33:2850, tables II and IX: airway hyper-responsiveness, 1/1/7/12
    assert stats.tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=6e-4)
    # at a difference of 0 the score test is McNemar's: z = (b - c) / sqrt(b + c)
    assert stats.tango_score(1, 7, 21, 0.0) == pytest.approx(-6 / np.sqrt(8))


def test_tango_of_equal_systems():
    # no discordant pair: T = -n d / sqrt(n d (1 - d)) for d > 0, so the border is z² / (n + z²)
    z2 = 1.959964**2
    assert stats.tango_interval(0, 0, 200) == pytest.approx((-z2 / (200 + z2), z2 / (200 + z2)), abs=1e-6)
    assert stats.tango_interval(5, 0, 5)[1] == pytest.approx(1.0)


def test_tango_test_direction():
    better, worse = stats.tango_test(60, 10, 1000, 0.02)
    assert better < 1e-6 and worse > 0.999
    better, worse = stats.tango_test(0, 50, 1000, 0.02)
    assert better > 0.999 and worse < 1e-3
    assert stats.tango_test(10, 10, 1000, 0.0) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 7), (10, 10), (3, 0), (40, 20)])
def test_mcnemar_is_the_binomial_test(b, c):
    wanted = binomtest(b, b + c).pvalue if b + c else 1.0
    assert stats.mcnemar(b, c) == pytest.approx(wanted)


def test_holm():
    # worked by hand: sorted .005 .01 .03 .04 times 4 3 2 1, made monotone
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])
    assert len(stats.holm([])) == 0


# -- means -----------------------------------------------------------------------------------------------------------
def test_mean_test_is_scipys():
    d = np.random.default_rng(0).normal(0.01, 0.3, 60)
    mean, fine, worse = stats.mean_test(d, 0.05)
    assert mean == pytest.approx(d.mean())
    assert fine == pytest.approx(ttest_1samp(d, -0.05, alternative="greater").pvalue)
    assert worse == pytest.approx(ttest_1samp(d, -0.05, alternative="less").pvalue)
    assert stats.mean_test(np.zeros(9), 0.02) == (0.0, 0.0, 1.0)
    assert stats.mean_test(np.full(9, -0.5), 0.02)[1:] == (1.0, 0.0)


def test_mover_of_equal_widths():
    low, high = stats.mover([0.5, 0.5], [0.4, 0.8], [0.3, 0.7], [0.5, 0.9])
    assert (low, high) == pytest.approx((0.6 - 0.1 / np.sqrt(2), 0.6 + 0.1 / np.sqrt(2)))
    assert stats.mover([1.0], [0.4], [0.1], [0.6]) == pytest.approx((0.1, 0.6))


# -- AUROC -----------------------------------------------------------------------------------------------------------
def sample(n=80, seed=0, ties=True):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    x = rng.normal(size=n) + 0.8 * y
    return (np.round(x, 1) if ties else x), y


@pytest.mark.parametrize("ties", [True, False])
def test_auroc_is_scikit_learns(ties):
    from sklearn.metrics import roc_auc_score

    x, y = sample(ties=ties)
    assert stats.auroc(x, y) == pytest.approx(roc_auc_score(y, x), abs=1e-12)
    assert stats.delong(x, y)[0][0] == pytest.approx(roc_auc_score(y, x), abs=1e-12)
    assert np.isnan(stats.auroc(x, np.ones_like(y)))


def test_auroc_of_counts_is_scikit_learns_of_the_resample():
    from sklearn.metrics import f1_score, matthews_corrcoef, roc_auc_score

    x, y = sample(30)
    p = x > 0.3
    three = np.random.default_rng(3).integers(0, 3, (2, 30))
    for counts in stats.draws(30, 25, seed=7):
        for row, found in zip(counts, stats.auroc_of(x, y)(counts), strict=True):
            at = np.repeat(np.arange(30), row.astype(int))
            assert found == pytest.approx(roc_auc_score(y[at], x[at]), abs=1e-12)
            one = row[None]
            assert stats.f1_of(p, y)(one)[0] == pytest.approx(f1_score(y[at], p[at]))
            assert stats.mcc_of(*three)(one)[0] == pytest.approx(matthews_corrcoef(three[1][at], three[0][at]))
            assert stats.function_of(np.mean, list(x))(one)[0] == pytest.approx(x[at].mean())
            w = np.arange(30)
            assert stats.mean_of(x, w)(one)[0] == pytest.approx((x * w)[at].sum() / w[at].sum())


def test_macro_auroc_is_scikit_learns():
    from scipy.special import log_softmax, softmax
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    y = rng.integers(0, 4, 200)
    x = rng.normal(size=(200, 4)) + np.eye(4)[y]
    wanted = roc_auc_score(y, softmax(x, axis=1), multi_class="ovr", average="macro")
    assert stats.auroc_macro(log_softmax(x, axis=1), y) == pytest.approx(wanted, abs=1e-12)
    two = log_softmax(x[:, :2], axis=1)
    assert stats.auroc_macro(two, y % 2) == pytest.approx(roc_auc_score(y % 2, two[:, 1]), abs=1e-12)


def test_delong_variance_is_the_definitions():
    (x1, y), (x2, _) = sample(40), sample(40, seed=5)

    def parts(x):  # the structural components, pair by pair
        psi = (x[y][:, None] > x[~y][None]).astype(float) + 0.5 * (x[y][:, None] == x[~y][None])
        return psi.mean(axis=1), psi.mean(axis=0)

    (a10, a01), (b10, b01) = parts(x1), parts(x2)
    m, n = y.sum(), (~y).sum()
    areas, found = stats.delong(np.stack([x1, x2]), y)
    wanted = np.cov(np.stack([a10, b10])) / m + np.cov(np.stack([a01, b01])) / n
    assert found == pytest.approx(wanted, abs=1e-12)
    d, error = stats.delong_difference(x1, x2, y)
    assert d == pytest.approx(areas[0] - areas[1])
    assert error == pytest.approx(np.sqrt(wanted[0, 0] + wanted[1, 1] - 2 * wanted[0, 1]))
    assert stats.delong_difference(x1, x1, y) == pytest.approx((0.0, 0.0), abs=1e-8)
    assert np.isnan(stats.delong_interval(np.arange(6), np.arange(6) > 2)[0])  # all right: no interval of no width


# -- the bootstrap ---------------------------------------------------------------------------------------------------
def test_bootstrap_is_the_same_again_and_whatever_the_chunks():
    x = np.random.default_rng(0).exponential(size=50)
    first = stats.replicates(stats.mean_of(x), 50, 300, seed=3)
    assert np.array_equal(first, stats.replicates(stats.mean_of(x), 50, 300, seed=3))
    assert not np.array_equal(first, stats.replicates(stats.mean_of(x), 50, 300, seed=4))
    small = np.concatenate([stats.mean_of(x)(c) for c in stats.draws(50, 300, seed=3, cells=1000)])
    assert np.allclose(first, small)
    assert first.std() == pytest.approx(x.std() / np.sqrt(50), rel=0.1)


def test_bca_is_scipys():
    from scipy.stats import bootstrap

    x = np.random.default_rng(2).exponential(size=60)
    found = stats.bootstrap_interval(stats.mean_of(x), 60, resamples=20_000, bca=True)
    wanted = bootstrap((x,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert found == pytest.approx((wanted.low, wanted.high), abs=0.008)
    plain = stats.bootstrap_interval(stats.mean_of(x), 60, resamples=20_000)
    assert found[1] > plain[1]  # skewed to the right
    assert stats.bootstrap_interval(stats.mean_of(np.ones(9)), 9, bca=True) == (1.0, 1.0)
    assert np.isnan(stats.bootstrap_interval(stats.mean_of(np.ones(1)), 1)[0])


def test_pairing_narrows():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=200)
    a, b = shared + 0.1 * rng.normal(size=200), shared + 0.1 * rng.normal(size=200)
    paired = stats.bootstrap_interval(stats.difference_of(stats.mean_of(a), stats.mean_of(b)), 200)
    alone = stats.bootstrap_interval(stats.mean_of(a), 200)
    assert paired[1] - paired[0] < 0.2 * (alone[1] - alone[0])
    half = 1.96 * (a - b).std(ddof=1) / np.sqrt(200)
    assert paired == pytest.approx(((a - b).mean() - half, (a - b).mean() + half), abs=0.003)


# -- coverage --------------------------------------------------------------------------------------------------------
def share_inside(make, truth: float, runs: int) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([low <= truth <= high for low, high in (make(rng) for _ in range(runs))]))


def test_coverage_of_wilson_and_tango():
    assert 0.93 < share_inside(lambda r: stats.wilson(r.binomial(60, 0.85), 60), 0.85, 2000) < 0.975

    def tango(r):
        b, c, *_ = r.multinomial(100, [0.12, 0.05, 0.83])
        return stats.tango_interval(int(b), int(c), 100)

    assert 0.935 < share_inside(tango, 0.07, 1500) < 0.97


def test_size_of_the_non_inferiority_test_at_the_margin():
    rng = np.random.default_rng(1)
    rejected = [stats.tango_test(b, c, 400, 0.02)[0] < 0.05 for b, c, _ in rng.multinomial(400, [0.04, 0.06, 0.9], 2000)]
    assert 0.03 < np.mean(rejected) < 0.065


def test_coverage_of_auroc_intervals():
    truth = float(norm.cdf(1 / np.sqrt(2)))

    def scores(r):
        y = np.arange(80) < 40
        return r.normal(size=80) + y, y

    assert 0.92 < share_inside(lambda r: stats.delong_interval(*scores(r)), truth, 600) < 0.975


    def resampled(r):
        return stats.bootstrap_interval(stats.auroc_of(*scores(r)), 80, resamples=400, bca=True)

    assert 0.90 < share_inside(resampled, truth, 300) < 0.98


def test_coverage_of_the_bootstrap_of_a_skewed_mean():
    def interval(r):
        return stats.bootstrap_interval(stats.mean_of(r.exponential(size=80)), 80, resamples=400, bca=True)

    assert 0.90 < share_inside(interval, 1.0, 400) < 0.97
