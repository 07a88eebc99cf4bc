"""Exported models that transformers alone does not read: the card's own code loads them, merged ones as well."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_export import IDS, exported, ours

from conftest import SMOKE, Cli
from cpet_bench.cli.main import main
from cpet_bench.models.formats import PACKED, ROUTED, UNEVEN
from cpet_bench.models.loading import load_model
from cpet_bench.store import Store

MATRIX = """name: odd
model:
  tiny: {source: "tiny:llama", options: {hidden: 64, layers: 6, heads: 4, intermediate: 128, seed: 0}}
compression:
  none: none
  narrow: {backend: structured, ratio: 0.3, importance: l2}
  packed: {backend: rtn, bits: 4, group: 32}
  routed: {backend: moefy, experts: 4, top: 0.5, epochs: 1, calibration: {documents: 64}}
pet:
  lora: {method: lora, r: 4, lora_alpha: 4}
  prompt: {method: prompt_tuning, num_virtual_tokens: 4}
restoring:
  linear: {inherit: true, recover: {r: 4, act: identity}, distill: true}
task:
  smoke_sentiment: {include: FOLDER, limit: 4}
seed: 0
train: {steps: 2, batch: 2, lr: 3e-3, documents: 10}
probes: {throughput: false, memory: false}
device: {devices: [cpu], dtype: float32, threads: 1}
include:
  - {compression: [narrow, packed, routed], pet: lora}
  - {compression: narrow, pet: prompt}
"""
CELL = "tiny--{}--{}--linear--smoke_sentiment--s0"
ELSEWHERE = """
import json, os, sys
import torch
os.chdir({folder!r})
sys.path.insert(0, "")
{code}
with torch.no_grad():
    found = model.eval()(torch.tensor({ids})).logits.tolist()
open("logits.json", "w").write(json.dumps(found))  # libraries print banners
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    cli = Cli(tmp_path_factory.mktemp("odd"))
    matrix = cli.folder / "matrix.yaml"
    matrix.write_text(MATRIX.replace("FOLDER", str(SMOKE.parent / "smoke_task")))
    done = cli("run", matrix, "--no-page", timeout=600)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(cli=cli, folder=cli.folder / "runs/odd", records=cli.records("odd"))


def test_the_code_on_the_card_loads_what_was_measured(odd, tmp_path):
    wanted, scripts = {}, []
    for compression, what in (("narrow", UNEVEN), ("packed", PACKED), ("routed", ROUTED)):
        cell, to = CELL.format(compression, "lora"), tmp_path / compression
        merged = [] if compression == "packed" else ["--merged"]
        assert exported(odd, cell, to, "--base", *merged) == 0
        wanted[compression] = ours(odd, cell)
        card = (to / "README.md").read_text()
        assert f"The model has {what}" in card
        scripts.append(ELSEWHERE.format(folder=str(to), code=card.split("```python\n")[1].split("```")[0], ids=IDS))
        if merged:
            with torch.no_grad():
                found = load_model(to / "merged")(torch.tensor(IDS)).logits
            torch.testing.assert_close(found, wanted[compression], atol=1e-4, rtol=1e-4)
            assert "it is loaded as the model above" in card
    there = subprocess.run([sys.executable, "-c", "".join(scripts)], capture_output=True, text=True, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    for compression, logits in wanted.items():
        found = torch.tensor(json.loads((tmp_path / compression / "logits.json").read_text()))
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)


def test_the_card_says_so_without_the_model(odd, tmp_path):
    """From the store where it is there; by the compression where it is not."""
    cell, copy = CELL.format("routed", "lora"), tmp_path / "store"
    assert exported(odd, cell, tmp_path / "one") == 0
    shutil.copytree(odd.cli.env["CPET_BENCH_STORE"], copy)
    Store(str(copy)).drop(odd.records[cell]["provenance"]["keys"]["compress"])
    places = ["--store", str(copy), "--runs", str(odd.folder.parent)]
    assert main(["export", cell, "--to", str(tmp_path / "two"), *places]) == 0
    cards = [(tmp_path / name / "README.md").read_text() for name in ("one", "two")]
    assert cards[0] == cards[1] and 'base = load_model("FOLDER OF THE MODEL")' in cards[0]


def test_what_cannot_be_merged_leaves_nothing(odd, tmp_path, capsys, monkeypatch):
    cell, to = CELL.format("narrow", "prompt"), tmp_path / "out"
    assert exported(odd, cell, to, "--merged") == 2
    assert "virtual tokens are no weights" in capsys.readouterr().err and not to.exists()
    to.mkdir()
    monkeypatch.setattr("cpet_bench.export.merge.refuse", lambda *a: None)  # a method of which PEFT alone knows
    assert exported(odd, cell, to, "--merged") == 2
    assert "PEFT cannot merge this method" in capsys.readouterr().err and not any(to.iterdir())
    monkeypatch.undo()
    assert exported(odd, cell, to) == 0
