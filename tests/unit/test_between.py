"""Cells that differ in one axis: differences, intervals and p-values against scipy's, and what cannot be compared."""

import json

import numpy as np
import pytest
from made_runs import metric, record, rows, write_run
from scipy.stats import norm, ttest_rel

from cpet_bench.check import between
from cpet_bench.cli.main import main
from cpet_bench.errors import InputError

N = 400


def cells():
    """{(compression, restoring): 0/1 values}: cpet better than matched on nf4 by much, on wanda by nothing."""
    draw = np.random.default_rng(3).random(N)
    return {
        ("nf4", "cpet"): (draw < 0.9).astype(float),
        ("nf4", "matched"): (draw < 0.8).astype(float),
        ("wanda", "cpet"): (draw < 0.7).astype(float),
        ("wanda", "matched"): (np.roll(draw, 7) < 0.7).astype(float),
    }


def losses(values, seed):
    return np.exp(np.random.default_rng(seed).normal(size=N)) + 1 - values


@pytest.fixture
def run(tmp_path):
    records, outcomes = [], {}
    for i, ((compression, restoring), values) in enumerate(cells().items()):
        lost = losses(values, i)
        found = {"acc": metric(float(values.mean()), n=N), "log_loss": metric(float(lost.mean()), n=N, higher=False)}
        one = record(compression, restoring=restoring, metrics=found)
        records.append(one)
        outcomes[one["id"]] = rows(values) + rows(lost, metric="log_loss")
    records.append(record("nf4", restoring="vanilla"))
    return write_run(tmp_path / "run", records, outcomes)


def test_pairs_agree_in_every_other_axis(run):
    found = between(run, "restoring=cpet", "restoring=matched")
    assert found.axis == "restoring" and found.names == ("cpet", "matched") and found.alone == []
    assert {(p.first.split("--")[1], p.second.split("--")[1]) for p in found.pairs} == {("nf4", "nf4"), ("wanda", "wanda")}
    assert len(found.pairs) == 4 and all(p.documents == N for p in found.pairs)
    across = between(run, "compression=nf4", "compression=wanda", metric="acc")
    assert len(across.pairs) == 2 and across.alone == ["tiny--nf4--lora--vanilla--movies--s0"]


def test_tuned_cells_are_held_against_the_untuned_one(tmp_path):
    """Which has neither PET nor restoring, and only the first seed."""
    draw = np.random.default_rng(5).random(N)
    made = {("none", "none", 0): draw < 0.6, ("lora", "vanilla", 0): draw < 0.8, ("lora", "cpet", 1): draw < 0.5}
    records, outcomes = [], {}
    for (pet, restoring, seed), values in made.items():
        one = record("nf4", pet, restoring, metrics={"acc": metric(float(values.mean()), n=N)}, seed=seed)
        one["references"]["untuned"] = "tiny--nf4--none--none--movies--s0" if pet == "lora" else None
        records.append(one)
        outcomes[one["id"]] = rows(values.astype(float))
    other = record("int8", "lora", "vanilla")  # of a compression whose untuned cell is not there
    run = write_run(tmp_path / "run", [*records, other], outcomes)
    for first, second, sign in (("pet=lora", "pet=none", 1), ("pet=none", "pet=lora", -1)):
        found = between(run, first, second)
        assert found.alone == [other["id"]] and len(found.pairs) == 2
        for pair in found.pairs:
            tuned = made["lora", "cpet", 1] if "cpet" in pair.first + pair.second else made["lora", "vanilla", 0]
            assert pair.difference == pytest.approx(sign * (tuned.mean() - made["none", "none", 0].mean()))
    (one,) = between(run, "restoring=cpet", "restoring=none").pairs
    assert one.first.endswith("cpet--movies--s1") and one.difference < 0


