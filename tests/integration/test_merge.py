"""`merge`: halves of a run, runs of a matrix that has grown, and what is refused."""

import json

import pytest

from cpet_bench.cli.main import main
from cpet_bench.errors import InputError
from cpet_bench.results import files
from cpet_bench.results.merge import merge
from cpet_bench.results.validate import validate
from shared_run import DENSE, PRUNED, TEXT, TUNED, another_machine, change, losses, outcomes, record


def comparable(body: dict) -> dict:
    """A record without the moment it was written and what was estimated by then."""
    provenance = {k: v for k, v in body["provenance"].items() if k != "created"}
    costs = {k: v for k, v in body["costs"].items() if k != "estimated_seconds"}
    return body | {"provenance": provenance, "costs": costs}


def test_two_halves_are_the_whole(made, tmp_path):
    assert json.loads(record(made.b, PRUNED).read_text())["references"]["dense"] is None
    assert merge([made.b, made.a], tmp_path / "shared") == {"done": 3}
    assert validate(tmp_path / "shared").faults == []
    got = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "shared/records").iterdir()}
    assert {k: comparable(v) for k, v in got.items()} == {k: comparable(v) for k, v in made.records.items()}
    mine, whole = (json.loads((f / "run.json").read_text()) for f in (tmp_path / "shared", made.run))
    assert mine["cells"] == whole["cells"] and mine["matrix"] == whole["matrix"]
    assert [(s["name"], s["cells"]) for s in mine["sources"]] == [("half-b", [PRUNED]), ("half-a", [DENSE, TUNED])]
    assert losses(tmp_path / "shared").read_bytes() == losses(made.run).read_bytes()
    with pytest.raises(InputError, match="there already"):
        merge([made.a, made.b], tmp_path / "shared")
    ready = made.cli("plan", tmp_path / "shared/matrix.yaml", "--json")
    assert ready.returncode == 0 and len(json.loads(ready.stdout)["cells"]) == 3


GROWN = TEXT.replace("restoring: none}", "restoring: [none, again]}") + "seed: [0, 1]\nrestoring: {again: {recover: {r: 2}}}\n"


def test_a_matrix_may_grow(made, tmp_path):
    """Entries of an axis added, seeds too: earlier runs of it stay good, and the widest matrix is kept."""
    grown = made.cli.matrix(GROWN, "grown.yaml")
    only = ("--only", "restoring=again", "--only", "seed=1", "--no-page")
    nothing = ("--no-page", "--budget", "1s")  # what is refused for its matrix need not have been computed
    assert made.cli("run", grown, *only, "--name", "grown").returncode == 0
    wider = made.cli.folder / "runs/grown"
    new = PRUNED.replace("--none--none--smoke", "--lora--again--smoke").replace("--s0", "--s1")
    assert merge([made.a, made.b, wider], tmp_path / "shared") == {"done": 4}
    assert validate(tmp_path / "shared").faults == []
    info = json.loads((tmp_path / "shared/run.json").read_text())
    assert info["cells"] == [DENSE, TUNED, PRUNED, new] and info["matrix"]["seed"] == [0, 1] and "again" in info["matrix_text"]
    assert (tmp_path / "shared/matrix.yaml").read_bytes() == (wider / "matrix.yaml").read_bytes()
    ready = made.cli("plan", tmp_path / "shared/matrix.yaml", "--json")
    assert ready.returncode == 0 and new in ready.stdout
    other = made.cli.matrix(GROWN.replace("{r: 2}", "{r: 4}"), "other.yaml")
    assert made.cli("run", other, *nothing, "--name", "other").returncode == 0
    with pytest.raises(InputError, match=r"different matrices: restoring\.again differs"):
        merge([made.a, wider, made.cli.folder / "runs/other"], tmp_path / "out")
    first = made.cli.matrix(GROWN.replace("seed: [0, 1]", "seed: [1, 0]"), "first.yaml")
    assert made.cli("run", first, *nothing, "--name", "first").returncode == 0
    with pytest.raises(InputError, match="different matrices: .*seed differ"):  # where rates are chosen
        merge([made.a, made.cli.folder / "runs/first"], tmp_path / "out")
    aside = made.cli.matrix(GROWN.replace("again", "aside"), "aside.yaml")
    assert made.cli("run", aside, *nothing, "--name", "aside").returncode == 0
    with pytest.raises(InputError, match=r"different matrices: restoring\.as?[a-z]+ differs"):
        merge([wider, made.cli.folder / "runs/aside"], tmp_path / "out")


def test_conflicts_are_refused_by_name(made, copied, tmp_path, capsys):
    another_machine(copied)
    out = tmp_path / "out"
    with pytest.raises(InputError, match="1 cell has different results") as caught:
        merge([made.a, copied], out)
    assert TUNED in str(caught.value) and "--prefer" in str(caught.value) and not list(tmp_path.glob("*out*"))
    assert main(["merge", str(made.a), str(copied), "-o", str(out), "--prefer", str(copied)]) == 0
    kept = json.loads(record(out, TUNED).read_text())
    assert kept["provenance"]["device"]["name"] == "Another CPU" and validate(out).faults == []
    names = {json.loads(p.read_text())["provenance"]["device"]["name"] for p in (out / "records").iterdir()}
    assert len(names) == 2
    capsys.readouterr()
    assert main(["leaderboard", str(out)]) == 0
    page = (out / "leaderboard.html").read_text()
    assert "device used" in page and "Another CPU" in page
    with pytest.raises(InputError, match="no(ne|t)|names none"):
        merge([made.a, copied], tmp_path / "other", prefer="nobody")


def _matrix(run):
    return json.loads((run / "run.json").read_text())["matrix"]


def test_what_cannot_be_merged(made, copied, tmp_path):
    change(copied / "run.json", lambda r: r["matrix"]["train"].update(lr=1.0))
    with pytest.raises(InputError, match="has faults"):
        merge([made.a, copied], tmp_path / "out")
    files.write_manifest(copied)
    with pytest.raises(InputError, match="different matrices: train.lr differs"):
        merge([made.a, copied], tmp_path / "out")
    change(copied / "run.json", lambda r: r["matrix"].update(train=_matrix(made.a)["train"], select={"lr": [1e-3, 1e-2]}))
    files.write_manifest(copied)
    with pytest.raises(InputError, match="different matrices: select differs"):
        merge([made.a, copied], tmp_path / "out")
    with pytest.raises(InputError, match="at least two"):
        merge([made.a], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_done_cell_wins_over_a_pending_one(made, copied, tmp_path):
    empty = {"metrics": {}, "primary": None, "probes": {}, "compression": None, "training": None, "simulated": []}
    change(record(copied, PRUNED), lambda r: r.update(status="pending", **empty))
    outcomes(copied, PRUNED).unlink()
    files.write_manifest(copied)
    assert validate(copied).faults == []
    assert merge([copied, made.b], tmp_path / "out") == {"done": 3}
