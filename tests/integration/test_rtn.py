"""Rounding to nearest against the grid written out in numpy, and packed models as the rest of the program uses them."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.compression.rounding import grid, group_of, integers
from cpet_bench.compression.rtn import Rtn
from cpet_bench.deployment import deploy
from cpet_bench.errors import InputError, StepFailed, Unsupported
from cpet_bench.matrix import load_matrix
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, dense_weight, features, is_linear, resident_bytes
from cpet_bench.models.loading import load_model
from cpet_bench.models.packed import PackedLinear, pack, unpack
from cpet_bench.models.pool import ModelPool
from cpet_bench.models.sources import facts as source_facts
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.settings import PetSettings, RecoverSettings

HOW = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
LORA = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "t5": ["q", "wo"]}
CASES = [("llama", 4, True), ("llama", 3, False), ("gpt2", 2, False), ("gpt2", 8, True), ("t5", 4, False), ("t5", 8, True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in LORA:
        tiny.make(arch, tiny.DEFAULTS, root / arch)
    return root


@pytest.fixture(scope="module")
def made(folders):
    """(folder, facts) of a rounded model, made once."""
    kept = {}

    def get(arch, bits, sym, group=None):
        at = (arch, bits, sym, group)
        if at not in kept:
            out = folders / "-".join(map(str, at))
            kept[at] = out, Rtn.compress(folders / arch, out, Rtn.Settings(bits=bits, sym=sym, group=group), **HOW)
        return kept[at]

    return get


@torch.no_grad()
def answer(model):
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def nearest(weight, bits, group, sym):
    """For each weight the nearest of all values that its group's grid has, by looking at every one of them."""
    w = weight.double().numpy()
    out = np.empty_like(w)
    steps = 2**bits - 1
    for row in range(w.shape[0]):
        for at in range(0, w.shape[1], group):
            x = w[row, at : at + group]
            high = max(abs(x)) if sym else max(x.max(), 0)
            low = -high if sym else min(x.min(), 0)
            scale = float(np.float16((high - low) / steps)) or 1.0
            zero = 2 ** (bits - 1) if sym else round(-low / scale)
            values = (np.arange(steps + 1) - zero) * scale
            out[row, at : at + group] = values[abs(x[:, None] - values).argmin(1)]
    return torch.from_numpy(out).float()


# -- packing, the grid -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_keeps_every_value_in_so_many_bits(bits):
    values = torch.randint(0, 2**bits, (7, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    planes = pack(values, bits)
    assert planes.numel() * 8 == values.numel() * bits
    assert torch.equal(unpack(planes, bits), values)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 30.0])
@pytest.mark.parametrize("sym", [True, False])
def test_no_weight_is_further_from_its_value_than_half_a_step(sym, scale):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0  # a group of zeros
    weight[4] = weight[4].abs()  # all on one side of zero
    for bits in range(2, 9):
        s, zero = grid(weight, bits, 32, sym, "layer")
        q = integers(weight, s, zero, bits)
        assert int(q.max()) < 2**bits
        found = (q.float().view(16, 2, 32) - zero[..., None]) * s.float()[..., None]
        error = (found - weight.view(16, 2, 32)).abs().amax(-1)
        # float16 moves a scale by up to 2^-11 of it, which the end of a group feels 2^bits / 2 times
        assert (error <= s.float() * (0.5 + 2**bits * 2**-11) * 1.001).all(), bits
        assert (found[weight.view(16, 2, 32) == 0] == 0).all()


def test_weights_that_no_grid_can_hold_are_named():
    with pytest.raises(StepFailed, match="weights of layer7 are not finite"):
        grid(torch.full((2, 32), float("nan")), 4, 32, True, "layer7")
    with pytest.raises(Unsupported, match="layer7 are too large for scales in float16"):
        grid(torch.full((2, 32), 1e8), 4, 32, True, "layer7")


