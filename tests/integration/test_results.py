"""Results that go from hand to hand: a real run validated, damaged, published, and run again."""

import json
import shutil

import pyarrow.parquet as pq
import pytest

from conftest import SMOKE, Cli
from cpet_bench.cli.main import main
from cpet_bench.errors import InputError
from cpet_bench.results import files
from cpet_bench.results.publish import publish
from cpet_bench.results.reproduce import reproduce
from cpet_bench.results.validate import validate
from shared_run import DENSE, PRUNED, TUNED, another_machine, change, flipped, losses, outcomes, record, rewrite


# -- validate ------------------------------------------------------------------------------------------------------------
def test_a_real_run_has_no_faults(made):
    report = validate(made.run)
    assert report.faults == [] and report.cells == 3 and report.statuses == {"done": 3} and report.unchecked == []
    assert main(["validate", str(made.run)]) == 0
    assert [p.stem for p in (made.run / "losses").iterdir()] == [TUNED]  # what has a training of some steps
    training = made.records[TUNED]["training"]
    assert pq.read_table(losses(made.run)).to_pylist() == training["losses"] and len(training["losses"]) == training["steps"]


def test_a_run_of_before_loss_curves_were_kept_is_whole(made, copied):
    shutil.rmtree(copied / "losses")
    files.write_manifest(copied)
    assert validate(copied).faults == []
    assert not any(name.startswith("losses/") for name in files.read_manifest(copied))


def other_name(folder):
    record(folder).rename(record(folder, "another"))


