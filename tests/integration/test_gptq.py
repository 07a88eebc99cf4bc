"""GPTQ against its formula written out (arXiv 2210.17323, algorithm 1), its format read bit by bit, and what is put on it."""

import json
import random

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from cpet_bench.compression.gptq import Gptq, sets_of_layers
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import gptq, tiny
from cpet_bench.models.arch import block_linears, dense_weight, resident_bytes
from cpet_bench.models.loading import load_model
from cpet_bench.models.pool import canary
from cpet_bench.models.sources import LocalSource
from cpet_bench.models.sources import facts as source_facts
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.settings import ModelSettings, PetSettings, RecoverSettings

SETTINGS = {
    "llama": {"bits": 4},
    "gpt2": {"bits": 4, "group": 32, "act_group_aware": False},
    "llama-3-act": {"bits": 3, "group": 32, "desc_act": True},
    "llama-2-asym": {"bits": 2, "group": 32, "sym": False},
    "gpt2-8-row": {"bits": 8, "group": -1},
}
OPTIONS = {**tiny.DEFAULTS, "layers": 1}


def documents(n=64):
    rng = random.Random(0)
    return [[rng.randrange(3, 300) for _ in range(rng.randint(8, 30))] for _ in range(n)]


def compress(source, out, examples=None, **given):
    told = []
    how = {"device": "cpu", "dtype": "float32", "progress": lambda *a: told.append(a)}
    facts = Gptq.compress(source, out, Gptq.Settings(**given), examples=examples or documents(), **how)
    assert told[-1][0] == told[-1][1] == len(told)  # each block told once
    return facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By name of SETTINGS: folders of the dense and of the quantised model, and the facts."""
    root, found = tmp_path_factory.mktemp("gptq"), {}

    def get(name):
        pytest.importorskip("gptqmodel")
        pytest.importorskip("optimum")
        dense = root / name.partition("-")[0]
        if not dense.exists():
            tiny.make(dense.name, OPTIONS, dense)
        if name not in found:
            found[name] = dense, root / f"{name}-packed", compress(dense, root / f"{name}-packed", **SETTINGS[name])
        return found[name]

    return get


# -- the formula ---------------------------------------------------------------------------------------------------------
def grid(w, bits, sym):
    """Scale and zero (out x 1) of a group of columns by its extremes; zero is among the levels."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    return scale, torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round()


def rounded(w, scale, zero, bits):
    return scale * (((w / scale).round() + zero).clamp(0, 2**bits - 1) - zero)


def nearest(w, bits, group, sym):
    return torch.cat([rounded(g, *grid(g, bits, sym), bits) for g in w.split(group, 1)], 1)


def reference(w, x, bits, group, sym, damp=0.01):
    """GPTQ column by column in fp64. w: out x in; x: tokens x in."""
    h = 2 * x.T @ x
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, q = w.clone(), torch.zeros_like(w)
    for i in range(w.shape[1]):
        if i % group == 0:
            scale, zero = grid(w[:, i : i + group], bits, sym)
        q[:, i] = rounded(w[:, i : i + 1], scale, zero, bits)[:, 0]
        error = (w[:, i] - q[:, i]) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
    return q


