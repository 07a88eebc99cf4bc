"""Whole weights and biases as they are kept: saved, loaded elsewhere, refused, exported."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from whole_modules import (
    ALL,
    ELSE,
    EXISTING,
    FULL,
    folders,  # noqa: F401
    learn,
    shake,
    trained,
)

from compressed import answer
from cpet_bench.cli.main import main
from cpet_bench.deployment import deploy
from cpet_bench.errors import InputError, StepFailed, Unsupported
from cpet_bench.matrix import load_matrix
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, head, resident_bytes
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.restoring.fairness import trainable_count, wider
from cpet_bench.settings import PetSettings, RecoverSettings
from cpet_bench.steps.tuning import control_ranks, target_parameters
from cpet_bench.store import Store

# -- kept --------------------------------------------------------------------------------------------------------------
ELSEWHERE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from cpet_bench.deployment import deploy
from cpet_bench.models.loading import load_model
torch.set_num_threads(1)
found = {}
for pair in sys.argv[2:]:
    folder, tuned = pair.split("|")
    with torch.no_grad(), deploy(load_model(Path(folder)), [Path(tuned)]) as model:
        ids = torch.arange(3, 51).view(4, 12)
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        found[tuned] = model(input_ids=ids, **more).logits
save_file(found, sys.argv[1])
"""


def test_saved_and_loaded_in_another_process(folders, tmp_path):
    """Beside recovery; the deployed model holds W + D in W's place, and gives the very weights back."""
    wanted, words = {}, []
    for kind, pet in (("pruned2", FULL), ("t5", FULL), ("gpt2", EXISTING), ("nf4", ALL)):
        out = tmp_path / f"{kind}-tuned"
        model = methods.attach(load_model(folders / kind), pet)
        recover.attach_recovery(model, RecoverSettings(r=2), seed=1)
        learn(model, tmp_path / f"{kind}-scratch")
        methods.save(model, out / "adapter")
        recover.save_recovery(model, out / "recovery", RecoverSettings(r=2))
        assert {p.name for p in (out / "adapter").iterdir()} == {"whole.json", "whole.safetensors"}
        held = load_file(out / "adapter/whole.safetensors")
        ours = {n: p for n, p in trained(model).items() if "cpet_recovery" not in n}
        assert held.keys() == ours.keys() and all(torch.equal(d, ours[n]) for n, d in held.items())
        methods.save(model, tmp_path / "again")
        assert (tmp_path / "again/whole.safetensors").read_bytes() == (out / "adapter/whole.safetensors").read_bytes()
        model.eval()
        wanted[str(out)] = answer(model)
        words.append(f"{folders / kind}|{out}")
    call = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "there.safetensors"), *words]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "there.safetensors")
    for tuned, logits in wanted.items():
        torch.testing.assert_close(there[tuned], logits, atol=1e-5, rtol=1e-5)


