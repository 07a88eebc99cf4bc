"""NOLA against its formula written out: portable bases, coefficients alone trained and kept, beside every class of layer."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from nola_modules import (
    KINDS,
    answer,
    coefficients,
    folders,  # noqa: F401
    learn,
    pet,
    shake,
)
from safetensors.torch import load_file

from cpet_bench.deployment import deploy
from cpet_bench.models.arch import block_linears, resident_bytes
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods, nola
from cpet_bench.pet.own import NolaSettings
from cpet_bench.restoring import recover
from cpet_bench.restoring.fairness import trainable_count
from cpet_bench.settings import RecoverSettings

# -- what is drawn -----------------------------------------------------------------------------------------------------
PINNED = {"A0": "7b9f10d16960258a", "M": "a9b6dad252425def", "N": "61ba39702f97fc65"}


def test_the_bases_are_the_same_everywhere():
    """Pinned values: whatever draws others could not read what is saved."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = {part: nola.draw(3, part, 4, 5, 6) for part in PINNED}
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is never asked
    assert {part: hashlib.sha256(v.numpy().tobytes()).hexdigest()[:16] for part, v in found.items()} == PINNED
    assert all(v.shape == (4, 30) and -1 <= v.min() < -0.8 and 0.8 < v.max() < 1 for v in found.values())
    assert all(torch.equal(v * 2**23, (v * 2**23).round()) for v in found.values())
    bases = nola.Bases(NolaSettings(k=4, r=5), 3)
    start, m = bases.of_a(6, torch.device("cpu"))
    torch.testing.assert_close(start, nola.draw(3, "A0", 1, 5, 6).view(5, 6) / 6**0.5)
    torch.testing.assert_close(m, found["M"] / 2.0)
    assert bases.of_a(6, torch.device("cpu"))[1] is m  # layers of one width share them


# -- the product and its gradients -------------------------------------------------------------------------------------
def dense(bases, module, alpha, beta, r=4):
    """A and B from the formula, a matrix at a time."""
    start, m = bases.of_a(module.n_in, torch.device("cpu"))
    n = bases.of_b(module.n_out, torch.device("cpu"))
    a = start + sum(alpha[i] * m[i].view(r, module.n_in) for i in range(len(alpha)))
    return a, sum(beta[i] * n[i].view(module.n_out, r) for i in range(len(beta)))


