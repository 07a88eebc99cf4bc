"""Structured pruning against the dense model with the removed groups set to zero, and against the formulas of importance."""

import subprocess
import sys

import pytest
import torch
import transformers as tr
from pruned_models import (
    ARCHS,
    EXAMPLES,
    HOW,
    compress,
    config,
    folders,  # noqa: F401
    kept,
    logits,
    masked,
)
from safetensors.torch import load_file

from cpet_bench.compression.importance import gradients, importance
from cpet_bench.compression.structured import Structured, choose_parts, spared_ends
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model
from cpet_bench.models.widths import parts


@pytest.mark.parametrize("spare", [[0, 0], [1, 0]], ids=["alike", "one-spared"])
@pytest.mark.parametrize("arch", ARCHS)
def test_computes_what_the_masked_dense_model_computes(arch, spare, folders, tmp_path):
    facts = compress(folders / arch, tmp_path / "out", ratio=0.15, spare=spare, multiple=1)
    found = kept(tmp_path / "out")
    assert facts["simulated"] == [] and facts["parts"] == (["mlp"] if arch == "t5" else ["heads", "mlp"])
    wanted = {p.label: p.groups for p in parts(load_model(folders / arch))}
    assert any(0 < len(keep) < wanted[label] for label, keep in found.items())
    model = load_model(tmp_path / "out")
    assert {p.label: p.groups for p in parts(model)} == wanted | {label: len(keep) for label, keep in found.items()}
    torch.testing.assert_close(logits(model), logits(masked(arch, folders / arch, found)), atol=2e-5, rtol=1e-4)
    assert (logits(model) - logits(load_model(folders / arch))).abs().max() > 1e-3
    assert (tmp_path / "out/model.safetensors").stat().st_size < (folders / arch / "model.safetensors").stat().st_size
    assert abs(facts["ratio_reached"] - 0.15) < 0.01
    assert facts["uniform"] == ("cpet_widths" not in config(tmp_path / "out"))
    assert not facts["uniform"] or spare == [0, 0]
    assert len(facts["spared"]) == spare[0] * (2 if arch == "t5" else 1)


def test_alike_blocks_load_in_transformers_itself(folders, tmp_path):
    facts = compress(folders / "llama", tmp_path / "out", ratio=0.4)
    plain = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert facts["uniform"] and plain.config.num_key_value_heads == 2 and plain.config.intermediate_size < 96
    assert torch.equal(logits(plain), logits(load_model(tmp_path / "out")))


def test_blocks_of_several_widths_load_in_a_new_process_and_generate_with_a_cache(folders, tmp_path):
    names = ("llama", "gpt2", "t5")
    for arch in names:
        compress(folders / arch, tmp_path / arch, ratio=0.12, spare=[0, 1])
        assert config(tmp_path / arch)["cpet_widths"]
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import save_file\n"
        "from cpet_bench.models.loading import load_model\nfound = {}\n"
        f"for arch in {names!r}:\n    model = load_model(Path(sys.argv[1], arch))\n    ids = torch.arange(3, 11)[None]\n"
        "    more = {'decoder_input_ids': ids} if model.config.is_encoder_decoder else {}\n"
        "    found[arch] = model(input_ids=ids, **more).logits\nsave_file(found, sys.argv[1] + '/logits')\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    models = {arch: load_model(tmp_path / arch) for arch in names}
    ids, how = torch.arange(3, 11)[None], {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for arch, model in models.items():
        assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how)), arch
    error = other.communicate(timeout=120)[1]
    assert other.returncode == 0, error
    found = load_file(tmp_path / "logits")
    for arch, model in models.items():
        more = {"decoder_input_ids": ids} if arch == "t5" else {}
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, **more).logits, found[arch]), arch


# -- importance ----------------------------------------------------------------------------------------------------------
def loss_of(model, tokens):
    ids = torch.tensor([tokens])
    log = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
    return -log[torch.arange(len(tokens) - 1), ids[0, 1:]].mean()


def reference(kind, w, g, f):
    """The score of one row (a vector) of one layer."""
    return {
        "vector": lambda: abs((w * g).sum()),
        "element1": lambda: (w * g).abs().sum(),
        "element2": lambda: (w * f * w).abs().sum(),
        "mixed": lambda: (w * g - 0.5 * w * f * w).abs().sum(),
        "l1": lambda: w.abs().sum(),
        "l2": lambda: (w**2).sum(),
    }[kind]()


