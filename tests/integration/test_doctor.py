"""`doctor` really tries: a library that is hidden, broken or crashes changes the rows that need it, and no others."""

import json
import os
import signal
import textwrap

import pytest

from cpet_bench import doctor, registry

PLUGIN = '''
class Nothing:
    name = "nothing"
    version = 1
    packages = ("torch",)
    calibrated = False
    from cpet_bench.settings import Settings

    @staticmethod
    def structure(settings):
        return {}

    @staticmethod
    def refuse(settings, before):
        return None

    @staticmethod
    def compress(source, out, settings, *, examples, device, dtype, progress, seed=0):
        import shutil
        shutil.copytree(source, out)
        return {}


class Crashing(Nothing):
    name = "crashing"

    @staticmethod
    def compress(source, out, settings, **rest):
        import os, signal
        os.kill(os.getpid(), signal.SIGSEGV)
'''


def site(folder, **modules):
    """A folder for PYTHONPATH with these modules (name → source)."""
    folder.mkdir()
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(code))
    return str(folder)


def by_name(rows):
    return {(row["part"], row["name"]): row for row in rows}


@pytest.fixture
def hidden(tmp_path, monkeypatch):
    """PYTHONPATH in front of everything, for processes that are started."""

    def hide(**modules):
        folders = [site(tmp_path / "site", **modules), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))

    return hide


def test_the_whole_report(cli, tmp_path):
    site(tmp_path / "site", nothing_plugin=PLUGIN)
    info = tmp_path / "site/nothing_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nothing-plugin\nVersion: 1.0\n")
    points = "nothing = nothing_plugin:Nothing\naa-crashing = nothing_plugin:Crashing\n"
    (info / "entry_points.txt").write_text(f"[cpet_bench.compression]\n{points}")
    done = cli("doctor", "--json", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = json.loads(done.stdout)
    rows = by_name(found["rows"])
    for part in ("compression", "source"):
        assert {name for p, name in rows if p == part} >= set(registry.names(part))
    for name in (*registry.names("compression"), "nothing"):
        assert rows["compression", name]["state"] == "ok", rows["compression", name]
    crashed = rows["compression", "aa-crashing"]
    assert crashed["state"] == "failed" and "SIGSEGV" in crashed["reason"] and "compress" in crashed["trace"]
    assert [rows["source", n]["state"] for n in ("tiny", "local", "gguf", "pypi")] == ["ok"] * 4
    hub = rows["source", "hf"]  # the tests are offline
    assert hub["state"] == "unsupported" and "hub" in hub["reason"] and "network" in hub["remedy"]
    assert rows["pet", "lora"]["state"] == "ok" and "two optimiser steps" in rows["pet", "lora"]["reason"]
    assert rows["pet", "prefix_tuning"]["state"] == "ok", rows["pet", "prefix_tuning"]
    assert rows["pet", "cpt"]["state"] == "unsupported", rows["pet", "cpt"]
    assert [rows["core", n]["state"] for n in ("torch", "training", "lm-eval", "store")] == ["ok"] * 4
    assert found["devices"]["cpu"]["formats"]["float32"] is True and found["devices"]["cpu"]["memory"] > 2**30
    assert found["versions"]["torch"] != "absent" and {f["what"] for f in found["folders"]} >= {"store", "cache", "runs"}
    assert all(row["reason"] and (row["remedy"] or row["state"] == "ok") for row in found["rows"])


@pytest.mark.parametrize("how", ["absent", *(pytest.param(how, marks=pytest.mark.slow) for how in ("broken", "crashing"))])
def test_a_library_that_is_hidden_changes_its_row_alone(hidden, tmp_path, how):
    if how == "absent":
        hidden(
            sitecustomize="""
            import sys
            class Hide:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "bitsandbytes":
                        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
            sys.meta_path.insert(0, Hide())
            """
        )
    elif how == "broken":
        hidden(bitsandbytes="raise ImportError('libcudart.so: cannot open shared object file')")
    else:
        hidden(bitsandbytes="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    rows = by_name(doctor.tries("compression", tmp_path))
    row = rows["compression", "bitsandbytes"]
    if how == "crashing":
        assert row["state"] == "failed" and signal.SIGSEGV.name in row["reason"]
    else:
        assert row["state"] == "unsupported" and "bitsandbytes" in row["reason"] + row["remedy"]
        assert row["remedy"] == "pip install " + ("bitsandbytes" if how == "absent" else "--force-reinstall bitsandbytes")
    assert rows["compression", "magnitude"]["state"] == rows["compression", "wanda"]["state"] == "ok"


@pytest.mark.slow
def test_the_core_is_what_the_exit_code_is_about(cli, tmp_path, hidden):
    hidden(lm_eval="raise ImportError('broken on purpose')", gguf="raise ImportError('no gguf')")
    done = cli("doctor", PYTHONPATH=os.environ["PYTHONPATH"])
    assert done.returncode == 1, done.stdout + done.stderr
    shown = " ".join(done.stdout.split())  # lines are folded
    assert "does NOT work" in shown and "broken on purpose" in shown and "Traceback" not in shown + done.stderr
    assert "pip install --force-reinstall gguf" in shown and "pip install --force-reinstall lm-eval" in shown


@pytest.mark.slow
def test_a_try_that_hangs_is_ended(monkeypatch, tmp_path, hidden):
    hidden(bitsandbytes="import time; time.sleep(600)")
    monkeypatch.setattr(doctor, "PATIENCE", 25.0)
    rows = by_name(doctor.tries("compression", tmp_path))
    assert rows["compression", "bitsandbytes"]["reason"] == "no answer within 25 s"
    assert rows["compression", "magnitude"]["state"] == "ok"


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    rows = {row["what"]: row for row in doctor.folders(str(tmp_path / "file" / "store"), str(tmp_path / "runs"))}
    assert rows["store"]["writable"] is False and "Not a directory" in rows["store"]["reason"]
    assert rows["runs"]["writable"] is True and rows["runs"]["free"] > 0
    assert doctor.folders("s3://bucket/store", "runs")[0]["writable"] is None
    assert not any(tmp_path.glob("**/.cpet-doctor*"))