def test_product_and_gradients_are_those_of_the_formula():
    g = torch.Generator().manual_seed(0)
    bases = nola.Bases(NolaSettings(k=6, r=4), 1)
    module = nola.Nola(bases, 12, 7, 0.75, torch.device("cpu"))
    with torch.no_grad():
        module.alpha.normal_(generator=g)
        module.beta.normal_(generator=g)
    x, y, weight = (torch.randn(2, 3, n, generator=g) for n in (12, 7, 7))
    ours = x.clone().requires_grad_()
    found = module(ours, y)
    (found * weight).sum().backward()
    ex, alpha, beta = (t.detach().clone().requires_grad_() for t in (x, module.alpha, module.beta))
    a, b = dense(bases, module, alpha, beta)
    wanted = y + 0.75 * ex @ a.t() @ b.t()
    (wanted * weight).sum().backward()
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found, wanted, **close)
    for mine, theirs in ((ours, ex), (module.alpha, alpha), (module.beta, beta)):
        torch.testing.assert_close(mine.grad, theirs.grad, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_on_and_off_again_beside_every_class_of_layer(folders, kind, tmp_path):
    """Zero at the start; the formula beside every layer; two steps reach every tensor; taken off without a trace."""
    model, bare = load_model(folders / kind), load_model(folders / kind)
    before = answer(bare)
    methods.attach(model, pet(), seed=2)
    layers = block_linears(bare)
    trained = coefficients(model)
    assert trainable_count(model) == 2 * 6 * len(layers) == sum(p.numel() for p in trained.values())
    assert learn(model, tmp_path, steps=2)["losses"]  # raises where a tensor got no gradient or did not move
    shake(model)
    bases = nola.Bases(NolaSettings(k=6, r=4), 2)
    for name, layer in layers.items():
        module = model.cpet_nola["0"][name.replace(".", "/")]
        a, b = dense(bases, module, module.alpha.detach(), module.beta.detach())
        layer.register_forward_hook(lambda _m, args, out, a=a, b=b: out + 0.75 * (args[0] @ a.t() @ b.t()))
    reference = load_model(folders / kind) if kind == "nf4" else model  # 4-bit weights were not evaluated before
    if kind == "nf4":
        methods.save(model, tmp_path / "a")
        methods.attach_saved(reference, tmp_path / "a", trainable=False)
    found, wanted = answer(reference), answer(bare)
    tolerance = 2e-2 if kind in ("nf4", "int8") else 1e-4  # rounding upstream moves what is quantised downstream
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max() < (found - before).abs().max()
    methods.detach(reference)
    assert torch.equal(answer(reference), before) and not hasattr(reference, "cpet_nola")


def test_the_start_is_the_models_own_output_and_the_first_gradients(folders):
    model = load_model(folders / "llama")
    before = answer(model)
    methods.attach(model, pet())
    assert torch.equal(answer(model), before)
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, p in coefficients(model).items():  # B is zero: the first gradient goes by A0 to beta
        assert p.grad.isfinite().all() and bool(p.grad.any()) == name.endswith("beta"), name


def test_seeds(folders):
    """The settings' own seed, else the one given; in the file it always stands."""
    model = load_model(folders / "llama")
    for given, own, wanted in ((3, None, 3), (3, 5, 5)):
        methods.attach(model, pet(seed=own), seed=given)
        shake(model)
        assert next(iter(model.cpet_nola["0"].values()))._bases.seed == wanted
        methods.detach(model)


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
        found[folder] = model(input_ids=torch.arange(3, 51).view(4, 12)).logits
save_file(found, sys.argv[1])
"""


def test_saved_and_loaded_in_another_process(folders, tmp_path):
    """Beside recovery, on dense and 4-bit layers: what is in the file is k numbers twice a layer, and what it computes."""
    wanted, words = {}, []
    for kind in ("llama", "nf4"):
        out = tmp_path / kind
        model = load_model(folders / kind)
        methods.attach(model, pet(k=8, target_modules=["q_proj", "down_proj"]), seed=4)
        recover.attach_recovery(model, RecoverSettings(r=2), seed=1)
        learn(model, tmp_path / f"{kind}-scratch")
        methods.save(model, out / "adapter")
        recover.save_recovery(model, out / "recovery", RecoverSettings(r=2))
        given = {k: v.detach().clone() for k, v in coefficients(model).items() if "cpet_nola" in k}
        held = load_file(out / "adapter/nola.safetensors")
        assert {p.name for p in (out / "adapter").iterdir()} == {"nola.json", "nola.safetensors"}
        assert len(held) == len(given) == 2 * 2 * 2 and all(v.shape == (8,) for v in held.values())
        assert torch.equal(held["model.layers.1.mlp.down_proj.beta"], given["cpet_nola.0.model/layers/1/mlp/down_proj.beta"])
        model.eval()
        wanted[str(folders / kind)] = answer(model)
        words.append(f"{folders / kind}|{out}")
        text = json.loads((out / "adapter/nola.json").read_text())
        assert text["settings"] == {"k": 8, "r": 4, "lora_alpha": 3.0, "target_modules": ["q_proj", "down_proj"], "seed": 4}
        methods.save(model, tmp_path / "again")
        assert (tmp_path / "again/nola.safetensors").read_bytes() == (out / "adapter/nola.safetensors").read_bytes()
    call = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "there.safetensors"), *words]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "there.safetensors")
    for folder, logits in wanted.items():
        torch.testing.assert_close(there[folder], logits, atol=1e-5, rtol=1e-5)


def test_inherited_coefficients_train_on(folders, tmp_path):
    """D's coefficients on the compressed model, whatever the seed of that step: the file's seed is the one that counts."""
    model = load_model(folders / "llama")
    methods.attach(model, pet(), seed=4)
    shake(model)
    methods.save(model, tmp_path / "d")
    wanted = {k: v.detach().clone() for k, v in coefficients(model).items()}
    other = load_model(folders / "packed")
    methods.attach_saved(other, tmp_path / "d", trainable=True)
    for key, value in coefficients(other).items():
        assert torch.equal(value, wanted[key])
    module, same = (m.cpet_nola["0"]["model/layers/0/self_attn/q_proj"] for m in (model, other))
    assert all(torch.equal(a, b) for a, b in zip(module.factors(), same.factors(), strict=True))
    learn(other, tmp_path / "scratch", steps=2)


def test_factors_are_computed_once_where_nothing_is_trained(folders, tmp_path):
    """A deployment holds A and B, as LoRA would, and no bases; changed coefficients are noticed, an optimiser's too."""
    model = load_model(folders / "llama")
    bare = resident_bytes(model)
    methods.attach(model, pet())
    shake(model)
    methods.save(model, tmp_path / "adapter")
    first = answer(model)
    optimiser = torch.optim.AdamW(coefficients(model).values(), lr=0.1, fused=True)
    ids = torch.arange(3, 27).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    assert (answer(model) - first).abs().max() > 1e-4
    methods.detach(model)
    with deploy(model, [tmp_path]) as deployed:
        module = deployed.cpet_nola["0"]["model/layers/0/mlp/up_proj"]
        made = module.A
        torch.testing.assert_close(answer(deployed), first)
        assert module.A is made and not module._bases._held
        sizes = sum(4 * (4 * sum(b.weight.shape) + 2 * 6) for b in block_linears(model).values())
        assert resident_bytes(deployed) - bare == sizes
    assert torch.equal(answer(model), answer(load_model(folders / "llama")))


def test_several_add_up(folders, tmp_path):
    model = load_model(folders / "llama")
    before = answer(model)
    for i in range(2):
        methods.attach(model, pet(target_modules=["down_proj"], seed=i))
        shake(model)
        methods.save(model, tmp_path / f"{i}/adapter")
        methods.detach(model)
    layer, seen = model.model.layers[1].mlp.down_proj, []
    layer.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    with deploy(model, [tmp_path / "0", tmp_path / "1"]) as both:
        out = []
        layer.register_forward_hook(lambda _m, args, y: out.append(y))
        answer(both)
    x, y = seen[-1]
    for i in range(2):
        y = y + x @ nola.updates(tmp_path / f"{i}/adapter")["model.layers.1.mlp.down_proj"].t()
    torch.testing.assert_close(out[-1], y, atol=1e-4, rtol=1e-4)
    assert torch.equal(answer(model), before)
