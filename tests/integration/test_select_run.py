"""`select` for real: the rate with the best validation metric is used, at every seed, and the record says how it was chosen."""

import json
import shutil

import pytest

from conftest import Cli

GRID = """
compression: {none: none, wanda24: {backend: wanda, pattern: "2:4", calibration: {documents: 16}}}
restoring: {vanilla: {}, cpet: {inherit: true, recover: {r: 4}, distill: true}}
seed: [0, 1]
probes: {throughput: false, memory: false}
exclude: []
include: [{compression: none, pet: lora, restoring: vanilla}, {compression: wanda24, restoring: cpet}]
task: {smoke_sentiment: {limit: 20}}
"""
SELECT = "name: chosen\nselect: {lr: [1e-4, 1e-2], documents: 40}\n"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    cli = Cli(tmp_path_factory.mktemp("select"))
    done = cli("run", cli.matrix(SELECT + GRID, "chosen.yaml"))
    assert done.returncode == 0, done.stderr
    return cli


def test_every_seed_has_the_rate_that_validation_chose(chosen):
    records = chosen.records("chosen")
    assert len(records) == 4
    for r in records.values():
        selection = r["training"]["selection"]
        won = max(selection["candidates"], key=lambda c: c["acc"])
        assert selection["metric"] == "acc" and selection["on"] == "validation" and selection["documents"] == 40
        assert r["training"]["lr"] == selection["chosen"]["lr"] and won["acc"] == next(
            c["acc"] for c in selection["candidates"] if c["lr"] == r["training"]["lr"]
        )
        assert "lr" not in r["settings"]["train"] and r["settings"]["train"]["select"]["lr"] == [1e-4, 1e-2]
        assert r["training"]["losses"] and r["training"]["peak_memory"] > 0
        same = records[r["id"].replace("s1", "s0")]
        assert same["training"]["selection"] == selection
    one, two = (records[f"tiny--wanda24--lora--cpet--smoke_sentiment--s{s}"] for s in (0, 1))
    assert one["training"]["losses"] != two["training"]["losses"]
    assert one["training"]["inherited"]["id"] == "tiny--none--lora--vanilla--smoke_sentiment--s0"
    # What the choice cost is in the cell's seconds: both trials of both D and cpet.
    assert one["costs"]["steps"]["trial"] > one["training"]["seconds"]
    exported = chosen("export", two["id"], "--run", "chosen", "--to", chosen.folder / "out")
    assert exported.returncode == 0, exported.stderr
    (config,) = (chosen.folder / "out").rglob("adapter_config.json")
    assert json.loads(config.read_text())["peft_type"] == "LORA"


@pytest.mark.slow
def test_the_same_as_the_rate_given(chosen):
    """The candidates' figures are those of a run with that rate on the validation split; the winner is that very training."""
    chosen_records = chosen.records("chosen")
    selection = chosen_records["tiny--none--lora--vanilla--smoke_sentiment--s0"]["training"]["selection"]
    for candidate in selection["candidates"]:
        name = f"given{candidate['lr']:g}".replace("-", "m")
        task = GRID.replace("limit: 20", "split: validation, limit: 40")
        path = chosen.matrix(f"name: {name}\ntrain: {{lr: {candidate['lr']}}}\n{task}", f"{name}.yaml")
        done = chosen("run", path, "--only", "compression=none", "--only", "seed=0", "--no-page")
        assert done.returncode == 0, done.stderr
        given = chosen.records(name)["tiny--none--lora--vanilla--smoke_sentiment--s0"]
        assert given["metrics"]["acc"]["value"] == candidate["acc"]
        if candidate["lr"] == selection["chosen"]["lr"]:
            own = chosen_records["tiny--none--lora--vanilla--smoke_sentiment--s0"]["training"]
            assert [x["loss"] for x in given["training"]["losses"]] == [x["loss"] for x in own["losses"]]


def test_again_everything_is_there(chosen):
    again = chosen("run", chosen.folder / "chosen.yaml")
    assert again.returncode == 0 and "everything is in the store" in again.stderr


def test_more_seeds_take_the_rates_that_an_earlier_run_states(chosen):
    """In an empty store, as on another machine: no trial is run, and what comes out is what the whole run gave."""
    path, elsewhere = chosen.folder / "chosen.yaml", chosen.folder / "another-store"
    args = (path, "--only", "seed=1", "--store", elsewhere, "--runs", chosen.folder / "more", "--rates", "runs/chosen")
    plan = chosen("plan", *args, "--json")
    assert plan.returncode == 0, plan.stderr
    steps = json.loads(plan.stdout)["steps"]
    assert {s["why"] for s in steps if s["kind"] == "rate"} == {"taken from an earlier run"}
    assert not any(s["runs"] for s in steps if s["kind"] in ("rate", "select", "trial"))
    assert not (elsewhere / "objects").exists()  # a plan changes nothing
    done = chosen("run", *args, "--json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    ran = [e["kind"] for e in events if e["event"] == "start"]
    assert "tune" in ran and not {"trial", "select", "rate"} & set(ran)
    records = chosen.records("chosen")
    for file in sorted((chosen.folder / "more/chosen/records").glob("*.json")):
        found = json.loads(file.read_text())
        before = records[found["id"]]
        assert found["metrics"] == before["metrics"] and found["provenance"]["keys"] == before["provenance"]["keys"]
        origin = found["training"]["selection"].pop("taken_from")
        assert found["training"]["selection"] == before["training"]["selection"]
        assert origin["run"] == "chosen" and origin["cell"] == found["id"].replace("s1", "s0")
    out = chosen.folder / "both"
    merged = chosen("merge", chosen.folder / "runs/chosen", chosen.folder / "more/chosen", "-o", out)
    assert merged.returncode == 0, merged.stderr
    assert len(list((out / "records").glob("*.json"))) == 4


@pytest.mark.parametrize(
    ("change", "rates", "says"),
    [
        (("lr: [1e-4, 1e-2]", "lr: [1e-4, 1e-3]"), "runs/chosen", "were made with other settings, data, code or packages"),
        (("", ""), "runs/nothing", "there is no folder runs/nothing"),
        (("seed: [0, 1]", "seed: [0]"), "runs/chosen", "no rate of these cells was chosen at another seed"),
    ],
)
def test_rates_that_do_not_fit_are_refused(chosen, change, rates, says):
    path = chosen.matrix((SELECT + GRID).replace(*change), "unfit.yaml")
    found = chosen("run", path, "--rates", rates)
    assert found.returncode == 2 and says in found.stderr and "Traceback" not in found.stderr


def test_a_record_that_states_no_candidate_is_refused(chosen):
    shutil.copytree(chosen.folder / "runs/chosen", chosen.folder / "runs/edited")
    file = chosen.folder / "runs/edited/records/tiny--none--lora--vanilla--smoke_sentiment--s0.json"
    record = json.loads(file.read_text())
    record["training"]["selection"]["chosen"] = {"lr": 0.5}
    file.write_text(json.dumps(record))
    found = chosen("plan", chosen.folder / "chosen.yaml", "--only", "seed=1", "--rates", "runs/edited")
    assert found.returncode == 2 and "none of the candidates" in found.stderr and file.name in found.stderr
