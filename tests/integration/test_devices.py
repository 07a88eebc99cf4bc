"""Real workers: two that share the processor give what one gives; limits, budgets, and what a platform cannot do."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

import cpet_bench
from conftest import SMOKE, Cli
from cpet_bench.display import State
from cpet_bench.events import read_events

SMALL = """
name: {name}
train: {{steps: 6, checkpoint_every: 6}}
probes: {{memory: false, throughput: {{prompt_tokens: 8, new_tokens: 2, repeats: 2}}}}
{more}
"""
DENSE = ["--only", "compression=none", "--only", "restoring=none,vanilla", "--no-page"]


def small(cli: Cli, name: str, more: str = ""):
    return cli.matrix(SMALL.format(name=name, more=more), f"{name}.yaml")


@pytest.mark.slow
def test_two_workers_on_one_processor_give_what_one_gives(tmp_path):
    """The same metrics and outcomes, log-probabilities within 1e-3 (here: of one machine, the same)."""
    one, two = Cli(tmp_path / "one"), Cli(tmp_path / "two")
    for cli, devices in ((one, "cpu:1"), (two, "cpu:2")):
        cli.folder.mkdir()
        done = cli("run", small(cli, "small"), *DENSE, "--devices", devices, "--json")
        assert done.returncode == 0, done.stderr
        heard = [json.loads(line) for line in done.stdout.splitlines()]
        kept = read_events(cli.folder / "runs/small/events.jsonl")
        assert heard[-1]["event"] == "end"
        assert vars(fold(heard)) == vars(fold(kept))  # the log rebuilds the display's last state
        assert [r for r in heard if r["event"] != "progress"] == kept
    ours, theirs = one.records("small"), two.records("small")
    assert ours.keys() == theirs.keys() and len(ours) == 2
    for name, record in ours.items():
        other = theirs[name]
        assert record["status"] == other["status"] == "done"
        assert record["provenance"]["keys"] == other["provenance"]["keys"]  # a worker's name is in no key
        assert record["metrics"].keys() == other["metrics"].keys()
        for metric, found in record["metrics"].items():
            assert found["value"] == pytest.approx(other["metrics"][metric]["value"], abs=1e-3)
        a, b = (pq.read_table(c.folder / "runs/small/outcomes" / f"{name}.parquet").to_pandas() for c in (one, two))
        assert a.document.tolist() == b.document.tolist()
        assert np.allclose(np.stack(a.logprobs.dropna()), np.stack(b.logprobs.dropna()), atol=1e-3)
        for place in (record, other):
            device = place["provenance"]["device"]
            assert device["device"] == "cpu" and device["dtype"] == "float32" and device["threads"] == 1
            assert device["attention"] == "auto" and device["attention_used"] in ("sdpa", "eager") and device["tf32"] is False
    probe_alone(read_events(two.folder / "runs/small/events.jsonl"))


def probe_alone(events: list[dict]) -> None:
    """Both workers computed, at times at once, but nothing else ran while a speed was measured."""
    assert {row["device"] for row in events if row["event"] == "done"} == {"cpu:0", "cpu:1"}
    running, most = {}, 0
    for row in events:
        if row["event"] == "start":
            running[row["key"]] = row["kind"]
            most = max(most, len(running))
            assert len(running) == 1 or "probe" not in running.values(), running
        elif row["event"] == "done":
            running.pop(row["key"])
    assert most == 2 and any(row["event"] == "start" and row["kind"] == "probe" for row in events)


def fold(events) -> State:
    state = State()
    for row in events:
        state.take(row)
    return state


def test_a_listener_sees_what_the_log_keeps(tmp_path, monkeypatch):
    """Through Python, on a run that fails in part: the display that watched it and one that reads its log agree."""
    monkeypatch.chdir(tmp_path)
    cli = Cli(tmp_path)
    matrix = small(cli, "limited", "limits: {tune: 0.2}\ntask: {smoke_sentiment: {limit: 20}}")
    matrix.write_text(matrix.read_text().replace("steps: 6", "steps: 50000"))
    live = State()
    options = {"only": ("compression=none", "restoring=none,vanilla"), "store": str(tmp_path / "store")}
    result = cpet_bench.run(matrix, listeners=[live.take], **options)
    assert result.exit_code == 4
    assert vars(fold(read_events(result.folder / "events.jsonl"))) == vars(live)
    assert live.failed >= 3 and live.running == {} and live.waiting == 0 and live.cells_done == live.cells == 2
    records = cli.records("limited")
    tuned, plain = (records[f"tiny--none--{pet}--smoke_sentiment--s0"] for pet in ("lora--vanilla", "none--none"))
    assert plain["status"] == "done"  # the others go on, on a new worker
    assert tuned["status"] == "failed" and tuned["reason"]["type"] == "TimeLimit"
    assert "longer than its limit of 0 s" in tuned["reason"]["message"] and tuned["reason"]["step"].startswith("tune")


def test_a_budget_leaves_the_rest_pending(cli):
    done = cli("run", small(cli, "later"), *DENSE, "--budget", "1s")
    assert done.returncode == 0, done.stderr
    records = cli.records("later")
    assert {r["status"] for r in records.values()} == {"pending"} and len(records) == 2
    assert {r["reason"]["message"] for r in records.values()} == {"left out by --budget 1s"}
    assert "2 of 2 cells stay pending (left out by --budget 1s): tiny--none--" in done.stderr
    plan = json.loads(cli("plan", small(cli, "later"), "--sample", "50%", "--json").stdout)
    assert 0 < plan["total"]["left_out"] < 12
    assert any(step["why"] == "left out" and not step["runs"] for step in plan["steps"])
    for option, value in (("--budget", "soon"), ("--sample", "0%"), ("--devices", "cpu,cpu"), ("--devices", "cuda:99")):
        wrong = cli("plan", SMOKE, option, value)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and len(wrong.stderr.splitlines()) == 1, wrong.stderr


def test_what_a_platform_cannot_do_is_a_row(cli):
    matrix = small(cli, "flash", "device: {attention: flash_attention_2}")
    done = cli("run", matrix, "--only", "restoring=none", "--only", "compression=none", "--no-page")
    assert done.returncode == 0, done.stderr
    (record,) = cli.records("flash").values()
    assert record["status"] == "unsupported" and "flash_attention_2 cannot be used here" in record["reason"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be set back on Linux")
def test_a_steps_peak_is_its_own():
    from cpet_bench.worker import peak_memory, reset_peak

    held = [bytearray(65536) for _ in range(6000)]  # 400 MB in pieces that the C library keeps when they are freed
    high = peak_memory(["cpu"])
    del held
    reset_peak(["cpu"])
    low = peak_memory(["cpu"])
    assert low < high - 300 * 2**20
    held = bytearray(b"x") * (200 * 2**20)
    assert peak_memory(["cpu"]) > low + 150 * 2**20
    del held
