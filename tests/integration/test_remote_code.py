"""A model that brings Python code of its own: refused with the name of the switch, and run only where that is set."""

import json

import pytest

from conftest import SMOKE
from cpet_bench.models.tiny import DEFAULTS, make

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "their_own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path):
    own = tmp_path / "own"
    make("llama", DEFAULTS, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "their_own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnForCausalLM"}
    (own / "config.json").write_text(json.dumps(config))
    (own / "code.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    return own


def test_code_of_a_model_needs_the_switch(cli, folder):
    text = SMOKE.read_text().replace('"tiny:llama", options: {hidden: 64, layers: 2, heads: 4, seed: 0}', f'"local:{folder}"')
    text = text.replace("include: smoke_task", f"include: {SMOKE.parent}/smoke_task")
    matrix = cli.folder / "own.yaml"
    only = ["--only", "compression=none", "--only", "restoring=none"]
    matrix.write_text(text)
    env = {"HF_HOME": str(cli.folder / "hf")}  # transformers copies such code there
    done = cli("run", matrix, *only, **env)
    (record,) = cli.records().values()
    assert done.returncode == 4 and "allow_code: true" in record["reason"]["message"], done.stderr
    assert not (cli.folder / "mark").exists()
    matrix.write_text(text + "allow_code: true\n")
    done = cli("run", matrix, *only, **env)
    (record,) = cli.records().values()
    assert done.returncode == 0 and record["status"] == "done", done.stderr
    assert (cli.folder / "mark").read_text() == "ran" and record["provenance"]["device"]["allow_code"]
