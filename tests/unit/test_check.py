"""The gate on made-up runs: it finds planted drops, passes what is the same, and tells "nothing compared" from both."""

import json
import subprocess
import sys

import numpy as np
import pytest
from made_runs import labels, metric, record, rows, write_run
from scipy.stats import binomtest

from cpet_bench import stats
from cpet_bench.check import compare
from cpet_bench.cli.main import main


def run_of(folder, values, key, **more):
    """A run of one cell whose documents have these 0/1 values."""
    one = record(metrics={"acc": metric(float(np.mean(values)))}, key=key, **more)
    return write_run(folder, [one], {one["id"]: rows(values)})


def flipped(values, lose=0, gain=0):
    """`values` with the first `lose` ones made 0 and the first `gain` zeros made 1."""
    found = values.copy()
    found[np.flatnonzero(values == 1)[:lose]] = 0
    found[np.flatnonzero(values == 0)[:gain]] = 1
    return found


@pytest.fixture
def base():
    return (np.random.default_rng(0).random(1000) < 0.85).astype(float)


def check(tmp_path, *more):
    return main(["check", str(tmp_path / "new"), "--baseline", str(tmp_path / "old"), *more])


def test_finds_a_drop_of_five_points(tmp_path, base, capsys):
    run_of(tmp_path / "old", base, "old")
    run_of(tmp_path / "new", flipped(base, lose=60, gain=10), "new")
    report = compare(tmp_path / "new", tmp_path / "old")
    (cell,) = report.cells
    assert cell.verdict == "regression" and cell.documents == 1000
    assert cell.difference == pytest.approx(-0.05)
    assert (cell.low, cell.high) == pytest.approx(stats.tango_interval(10, 60, 1000)) and cell.high < -0.02
    assert check(tmp_path) == 1
    assert "regression: tiny--nf4--lora--cpet--movies--s0: acc 0.8" in capsys.readouterr().out


def test_passes_a_gain_and_a_small_change(tmp_path, base):
    run_of(tmp_path / "old", base, "old")
    run_of(tmp_path / "new", flipped(base, lose=5, gain=8), "new")
    assert compare(tmp_path / "new", tmp_path / "old").cells[0].verdict == "no regression shown"
    assert check(tmp_path) == 0


def test_says_inconclusive_where_the_interval_crosses_the_margin(tmp_path, base):
    run_of(tmp_path / "old", base[:150], "old")
    run_of(tmp_path / "new", flipped(base[:150], lose=6, gain=3), "new")
    (cell,) = compare(tmp_path / "new", tmp_path / "old").cells
    assert cell.low < -0.02 < cell.high and cell.verdict == "inconclusive"
    assert check(tmp_path) == 0
    assert compare(tmp_path / "new", tmp_path / "old", margin=0.2).cells[0].verdict == "no regression shown"


def test_direction_of_the_margin(tmp_path, base):
    """A drop of one point that is there beyond doubt is none under a margin of two, and one under a margin of a tenth."""
    run_of(tmp_path / "old", base, "old")
    run_of(tmp_path / "new", flipped(base, lose=10), "new")
    assert binomtest(0, 10).pvalue < 0.01
    assert compare(tmp_path / "new", tmp_path / "old", margin=0.02).cells[0].verdict == "no regression shown"
    assert compare(tmp_path / "new", tmp_path / "old", margin=0.001).cells[0].verdict == "regression"


def test_passes_an_identical_run_however_small(tmp_path):
    logprobs, gold = labels(12, 0)
    one = record(metrics={"acc": metric(0.5), "auroc": metric(0.6)}, key="old")
    found = rows(logprobs.argmax(1) == gold, logprobs=logprobs, gold=gold)
    write_run(tmp_path / "old", [one], {one["id"]: found})
    write_run(tmp_path / "new", [record(metrics=one["metrics"], key="new")], {one["id"]: found})
    (cell,) = compare(tmp_path / "new", tmp_path / "old").cells
    assert cell.verdict == "no regression shown" and cell.method == "outcomes are identical"
    assert check(tmp_path) == 0


def test_the_same_result_of_the_store_needs_no_outcomes(tmp_path):
    for name in ("old", "new"):
        write_run(tmp_path / name, [record()])
    assert compare(tmp_path / "new", tmp_path / "old").cells[0].verdict == "no regression shown"


def test_nothing_compared_has_a_code_of_its_own(tmp_path, base, capsys):
    run_of(tmp_path / "old", base, "old", restoring="cpet")
    run_of(tmp_path / "new", base, "new", restoring="vanilla")
    assert check(tmp_path) == 3
    out = capsys.readouterr().out
    assert "only in the baseline: tiny--nf4--lora--cpet" in out and "only in the candidate: tiny--nf4--lora--vanilla" in out


