"""Means over training seeds: against scipy's tests where one of documents and seeds does not vary, and by simulation."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_runs import SCHEMA, labels, metric, record, rows, write_run
from scipy.stats import t, ttest_1samp, ttest_rel

from cpet_bench import stats
from cpet_bench.check import between, gaps
from cpet_bench.check.seeds import pseudo_values, two_way
from cpet_bench.cli.main import main
from cpet_bench.errors import InputError

N, SEEDS = 300, 3
LEVELS = {"vanilla": 0.55, "matched": 0.6, "cpet": 0.75}  # shares of right answers on the compressed model
DENSE = 0.85


def p_value(table):
    mean, error, freedom = two_way(table)
    return 2 * t.sf(abs(mean) / error, freedom)


def test_without_variance_of_one_kind_it_is_the_t_test_of_the_other():
    rng = np.random.default_rng(0)
    documents = rng.normal(0.1, 1.0, N)
    assert p_value(np.stack([documents] * SEEDS, axis=1)) == pytest.approx(ttest_1samp(documents, 0).pvalue, rel=1e-9)
    seeds = rng.normal(0.1, 1.0, SEEDS)
    assert p_value(np.tile(seeds, (N, 1))) == pytest.approx(ttest_1samp(seeds, 0).pvalue, rel=1e-9)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_one_in_twenty_is_found_where_there_is_nothing(spread):
    """Documents, seeds and their interaction at random, mean 0; a t test of all rows pooled finds far more than it should."""
    rng = np.random.default_rng(1)
    ours, pooled = [], []
    for _ in range(600):
        x = rng.normal(0, 1, (60, 1)) + rng.normal(0, spread, (1, 4)) + rng.normal(0, 1, (60, 4))
        ours.append(p_value(x) < 0.05)
        pooled.append(ttest_1samp(x.ravel(), 0).pvalue < 0.05)
    assert 0.02 < np.mean(ours) < 0.09 and np.mean(pooled) > 0.12


def test_pseudo_values_of_a_mean_are_its_terms_and_of_auroc_give_delongs_error():
    rng = np.random.default_rng(2)
    values = rng.normal(size=50)
    assert pseudo_values(stats.mean_of(values), 50) == pytest.approx(values, abs=1e-9)
    found, gold = labels(400, 3)
    scores = found[:, 1] - found[:, 0]
    one = pseudo_values(stats.auroc_of(scores, gold == 1), 400)
    low, high = stats.delong_interval(scores, gold == 1)
    assert one.mean() == pytest.approx(stats.auroc(scores, gold == 1), abs=1e-3)
    # two groups of fixed sizes there, drawn documents here: within a tenth of each other
    assert one.std(ddof=1) / np.sqrt(400) == pytest.approx((high - low) / 2 / 1.96, rel=0.1)


def answers():
    """{(compression, restoring, seed): 0/1 values}, documents of like difficulty for all."""
    rng = np.random.default_rng(5)
    easy = rng.random(N)
    found = {}
    for seed in range(SEEDS):
        for restoring, level in LEVELS.items():
            noisy = 0.7 * easy + 0.3 * rng.random(N)
            found["nf4", restoring, seed] = (noisy < np.quantile(noisy, level + 0.03 * (seed - 1))).astype(float)
        noisy = 0.7 * easy + 0.3 * rng.random(N)
        found["none", "vanilla", seed] = (noisy < np.quantile(noisy, DENSE)).astype(float)
    return found


def written(folder, made, seeds=range(SEEDS), **more):
    records, outcomes = [], {}
    for (compression, restoring, seed), values in made.items():
        if seed not in seeds:
            continue
        one = record(compression, restoring=restoring, metrics={"acc": metric(float(values.mean()), 0.0, 1.0, n=N)}, seed=seed)
        steps = [] if compression == "none" else [{"backend": "bitsandbytes"}]
        parts = {"cpet": {"inherit": {}, "distill": {}}, "matched": {"control": "matched"}, "vanilla": {}}[restoring]
        one["settings"] |= {"compression": steps, "pet": {"method": "lora"}, "restoring": parts}
        one["training"] |= {"steps": 40, "flops": 2e12, "seconds": 9.0}
        name = "tiny--{}--lora--{}--movies--s{}".format
        one["references"]["dense_pet"] = name("none", "vanilla", seed) if one["id"] != name("none", "vanilla", seed) else None
        vanilla = name(compression, "vanilla", seed)
        one["references"]["vanilla"] = vanilla if compression != "none" and one["id"] != vanilla else None
        records.append(one)
        outcomes[one["id"]] = rows(values, **more)
    return write_run(folder, records, outcomes)


def test_cells_of_several_seeds_are_compared_by_their_means(tmp_path, capsys):
    made = answers()
    run = written(tmp_path / "run", made)
    found = between(run, "restoring=cpet", "restoring=matched")
    assert len(found.pairs) == SEEDS and len(found.over_seeds) == 1
    (pair,) = found.over_seeds
    d = np.stack([made["nf4", "cpet", s] - made["nf4", "matched", s] for s in range(SEEDS)], axis=1)
    assert pair.difference == pytest.approx(d.mean()) and pair.seeds == [0, 1, 2] and pair.documents == N
    assert pair.values == pytest.approx((d.mean() + made_mean(made, "matched"), made_mean(made, "matched")))
    assert pair.low < pair.difference < pair.high and pair.p == pytest.approx(p_value(d)) == pytest.approx(pair.p_holm)
    mean, error, freedom = two_way(d)
    half = t.ppf(0.975, freedom) * error
    assert (pair.low, pair.high) == pytest.approx((mean - half, mean + half)) and (pair.low > 0) == (pair.p < 0.05)
    assert main(["compare", str(run), "restoring=cpet", "restoring=matched"]) == 0
    assert "mean of seeds 0, 1, 2" in capsys.readouterr().out
    alone = written(tmp_path / "alone", made, seeds=[0])
    assert between(alone, "restoring=cpet", "restoring=matched").over_seeds == []
    assert between(run, "seed=0", "seed=1").over_seeds == []


def made_mean(made, restoring):
    return np.mean([made["nf4", restoring, s].mean() for s in range(SEEDS)])


def test_shares_of_the_gap_are_ratios_of_means(tmp_path, capsys):
    made = answers()
    run = written(tmp_path / "run", made)
    (ladder,) = gaps(run)
    by = {row.restoring: row for row in ladder.rows}
    assert set(by) == {"cpet", "matched"} and ladder.low.restoring == "vanilla" and ladder.documents == N
    low, high = made_mean(made, "vanilla"), np.mean([made["none", "vanilla", s].mean() for s in range(SEEDS)])
    assert ladder.gap.value == pytest.approx(high - low) and ladder.gap.low > 0
    for name, row in by.items():
        own = made_mean(made, name)
        assert row.value.value == pytest.approx(own) and row.above.value == pytest.approx(own - low)
        assert row.share.value == pytest.approx((own - low) / (high - low))
        assert row.share.low < row.share.value < row.share.high and row.seeds == [0, 1, 2]
        assert (row.trained, row.steps, row.flops, row.seconds) == (4_880_000, 40, 2e12, 9.0)
        assert row.dense_flops == (2e12 if name == "cpet" else None)
        assert row.per_million == pytest.approx(100 * row.share.value / 4.88)
        assert row.per_tflop == pytest.approx(100 * row.share.value / (4 if name == "cpet" else 2))
    assert by["cpet"].share.low > by["matched"].share.value
    assert main(["gap", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["gap"]["value"] == pytest.approx(high - low)
    assert main(["gap", str(run), "--markdown"]) == 0
    text = capsys.readouterr().out
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["restoring", "---", "D (dense)", "cpet", "matched", "vanilla"]
    assert f"{100 * by['cpet'].share.value:.1f} [" in table[3] and len({line.count("|") for line in table}) == 1
    assert main(["gap", str(run)]) == 0
    text = capsys.readouterr().out
    assert "the gap is +0." in text and "*" not in text
    path = next((run / "records").glob("*--cpet--*"))
    one = json.loads(path.read_text())
    one["training"] |= {"lr": 3e-3, "selection": {"at_the_edge": True}}
    path.write_text(json.dumps(one))
    assert main(["gap", str(run)]) == 0
    assert "0.003*" in (text := capsys.readouterr().out) and "*: the lowest or highest that was tried" in text


def test_what_was_spent_on_d_is_what_the_cell_says(tmp_path):
    """Of a teacher that is another model, that one's; of an adapter of the user's nothing is known."""
    run = written(tmp_path / "run", answers())
    for path in (run / "records").glob("*--cpet--*"):
        record = json.loads(path.read_text())
        record["training"]["taught_by"] = {"id": "large", "flops": 7e12}
        path.write_text(json.dumps(record))
    (ladder,) = gaps(run)
    assert {row.restoring: row.dense_flops for row in ladder.rows} == {"cpet": 7e12, "matched": None}
    for other, flops in (("large", 9e12), ("d", 2e12)):  # its own D is paid as well, unless that is the teacher
        for path in (run / "records").glob("*--cpet--*"):
            record = json.loads(path.read_text())
            taught = {"id": other, "flops": 7e12 if other == "large" else 2e12}
            record["training"] |= {"inherited": {"id": "d", "flops": 2e12}, "taught_by": taught}
            path.write_text(json.dumps(record))
        (ladder,) = gaps(run)
        assert {row.restoring: row.dense_flops for row in ladder.rows} == {"cpet": flops, "matched": None}
    for path in (run / "records").glob("*--cpet--*"):
        record = json.loads(path.read_text())
        record["settings"]["restoring"] = {"inherit": {"from": "local:mine"}}
        path.write_text(json.dumps(record))
    (ladder,) = gaps(run)
    assert {row.dense_flops for row in ladder.rows} == {None}


def test_fiellers_interval_is_the_closed_one_where_that_is_known(tmp_path):
    """One seed: degrees of freedom do not change with the share, and its ends are the roots of a quadratic."""
    made = answers()
    (ladder,) = gaps(written(tmp_path / "run", made, seeds=[1]))
    for name in ("cpet", "matched"):
        top, bottom = (made[k] - made["nf4", "vanilla", 1] for k in (("nf4", name, 1), ("none", "vanilla", 1)))
        (v, c), (_, w) = np.cov(top, bottom) / N * t.ppf(0.975, N - 1) ** 2
        a, b, d = bottom.mean() ** 2 - w, top.mean() * bottom.mean() - c, top.mean() ** 2 - v
        root = np.sqrt(b * b - a * d)
        share = next(r.share for r in ladder.rows if r.restoring == name)
        assert (share.low, share.high) == pytest.approx(((b - root) / a, (b + root) / a), abs=1e-6)


def test_what_is_at_an_end_of_the_gap_has_no_interval(tmp_path):
    """Numerator and denominator are of the same resamples: a cell equal to D is 1 in all of them, one equal to vanilla 0."""
    made = answers()
    for seed in range(SEEDS):
        made["nf4", "cpet", seed], made["nf4", "matched", seed] = made["none", "vanilla", seed], made["nf4", "vanilla", seed]
    for seeds in (range(SEEDS), [1]):
        (ladder,) = gaps(written(tmp_path / f"run{len(seeds)}", made, seeds))
        by = {row.restoring: row.share for row in ladder.rows}
        assert (by["cpet"].value, by["cpet"].low, by["cpet"].high) == (1.0, 1.0, 1.0)
        assert (by["matched"].value, by["matched"].low, by["matched"].high) == (0.0, 0.0, 0.0)


def test_of_one_seed_the_tests_are_those_of_a_pair(tmp_path):
    made = answers()
    run = written(tmp_path / "run", made, seeds=[0])
    (ladder,) = gaps(run)
    pair = between(run, "restoring=cpet", "restoring=vanilla").pairs[0]
    row = next(r for r in ladder.rows if r.restoring == "cpet")
    assert (row.above.value, row.above.low, row.above.high, row.above.p) == (pair.difference, pair.low, pair.high, pair.p)
    assert ttest_rel(made["nf4", "cpet", 0], made["nf4", "vanilla", 0]).pvalue == pytest.approx(row.above.p, abs=1e-3)
    assert (row.value.low, row.value.high) == (0.0, 1.0)  # the record's


def test_no_share_where_the_gap_could_be_chance(tmp_path, capsys):
    made = answers()
    for seed in range(SEEDS):
        made["none", "vanilla", seed] = np.roll(made["nf4", "vanilla", seed], 1)
    run = written(tmp_path / "run", made)
    (ladder,) = gaps(run)
    assert ladder.gap.low <= 0 <= ladder.gap.high
    assert all(row.share is None and row.above.p is not None for row in ladder.rows)
    assert main(["gap", str(run)]) == 0 and "there is none to have shares of" in capsys.readouterr().out


def test_what_has_no_vanilla_cell_is_left_out(tmp_path, capsys):
    """And is never taken for vanilla itself, whether a seed is missing or all of them."""
    made = answers()
    some = {k: v for k, v in made.items() if k[1] != "vanilla" or k[0] == "none" or k[2] == 2}
    (ladder,) = gaps(written(tmp_path / "some", some))
    assert ladder.low.seeds == [2] and ladder.low.value.value == pytest.approx(made["nf4", "vanilla", 2].mean())
    assert {r.restoring: r.seeds for r in ladder.rows} == {"cpet": [2], "matched": [2]} and len(ladder.left_out) == 4
    assert main(["gap", str(tmp_path / "some")]) == 0 and "left out, without its vanilla cell" in capsys.readouterr().out
    none = written(tmp_path / "none", {k: v for k, v in made.items() if k[1] != "vanilla" or k[0] == "none"})
    with pytest.raises(InputError, match="no compressed cell beside both"):
        gaps(none)


def test_vanilla_with_training_of_its_own_is_a_row(tmp_path):
    """It has no part either, and is measured against the vanilla that it refers to; where that is missing it is left out."""
    made = answers()
    run = written(tmp_path / "run", made)
    (before,) = gaps(run)
    for path in (run / "records").glob("*--matched--*"):
        record = json.loads(path.read_text())
        record["settings"]["restoring"] = {"train": {"steps": 80}}
        path.write_text(json.dumps(record))
    (ladder,) = gaps(run)
    assert ladder.low.restoring == "vanilla" and ladder.low.seeds == [0, 1, 2] and ladder.low.value == before.low.value
    shares = [{r.restoring: r.share for r in found.rows} for found in (before, ladder)]
    assert ladder.gap == before.gap and shares[0] == shares[1]
    gone = next((run / "records").glob("*--nf4--lora--vanilla--*--s1.json"))
    gone.unlink()
    (ladder,) = gaps(run)
    assert ladder.low.seeds == [0, 2] and {r.restoring: r.seeds for r in ladder.rows} == {"cpet": [0, 2], "matched": [0, 2]}


def test_the_gap_is_of_all_seeds_of_its_ends(tmp_path):
    made = answers()
    (ladder,) = gaps(written(tmp_path / "run", {k: v for k, v in made.items() if k[1] != "cpet" or k[2] == 0}))
    low, high = made_mean(made, "vanilla"), np.mean([made["none", "vanilla", s].mean() for s in range(SEEDS)])
    by = {r.restoring: r for r in ladder.rows}
    assert {n: r.seeds for n, r in by.items()} == {"cpet": [0], "matched": [0, 1, 2]}
    assert ladder.gap.value == pytest.approx(high - low)
    own, low, high = (made[k].mean() for k in (("nf4", "cpet", 0), ("nf4", "vanilla", 0), ("none", "vanilla", 0)))
    assert by["cpet"].share.value == pytest.approx((own - low) / (high - low))


def test_no_share_where_the_dense_model_is_worse(tmp_path, capsys):
    made = answers()
    for seed in range(SEEDS):
        made["none", "vanilla", seed] = made["nf4", "vanilla", seed] * (np.arange(N) % 3 > 0)
    (ladder,) = gaps(written(tmp_path / "run", made))
    assert ladder.gap.high < 0 and all(row.share is None for row in ladder.rows)
    assert main(["gap", str(tmp_path / "run")]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert words == ["D", "cpet", "matched", "vanilla"]  # best first all the same


@pytest.mark.parametrize("seeds", [range(SEEDS), [0]])
def test_a_groups_tasks_keep_their_shares(tmp_path, seeds):
    """Two tasks of 200 and 100 documents that count the same."""
    made = answers()
    run = written(tmp_path / "run", made, seeds)
    tasks = ["long"] * 200 + ["short"] * 100
    for path in (run / "records").iterdir():
        body = json.loads(path.read_text())
        restoring, seed = body["axes"]["restoring"], body["axes"]["seed"]
        values = made[body["axes"]["compression"], restoring, seed]
        grouped = [row | {"task": task} for row, task in zip(rows(values), tasks, strict=True)]
        pq.write_table(pa.Table.from_pylist(grouped, schema=SCHEMA), run / "outcomes" / f"{path.stem}.parquet")
        value = (values[:200].mean() + values[200:].mean()) / 2
        body["metrics"]["acc"] |= {"weights": {"long": 0.5, "short": 0.5}, "value": value}
        path.write_text(json.dumps(body))

    def mean(compression, restoring):
        found = [made[compression, restoring, s] for s in seeds]
        return np.mean([(v[:200].mean() + v[200:].mean()) / 2 for v in found])

    (ladder,) = gaps(run)
    row = next(r for r in ladder.rows if r.restoring == "cpet")
    low, high = mean("nf4", "vanilla"), mean("none", "vanilla")
    assert row.value.value == pytest.approx(mean("nf4", "cpet")) and row.above.value == pytest.approx(mean("nf4", "cpet") - low)
    assert row.share.value == pytest.approx((mean("nf4", "cpet") - low) / (high - low)) and row.above.p < 0.01


def test_what_has_no_value_is_said_and_is_no_error(tmp_path, capsys):
    """A metric without a value by document; one that D lacks; one of unknown direction; perplexities of several seeds."""
    run = written(tmp_path / "run", answers())
    for path in (run / "records").iterdir():
        body = json.loads(path.read_text())
        body["metrics"] |= {"total": metric(0.5, n=N), "sized": metric(0.5, n=N) | {"higher_is_better": None}}
        body["metrics"]["word_perplexity"] = metric(20.0 + body["axes"]["seed"], n=N, higher=False)
        if body["axes"]["compression"] != "none":
            body["metrics"]["ours"] = metric(0.5, n=N)
        path.write_text(json.dumps(body))
    (ladder,) = gaps(run, "total")
    assert ladder.gap is None and "no outcomes" in ladder.note and ladder.rows[0].value.low is None
    for how in ("--json", "--markdown"):
        assert main(["gap", str(run), "--metric", "total", how]) == 0 and "no outcomes" in capsys.readouterr().out
    assert gaps(run, "word_perplexity")[0].rows[0].value.value == 21.0  # not in nats a word
    for name in ("ours", "sized"):
        assert main(["gap", str(run), "--metric", name]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_bad_input(tmp_path, capsys):
    run = written(tmp_path / "run", answers())
    assert main(["gap", str(run), "--metric", "ac"]) == 2 and "Did you mean acc?" in capsys.readouterr().err
    plain = written(tmp_path / "plain", {k: v for k, v in answers().items() if k[0] == "none"})
    with pytest.raises(InputError, match="no compressed cell beside both"):
        gaps(plain)