def test_the_group_is_the_largest_that_divides_every_width():
    assert group_of({"a": 256, "b": 384}, None) == 128
    assert group_of({"a": 576, "b": 1536}, None) == 64
    assert group_of({"a": 256, "b": 96}, None) == 32
    assert group_of({"a": 256, "b": 96}, 16) == 16
    with pytest.raises(Unsupported, match="groups of 128 do not divide the width 96 of b; group can be 8, 16, 32$"):
        group_of({"a": 256, "b": 96}, 128)
    with pytest.raises(Unsupported, match="groups of 32 do not divide the width 144 of a; group can be 8, 24, 72$"):
        group_of({"a": 144, "b": 72}, None)
    with pytest.raises(Unsupported, match="no group size divides all widths"):
        group_of({"a": 100}, None)


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("arch", "bits", "sym"), CASES)
def test_a_rounded_model_computes_with_the_nearest_values(folders, made, arch, bits, sym):
    out, facts = made(arch, bits, sym)
    model, reference = load_model(out), load_model(folders / arch)
    here, dense = block_linears(model), block_linears(reference)
    assert here.keys() == dense.keys() and facts["layers"] == len(here) and facts["group"] == 64
    g = torch.Generator().manual_seed(0)
    for name, layer in here.items():
        was = dense_weight(dense[name])
        wanted = nearest(was, bits, 64, sym)
        assert type(layer) is PackedLinear and is_linear(layer) and features(layer) == features(dense[name])
        torch.testing.assert_close(layer.weight, dense_weight(layer))
        x = torch.randn(50, was.shape[1], generator=g)
        bias = dense[name].bias
        torch.testing.assert_close(layer(x), F.linear(x, dense_weight(layer), bias))
        # a weight half-way between two values may go either way: then the layer's error is no larger than the reference's
        error, least = ((layer(x) - F.linear(x, w, bias)).norm() for w in (was, wanted))
        assert (x @ (wanted - was).t()).norm() > 0 and error <= 1.1 * (x @ (wanted - was).t()).norm(), name
        assert (dense_weight(layer) - wanted).abs().mean() < 1e-3 * wanted.abs().mean(), name
        assert least < 0.1 * error, name
        target = dense[name].weight.data
        target.copy_(dense_weight(layer) if target.shape == was.shape and arch != "gpt2" else dense_weight(layer).t())
    torch.testing.assert_close(answer(model), answer(reference), atol=1e-4, rtol=1e-4)
    assert torch.equal(answer(load_model(out)), answer(model))