def test_a_deployment_costs_what_the_model_costs_and_leaves_no_trace(folders, tmp_path):
    model = load_model(folders / "llama", dtype="bfloat16")
    before, objects, size = answer(model), list(model.parameters()), resident_bytes(model)
    for i, pet in enumerate((FULL, ALL, PetSettings(method="lora", r=2, target_modules=["q_proj"]), FULL)):
        methods.attach(model, pet)
        shake(model)
        methods.save(model, tmp_path / f"{i}/adapter")
        methods.detach(model)
    bare = model.model.norm.weight.clone()
    with deploy(model, [tmp_path / "0"]) as deployed:
        assert resident_bytes(deployed) == size and not torch.equal(answer(deployed), before)
        assert not any(p.requires_grad for p in deployed.parameters())
    with deploy(model, [tmp_path / str(i) for i in range(4)]) as deployed:  # full twice: what is added, is added twice
        d = load_file(tmp_path / "0/adapter/whole.safetensors")["model.norm.weight"]
        assert torch.equal(deployed.model.norm.weight, ((bare + d).bfloat16() + d).bfloat16())
        assert not torch.equal(answer(deployed), before)
    assert torch.equal(answer(model), before) and all(a is b for a, b in zip(model.parameters(), objects, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_it_costs(folders, tmp_path):
    """2 T for the gradients of what is trained; no product beside those of the layers, which are there anyway."""
    for kind, pet in (("llama", FULL), ("llama", ALL)):
        model = methods.attach(load_model(folders / kind), pet)
        facts = learn(model, tmp_path / pet.method, steps=2)
        linear = sum(m.weight.numel() for m in block_linears(model).values())
        vocabulary, width = head(model)[0].shape
        tokens, places = 8 * (3 + 2), 8 * 3  # context and answer without its last token; each of the answer's is predicted
        assert facts["flops"] == tokens * (4 * linear + 2 * trainable_count(model)) + places * 4 * vocabulary * width


def test_controls(folders):
    """A control of the same size is LoRA; one that widens is not to be had."""
    model = load_model(folders / "llama")
    control = {"control": "matched", "pet": {"method": "full"}, "recover": {"r": 2}}
    wanted = target_parameters(model, control)
    ours = {n: p for n, p in model.named_parameters() if not any(part in n for part in ELSE)}
    assert wanted == sum(p.numel() for p in ours.values()) + sum(2 * sum(m.weight.shape) for m in block_linears(model).values())
    methods.attach(model, FULL, targets=control_ranks(model, FULL, control))
    assert abs(trainable_count(model) - wanted) <= 0.01 * wanted and all("lora_" in n for n in trained(model))


# -- refused -----------------------------------------------------------------------------------------------------------
def test_a_saved_module_that_does_not_fit(folders, tmp_path):
    for name, arch, pet in (("full", "llama", FULL), ("biases", "gpt2", EXISTING)):
        model = methods.attach(load_model(folders / arch), pet)
        methods.save(model, tmp_path / name)
    tiny.make("llama", {**tiny.DEFAULTS, "intermediate": 96}, tmp_path / "narrow")
    with pytest.raises(StepFailed, match=r"What full trained does not fit .*down_proj.weight is \[64, 128\], here \[64, 96\]"):
        methods.attach_saved(load_model(tmp_path / "narrow"), tmp_path / "full", trainable=True)
    tiny.make("gpt2", {**tiny.DEFAULTS, "layers": 1}, tmp_path / "short")
    with pytest.raises(StepFailed, match="not in the model: transformer.h.1.attn.c_attn.bias"):
        methods.attach_saved(load_model(tmp_path / "short"), tmp_path / "biases", trainable=False)
    with pytest.raises(Unsupported, match="Linear4bit"):
        methods.attach_saved(load_model(folders / "nf4"), tmp_path / "full", trainable=False)
    with pytest.raises(Unsupported, match="not in PEFT's format"):
        wider(tmp_path / "full", 4000, tmp_path / "x")


MATRIX = """
model: {tiny: {source: "tiny:llama"}}
pet:
  some: {%s}
task: {movie_reviews: {}}
"""


@pytest.mark.parametrize(
    ("fields", "key", "says"),
    [
        ("method: ful", "pet.some.method", "Did you mean full"),
        ("method: full, r: 4", "pet.some.r", "full has no field of this name. .*Allowed: train, zeros"),
        ("method: bitfit, wher: all", "pet.some.wher", "Did you mean where"),
        ("method: bitfit, where: al", "pet.some.where", "Did you mean all"),
    ],
)
def test_the_matrix_says_which_fields_they_have(tmp_path, fields, key, says):
    path = tmp_path / "m.yaml"
    path.write_text(MATRIX % fields)
    with pytest.raises(InputError, match=says) as caught:
        load_matrix(path)
    assert caught.value.key == key and caught.value.line == 4
    with pytest.raises(InputError, match="where"):
        methods.attach(torch.nn.Module(), PetSettings(method="bitfit", where="some"))


# -- the whole way -----------------------------------------------------------------------------------------------------
RUN = """
name: whole
pet:
  full: {method: full, train: {lr: 3e-3}}
  bitfit: {method: bitfit, where: all, train: {lr: 3e-2}}
probes: {throughput: {prompt_tokens: 8, new_tokens: 2, repeats: 1}}
task: {smoke_sentiment: {include: %s, limit: 30}}
include:
  - {pet: full, compression: none, restoring: vanilla}
  - {pet: full, compression: wanda24, restoring: cpet}
  - {pet: full, compression: nf4, restoring: vanilla}
  - {pet: bitfit, compression: nf4, restoring: cpet}
"""
OUTSIDE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from pathlib import Path
found = []
for folder in sys.argv[2:]:
    sys.path.insert(0, folder)
    from load_whole import attach_whole
    base = AutoModelForCausalLM.from_pretrained(folder + "/base")
    model = attach_whole(base, folder)
    if Path(folder, "recovery.json").exists():
        from load_recovery import attach_recovery
        attach_recovery(base, folder)
    with torch.no_grad():
        found.append(model.eval()(torch.tensor([[3, 1, 4, 1, 5]])).logits.tolist())
assert not any(name.startswith("cpet") for name in sys.modules)
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_a_run_and_what_others_make_of_it(cli, tmp_path):
    """Tuned, inherited beside recovery with distillation on pruned and 4-bit layers, probed; exported, loaded without us."""
    from conftest import SMOKE

    assert cli("run", cli.matrix(RUN % (SMOKE.parent / "smoke_task"))).returncode == 0
    records = {tuple(r["axes"][a] for a in ("pet", "compression")): r for r in cli.records("whole").values()}
    dense, pruned, packed = (records["full", c] for c in ("none", "wanda24", "nf4"))
    biases = records["bitfit", "nf4"]
    assert packed["status"] == "unsupported" and "are packed (Linear4bit)" in packed["reason"]["message"]
    done = [dense, pruned, biases]
    assert all(r["status"] == "done" for r in done), [r["reason"] for r in done]
    for record, part in zip(done, ("full", "full", "bitfit"), strict=True):
        assert record["training"]["by_part"][part] == (74048 if part == "full" else 1024)
        assert record["probes"]["decode"]["value"] > 0
    assert pruned["training"]["inherited"]["steps"] == biases["training"]["inherited"]["steps"] == 12
    store = Store(cli.env["CPET_BENCH_STORE"])
    places = ["--store", store.url, "--runs", str(cli.folder / "runs")]
    exports, wanted = [], []
    for record in done:
        exports.append(str(tmp_path / record["id"]))
        more = ["--merged"] if record is dense else []
        assert main(["export", record["id"], "--to", exports[-1], "--base", *places, *more]) == 0
        keys = record["provenance"]["keys"]
        model = load_model(store.materialise(keys.get("compress", keys["model"])))
        ids = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.no_grad():
            bare = load_model(store.materialise(keys.get("compress", keys["model"])))(ids).logits
            with deploy(model, [store.materialise(keys["tune"])]) as deployed:
                wanted.append(deployed(ids).logits)
        assert (wanted[-1] - bare).abs().max() > 1e-2
    there = subprocess.run([sys.executable, "-c", OUTSIDE, str(tmp_path / "out"), *exports], capture_output=True, text=True)
    assert there.returncode == 0, there.stderr
    for found, logits in zip(json.loads((tmp_path / "out").read_text()), wanted, strict=True):
        torch.testing.assert_close(torch.tensor(found), logits, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        merged = load_model(tmp_path / dense["id"] / "merged")(torch.tensor([[3, 1, 4, 1, 5]])).logits
    torch.testing.assert_close(merged, wanted[0], atol=1e-5, rtol=1e-5)
    text = (tmp_path / biases["id"] / "README.md").read_text()
    assert "attach_whole(base" in text and "attach_recovery(base" in text and "peft" not in text.partition("```")[2].lower()


def test_merging(folders, tmp_path):
    """Biases go into the model's own, and weights keep a pruned model's zeros; a bias that it has not cannot."""
    from cpet_bench.export.merge import merge, refuse

    plain = {"settings": {"compression": []}}
    for kind, pet in (("gpt2", EXISTING), ("pruned2", FULL)):
        model, out = methods.attach(load_model(folders / kind), pet), tmp_path / kind
        learn(model, tmp_path / f"{kind}-scratch")
        methods.save(model, out / "adapter")
        assert refuse(plain, out) is None
    model = methods.attach(load_model(folders / "llama"), ALL)
    methods.save(model, tmp_path / "added/adapter")
    assert "14 layers got a bias that the model's class has not, model.layers.0" in refuse(plain, tmp_path / "added")
    for kind in ("gpt2", "pruned2"):
        base, out = load_model(folders / kind), tmp_path / kind
        zeros = [m.weight == 0 for m in block_linears(base).values()]
        merge(folders / kind, out, out / "merged")
        merged = load_model(out / "merged")
        assert all(torch.equal(m.weight == 0, z) for m, z in zip(block_linears(merged).values(), zeros, strict=True))
        with deploy(base, [out]) as deployed:
            torch.testing.assert_close(answer(merged), answer(deployed), atol=1e-5, rtol=1e-5)