def rows_of(arch, kind, module):
    """By layer of a part: which rows (True) or columns of its (out x in) weight group u has."""
    if kind == "mlp":
        one = lambda u: [u]  # noqa: E731
        makers, reader = (("gate_proj", "up_proj"), "down_proj") if arch == "llama" else (("c_fc",), "c_proj")
        return [(m, True, one) for m in makers] + [(reader, False, one)]
    if arch == "llama":
        two, single = lambda u: range(16 * u, 16 * u + 16), lambda u: range(8 * u, 8 * u + 8)
        return [("q_proj", True, two), ("k_proj", True, single), ("v_proj", True, single), ("o_proj", False, two)]
    three = lambda u: [s + 8 * u + i for s in (0, 64, 128) for i in range(8)]  # noqa: E731
    return [("c_attn", True, three), ("c_proj", False, lambda u: range(8 * u, 8 * u + 8))]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_importance_is_that_of_the_formulas(arch, folders):
    model = load_model(folders / arch)
    kinds = ("vector", "element1", "element2", "mixed", "l1", "l2")
    chosen, _ = choose_parts(model, Structured.Settings(ratio=0.2))
    chosen = chosen[:1] + chosen[-1:]  # an MLP and an attention
    found = gradients(model, chosen, EXAMPLES, True, HOW["progress"])
    assert not any(p.requires_grad for p in model.parameters())
    check = load_model(folders / arch)
    for part in chosen:
        module = check.get_submodule(part.name)
        layers = {n: getattr(module, n) for n, *_ in rows_of(arch, part.kind, module)}
        weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
        each = [torch.autograd.grad(loss_of(check, tokens), weights) for tokens in EXAMPLES]
        g = dict(zip(layers, (torch.stack(x).mean(0) for x in zip(*each, strict=True)), strict=True))
        f = dict(zip(layers, (torch.stack(x).square().mean(0) for x in zip(*each, strict=True)), strict=True))
        for kind in kinds:
            table = []
            for u in range(part.groups):
                scores = []
                for name, rows, which in rows_of(arch, part.kind, module):
                    tensors = [t.t() if arch == "gpt2" else t for t in (layers[name].weight.detach(), g[name], f[name])]
                    pick = [t if rows else t.t() for t in tensors]
                    scores.append(sum(reference(kind, *(t[i] for t in pick)) for i in which(u)))
                table.append(torch.stack(scores))
            table = torch.stack(table)
            joins = {"sum": table.sum(1), "mean": table.mean(1), "max": table.amax(1), "prod": table.prod(1)}
            for group, joined in joins.items():
                settings = Structured.Settings(ratio=0.2, importance=kind, group=group)
                mine = importance(model, part, settings, found, torch.Generator())
                torch.testing.assert_close(mine, joined, rtol=2e-3, atol=1e-9, msg=lambda m, k=(kind, group): f"{k}: {m}")


def test_the_least_important_go(folders, tmp_path):
    """A model in which half of the neurons and two key heads can hardly matter loses exactly those."""
    model = load_model(folders / "llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, ::2] *= 1e-4
            block.mlp.up_proj.weight[::2] *= 1e-4
            block.mlp.gate_proj.weight[::2] *= 1e-4
            for layer, rows in ((block.self_attn.q_proj, 16), (block.self_attn.k_proj, 8), (block.self_attn.v_proj, 8)):
                layer.weight[rows : 3 * rows] *= 1e-4
            block.self_attn.o_proj.weight[:, 16:48] *= 1e-4
    model.save_pretrained(tmp_path / "in")
    tiny.make_tokenizer().save_pretrained(tmp_path / "in")
    for kind in ("vector", "element1", "element2", "mixed", "l1", "l2"):
        compress(tmp_path / "in", tmp_path / kind, ratio=0.49, importance=kind)
        for label, keep in kept(tmp_path / kind).items():
            assert keep == ([0, 3] if label.endswith("heads") else list(range(1, 96, 2))), (kind, label)
        torch.testing.assert_close(logits(load_model(tmp_path / kind)), logits(model), atol=1e-3, rtol=1e-3)
    first, second = (compress(tmp_path / "in", tmp_path / f"r{s}", ratio=0.49, importance="random", seed=s) for s in (0, 1))
    assert first["block_parameters"] == second["block_parameters"] and kept(tmp_path / "r0") != kept(tmp_path / "r1")


# -- how much goes -------------------------------------------------------------------------------------------------------
def test_ends_are_spared_in_proportion_to_the_depth():
    assert [spared_ends(n) for n in (32, 30, 24, 12, 6, 4, 2)] == [(4, 3), (4, 3), (3, 2), (2, 1), (1, 1), (1, 0), (0, 0)]


def test_three_key_heads_leave_the_rest_to_the_neurons(tmp_path):
    """As SmolLM2-135M has them: 0, 1/3 or 2/3 of an attention can go, and 1536-like widths carry what is asked."""
    options = {"hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 7, "num_attention_heads": 9}
    made = tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=260, num_key_value_heads=3, **options))
    made.save_pretrained(tmp_path / "in")
    tiny.make_tokenizer().save_pretrained(tmp_path / "in")
    for ratio, heads in ((0.1, 3), (0.2, 2), (0.4, 1)):
        facts = compress(tmp_path / "in", tmp_path / str(ratio), ratio=ratio, importance="l1", multiple=4)
        assert facts["spared"] == ["model.layers.0", "model.layers.6"] and facts["groups_left"]["heads"][0] == heads
        assert facts["ratio_reached"] == pytest.approx(ratio, abs=0.01)
        assert facts["groups_left"]["mlp"][0] % 4 == 0 and facts["groups_left"]["mlp"][-1] == 192
        before, after = facts["block_parameters"]
        model = load_model(tmp_path / str(ratio))
        assert after == sum(p.numel() for p in model.model.layers.parameters())
        assert before == sum(p.numel() for p in made.model.layers.parameters())
