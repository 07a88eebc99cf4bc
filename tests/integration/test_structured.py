"""Structured pruning against the dense model with the removed groups set to zero, and against the formulas of importance."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as tr
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.importance import gradients, importance
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.compression.structured import Structured, choose_parts, spared_ends
from cpet_bench.compression.wanda import Wanda
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import features
from cpet_bench.models.loading import load_model
from cpet_bench.models.widths import parts
from cpet_bench.pet import methods
from cpet_bench.restoring.recover import attach_recovery
from cpet_bench.settings import PetSettings, RecoverSettings

EXAMPLES = torch.randint(3, 200, (5, 16), generator=torch.Generator().manual_seed(0)).tolist()
HOW = {"examples": EXAMPLES, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
ARCHS = ("llama", "gpt2", "opt", "t5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ARCHS:
        tiny.make(arch, {**tiny.DEFAULTS, "hidden": 64, "heads": 8, "intermediate": 96}, root / arch)
    return root


def compress(source, out, **given):
    return Structured.compress(source, out, Structured.Settings(**given), **HOW)


def kept(folder):
    return json.loads((folder / "cpet_compression.json").read_text())["kept"]


def config(folder):
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def logits(model, ids=None):
    ids = torch.tensor(EXAMPLES) if ids is None else ids
    more = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {"use_cache": False}
    return model(input_ids=ids, **more).logits


# -- what the pruned model computes --------------------------------------------------------------------------------------
@torch.no_grad()
def masked(arch, folder, found):
    """The dense model with rows, biases and columns of every group not in `found` set to zero, written out by architecture."""
    model = load_model(folder)
    for label, keep in found.items():
        module = model.get_submodule(label.rpartition(".")[0])
        kind = label.rpartition(".")[2]
        if arch == "llama" and kind == "heads":  # 8 heads of 8, 4 key heads
            gone = [u for u in range(4) if u not in keep]
            for u in gone:
                module.q_proj.weight[16 * u : 16 * u + 16] = 0
                module.o_proj.weight[:, 16 * u : 16 * u + 16] = 0
                module.k_proj.weight[8 * u : 8 * u + 8] = 0
                module.v_proj.weight[8 * u : 8 * u + 8] = 0
        elif kind == "heads":
            for u in set(range(8)) - set(keep):
                if arch == "gpt2":
                    for start in (0, 64, 128):
                        module.c_attn.weight[:, start + 8 * u : start + 8 * u + 8] = 0
                        module.c_attn.bias[start + 8 * u : start + 8 * u + 8] = 0
                    module.c_proj.weight[8 * u : 8 * u + 8] = 0
                else:
                    for layer in (module.q_proj, module.k_proj, module.v_proj):
                        layer.weight[8 * u : 8 * u + 8] = 0
                        layer.bias[8 * u : 8 * u + 8] = 0
                    module.out_proj.weight[:, 8 * u : 8 * u + 8] = 0
        else:
            gone = [j for j in range(96) if j not in keep]
            if arch == "llama":
                module.gate_proj.weight[gone] = module.up_proj.weight[gone] = 0
                module.down_proj.weight[:, gone] = 0
            elif arch == "gpt2":
                module.c_fc.weight[:, gone] = 0
                module.c_fc.bias[gone] = 0
                module.c_proj.weight[gone] = 0
            elif arch == "opt":
                module.fc1.weight[gone] = 0
                module.fc1.bias[gone] = 0
                module.fc2.weight[:, gone] = 0
            else:
                module.wi.weight[gone] = 0
                module.wo.weight[:, gone] = 0
    return model


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


# -- what follows --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_lora_and_recovery_train_on_it(arch, folders, tmp_path):
    compress(folders / arch, tmp_path / "out", ratio=0.12, spare=[1, 0])
    model = load_model(tmp_path / "out")
    methods.attach(model, PetSettings(method="lora", r=4, target_modules="all-linear"))
    attach_recovery(model, RecoverSettings(r=4), seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.tensor(EXAMPLES)
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses, moved = [], dict.fromkeys(trained, False)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        moved = {n: moved[n] or bool(p.grad.abs().max() > 0) for n, p in trained.items()}
        optimiser.step()
    assert all(moved.values()), [n for n, m in moved.items() if not m]
    assert losses[2] < losses[0]


def test_widths_that_four_bit_layers_break_on_are_named(folders, tmp_path, monkeypatch):
    from bitsandbytes.nn import Linear4bit

    start = Linear4bit.__init__

    def packing(self, *args, **kwargs):  # as on a CPU that multiplies in bfloat16
        start(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(Linear4bit, "__init__", packing)
    compress(folders / "llama", tmp_path / "s", ratio=0.12, parts="mlp")
    with pytest.raises(Unsupported, match=r"model.layers.0.mlp.gate_proj has 64 and 80: type int8 works"):
        BitsAndBytes.compress(tmp_path / "s", tmp_path / "b", BitsAndBytes.Settings(type="nf4"), **HOW)


def test_what_follows_in_a_mixture_keeps_the_widths(folders, tmp_path):
    compress(folders / "llama", tmp_path / "s", ratio=0.12, spare=[1, 0])
    noted = config(tmp_path / "s")["cpet_widths"]
    Magnitude.compress(tmp_path / "s", tmp_path / "m", Magnitude.Settings(sparsity=0.5), **HOW)
    Wanda.compress(tmp_path / "s", tmp_path / "w", Wanda.Settings(pattern="2:4"), **HOW)
    BitsAndBytes.compress(tmp_path / "s", tmp_path / "b", BitsAndBytes.Settings(type="int8"), **HOW)
    compress(tmp_path / "s", tmp_path / "again", ratio=0.1, importance="l1", spare=[0, 0])
    inner = logits(load_model(tmp_path / "s"))
    for name in ("m", "w", "b"):
        assert config(tmp_path / name)["cpet_widths"] == noted
        out = logits(load_model(tmp_path / name))
        assert torch.isfinite(out).all() and 0 < (out - inner).abs().max() < inner.abs().max() * 2
    mlp = load_model(tmp_path / "b").model.layers[1].mlp.up_proj
    assert type(mlp).__name__ == "Linear8bitLt" and features(mlp)[1] == noted["model.layers.1.mlp.mlp"] < 96
    twice = {p.label: p.groups for p in parts(load_model(tmp_path / "again"))}
    once = {p.label: p.groups for p in parts(load_model(tmp_path / "s"))}
    assert all(twice[label] <= once[label] for label in once) and twice != once


# -- what it refuses -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given",
    [{}, {"ratio": 0}, {"ratio": 1}, {"ratio": -0.1}, {"ratio": "much"}, {"ratio": 0.2, "importance": "taylor"}]
    + [{"ratio": 0.2, **more} for more in ({"spare": [1]}, {"spare": [-1, 0]}, {"parts": "all"}, {"rate": 1}, {"multiple": 0})],
    ids=str,
)
def test_settings_that_mean_nothing(given):
    with pytest.raises(ValidationError):
        Structured.Settings(**given)


def test_orders_that_cannot_be():
    settings = Structured.Settings(ratio=0.2)
    assert "bitsandbytes" in Structured.refuse(settings, ["bitsandbytes"])
    for name in ("magnitude", "wanda", "sparsegpt"):
        assert f"{name} left; put structured first" in Structured.refuse(settings, [name])
    assert Structured.refuse(settings, []) is None and Structured.refuse(settings, ["structured"]) is None


def test_models_and_shares_it_cannot_take(folders, tmp_path):
    def refused(source, **given):
        with pytest.raises(Unsupported) as caught:
            compress(source, tmp_path / "never", **given)
        assert not (tmp_path / "never").exists()
        return str(caught.value)

    for given in ({"ratio": 0.99}, {"ratio": 0.6, "parts": "heads"}):
        message = refused(folders / "llama", **given)
        works = float(message.rpartition("the nearest that work: ")[2])
        facts = compress(folders / "llama", tmp_path / str(works), **given | {"ratio": works, "importance": "l1"})
        assert facts["ratio_reached"] == pytest.approx(works, abs=0.002)
    assert "half a step" in refused(folders / "llama", ratio=0.02, parts="heads")
    assert "half a step" in refused(folders / "llama", ratio=0.001)
    assert "leaves none of the 2 blocks of model.layers" in refused(folders / "llama", ratio=0.1, spare=[1, 1])
    assert "position bias" in refused(folders / "t5", ratio=0.1, parts="both")
    bloom = tr.BloomForCausalLM(tr.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4))
    bloom.save_pretrained(tmp_path / "bloom")
    message = refused(tmp_path / "bloom", ratio=0.2)
    assert "BloomForCausalLM: no MLP of plain linear layers known here" in message and "depth drops whole blocks" in message
    assert "transformer.h.0 has self_attention.query_key_value, self_attention.dense, mlp.dense_h_to_4h, mlp" in message
    BitsAndBytes.compress(folders / "llama", tmp_path / "int8", BitsAndBytes.Settings(type="int8"), **HOW)
    assert "quantised (bitsandbytes)" in refused(tmp_path / "int8", ratio=0.2)
    settings = Structured.Settings(ratio=0.2)
    for examples, words in (([[5], [7]], "single token"), ([], "calibration documents"), (None, "calibration documents")):
        with pytest.raises(StepFailed, match=words):
            Structured.compress(folders / "llama", tmp_path / "never", settings, **HOW | {"examples": examples})


@pytest.mark.parametrize("importance", ["l1", "l2", "random"])
def test_importances_that_read_no_text_need_none(folders, tmp_path, importance):
    settings = Structured.Settings(ratio=0.2, importance=importance)
    with_text, without = tmp_path / "with", tmp_path / "without"
    Structured.compress(folders / "llama", with_text, settings, **HOW)
    facts = Structured.compress(folders / "llama", without, settings, **HOW | {"examples": None})
    assert (with_text / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()
    note = json.loads((without / "cpet_compression.json").read_text())
    assert not [k for k in (*facts, *note) if k.startswith("calibration")]


def test_a_share_between_what_heads_and_neurons_can_give_is_named(tmp_path):
    """Two large key heads beside a narrow MLP: too little without a head, too much with one."""
    options = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
    tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=500, num_key_value_heads=2, **options)).save_pretrained(tmp_path / "in")
    tiny.make_tokenizer().save_pretrained(tmp_path / "in")
    with pytest.raises(Unsupported) as caught:
        compress(tmp_path / "in", tmp_path / "never", ratio=0.2)
    near = str(caught.value).rpartition("the nearest that work: ")[2].split(" and ")
    assert float(near[0]) < 0.2 < float(near[1])
    for works in map(float, near):
        facts = compress(tmp_path / "in", tmp_path / str(works), ratio=works, importance="l1")
        assert facts["ratio_reached"] == pytest.approx(works, abs=0.002)


def test_heads_stay_where_a_norm_spans_them(tmp_path):
    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tr.Olmo2ForCausalLM(tr.Olmo2Config(vocab_size=500, num_key_value_heads=2, **options)).save_pretrained(tmp_path / "in")
    tiny.make_tokenizer().save_pretrained(tmp_path / "in")
    assert compress(tmp_path / "in", tmp_path / "out", ratio=0.2)["parts"] == ["mlp"]
    with pytest.raises(Unsupported, match=r"self_attn.q_norm.weight spans the heads; parts: mlp"):
        compress(tmp_path / "in", tmp_path / "never", ratio=0.2, parts="both")


def test_a_coupling_unknown_here_fails_the_step(folders, tmp_path, monkeypatch):
    """Heads cut in another order than they are read in: a model of the same shapes that computes something else."""
    from cpet_bench.models.widths import Part

    real = Part.outputs
    monkeypatch.setattr(Part, "outputs", lambda self, layer, kept: real(self, layer, kept[::-1] if layer == "v_proj" else kept))
    with pytest.raises(StepFailed, match="coupled in a way not known here"):
        compress(folders / "llama", tmp_path / "never", ratio=0.15, spare=[0, 0])
    assert not (tmp_path / "never").exists()


def test_a_folder_whose_weights_or_widths_do_not_fit_is_refused(folders, tmp_path):
    compress(folders / "llama", tmp_path / "out", ratio=0.12, spare=[1, 0])
    noted = config(tmp_path / "out")
    name = next(iter(noted["cpet_widths"]))
    for widths, error in (({name: 999}, Unsupported), ({"model.layers.9.mlp.mlp": 8}, Unsupported), ({name: 1}, Exception)):
        (tmp_path / "out/config.json").write_text(json.dumps(noted | {"cpet_widths": widths}))
        with pytest.raises(error):
            load_model(tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps(noted))
    weights = load_file(tmp_path / "out/model.safetensors")
    short = {k: v[:4].contiguous() if k.endswith("layers.1.mlp.up_proj.weight") else v for k, v in weights.items()}
    save_file(short, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match="mismatch|size|shape"):
        load_model(tmp_path / "out")
