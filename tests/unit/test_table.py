"""The terminal table shows every cell, and why a cell has no numbers."""

import io

from made_runs import metric, record
from rich.console import Console

from cpet_bench.table import ladder, print_table


def printed(records, width=200):
    stream = io.StringIO()
    print_table(records, Console(file=stream, width=width))
    return stream.getvalue()


def quality(acc, **more):
    return {"acc": metric(acc, acc - 0.03, acc + 0.02), "auroc": metric(0.9123), "log_loss": metric(0.41, higher=False), **more}


def test_a_row_has_everything():
    one = record("wanda24", metrics=quality(0.823), speed=(380, 395.4, 400))
    one["probes"]["prefill"]["simulated"] = True
    text = printed([one])
    for wanted in ("tiny · movies", "wanda24", "lora", "cpet", "0.823 [0.793, 0.843]", "0.912", "0.410", "4.88 M", "269 MB"):
        assert wanted in text
    assert "395 sim." in text and text.count("sim.") == 1  # decode is not marked
    assert "75 s" in text and "done" in text and "seed" not in text


def test_failed_and_unsupported_say_why():
    made = [record("nf4", status="failed"), record("wanda24", status="unsupported"), record("int8", status="pending")]
    made[1]["reason"]["message"] = "[bold]packed[/bold] weights " + "cannot be pruned " * 20 + "at all"
    text = printed(made, width=90)
    assert "the loss is not finite in tiny--nf4" in text and "pending" in text
    assert "[bold]packed[/bold]" in text and "at all" in text  # not cut off, and no markup of ours


def test_ladder_climbs_inside_each_compression():
    made = [
        record("none", restoring="vanilla", metrics=quality(0.9)),
        record("nf4", restoring="cpet", metrics=quality(0.85)),
        record("nf4", restoring="broken", status="failed"),
        record("nf4", pet="none", restoring="none", metrics=quality(0.7)),
        record("none", pet="none", restoring="none", metrics=quality(0.8)),
    ]
    order = [(r["axes"]["compression"], r["axes"]["restoring"]) for r in ladder(made)]
    assert order == [("none", "none"), ("none", "vanilla"), ("nf4", "none"), ("nf4", "cpet"), ("nf4", "broken")]
    lower = [record(restoring=str(v), metrics={"word_perplexity": metric(v, higher=False)}) for v in (7.0, 17.0)]
    assert [r["axes"]["restoring"] for r in ladder(lower)] == ["17.0", "7.0"]


def test_blocks_seeds_and_missing_numbers():
    made = [record(seed=0), record(seed=1), record(task="tweets", metrics={"exact_match": metric(None)})]
    made[2]["training"] = None
    made[2]["probes"] = {}
    text = printed(made)
    assert "tiny · movies" in text and "tiny · tweets" in text and "seed" in text
    assert "exact_match (95 %)" in text and "–" in text


def test_narrow_terminals_lose_columns_and_never_digits():
    one = record("wanda24", metrics=quality(0.823), speed=(380, 395.4, 400))
    text = printed([one], width=72)
    assert "0.823 [0.793, 0.843]" in text and "done" in text and "…" not in text
    assert "no room here for: time, stored" in text and "269 MB" not in text
