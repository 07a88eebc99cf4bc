"""NOLA: what is refused, and the whole way."""

import json
import subprocess
import sys

import pytest
import torch
from nola_modules import (
    folders,  # noqa: F401
    pet,
)

from cpet_bench.cli.main import main
from cpet_bench.deployment import deploy
from cpet_bench.errors import InputError, StepFailed, Unsupported
from cpet_bench.matrix import load_matrix
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring.fairness import wider
from cpet_bench.steps.tuning import target_parameters
from cpet_bench.store import Store


# -- refused -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_modules": ["q_prj"]}, "Did you mean q_proj"),
        ({"target_modules": ".*nothing"}, "nothing"),
        ({"kk": 4}, "nola has no field 'kk'"),
        ({"k": 0}, "pet.k: .*greater than or equal to 1"),
        ({"r": 33}, "k_proj has 64 inputs and 32 outputs, so a rank of 33 .* at most 32"),
    ],
)
def test_what_cannot_be_put_on(change, says, folders):
    model = load_model(folders / "llama")
    with pytest.raises(InputError, match=says):
        methods.attach(model, pet(**change))
    assert not hasattr(model, "cpet_nola")


def test_a_saved_module_that_does_not_fit(folders, tmp_path):
    model = load_model(folders / "llama")
    methods.attach(model, pet(target_modules=["q_proj", "down_proj"]))
    methods.save(model, tmp_path / "a")
    tiny.make("llama", {**tiny.DEFAULTS, "intermediate": 96}, tmp_path / "narrow")
    with pytest.raises(StepFailed, match=r"down_proj is \[128, 64\], here \[96, 64\]"):
        methods.attach_saved(load_model(tmp_path / "narrow"), tmp_path / "a", trainable=True)
    tiny.make("llama", {**tiny.DEFAULTS, "layers": 1}, tmp_path / "short")
    with pytest.raises(StepFailed, match="not in the model: model.layers.1.mlp.down_proj"):
        methods.attach_saved(load_model(tmp_path / "short"), tmp_path / "a", trainable=True)
    with pytest.raises(Unsupported, match="not in PEFT's format"):
        wider(tmp_path / "a", 4000, tmp_path / "x")


def test_a_control_is_matched_to_it(folders):
    model = load_model(folders / "llama")
    control = {"pet": {"method": "nola", "k": 6, "r": 4}, "recover": {"r": 2}}
    recovery = sum(2 * sum(m.weight.shape) for m in block_linears(model).values())
    assert target_parameters(model, control) == 2 * 6 * 4 + recovery  # q_proj and v_proj, as PEFT's LoRA
    assert not hasattr(model, "cpet_nola")


MATRIX = """
model: {tiny: {source: "tiny:llama"}}
pet:
  nola: {method: NOLA, %s}
task: {movie_reviews: {}}
"""


@pytest.mark.parametrize(
    ("fields", "key", "says"),
    [
        ("k: 16, rank: 4", "pet.nola.rank", "nola has no field of this name. .*Allowed: k, lora_alpha, r, seed"),
        ("basis: 4", "pet.nola.basis", "Allowed: k, lora_alpha"),
        ("k: many", "pet.nola.k", "valid integer"),
        ("r: 0", "pet.nola.r", "at least 1 and at most"),
    ],
)
def test_the_matrix_says_which_fields_it_has(tmp_path, fields, key, says):
    path = tmp_path / "m.yaml"
    path.write_text(MATRIX % fields)
    with pytest.raises(InputError, match=says) as caught:
        load_matrix(path)
    assert caught.value.key == key and caught.value.line == 4
    path.write_text(MATRIX % "k: 16, r: 4, seed: 2, train: {lr: 1e-2}")
    assert load_matrix(path).pet["nola"].fields == {"k": 16, "r": 4, "seed": 2}


# -- the whole way -----------------------------------------------------------------------------------------------------
RUN = """
name: nola
pet: {nola: {method: nola, k: 16, r: 4, target_modules: [q_proj, v_proj], train: {lr: 3e-2}}}
probes: {throughput: {prompt_tokens: 8, new_tokens: 2, repeats: 1}}
task: {smoke_sentiment: {include: %s, limit: 30}}
include:
  - {pet: nola, compression: none, restoring: vanilla}
  - {pet: nola, compression: nf4, restoring: cpet}
"""
OUTSIDE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = []
for folder in sys.argv[2:]:
    sys.path.insert(0, folder)
    from load_nola import attach_nola
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = attach_nola(base, folder)
    if "--nf4" in folder:
        from load_recovery import attach_recovery
        attach_recovery(base, folder)
    with torch.no_grad():
        found.append(model.eval()(torch.tensor([[3, 1, 4, 1, 5]])).logits.tolist())
assert not any(name.startswith("cpet") for name in sys.modules)
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_a_run_and_what_others_make_of_it(cli, tmp_path):
    """Tuned, inherited beside recovery with distillation on 4-bit layers, probed, scored; exported and loaded without us."""
    from conftest import SMOKE

    assert cli("run", cli.matrix(RUN % (SMOKE.parent / "smoke_task"))).returncode == 0
    records = cli.records("nola")
    by = {(r["axes"]["compression"], r["axes"]["restoring"]): r for r in records.values()}
    vanilla, cpet = by["none", "vanilla"], by["nf4", "cpet"]
    assert all(r["status"] == "done" for r in records.values()) and vanilla["training"]["by_part"] == {"nola": 2 * 16 * 4}
    assert cpet["training"]["by_part"]["nola"] == 128 and cpet["training"]["inherited"]["steps"] == 12
    assert vanilla["training"]["losses"][-1]["loss"] < vanilla["training"]["losses"][0]["loss"]
    assert cpet["probes"]["decode"]["value"] > 0
    places, exports = ["--store", cli.env["CPET_BENCH_STORE"], "--runs", str(cli.folder / "runs")], []
    store = Store(cli.env["CPET_BENCH_STORE"])
    wanted = []
    for record, more in ((vanilla, ["--merged"]), (cpet, [])):
        exports.append(str(tmp_path / record["id"]))
        assert main(["export", record["id"], "--to", exports[-1], "--base", *places, *more]) == 0
        keys = record["provenance"]["keys"]
        model = load_model(store.materialise(keys.get("compress", keys["model"])))
        with torch.no_grad(), deploy(model, [store.materialise(keys["tune"])]) as deployed:
            wanted.append(deployed(torch.tensor([[3, 1, 4, 1, 5]])).logits)
    there = subprocess.run([sys.executable, "-c", OUTSIDE, str(tmp_path / "out"), *exports], capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    for found, logits in zip(json.loads((tmp_path / "out").read_text()), wanted, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        merged = load_model(tmp_path / vanilla["id"] / "merged")(torch.tensor([[3, 1, 4, 1, 5]])).logits
    torch.testing.assert_close(merged, wanted[0], atol=1e-4, rtol=1e-4)
    text = (tmp_path / cpet["id"] / "README.md").read_text()
    assert "attach_nola(base" in text and "attach_recovery(base" in text and "peft" not in text.partition("```")[2].lower()
    assert not (tmp_path / cpet["id"] / "adapter_config.json").exists()