DAMAGES = {
    "a record gone": (lambda f: record(f).unlink(), "has no record"),
    "outcomes gone": (lambda f: outcomes(f).unlink(), "there are no outcomes of cell"),
    "outcomes cut": (lambda f: outcomes(f).write_bytes(outcomes(f).read_bytes()[:-9]), "damaged"),
    "no JSON": (lambda f: record(f).write_text("{"), "damaged"),
    "another schema": (lambda f: change(record(f), lambda r: r.update(schema=9)), "schema 9"),
    "a key too many": (lambda f: change(record(f), lambda r: r.update(extra=1)), "extra"),
    "another file name": (other_name, "not the file's name"),
    "a copy under another name": (lambda f: shutil.copy(record(f), record(f, "copy")), "has another record"),
    "other axes": (lambda f: change(record(f), lambda r: r["axes"].update(seed=7)), "its axes give"),
    "another metric": (lambda f: change(record(f), lambda r: r["metrics"]["acc"].update(value=0.46)), "by its outcomes"),
    "another AUROC": (lambda f: change(record(f), lambda r: r["metrics"]["auroc"].update(value=0.4)), "auroc is"),
    "outside its interval": (lambda f: change(record(f), lambda r: r["metrics"]["acc"].update(low=0.99)), "outside its own"),
    "fewer documents": (lambda f: change(record(f), lambda r: r["metrics"]["acc"].update(n=59)), "59 documents"),
    "no such primary": (lambda f: change(record(f), lambda r: r.update(primary="f1")), "none of its metrics"),
    "a reference to nowhere": (lambda f: change(record(f), lambda r: r["references"].update(dense="x")), "no cell of the run"),
    "failed with results": (lambda f: change(record(f), lambda r: r.update(status="failed")), "gives no reason"),
    "outcomes flipped": (lambda f: rewrite(outcomes(f), flipped), "acc is"),
    "losses cut": (lambda f: losses(f).write_bytes(losses(f).read_bytes()[:-9]), "losses are damaged"),
    "losses of fewer steps": (lambda f: rewrite(losses(f), lambda rows: rows[:-1]), "the losses are of"),
    "losses of no cell": (lambda f: shutil.copy(losses(f), losses(f, "nobody")), "there is no record of this cell"),
    "losses of an untrained cell": (lambda f: shutil.copy(losses(f), losses(f, DENSE)), "the losses are of"),
    "an outcome twice": (lambda f: rewrite(outcomes(f), lambda rows: [*rows, rows[0]]), "stand there twice"),
    "an outcome lost": (lambda f: rewrite(outcomes(f), lambda rows: rows[1:]), "documents, the outcomes have 59"),
    "outcomes of nothing": (lambda f: shutil.copy(outcomes(f), outcomes(f, "none")), "no record of this cell"),
    "run.json cut": (lambda f: (f / "run.json").write_text("{"), "damaged"),
    "run.json without cells": (lambda f: change(f / "run.json", lambda r: r.pop("cells")), "cells: "),
    "a cell named twice": (lambda f: change(f / "run.json", lambda r: r["cells"].append(DENSE)), "names cells twice"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(copied, name, capsys):
    """By its hash; and, the hashes made to fit, by what it says."""
    damage, wanted = DAMAGES[name]
    damage(copied)
    assert any(
        f.what.startswith(("its content changed", "it has", "it is missing", "the manifest")) for f in validate(copied).faults
    )
    files.write_manifest(copied)
    assert wanted in "\n".join(f.what for f in validate(copied).faults)
    assert main(["validate", str(copied), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 1 and any(wanted in f["what"] for f in told["faults"])


def test_all_faults_are_listed_and_a_manifest_cannot_lead_outside(copied, capsys):
    record(copied).unlink()
    change(record(copied, TUNED), lambda r: r["metrics"]["acc"].update(value=0.1))
    body = json.loads((copied / "manifest.json").read_text())["files"] | {"../secret": {"bytes": 1, "sha256": "0"}}
    (copied / "manifest.json").write_text(json.dumps({"files": body, "sha256": files.digest(body)}))
    assert main(["validate", str(copied)]) == 1
    out = capsys.readouterr().out
    assert all(word in out for word in ("it is missing", "acc is 0.1", "'../secret', which is no part of a run"))
    assert main(["validate", str(copied.parent / "nothing")]) == 2


def test_running_again_makes_a_damaged_run_whole(made, copied):
    runs = copied.parent
    outcomes(copied).unlink()
    record(copied, TUNED).write_text("{")
    again = made.cli("run", made.cli.folder / "matrix.yaml", "--runs", runs, "--no-page")
    assert again.returncode == 0 and "everything is in the store" in again.stderr
    assert validate(copied).faults == []


# -- publish -------------------------------------------------------------------------------------------------------------
def test_publishing_tells_nothing_of_the_machine(made, copied, tmp_path):
    hidden = "/home/somebody/secret-project"
    reason = {"type": "OSError", "message": f"no {hidden}/model.bin", "step": "tune", "log": f'File "{hidden}/x.py", line 1'}
    empty = {"metrics": {}, "primary": None, "probes": {}, "compression": None, "training": None, "simulated": []}
    change(record(copied, TUNED), lambda r: r.update(status="failed", reason=reason, **empty))
    change(copied / "run.json", lambda r: r["device"].update(cache=f"{hidden}/cache"))
    outcomes(copied, TUNED).unlink()
    losses(copied).unlink()
    files.write_manifest(copied)
    done = publish(copied, tmp_path / "results")
    assert done.fresh and done.folder == tmp_path / "results/shared" and validate(done.folder).faults == []
    there = {p.relative_to(done.folder).parts[0] for p in done.folder.rglob("*")}
    assert there == {"records", "outcomes", "files", "run.json", "matrix.yaml", "manifest.json", "leaderboard.html"}
    for path in (tmp_path / "results").rglob("*"):
        if path.is_file() and path.suffix != ".parquet":
            text = path.read_text()
            assert "somebody" not in text and str(SMOKE.parent) not in text and str(made.cli.folder) not in text, path
    failed = json.loads(record(done.folder, TUNED).read_text())["reason"]
    assert failed["message"] == "no …/model.bin" and failed["log"] == 'File "…/x.py", line 1'
    (row,) = json.loads((tmp_path / "results/index.json").read_text())["runs"]
    assert row["name"] == "shared" and row["cells"] == {"done": 2, "failed": 1} and "torch" in row["versions"]
    assert row["devices"] == [made.records[DENSE]["provenance"]["device"]["name"]]


def test_a_published_run_is_not_lost(made, copied, tmp_path, capsys):
    to = tmp_path / "results"
    assert main(["publish", str(made.run), "--to", str(to), "--name", "ours"]) == 0
    assert json.loads(record(to / "ours").read_text())["run"] == "ours"
    assert losses(to / "ours").read_bytes() == losses(made.run).read_bytes()
    before = (to / "ours/manifest.json").read_bytes()
    assert main(["publish", str(made.run), "--to", str(to), "--name", "ours"]) == 0
    assert "published before" in capsys.readouterr().out and (to / "ours/manifest.json").read_bytes() == before
    another_machine(copied)
    assert main(["publish", str(copied), "--to", str(to), "--name", "ours"]) == 2
    assert TUNED in capsys.readouterr().err and (to / "ours/manifest.json").read_bytes() == before
    assert main(["publish", str(copied), "--to", str(to), "--name", "ours", "--force"]) == 0
    assert json.loads(record(to / "ours", TUNED).read_text())["provenance"]["device"]["name"] == "Another CPU"
    assert sorted(p.name for p in to.iterdir()) == ["index.json", "ours"]


def test_what_is_not_published(made, copied, tmp_path):
    for run, more, why in ((copied, {"name": "../x"}, "cannot be named"), (copied, {}, "validate finds faults")):
        if not more:
            record(copied).write_text("{")
        with pytest.raises(InputError, match=why):
            publish(run, tmp_path / "results", **more)
    pending = shutil.copytree(made.b, tmp_path / "pending")
    empty = {"metrics": {}, "primary": None, "probes": {}, "compression": None, "training": None, "simulated": []}
    change(record(pending, PRUNED), lambda r: r.update(status="pending", **empty))
    outcomes(pending, PRUNED).unlink()
    files.write_manifest(pending)
    with pytest.raises(InputError, match="1 of 1 cells are pending"):
        publish(pending, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    assert publish(pending, tmp_path / "results", partial=True).statuses == {"pending": 1}


# -- reproduce -----------------------------------------------------------------------------------------------------------
def test_a_published_cell_is_reproduced_from_nothing(made, tmp_path):
    """From the published folder alone, elsewhere, with a fresh store: bit for bit on the same machine."""
    published = publish(made.run, tmp_path / "results").folder
    moved = shutil.move(published, tmp_path / "elsewhere")
    own = Cli(tmp_path)
    done = own("reproduce", moved, "--cell", TUNED, "--json")
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["reproduced"] and cell["equal"] == 1.0 and cell["documents"] == 60 and cell["changed"] == []
    assert cell["logprob_max"] == 0.0 and {m["name"] for m in cell["metrics"]} == {"acc", "auroc", "log_loss"}
    assert all(m["now"] == m["kept"] for m in cell["metrics"])
    assert not (tmp_path / "store").exists() and not (tmp_path / "runs").exists()


def test_the_number_format_is_the_kept_one(made, copied, capsys):
    """Of a matrix that left it to the machine, whose choice may be another one elsewhere."""
    matrix = copied / "matrix.yaml"
    assert "dtype: float32" in matrix.read_text()
    matrix.write_text(matrix.read_text().replace("dtype: float32", "dtype: auto"))
    change(record(copied, DENSE), lambda r: r["provenance"]["device"].update(dtype="bfloat16"))
    files.write_manifest(copied)
    assert main(["reproduce", str(copied), "--cell", DENSE, "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["changed"] == [] and 0 < cell["logprob_max"] < 0.1  # computed in bfloat16; the outcomes kept are float32's


def test_false_results_are_not_reproduced(made, copied, capsys, monkeypatch):
    """Against the true store, so that nothing needs computing."""
    store = made.cli.env["CPET_BENCH_STORE"]
    words = ["reproduce", str(copied), "--cell", DENSE, "--store", store]
    assert main(words) == 0 and "reproduced" in capsys.readouterr().out
    rewrite(outcomes(copied), flipped)
    assert main(words) == 1
    out = capsys.readouterr().out
    assert "NOT reproduced: 95.0% of the outcomes are equal" in out and "0 of 1 cells" in out
    shutil.copy(outcomes(made.run), outcomes(copied))
    change(record(copied), lambda r: r["metrics"]["acc"].update(value=0.9, low=0.8, high=0.95))
    change(record(copied), lambda r: r["provenance"]["versions"].update(torch="1.0"))
    report = reproduce(copied, cells=[DENSE], store=store)
    (cell,) = report.cells
    assert report.exit_code == 1 and cell.equal == 1.0 and "acc is 0.45, kept 0.9" in cell.why
    assert any(c.startswith("torch 1.0 → ") for c in cell.changed)


def test_another_make_of_processor_may_round_otherwise(made, copied):
    """Of 60 documents 3 others are too many on the same one and fine elsewhere; 7 are too many there as well."""
    store = made.cli.env["CPET_BENCH_STORE"]
    for elsewhere, wrong, refused in ((False, 3, True), (True, 3, False), (True, 7, True)):
        shutil.copy(outcomes(made.run), outcomes(copied))
        rewrite(outcomes(copied), lambda rows, times=wrong: flipped(rows, times))
        if elsewhere:
            change(record(copied), lambda r: r["provenance"]["device"].update(name="Another processor"))
        (cell,) = reproduce(copied, cells=[DENSE], store=store).cells
        assert cell.equal == pytest.approx(1 - wrong / 60) and cell.required == (0.9 if elsewhere else 0.98)
        assert any("of the outcomes are equal" in why for why in cell.why) is refused


def test_what_cannot_be_reproduced(copied, capsys):
    words = ["reproduce", str(copied), "--store", str(copied / "store")]
    assert main([*words, "--cell", TUNED[:-1] + "9"]) == 2 and TUNED in capsys.readouterr().err
    change(
        copied / "run.json",
        lambda r: r["outside"].append({"key": ["model", "m"], "place": "local:files/model/m", "why": "big"}),
    )
    assert main(words) == 2 and "put it at" in capsys.readouterr().err
    change(copied / "run.json", lambda r: r.update(outside=[]))
    matrix = copied / "matrix.yaml"
    matrix.write_text(matrix.read_text() + "\nallow_code: true\n" if "allow_code" not in matrix.read_text() else "")
    assert main(words) == 2 and "--allow-code" in capsys.readouterr().err
    matrix.unlink()
    assert main(words) == 2 and "keeps no matrix" in capsys.readouterr().err
