"""`select` for real: the rate with the best validation metric is used, at every seed, and the record says how it was chosen."""

import json

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