def inputs(model):
    """What each layer of the blocks gets from the calibration documents (tokens x in, fp64)."""
    found = {name: [] for name in block_linears(model)}
    for name, layer in block_linears(model).items():
        layer.register_forward_pre_hook(lambda m, args, name=name: found[name].append(args[0][0].double()))
    with torch.inference_mode():
        for tokens in documents():
            model(input_ids=torch.tensor([tokens]))
    return {name: torch.cat(x) for name, x in found.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_output_error_is_the_formulas_and_below_round_to_nearest(made, name):
    dense, packed, facts = made(name)
    weights = {n: dense_weight(layer).double() for n, layer in block_linears(load_model(dense)).items()}
    # GPTQ takes layer after layer, so each one's inputs were those that the quantised model gives
    model = load_model(packed)
    x = inputs(model)
    total = dict.fromkeys(("own", "formula", "nearest"), 0.0)
    for n, layer in block_linears(model).items():
        how = (facts["bits"], facts["group"] if facts["group"] > 0 else x[n].shape[1], SETTINGS[name].get("sym", True))
        found = {"own": dense_weight(layer).double(), "formula": reference(weights[n], x[n], *how)}
        found["nearest"] = nearest(weights[n], *how)
        error = {k: float((x[n] @ (weights[n] - q).T).square().sum()) for k, q in found.items()}
        assert error["own"] <= 1.1 * error["formula"], (n, error)
        assert error["own"] < error["nearest"], (n, error)
        for k, e in error.items():
            total[k] += e
    assert total["own"] < (0.75 if facts["bits"] < 8 else 0.8) * total["nearest"]


# -- the format ----------------------------------------------------------------------------------------------------------
def unpacked(words, bits):
    """Integers of packed int32 words along the first dimension, the lowest bits first (what auto-gptq writes)."""
    shifts = torch.arange(32)[None, :, None]
    stream = ((words.long()[:, None] >> shifts) & 1).reshape(-1, bits, words.shape[1])
    return (stream << torch.arange(bits)[None, :, None]).sum(1)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_stored_is_what_is_computed_and_of_the_formulas_size(made, name):
    dense, packed, facts = made(name)
    stored, model = load_file(packed / "model.safetensors"), load_model(packed)
    bits, sym = facts["bits"], SETTINGS[name].get("sym", True)
    said = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert said["format"] == ("gptq" if sym else "gptq_v2") and said["quant_method"] == "gptq"
    assert (said["bits"], said["group_size"], said["desc_act"]) == (bits, facts["group"], SETTINGS[name].get("desc_act", False))
    size = 0
    for n, layer in block_linears(model).items():
        codes = unpacked(stored[f"{n}.qweight"], bits)  # in x out
        zeros = unpacked(stored[f"{n}.qzeros"].T.contiguous(), bits).T + (1 if sym else 0)  # auto-gptq stores one less
        order = stored[f"{n}.g_idx"].long()
        wanted = stored[f"{n}.scales"][order].float() * (codes - zeros[order])
        torch.testing.assert_close(dense_weight(layer), wanted.T, rtol=2e-3, atol=1e-6)  # its product is of float16
        wide, high = codes.shape
        group = facts["group"] if facts["group"] > 0 else wide
        assert set(order.bincount().tolist()) == {group}
        # codes; a scale (float16) and a zero for each group and output; a group for each input; the bias
        size += wide * high * bits / 8 + wide // group * high * (2 + bits / 8) + 4 * wide
        size += 2 * high if f"{n}.bias" in stored else 0
    assert facts["packed_bytes"] == pytest.approx(size, rel=0.01)
    rest = sum(t.nbytes for n, t in stored.items() if not n.endswith(("qweight", "qzeros", "scales", "g_idx")))
    assert facts["bytes"] == (packed / "model.safetensors").stat().st_size == pytest.approx(size + rest, rel=0.06)
    assert facts["layers"] == len(block_linears(model)) and facts["left_dense"] == [] and facts["kernel"] == "gptq_torch"
    assert facts["engine"].startswith("gptqmodel ") and facts["engine"][10].isdigit()
    assert facts["calibration_documents"] == 64 and facts["calibration_tokens"] == sum(map(len, documents()))
    plain = load_model(dense)
    weights = sum(p.nbytes for layer in block_linears(plain).values() for p in layer.parameters())
    assert resident_bytes(plain) - resident_bytes(model) == pytest.approx(weights - size, rel=0.02)


def test_group_and_act_order_are_what_was_asked(made):
    _, packed, facts = made("llama-3-act")
    index = {n: t for n, t in load_file(packed / "model.safetensors").items() if n.endswith("g_idx")}
    neighbours = {n: torch.equal(t, torch.arange(len(t), dtype=t.dtype) // 32) for n, t in index.items()}
    assert facts["group"] == 32 and not any(neighbours.values())
    _, packed, facts = made("llama")
    index = {n: t for n, t in load_file(packed / "model.safetensors").items() if n.endswith("g_idx")}
    assert facts["group"] == 64  # 128 does not divide the width 64
    assert all(torch.equal(t, torch.arange(len(t), dtype=t.dtype) // 64) for t in index.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-2-asym"])
def test_loaded_again_it_is_the_dense_model_with_these_weights(made, name):
    dense, packed, _ = made(name)
    model, plain = load_model(packed), load_model(dense)
    for n, layer in block_linears(plain).items():
        weight = dense_weight(block_linears(model)[n])
        layer.weight.data.copy_(weight.T if name == "gpt2" else weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.copy_(layer.bias.half())
    logits = canary(model)
    torch.testing.assert_close(logits, canary(plain), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits, canary(load_model(packed)))
    half = canary(load_model(packed, dtype="bfloat16"))
    assert (half - logits).abs().max() < 0.05 * logits.abs().max()


# -- what is put on it ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-3-act"])
def test_lora_and_recovery_train_on_it(made, tmp_path, name):
    _, packed, _ = made(name)
    model = load_model(packed)
    before = canary(model)  # evaluated first, as a resident model is
    methods.attach(model, PetSettings(method="lora", r=4))
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in n for n in trained) and sum("U2" in n for n in trained) == len(block_linears(model))
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = torch.tensor([documents()[0]])
    losses, moved = [], set()
    model.train()
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        moved |= {n for n, p in trained.items() if p.grad is not None and p.grad.isfinite().all() and p.grad.any()}
        losses.append(float(loss.detach()))
        optimiser.step()
        optimiser.zero_grad()
    assert moved == trained.keys() and losses[-1] < losses[0]
    methods.save(model, tmp_path)
    model.eval()
    with torch.inference_mode():
        tuned = model(input_ids=ids).logits
    recover.detach_recovery(model)
    methods.detach(model)
    assert torch.equal(canary(model), before)  # the packed weights are as they were
    methods.attach_saved(model, tmp_path, trainable=False)
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    with torch.inference_mode():
        assert not torch.equal(model(input_ids=ids).logits, tuned)  # the recovery is untrained again


def test_a_checkpoint_of_auto_gptq_is_a_source(made, tmp_path):
    _, packed, facts = made("llama")
    folder = tmp_path / "given"
    folder.mkdir()
    for path in packed.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "quantize_config.json").unlink()
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {  # the keys that auto-gptq 0.7 writes
        "bits": 4,
        "group_size": 64,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }
    (folder / "config.json").write_text(json.dumps(config))
    settings = ModelSettings(source=f"local:{folder}")
    found = LocalSource().fetch(settings, tmp_path, tmp_path / "out", lambda *a: None)
    assert found["bytes"] == facts["bytes"]
    assert found["quantised"] == {"method": "gptq", "bits": 4, "group": 64}
    assert "zeros_kept" not in facts
    assert torch.equal(canary(load_model(folder)), canary(load_model(packed)))
    with pytest.raises(Unsupported, match="GPTQ needs plain weights; the model is quantised"):
        compress(folder, tmp_path / "again")


def words(codes):
    """Integers of 4 bits (n x m) as auto-gptq packs them: eight rows in one of int32, the first in the lowest bits."""
    eights = codes.view(-1, 8, codes.shape[1]) << (4 * torch.arange(8))[None, :, None]
    return eights.sum(1).to(torch.int32)  # what is above 2^31 wraps round, as the bits are to


@pytest.mark.parametrize("apart", [False, True], ids=["in the config", "in a file of its own"])
def test_a_checkpoint_written_bit_by_bit_computes_what_it_says(made, tmp_path, apart):
    """In auto-gptq's format, asymmetric; its early versions keep the settings in quantize_config.json alone."""
    dense, _, _ = made("llama")
    tensors, plain, g = load_file(dense / "model.safetensors"), load_model(dense), torch.Generator().manual_seed(0)
    for name, layer in block_linears(plain).items():
        high, wide = layer.weight.shape
        codes = torch.randint(0, 16, (wide, high), generator=g)
        zeros = torch.randint(1, 16, (wide // 32, high), generator=g)
        scales = (torch.rand(wide // 32, high, generator=g) * 0.02).half()
        order = torch.arange(wide) // 32
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.qweight": words(codes), f"{name}.qzeros": words((zeros - 1).T).T.contiguous()}
        tensors |= {f"{name}.scales": scales, f"{name}.g_idx": order.int()}
        layer.weight.data.copy_(((codes - zeros[order]) * scales[order].float()).T)
    folder = tmp_path / "given"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    said = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False, "true_sequential": True}
    if apart:
        (folder / "quantize_config.json").write_text(json.dumps(said))
    else:
        config["quantization_config"] = {**said, "quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    for name, layer in block_linears(plain).items():
        torch.testing.assert_close(dense_weight(block_linears(model)[name]), layer.weight, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(canary(model), canary(plain), rtol=1e-2, atol=1e-2)
    assert source_facts(folder)["quantised"] == {"method": "gptq", "bits": 4, "group": 32}


def test_layers_that_read_one_input_share_a_pass_and_nothing_changes(made, tmp_path, monkeypatch):
    dense, packed, _ = made("llama")
    model = load_model(dense)
    sets = sets_of_layers(model, block_linears(model), "model.layers", documents())
    names = [sorted(name.rpartition(".")[2] for name in found) for found in sets]
    assert names == [["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    monkeypatch.setattr("cpet_bench.compression.gptq.sets_of_layers", lambda *a: None)  # each layer by itself
    compress(dense, tmp_path, bits=4)
    one, other = load_file(packed / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_how_many_zeros_of_a_pruned_model_stay_zero_is_told(made, tmp_path):
    dense, _, _ = made("llama")
    how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
    Magnitude.compress(dense, tmp_path / "pruned", Magnitude.Settings(pattern="2:4"), **how)
    facts = compress(tmp_path / "pruned", tmp_path / "both", bits=4, group=32)
    pruned = block_linears(load_model(tmp_path / "pruned"))
    both = block_linears(load_model(tmp_path / "both"))
    left = torch.cat([dense_weight(both[n])[dense_weight(m) == 0] == 0 for n, m in pruned.items()]).double().mean()
    assert facts["zeros_kept"] == pytest.approx(float(left), abs=1e-6) and 0.9 < left < 1


# -- bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 5}, "2, 3, 4 or 8"),
        ({"group": 48}, "16, 32, 64"),
        ({"damp": 0}, "greater than 0"),
        ({"desc_act": True, "act_group_aware": True}, "two orders"),
        ({"group": -1, "act_group_aware": True}, "needs groups"),
        ({"groups": 32}, "groups"),
    ],
    ids=str,
)
def test_settings_are_refused_when_they_are_read(given, message):
    with pytest.raises(ValidationError, match=message):
        Gptq.Settings(**given)


def test_orders_of_a_mixture():
    assert "packed by bitsandbytes" in Gptq.refuse(Gptq.Settings(), ["magnitude", "bitsandbytes"])
    assert Gptq.refuse(Gptq.Settings(), ["magnitude", "wanda"]) is None
    assert "gptq packs them" in Magnitude.refuse(Magnitude.Settings(pattern="2:4"), ["gptq"])


def test_without_the_library_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(gptq.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(Unsupported, match=r"needs gptqmodel and optimum.*pip install"):
        compress(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(Unsupported, match=r"needs gptqmodel and optimum.*pip install"):
        load_model(tmp_path)


def test_models_it_cannot_take(made, tmp_path):
    dense, _, _ = made("llama")
    with pytest.raises(Unsupported, match=r"128 do not divide the width 64 of model.layers.0.*group can be 16, 32, 64$"):
        compress(dense, tmp_path / "out", group=128)
    with pytest.raises(StepFailed, match="calibration documents"):
        Gptq.compress(dense, tmp_path, Gptq.Settings(), examples=[], device="cpu", dtype="float32", progress=print)
    tiny.make("llama", {**OPTIONS, "hidden": 48, "intermediate": 96}, tmp_path / "narrow")
    with pytest.raises(Unsupported, match=r"multiples of 32.*model.layers.0.self_attn.q_proj has \(48, 48\): rtn takes"):
        compress(tmp_path / "narrow", tmp_path / "out")
    assert not (tmp_path / "out").exists()