def test_outcomes_that_are_missing_or_of_other_documents_are_not_compared(tmp_path, base):
    old = run_of(tmp_path / "old", base, "old")
    one = record(key="new")
    write_run(tmp_path / "new", [one])
    assert check(tmp_path) == 3
    write_run(tmp_path / "other", [one], {one["id"]: rows(base, first=5000)})
    report = compare(tmp_path / "other", old)
    assert report.exit_code == 3 and "no documents in common" in report.cells[0].note


def test_bad_input_is_2(tmp_path, base, capsys):
    run_of(tmp_path / "old", base, "old")
    assert check(tmp_path) == 2
    assert "there is no folder" in capsys.readouterr().err
    run_of(tmp_path / "new", base, "new")
    assert check(tmp_path, "--metric", "accc") == 2
    assert "Did you mean acc?" in capsys.readouterr().err
    for flag in (["--margin", "-1"], ["--alpha", "1.5"], ["--speed-margin", "0"]):
        assert check(tmp_path, *flag) == 2
    assert main(["check", str(tmp_path), "--baseline", str(tmp_path / "old")]) == 2
    (tmp_path / "new" / "records" / "x.json").write_text("{")
    assert check(tmp_path) == 2


@pytest.mark.parametrize("status", ["failed", "unsupported"])
def test_a_cell_that_was_done_and_is_no_longer(tmp_path, status):
    write_run(tmp_path / "old", [record()])
    write_run(tmp_path / "new", [record(status=status)])
    report = compare(tmp_path / "new", tmp_path / "old")
    assert report.exit_code == 1 and f"was done, is {status}: the loss is not finite" in report.cells[0].note
    assert compare(tmp_path / "old", tmp_path / "new").exit_code == 3  # the baseline had nothing


def test_only_documents_that_both_have(tmp_path, base):
    one = record(metrics={"acc": metric(0.8)}, key="old")
    write_run(tmp_path / "old", [one], {one["id"]: rows(base)})
    # other documents come first and are all wrong; those in common are the same
    found = rows(np.zeros(300), first=9000) + rows(base)[::-1]
    write_run(tmp_path / "new", [record(metrics={"acc": metric(0.6)}, key="new")], {one["id"]: found})
    (cell,) = compare(tmp_path / "new", tmp_path / "old").cells
    assert cell.difference == 0 and cell.documents == 1000 and "300 documents in one run only" in cell.note


def test_holm_counts_the_cells_that_could_not_be_compared(tmp_path, base):
    """p is 0.004 after doubling: a regression alone, none among 20 cells of which 19 have no outcomes."""
    lost = next(k for k in range(1, 200) if 2 * stats.tango_test(0, k, 1000, 0.02)[1] < 0.004)
    for count, verdict in ((1, "regression"), (20, "inconclusive")):
        made = [record(restoring=f"r{i}", key="old", metrics={"acc": metric(0.8)}) for i in range(count)]
        old, new = tmp_path / f"old{count}", tmp_path / f"new{count}"
        write_run(old, made, {made[0]["id"]: rows(base)})
        made = [record(restoring=f"r{i}", key="new", metrics={"acc": metric(0.8)}) for i in range(count)]
        write_run(new, made, {made[0]["id"]: rows(flipped(base, lose=lost))})
        report = compare(new, old)
        assert report.family == count and report.cells[0].verdict == verdict


def test_false_alarms_stay_below_alpha(tmp_path):
    """Twenty cells at the margin itself, a hundred times: some verdict is wrong in about one of twenty at most."""
    from cpet_bench.check.compare import _adjusted

    rng, alarms = np.random.default_rng(0), 0
    for _ in range(400):
        p = {i: stats.tango_test(b, c, 500, 0.02)[1] for i, (b, c, _) in enumerate(rng.multinomial(500, [0.04, 0.06, 0.9], 20))}
        alarms += min(_adjusted(p).values()) <= 0.05
    assert alarms <= 400 * 0.05 + 2 * np.sqrt(400 * 0.05 * 0.95)


@pytest.mark.parametrize(("name", "drop"), [("auroc", 0.7), ("log_loss", 0.7), ("f1", 0.5), ("mcc", 0.5)])
def test_other_metrics(tmp_path, name, drop):
    """A weaker model is found out by each metric, the same model with a little noise is passed."""
    n = 1500
    strong, gold = labels(n, 0, shift=3.0)
    found = {"strong": strong, "same": labels(n, 0, shift=3.0, noise=1)[0], "weak": labels(n, 0, shift=3.0 * drop)[0]}

    def value(x):
        picked = {"auroc": stats.macro_of, "f1": stats.f1_of, "mcc": stats.mcc_of}
        if name == "log_loss":
            return float(-x[np.arange(n), gold].mean())
        return float(picked[name](x if name == "auroc" else x.argmax(1), gold)(np.ones((1, n)))[0])

    for key, x in found.items():
        values = -x[np.arange(n), gold] if name == "log_loss" else [None] * n
        one = record(metrics={"acc": metric(0.5), name: metric(value(x), higher=name != "log_loss")}, key=key)
        write_run(tmp_path / key, [one], {one["id"]: rows(values, metric=name, logprobs=x, gold=gold)})
    (cell,) = compare(tmp_path / "weak", tmp_path / "strong", metric=name).cells
    sign = -1 if name == "log_loss" else 1
    assert cell.verdict == "regression"
    assert cell.difference == pytest.approx(sign * (value(found["weak"]) - value(strong)))
    assert cell.low < cell.difference < cell.high < -0.02
    (cell,) = compare(tmp_path / "same", tmp_path / "strong", metric=name).cells
    assert cell.verdict == "no regression shown" and cell.low > -0.02
    (cell,) = compare(tmp_path / "strong", tmp_path / "weak", metric=name).cells
    assert cell.verdict == "no regression shown" and cell.low > 0


