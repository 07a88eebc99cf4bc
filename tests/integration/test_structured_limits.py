"""What follows a structured pruning, and what it refuses."""

import json

import pytest
import torch
import transformers as tr
from pruned_models import (
    EXAMPLES,
    HOW,
    compress,
    config,
    folders,  # noqa: F401
    logits,
)
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.compression.structured import Structured
from cpet_bench.compression.wanda import Wanda
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import features
from cpet_bench.models.loading import load_model
from cpet_bench.models.widths import parts
from cpet_bench.pet import methods
from cpet_bench.restoring.recover import attach_recovery
from cpet_bench.settings import PetSettings, RecoverSettings


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
