"""Exported cells: plain PEFT and the ten-line loader give in another process what we compute; merged weights; bad input."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from cpet_bench.cli.main import main
from cpet_bench.deployment import deploy
from cpet_bench.models.loading import load_model
from cpet_bench.results.clean import clean_record
from cpet_bench.store import Store

CELL = "tiny--{}--lora--{}--smoke_sentiment--s0"
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]

ELSEWHERE = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, ".")
if sys.argv[2] == "recovery":
    sys.path.insert(0, ".")
    from load_recovery import attach_recovery
    attach_recovery(base, ".")
assert not any(name.startswith("cpet") for name in sys.modules)
with torch.no_grad():
    found = model.eval()(torch.tensor({ids})).logits.tolist()
open(sys.argv[3], "w").write(json.dumps(found))  # libraries print banners
"""


def exported(smoke, cell, to, *more) -> int:
    places = ["--store", smoke.cli.env["CPET_BENCH_STORE"], "--runs", str(smoke.folder.parent)]
    return main(["export", cell, "--to", str(to), *places, *more])


def ours(smoke, cell):
    """Logits of the deployed cell as scoring computes them."""
    store, keys = Store(smoke.cli.env["CPET_BENCH_STORE"]), smoke.records[cell]["provenance"]["keys"]
    model = load_model(store.materialise(keys.get("compress", keys["model"])))
    with deploy(model, [store.materialise(keys["tune"])]) as deployed, torch.no_grad():
        return deployed(torch.tensor(IDS)).logits


@pytest.mark.parametrize(
    ("compression", "restoring", "recovery"),
    [("none", "vanilla", False), ("wanda24", "cpet", True), ("nf4", "cpet-eora", True)],
)
def test_others_load_what_we_computed(smoke, tmp_path, compression, restoring, recovery):
    cell, to = CELL.format(compression, restoring), tmp_path / "out"
    assert exported(smoke, cell, to, "--base") == 0
    script = ELSEWHERE.replace("{ids}", str(IDS))
    words = ["base", "recovery" if recovery else "none", str(tmp_path / "logits.json")]
    there = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=to)
    assert there.returncode == 0, there.stderr
    found = torch.tensor(json.loads((tmp_path / "logits.json").read_text()))
    torch.testing.assert_close(found, ours(smoke, cell), atol=1e-5, rtol=1e-5)
    assert (to / "recovery.json").exists() == (to / "load_recovery.py").exists() == recovery


def test_the_card_says_what_it_is(smoke, tmp_path):
    cell = CELL.format("wanda24", "cpet")
    assert exported(smoke, cell, tmp_path / "out", "--run", "smoke") == 0
    names = {p.name for p in (tmp_path / "out").iterdir()}
    files = {"README.md", "record.json", "load_recovery.py", "recovery.json", "recovery.safetensors"}
    assert names == files | {"adapter_config.json", "adapter_model.safetensors"}
    text = (tmp_path / "out/README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "peft", "tags": ["cpet-bench", "lora"]}
    acc = smoke.records[cell]["metrics"]["acc"]
    assert f"| acc | {acc['value']:.4f} | {acc['low']:.4f} to {acc['high']:.4f} | 60 |" in body
    assert '"backend": "wanda"' in body and "inherit, recover, distill" in body and "attach_recovery(base" in body
    assert json.loads((tmp_path / "out/record.json").read_text()) == clean_record(smoke.records[cell])
    assert str(smoke.cli.folder) not in text + (tmp_path / "out/adapter_config.json").read_text()


@pytest.mark.parametrize("restoring", ["vanilla", "cpet-eora"])
def test_merged_weights_compute_the_same(smoke, tmp_path, restoring):
    cell = CELL.format("wanda24", restoring)
    assert exported(smoke, cell, tmp_path / "out", "--merged") == 0
    with torch.no_grad():
        merged = load_model(tmp_path / "out/merged")(torch.tensor(IDS)).logits
    wanted = ours(smoke, cell)
    torch.testing.assert_close(merged, wanted, atol=1e-4, rtol=1e-4)
    store, keys = Store(smoke.cli.env["CPET_BENCH_STORE"]), smoke.records[cell]["provenance"]["keys"]
    with torch.no_grad():
        assert (load_model(store.materialise(keys["compress"]))(torch.tensor(IDS)).logits - wanted).abs().max() > 1e-3
    assert "no longer zero" in (tmp_path / "out/README.md").read_text()


WRONG = [
    ((CELL.format("wanda24", "cpte"),), "There is no cell"),
    (("tiny--nf4--none--none--smoke_sentiment--s0",), "has no tuned modules"),
    ((CELL.format("nf4", "vanilla"), "--merged"), "packed by bitsandbytes"),
    ((CELL.format("wanda24", "cpet"), "--merged"), "not linear (act: gelu)"),
    ((CELL.format("none", "vanilla"), "--run", "smok"), "There is no run 'smok'. Did you mean smoke?"),
    ((CELL.format("none", "vanilla"), "--store", "EMPTY"), "run its matrix again"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[m[:20] for _, m in WRONG])
def test_what_cannot_be_exported(smoke, tmp_path, capsys, words, message):
    words = [str(tmp_path / w) if w == "EMPTY" else w for w in words]
    places = [] if "--store" in words else ["--store", smoke.cli.env["CPET_BENCH_STORE"]]
    call = ["export", *words, "--to", str(tmp_path / "out"), "--runs", str(smoke.folder.parent), *places]
    assert main(call) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_nothing_is_written_over(smoke, tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    call = ["export", CELL.format("none", "vanilla"), "--to", str(tmp_path), "--runs", str(smoke.folder.parent)]
    assert main([*call, "--store", smoke.cli.env["CPET_BENCH_STORE"]]) == 2
    assert "is not empty" in capsys.readouterr().err and (tmp_path / "mine").read_text() == "precious"


