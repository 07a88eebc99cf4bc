"""GPTQ on encoder-decoder models: the column loop against its formula (arXiv 2210.17323, algorithm 1), and what it stores."""

import json

import pytest
import torch
from new_process import answer, answers
from safetensors import safe_open

from compressed import can_be_trained, compress, documents, inputs_of
from cpet_bench.compression import gptq_columns
from cpet_bench.compression.gptq import Gptq
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.compression.sparsegpt import inverse_factor
from cpet_bench.compression.streaming import Whole
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import gptq, tiny
from cpet_bench.models.arch import block_linears, dense_weight, features, resident_bytes
from cpet_bench.models.loading import load_model
from cpet_bench.models.packed import PackedLinear
from cpet_bench.models.sources import facts as source_facts

SETTINGS = {
    "4": {"bits": 4},
    "3": {"bits": 3, "group": 32, "act_group_aware": False},
    "3-act": {"bits": 3, "group": 32, "desc_act": True, "sym": False},
    "8-row": {"bits": 8, "group": -1},
}
TEXT = documents()


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "t5"
    tiny.make("t5", tiny.DEFAULTS, folder)
    return folder


@pytest.fixture(scope="module")
def made(t5, tmp_path_factory):
    """(folder, facts) by name of SETTINGS."""
    root, found = tmp_path_factory.mktemp("packed"), {}

    def get(name):
        if name not in found:
            found[name] = root / name, compress(Gptq, t5, root / name, TEXT, **SETTINGS[name])
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