def test_differences_intervals_and_p_values(run):
    made = cells()
    found = {(p.first.split("--")[1], p.metric): p for p in between(run, "restoring=cpet", "restoring=matched").pairs}
    for i, compression in enumerate(("nf4", "wanda")):
        a, b = made[compression, "cpet"], made[compression, "matched"]
        gained, lost = int((a > b).sum()), int((a < b).sum())
        acc = found[compression, "acc"]
        assert acc.difference == pytest.approx((a - b).mean(), abs=1e-12) and acc.low < acc.difference < acc.high
        z = (gained - lost) / np.sqrt(gained + lost)  # Tango's score test of no difference is McNemar's without a correction
        assert acc.p == pytest.approx(2 * norm.sf(abs(z)), rel=1e-6)
        x, y = losses(a, 2 * i), losses(b, 2 * i + 1)
        loss = found[compression, "log_loss"]
        assert loss.difference == pytest.approx((y - x).mean(), abs=1e-12)  # less loss is better
        assert loss.p == pytest.approx(ttest_rel(x, y).pvalue, rel=1e-6)
    assert found["nf4", "acc"].low > 0 > found["wanda", "acc"].low
    for name in ("acc", "log_loss"):
        p = [found[c, name].p for c in ("nf4", "wanda")]
        smallest = min(p)
        wanted = [min(1.0, 2 * x) if x == smallest else max(x, min(1.0, 2 * smallest)) for x in p]
        assert [found[c, name].p_holm for c in ("nf4", "wanda")] == pytest.approx(wanted)


def test_the_other_way_round_is_the_other_sign(run):
    one, two = (between(run, *names).pairs for names in PAIRS)
    for a, b in zip(one, two, strict=True):
        assert (a.first, a.second) == (b.second, b.first) and a.difference == pytest.approx(-b.difference)
        assert a.low == pytest.approx(-b.high, abs=2e-3) and a.p == pytest.approx(b.p)


PAIRS = [("restoring=cpet", "restoring=matched"), ("restoring=matched", "restoring=cpet")]
WRONG = [
    (("restoring=cpet", "restoring=matche"), "Did you mean matched?"),
    (("restoring=cpet", "compression=nf4"), "two names on one axis"),
    (("restoring=cpet", "restoring=cpet"), "two names on one axis"),
    (("restorin=cpet", "restoring=matched"), "no cell has an axis 'restorin'. Did you mean restoring?"),
    (("cpet", "matched"), "'cpet' is no AXIS=NAME"),
    (("restoring=cpet", "restoring=matched", "--metric", "auroc"), "with a metric 'auroc'"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[m[-22:] for _, m in WRONG])
def test_bad_input(run, capsys, words, message):
    assert main(["compare", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_perplexities_are_compared_in_nats(tmp_path, capsys):
    draw = np.random.default_rng(0)
    words, nats = draw.integers(3, 30, N).astype(float), draw.gamma(4.0, 1.0, (2, N))
    records, outcomes = [], {}
    for restoring, sums in zip(("cpet", "matched"), nats, strict=True):
        value = float(np.exp(sums.sum() / words.sum()))
        one = record(restoring=restoring, metrics={"word_perplexity": metric(value, n=N, higher=False)})
        records.append(one)
        outcomes[one["id"]] = rows(sums / words, metric="word_perplexity", weight=words)
    run = write_run(tmp_path / "run", records, outcomes)
    (pair,) = between(run, *PAIRS[0]).pairs
    assert pair.unit == "nats/word" and pair.difference == pytest.approx(np.log(pair.values[1] / pair.values[0]))
    assert main(["compare", str(run), *PAIRS[0]]) == 0 and "nats/word" in capsys.readouterr().out


def test_cells_that_are_not_done_are_said(tmp_path):
    values = np.ones(5)
    good, bad = record(restoring="cpet"), record(restoring="matched", status="failed")
    run = write_run(tmp_path / "run", [good, bad], {good["id"]: rows(values)})
    (pair,) = between(run, *PAIRS[0]).pairs
    assert pair.difference is None and pair.note == f"{bad['id']} is failed"


def test_no_documents_in_common(tmp_path):
    a, b = record(restoring="cpet"), record(restoring="matched")
    run = write_run(tmp_path / "run", [a, b], {a["id"]: rows(np.ones(5)), b["id"]: rows(np.ones(5), first=5)})
    (pair,) = between(run, *PAIRS[0]).pairs
    assert pair.p is None and pair.p_holm is None and "no documents in common" in pair.note


def test_on_the_command_line(run, capsys):
    assert main(["compare", str(run), *PAIRS[0]]) == 0
    text = capsys.readouterr().out
    assert "tiny--nf4--lora--cpet--movies--s0 against matched, 400 documents" in text and "< .0001" in text
    assert main(["compare", str(run), *PAIRS[0], "--json", "--metric", "acc"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["names"] == ["cpet", "matched"] and len(body["pairs"]) == 2


def test_one_run_only(run, tmp_path):
    with pytest.raises(InputError, match="several runs|holds no"):
        between(tmp_path, *PAIRS[0])