def test_groups_weigh_their_tasks(tmp_path):
    """Task a is large and unchanged, task b small and lost: pooled it is a small drop, with equal weights a large one."""
    rng = np.random.default_rng(0)
    big, small = (rng.random(3000) < 0.8).astype(float), (rng.random(300) < 0.8).astype(float)
    for name, weights in (("pooled", {"a": 10 / 11, "b": 1 / 11}), ("equal", {"a": 0.5, "b": 0.5})):
        metrics = {"acc": metric(0.8, weights=weights), "a/acc": metric(0.8), "b/acc": metric(0.8)}
        for key, b in (("old", small), ("new", flipped(small, lose=30))):
            one = record(metrics=metrics, key=key)
            write_run(tmp_path / name / key, [one], {one["id"]: rows(big, task="a") + rows(b, task="b", first=7000)})
    pooled, equal = (compare(tmp_path / n / "new", tmp_path / n / "old").cells[0] for n in ("pooled", "equal"))
    assert pooled.difference == pytest.approx(-30 / 3300) and pooled.verdict == "no regression shown"
    assert equal.difference == pytest.approx(-0.05) and equal.verdict == "regression" and equal.low < -0.05 < equal.high
    (part,) = compare(tmp_path / "equal" / "new", tmp_path / "equal" / "old", metric="b/acc").cells
    assert part.difference == pytest.approx(-0.1) and part.documents == 300


def test_perplexity_weighs_by_words(tmp_path):
    """Long documents lose, short ones gain as much: a mean of documents would see nothing."""
    rng = np.random.default_rng(0)
    loss, words = rng.normal(3, 0.4, 400), np.where(np.arange(400) % 2, 50, 5)
    worse = loss + np.where(words == 50, 0.2, -0.2) + rng.normal(0, 0.05, 400)
    for key, values in (("old", loss), ("new", worse)):
        one = record(metrics={"word_perplexity": metric(20.0, higher=False)}, key=key)
        write_run(tmp_path / key, [one], {one["id"]: rows(values, metric="word_perplexity", weight=words)})
    (cell,) = compare(tmp_path / "new", tmp_path / "old").cells
    assert cell.verdict == "regression"
    assert cell.difference == pytest.approx(-np.average(worse - loss, weights=words)) and cell.low < cell.difference < cell.high


def speed_runs(tmp_path, old, new, **changed):
    for key, speed in (("old", old), ("new", new)):
        one = record(speed=speed)
        if key == "new":
            one["provenance"]["device"] |= changed
        write_run(tmp_path / key, [one])
    return compare(tmp_path / "new", tmp_path / "old")


@pytest.mark.parametrize(
    ("new", "changed", "verdict", "code"),
    [
        ((68, 70, 75), {}, "regression", 1),
        ((60, 70, 97), {}, "inconclusive", 0),
        ((88, 90, 91), {}, "no regression shown", 0),
        ((68, 70, 75), {"name": "Another processor"}, "not compared", 0),
        ((68, 70, 75), {"threads": 1}, "not compared", 0),
    ],
)
def test_speed(tmp_path, new, changed, verdict, code):
    report = speed_runs(tmp_path, (95, 100, 105), new, **changed)
    assert [s.verdict for s in report.speed] == [verdict] * 2 and report.exit_code == code
    if verdict == "not compared":
        assert next(iter(changed)) in report.speed[0].note
    else:
        assert report.speed[0].ratio == pytest.approx(new[1] / 100)


def test_json(tmp_path, base, capsys):
    run_of(tmp_path / "old", base, "old")
    run_of(tmp_path / "new", flipped(base, lose=60), "new")
    assert check(tmp_path, "--json", "--margin", "0.01") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 1 and found["margin"] == 0.01 and found["cells"][0]["verdict"] == "regression"


def test_loads_no_heavy_library(tmp_path, base):
    run_of(tmp_path / "old", base, "old")
    code = (
        "import sys; from cpet_bench.cli.main import main; main(['check', sys.argv[1], '--baseline', sys.argv[1]]);"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "old")], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