def reference(w, x, bits, group, sym, act=False, damp=0.01):
    """GPTQ column by column in fp64, each error passed on at once. w: out x in; x: tokens x in.

    act: columns by falling diagonal of H, each with the scale of its own group of neighbours in the dense weight.
    """
    h = 2 * x.T @ x
    order = h.diagonal().argsort(descending=True) if act else torch.arange(len(h))
    grids = [grid(g, bits, sym) for g in w.split(group, 1)]
    h = h[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, q = w[:, order], torch.zeros_like(w)
    for i, column in enumerate(order.tolist()):
        if i % group == 0 and not act:
            grids[i // group] = grid(w[:, i : i + group], bits, sym)
        q[:, column] = rounded(w[:, i : i + 1], *grids[column // group], bits)[:, 0]
        error = (w[:, i] - q[:, column]) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
    return q


@pytest.mark.parametrize(
    ("bits", "group", "sym", "act"),
    [
        (4, 64, True, False),
        (3, 32, False, False),
        (2, 16, True, True),
        (4, 256, False, False),
        (3, 384, True, True),
        (8, 32, False, True),
    ],
)
def test_a_layer_wider_than_a_block_is_rounded_as_by_the_formula(bits, group, sym, act):
    g = torch.Generator().manual_seed(bits)
    width = 768 if group != 384 else 384
    w = torch.randn(24, width, generator=g) * 0.1
    x = torch.randn(2000, 60, generator=g) @ torch.randn(60, width, generator=g) + 0.3 * torch.randn(2000, width, generator=g)
    settings = Gptq.Settings(bits=bits, group=group if group != 384 else -1, sym=sym, desc_act=act, act_group_aware=False)
    h = x.T @ x
    order = gptq_columns.columns_in_order(h.diagonal(), group, settings, settings.group)
    factor = inverse_factor(h[order][:, order], settings.damp)
    q, scale, zero = gptq_columns.quantised(w, factor, order, group, settings, "layer")
    found = ((q.view(24, -1, group).double() - zero[..., None].double()) * scale[..., None].double()).view(24, width)
    error = {"own": found, "formula": reference(w.double(), x.double(), bits, group, sym, act)}
    error["nearest"] = nearest(w.double(), bits, group, sym)
    error = {k: float((x.double() @ (w.double() - v).T).square().sum()) for k, v in error.items()}
    assert error["own"] == pytest.approx(error["formula"], rel=0.05) and error["own"] < 0.7 * error["nearest"], error


def test_groups_are_ordered_by_their_most_active_column_and_stay_whole():
    diagonal = torch.tensor([1.0, 5, 2, 2, 9, 0, 3, 4])
    settings = Gptq.Settings(group=16)
    assert gptq_columns.columns_in_order(diagonal, 4, settings, 4).tolist() == [4, 7, 6, 5, 1, 2, 3, 0]
    act = Gptq.Settings(desc_act=True)
    assert gptq_columns.columns_in_order(diagonal, 4, act, 4).tolist() == [4, 1, 7, 6, 2, 3, 0, 5]
    row = Gptq.Settings(group=-1)
    assert gptq_columns.columns_in_order(diagonal, 8, row, -1).tolist() == list(range(8))


@pytest.mark.parametrize("name", SETTINGS)
def test_output_error_is_the_formulas_and_below_round_to_nearest(t5, made, name):
    packed, facts = made(name)
    weights = {n: dense_weight(layer).double() for n, layer in block_linears(load_model(t5)).items()}
    model = load_model(packed)
    x = inputs_of(model, TEXT)  # each layer was rounded by what it reads in the quantised model
    assert {n.partition(".")[0] for n in weights} == {"encoder", "decoder"} and facts["layers"] == len(weights) == 32
    total = dict.fromkeys(("own", "formula", "nearest"), 0.0)
    how = SETTINGS[name]
    for n, layer in block_linears(model).items():
        group = facts["group"] if facts["group"] > 0 else weights[n].shape[1]
        own = (facts["bits"], group, how.get("sym", True))
        found = {"own": dense_weight(layer).double(), "nearest": nearest(weights[n], *own)}
        found["formula"] = reference(weights[n], x[n], *own, act=how.get("desc_act", False))
        error = {k: float((x[n] @ (weights[n] - q).T).square().sum()) for k, q in found.items()}
        assert error["own"] <= 1.1 * error["formula"], (n, error)
        assert error["own"] < error["nearest"], (n, error)
        for k, e in error.items():
            total[k] += e
    assert total["own"] < 0.8 * total["nearest"]


# -- what is stored ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_are_those_of_the_formula_on_disk_and_in_memory(t5, made, name):
    packed, facts = made(name)
    model, dense = load_model(packed), load_model(t5)
    sym, bits = SETTINGS[name].get("sym", True), facts["bits"]
    size = weights = 0
    for n, layer in block_linears(dense).items():
        n_in, n_out = features(layer)
        group = facts["group"] if facts["group"] > 0 else n_in
        size += n_in * n_out * bits / 8 + n_in // group * n_out * (2 if sym else 3)  # scales of two bytes, zero points of one
        weights += n_in * n_out
        assert type(block_linears(model)[n]) is PackedLinear
    with safe_open(packed / "model.safetensors", "pt") as f:
        stored = {k: f.get_tensor(k).nbytes for k in f.keys()}
    there = sum(b for k, b in stored.items() if k.endswith(("packed", "scales", "zeros")))
    assert there == facts["packed_bytes"] == pytest.approx(size, rel=0.01)
    assert facts["bytes"] == (packed / "model.safetensors").stat().st_size
    assert resident_bytes(dense) - resident_bytes(model) == pytest.approx(4 * weights - size, rel=0.01)
    group = facts["group"]
    assert source_facts(packed)["quantised"] == {"method": "cpet_packed", "bits": bits, "group": group}


def test_the_record_says_what_computed_it_and_how(made):
    said = {name: made(name)[1] for name in ("4", "3", "3-act", "8-row")}
    for facts in said.values():
        assert facts["engine"] == "cpet-bench" and "dequantised" in facts["kernel"] and facts["left_dense"] == []
        assert facts["calibration_documents"] == 24 and facts["calibration_tokens"] == sum(map(len, TEXT))
    assert {name: facts["order"] for name, facts in said.items()} == {
        "4": "falling diagonal of the Hessian, group by group",
        "3": "as they stand",
        "3-act": "falling diagonal of the Hessian, static groups",
        "8-row": "as they stand",
    }
    assert said["4"]["group"] == 64 and said["8-row"]["group"] == -1
    note = json.loads((made("4")[0] / "cpet_compression.json").read_text())
    assert note["backend"] == "gptq" and note["engine"] == "cpet-bench"


def test_loaded_in_a_new_process_it_computes_the_same(made, tmp_path):
    folders = [made(name)[0] for name in SETTINGS]
    for folder, found in zip(folders, answers(folders, tmp_path / "logits"), strict=True):
        assert torch.equal(found, answer(load_model(folder)))


@pytest.mark.parametrize("name", ["4", "3-act"])
def test_lora_and_recovery_train_on_it(made, name):
    can_be_trained(made(name)[0])


def test_how_many_zeros_of_a_pruned_model_stay_zero_is_told(t5, tmp_path):
    compress(Magnitude, t5, tmp_path / "pruned", pattern="2:4")
    facts = compress(Gptq, tmp_path / "pruned", tmp_path / "both", TEXT, bits=4, group=32)
    pruned, both = (block_linears(load_model(tmp_path / n)) for n in ("pruned", "both"))
    left = torch.cat([dense_weight(both[n])[dense_weight(m) == 0] == 0 for n, m in pruned.items()]).double().mean()
    assert facts["zeros_kept"] == pytest.approx(float(left), abs=1e-6) and 0.5 < left < 1


# -- where GPTQModel goes too --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [{"bits": 4}, {"bits": 3, "group": 32, "sym": False, "act_group_aware": False}], ids=str)
def test_on_a_llama_it_is_as_good_as_gptqmodel(tmp_path, given):
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    dense = tmp_path / "dense"
    tiny.make("llama", {**tiny.DEFAULTS, "layers": 1}, dense)
    weights = {n: dense_weight(layer).double() for n, layer in block_linears(load_model(dense)).items()}
    compress(Gptq, dense, tmp_path / "theirs", TEXT, **given)
    ours, settings = load_model(dense), Gptq.Settings(**given)
    layers = block_linears(ours)
    opened = Whole(ours, dense, tmp_path / "ours", "the test says so")
    group = gptq_columns.group_of({name: features(layer) for name, layer in layers.items()}, settings.group)
    gptq_columns.quantise(opened, TEXT, settings, group, lambda *a: None)
    error = []
    for model in (ours, load_model(tmp_path / "theirs")):
        x = inputs_of(model, TEXT)
        found = {n: dense_weight(layer).double() for n, layer in block_linears(model).items()}
        error.append({n: float((x[n] @ (weights[n] - q).T).square().sum()) for n, q in found.items()})
    for n in weights:
        assert error[0][n] == pytest.approx(error[1][n], rel=0.1), (n, error)


# -- what it refuses -----------------------------------------------------------------------------------------------------
def test_it_needs_neither_library_and_says_what_it_cannot_take(t5, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq.importlib.util, "find_spec", lambda name: None)
    compress(Gptq, t5, tmp_path / "out", TEXT[:8], bits=8)
    with pytest.raises(Unsupported, match=r"128 do not divide the width 64 of encoder.block.0.*group can be 16, 32, 64$"):
        compress(Gptq, t5, tmp_path / "never", TEXT, group=128)
    with pytest.raises(StepFailed, match="calibration documents"):
        compress(Gptq, t5, tmp_path / "never", [])
    with pytest.raises(Unsupported, match=r"encoder.block.0.layer.0.SelfAttention.q reads 12 inputs, which 8 does not divide"):
        gptq_columns.group_of({"encoder.block.0.layer.0.SelfAttention.q": (12, 8)}, -1)
    compress(Gptq, t5, tmp_path / "once", TEXT[:8], bits=4)
    with pytest.raises(Unsupported, match=r"GPTQ needs plain weights; the model is quantised \(cpet_packed\): give the"):
        compress(Gptq, tmp_path / "once", tmp_path / "never", TEXT)
    assert not (tmp_path / "never").exists()