@pytest.mark.parametrize(("arch", "bits", "sym"), CASES)
def test_bytes_are_those_of_the_formula_on_disk_and_in_memory(folders, made, arch, bits, sym):
    out, facts = made(arch, bits, sym)
    model, dense = load_model(out), load_model(folders / arch)
    weights = sum(int(np.prod(features(m))) for m in block_linears(dense).values())
    formula = weights * bits / 8 + weights / 64 * (2 if sym else 3)  # scales of two bytes, zero points of one
    with safe_open(next(out.glob("*.safetensors")), "pt") as f:
        stored = {k: f.get_tensor(k) for k in f.keys()}
    packed = sum(t.numel() * t.element_size() for k, t in stored.items() if k.endswith(("packed", "scales", "zeros")))
    assert packed == pytest.approx(formula, rel=0.01) and facts["packed_bytes"] == packed and facts["weights"] == weights
    assert facts["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert source_facts(out)["quantised"] == {"method": "cpet_packed", "bits": bits, "group": 64}  # given as a model
    saved = resident_bytes(dense) - resident_bytes(model)
    assert saved == pytest.approx(4 * weights - formula, rel=0.01)


def test_a_loaded_model_can_be_saved_and_cast_and_stays_exact(made, tmp_path):
    out, _ = made("llama", 4, False)
    model = load_model(out)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(load_model(tmp_path)), answer(model))
    before = {n: dense_weight(m) for n, m in block_linears(model).items()}
    model.to(torch.bfloat16)
    for name, layer in block_linears(model).items():
        assert layer.scales.dtype == torch.float16 and layer.weight.dtype == torch.bfloat16
        assert torch.equal(dense_weight(layer), before[name])
    half, loaded = answer(model), answer(load_model(out, dtype="bfloat16"))
    full = answer(load_model(out))
    for found in (half, loaded):  # not the same: the cast rounds the rotary frequencies too
        assert found.dtype == torch.bfloat16 and (found.float() - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("sym", [True, False])
def test_zeros_of_a_pruning_stay_zeros(folders, tmp_path, sym):
    Magnitude.compress(folders / "llama", tmp_path / "pruned", Magnitude.Settings(pattern="2:4"), **HOW)
    Rtn.compress(tmp_path / "pruned", tmp_path / "both", Rtn.Settings(bits=3, sym=sym), **HOW)
    pruned = block_linears(load_model(tmp_path / "pruned"))
    for name, layer in block_linears(load_model(tmp_path / "both")).items():
        gone = dense_weight(pruned[name]) == 0
        assert gone.float().mean() >= 0.5 and not dense_weight(layer)[gone].any()
    assert json.loads((tmp_path / "both/cpet_compression.json").read_text())["backend"] == "rtn"


# -- training on packed layers -----------------------------------------------------------------------------------------
def test_gradients_are_those_of_the_dense_product_and_keep_no_dense_weights():
    g = torch.Generator().manual_seed(0)
    layer = PackedLinear(64, 48, bits=3, group=32, sym=False, bias=True)
    layer.packed.random_(0, 256, generator=g)
    layer.zeros.random_(0, 8, generator=g)
    x = torch.randn(2, 5, 64, generator=g, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert not kept  # F.linear would keep the dense weight for the gradient
    upstream = torch.randn(y.shape, generator=g)
    y.backward(upstream)
    F.linear(again, layer.weight, bias).backward(upstream)
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)
    with pytest.raises((TypeError, KeyError)):
        layer.weight = torch.nn.Parameter(torch.zeros(48, 64))


@pytest.mark.parametrize("arch", LORA)
def test_adapters_and_recovery_are_trained_on_it_saved_and_deployed(made, tmp_path, arch):
    out, _ = made(arch, 4, arch == "llama")
    model = load_model(out)
    plain = answer(model)
    methods.attach(model, PetSettings(method="lora", r=4, lora_alpha=4, target_modules=LORA[arch]))
    settings = RecoverSettings(r=4)
    recover.attach_recovery(model, settings, seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=3e-3)
    ids = torch.randint(3, 200, (4, 12), generator=torch.Generator().manual_seed(0))
    losses, moved = [], dict.fromkeys(trained, False)
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for name, p in trained.items():
            assert p.grad is not None and torch.isfinite(p.grad).all(), name
            moved[name] |= bool((p.grad != 0).any())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert all(moved.values()) and losses[-1] < losses[0] - 0.05, losses
    model.eval()
    tuned = answer(model)
    methods.save(model, tmp_path / "adapter")
    recover.save_recovery(model, tmp_path / "recovery", settings)
    recover.detach_recovery(model)
    methods.detach(model)
    assert torch.equal(answer(model), plain) and (tuned - plain).abs().max() > 1e-2
    pool = ModelPool()
    machine = {"device": "cpu", "dtype": "float32", "attention": "auto"}
    for purpose in ("eval", "train", "eval"):
        with pool.lend("k", out, machine, purpose) as lent, deploy(lent, [tmp_path]) as deployed:
            torch.testing.assert_close(answer(deployed), tuned, atol=1e-5, rtol=1e-5)
    assert pool.loads == 1 and not pool.reloads


def test_an_adapter_of_the_dense_model_is_inherited(folders, made, tmp_path):
    """GPT-2's dense layers are Conv1D, whose adapters PEFT marks as transposed; the packed ones are not."""
    dense = load_model(folders / "gpt2")
    methods.attach(dense, PetSettings(method="lora", r=4, lora_alpha=4, target_modules=["c_attn"]))
    with torch.no_grad():
        for name, p in dense.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    methods.save(dense, tmp_path)
    model = load_model(made("gpt2", 8, True)[0])
    plain = answer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods.attach_saved(model, tmp_path, trainable=True)
    gap = (answer(model) - answer(dense)).norm()
    assert gap < 0.05 * (answer(dense) - plain).norm()


def test_initialisations_that_rewrite_the_base_are_refused(made):
    model = load_model(made("llama", 4, True)[0])
    pet = PetSettings(method="lora", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(Unsupported, match="pissa changes the base weights, which are packed"):
        methods.attach(model, pet)
    methods.attach(model, PetSettings(method="lora", r=4, target_modules=["q_proj"], use_dora=True))
    model(input_ids=torch.arange(3, 15).view(1, -1)).logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "magnitude" in n)


# -- what cannot be ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given", [{"bits": 1}, {"bits": 9}, {}, {"bits": 4, "group": 12}, {"bits": 4, "group": 2048}], ids=str)
def test_settings_that_no_layer_can_have(given):
    with pytest.raises(ValueError, match="bits|group"):
        Rtn.Settings.model_validate(given)


@pytest.mark.parametrize(
    ("chain", "says"),
    [
        ('[{backend: rtn, bits: 4}, {backend: magnitude, pattern: "2:4"}]', "rtn packs them; put the pruning first"),
        ("[{backend: rtn, bits: 4}, {backend: bitsandbytes, type: nf4}]", "packed by rtn already"),
        ("[{backend: bitsandbytes, type: nf4}, {backend: rtn, bits: 4}]", "packed by bitsandbytes already"),
        ("{backend: rtn, bits: 12}", "at least 2 and at most 8"),
        ("{backend: rtn, bits: 4, groups: 64}", "Did you mean group"),
    ],
)
def test_mistakes_are_refused_when_the_matrix_is_read(tmp_path, chain, says):
    path = tmp_path / "matrix.yaml"
    path.write_text(f'model: {{m: {{source: "tiny:llama"}}}}\ntask: {{movie_reviews: {{}}}}\ncompression:\n  c: {chain}\n')
    with pytest.raises(InputError, match=says) as caught:
        load_matrix(path)
    assert caught.value.line == 4


def test_models_that_cannot_be_rounded(folders, made, tmp_path):
    with pytest.raises(Unsupported, match="rtn needs plain weights; the model is quantised .cpet_packed"):
        Rtn.compress(made("llama", 4, True)[0], tmp_path / "a", Rtn.Settings(bits=4), **HOW)
    with pytest.raises(Unsupported, match="groups of 128 do not divide the width 64 of model.layers.0"):
        Rtn.compress(folders / "llama", tmp_path / "b", Rtn.Settings(bits=4, group=128), **HOW)
    assert not list(tmp_path.glob("*/*.safetensors"))
