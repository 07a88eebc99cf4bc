"""Recovery modules against the formula written out with ordinary operations, beside every class of linear layer we meet."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.errors import InputError, StepFailed
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, features
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.settings import PetSettings, RecoverSettings
from tiny_qwen import make_qwen2

PLAIN = {
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "identity": lambda z: z,
}
KINDS = ("llama", "gpt2", "t5", "opt", "qwen2", "nf4", "int8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gpt2", "t5", "opt"):
        tiny.make(arch, tiny.DEFAULTS, root / arch)
    make_qwen2(root / "llama", root / "qwen2")
    how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
    for kind in ("nf4", "int8"):
        BitsAndBytes.compress(root / "llama", root / kind, BitsAndBytes.Settings(type=kind), **how)
    return root


@torch.no_grad()
def answer(model):
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def filled(model, seed=1):
    """The recovery modules' weights, no longer zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.cpet_recovery.parameters():
            p.normal_(std=0.2, generator=g)
    return {recover._name(k): (m.U1.detach().clone(), m.U2.detach().clone()) for k, m in model.cpet_recovery["0"].items()}


# -- the product and its gradients -------------------------------------------------------------------------------------
@pytest.mark.parametrize("act", PLAIN)
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (2, 1, 3, 12)], ids=str)
def test_product_and_gradients_are_those_of_the_formula(act, scale, shape):
    g = torch.Generator().manual_seed(0)
    x, u1, u2 = torch.randn(*shape, generator=g), torch.randn(4, 12, generator=g), torch.randn(7, 4, generator=g)
    y, weight = torch.randn(*shape[:-1], 7, generator=g), torch.randn(*shape[:-1], 7, generator=g)
    ours = [t.clone().requires_grad_() for t in (x, y, u1, u2)]
    exact = [t.double().requires_grad_() for t in (x, y, u1, u2)]
    found = recover._Beside.apply(*ours, act, scale)
    (found * weight).sum().backward()
    ex, ey, e1, e2 = exact
    wanted = ey + scale * (PLAIN[act](ex @ e1.t()) @ e2.t())
    (wanted * weight).sum().backward()
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)
    for mine, theirs, name in zip(ours, exact, ("x", "y", "U1", "U2"), strict=True):
        close = {"atol": 2e-4, "rtol": 1e-5}
        torch.testing.assert_close(mine.grad.double(), theirs.grad, **close, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("act", PLAIN)
def test_gradients_against_finite_differences(act):
    g = torch.Generator().manual_seed(1)
    x, u1, u2 = (torch.randn(*s, generator=g) for s in ((3, 5), (2, 5), (4, 2)))
    y, weight = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g).double()

    def value(*tensors):
        return float((recover._Beside.apply(*tensors, act, 0.5) * weight).sum())

    tensors = [t.clone().requires_grad_() for t in (x, y, u1, u2)]
    (recover._Beside.apply(*tensors, act, 0.5) * weight.float()).sum().backward()
    for number, tensor in enumerate(tensors):
        for i in range(tensor.numel()):
            ends = []
            for step in (1e-5, -1e-5):  # in fp64, where a difference of this size still has digits
                moved = [t.detach().double() for t in tensors]
                moved[number].view(-1)[i] += step
                ends.append(value(*moved))
            assert float(tensor.grad.view(-1)[i]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-5)


def test_only_what_requires_a_gradient_gets_one():
    x, y, u1, u2 = torch.randn(3, 5), torch.randn(3, 4), torch.randn(2, 5), torch.randn(4, 2)
    for wanted in range(4):
        tensors = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, y, u1, u2))]
        recover._Beside.apply(*tensors, "gelu", 1.0).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == wanted for i in range(4)]


def test_half_precision_inputs_keep_fp32_weights():
    module = recover.Recovery(torch.randn(2, 5), torch.randn(4, 2), "gelu", 1.0)
    x, y = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True), torch.randn(3, 4, dtype=torch.bfloat16)
    out = module(x, y)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    assert module.U1.grad.dtype == module.U2.grad.dtype == torch.float32
    wanted = y.float() + F.gelu(x.float() @ module.U1.t()) @ module.U2.t()
    torch.testing.assert_close(out.float(), wanted, atol=0.1, rtol=0.05)


def tensor_names(model) -> list[str]:
    """Not by `state_dict()`, which breaks 4-bit weights once packed (see `cpet_bench.pet.methods`)."""
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


# -- on models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", PLAIN)
def test_zero_start_leaves_the_model_bit_identical(folders, kind, act):
    model = load_model(folders / kind)
    before, names = answer(model), tensor_names(model)
    recover.attach_recovery(model, RecoverSettings(r=4, act=act), seed=0)
    assert torch.equal(answer(model), before)
    layers = block_linears(model)
    assert recover.recovery_parameters(model) == sum(4 * sum(features(m)) for m in layers.values())
    assert len(model.cpet_recovery["0"]) == len(layers) == {"gpt2": 8, "t5": 32, "opt": 12}.get(kind, 14)
    filled(model)
    assert not torch.equal(answer(model), before)
    recover.detach_recovery(model)
    assert torch.equal(answer(model), before)
    assert tensor_names(model) == names and recover.recovery_parameters(model) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", PLAIN)
def test_the_model_computes_the_formula_beside_every_layer(folders, kind, act):
    model, bare = load_model(folders / kind), load_model(folders / kind)
    recover.attach_recovery(model, RecoverSettings(r=4, alpha=6, act=act), seed=0)
    weights = filled(model)
    assert weights.keys() == block_linears(bare).keys()
    for name, module in block_linears(bare).items():
        u1, u2 = weights[name]
        module.register_forward_hook(
            lambda _m, args, out, u1=u1, u2=u2: out + 1.5 * (PLAIN[act](args[0] @ u1.t()) @ u2.t())
        )
    found, wanted = answer(model), answer(bare)
    tolerance = 2e-2 if kind in ("nf4", "int8") else 1e-4  # rounding upstream moves what is quantised downstream
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()
    assert (found - answer(load_model(folders / kind))).abs().max() > 0.1 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "int8"])
def test_a_pet_module_on_the_same_layer_adds_up(folders, kind):
    target = "c_attn" if kind == "gpt2" else "q_proj"
    pet = PetSettings(method="lora", r=4, target_modules=[target])
    model, bare = load_model(folders / kind), load_model(folders / kind)
    methods.attach(model, pet)
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    layers = list(block_linears(bare))
    weights = filled(model)
    assert sorted(weights) == sorted(layers)  # named as in the bare model, without PEFT's base_layer
    g = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.2, generator=g)
    for name, module in block_linears(bare).items():
        u1, u2 = weights[name]
        wrapped = model.get_submodule(name)
        pair = None
        if name.endswith(target):
            pair = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight, wrapped.scaling["default"]

        def hook(_m, args, out, u1=u1, u2=u2, pair=pair):
            x = args[0]
            both = out + PLAIN["gelu"](x @ u1.t()) @ u2.t()
            return both if pair is None else both + pair[2] * (x @ pair[0].t() @ pair[1].t())

        module.register_forward_hook(hook)
    wanted = answer(bare)
    assert (answer(model) - wanted).abs().max() < (2e-2 if kind == "int8" else 1e-4) * wanted.abs().max()
    recover.detach_recovery(model)
    methods.detach(model)
    assert torch.equal(answer(model), answer(load_model(folders / kind)))


def test_its_gradients_in_a_model_are_those_of_plain_operations(folders):
    model = load_model(folders / "llama")
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    weights = filled(model)
    ids = torch.arange(3, 51).view(4, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    bare = load_model(folders / "llama")
    copies = {name: tuple(w.clone().requires_grad_() for w in pair) for name, pair in weights.items()}
    for name, module in block_linears(bare).items():
        u1, u2 = copies[name]
        module.register_forward_hook(lambda _m, args, out, u1=u1, u2=u2: out + F.gelu(args[0] @ u1.t()) @ u2.t())
    bare(input_ids=ids, labels=ids).loss.backward()
    for name, (u1, u2) in copies.items():
        mine = model.cpet_recovery["0"][recover._key(name)]
        for ours, wanted in ((mine.U1.grad, u1.grad), (mine.U2.grad, u2.grad)):
            assert wanted.abs().max() > 0
            assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max() + 1e-7, name


def test_start_follows_the_seed_alone(folders):
    def drawn(seed):
        model = load_model(folders / "llama")
        recover.attach_recovery(model, RecoverSettings(r=4), seed=seed)
        return {n: p.detach().clone() for n, p in model.cpet_recovery.named_parameters()}

    torch.manual_seed(1)
    first, state = drawn(5), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = drawn(5), drawn(6)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
    assert all(torch.equal(first[n], again[n]) for n in first)
    for name, value in first.items():
        if name.endswith("U1"):
            assert not torch.equal(value, other[name])
            bound = value.shape[1] ** -0.5
            assert value.abs().max() <= bound and value.abs().max() > 0.9 * bound
        else:
            assert not value.any()


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(folders, tmp_path, kind):
    settings = RecoverSettings(r=4, alpha=2, act="sigmoid")
    model = load_model(folders / kind)
    recover.attach_recovery(model, settings, seed=0)
    filled(model)
    recover.save_recovery(model, tmp_path / "one", settings)
    wanted = answer(model)
    other = load_model(folders / kind)
    recover.attach_saved_recovery(other, tmp_path / "one")
    assert torch.equal(answer(other), wanted)
    assert not any(p.requires_grad for p in other.parameters())
    recover.save_recovery(other, tmp_path / "two", settings)
    for file in ("recovery.safetensors", "recovery.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    kept = json.loads((tmp_path / "one/recovery.json").read_text())
    assert kept["layers"] == list(block_linears(load_model(folders / kind)))
    recover.detach_recovery(other)
    recover.attach_saved_recovery(other, tmp_path / "one", trainable=True)
    assert sum(p.requires_grad for p in other.parameters()) == 2 * len(kept["layers"])


def test_several_add_up(folders, tmp_path):
    """Two saved ones, each of half the size, are one of the whole: exact for the identity."""
    settings = RecoverSettings(r=4, act="identity")
    model = load_model(folders / "llama")
    recover.attach_recovery(model, settings, seed=0)
    filled(model)
    wanted = answer(model)
    for module in model.cpet_recovery["0"].values():
        module.U2.data *= 0.5
    recover.save_recovery(model, tmp_path, settings)
    twice = load_model(folders / "llama")
    for _ in range(2):
        recover.attach_saved_recovery(twice, tmp_path)
    assert (answer(twice) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    recover.detach_recovery(twice)
    assert torch.equal(answer(twice), answer(load_model(folders / "llama")))


def test_a_rank_above_the_width_of_a_layer_is_refused(folders):
    for kind in KINDS:
        model = load_model(folders / kind)
        before, narrowest = answer(model), min(min(features(m)) for m in block_linears(model).values())
        with pytest.raises(InputError, match=rf"recover\.r: .* rank of 1000 .* give at most {narrowest}\.$"):
            recover.attach_recovery(model, RecoverSettings(r=1000), seed=0)
        assert not hasattr(model, "cpet_recovery") and torch.equal(answer(model), before)
        recover.attach_recovery(model, RecoverSettings(r=narrowest), seed=0)


def test_what_does_not_fit_is_named(folders, tmp_path):
    settings = RecoverSettings(r=4)
    model = load_model(folders / "llama")
    before = answer(model)
    recover.attach_recovery(model, settings, seed=0)
    recover.save_recovery(model, tmp_path / "good", settings)
    recover.detach_recovery(model)
    tiny.make("llama", {**tiny.DEFAULTS, "intermediate": 96}, tmp_path / "narrow")
    tiny.make("llama", {**tiny.DEFAULTS, "layers": 1}, tmp_path / "short")
    narrow = r"mlp.down_proj.U1 is \[4, 128\], here \[4, 96\]"
    for name, pattern in {"narrow": narrow, "short": "no layer model.layers.1"}.items():
        with pytest.raises(StepFailed, match=pattern):
            recover.attach_saved_recovery(load_model(tmp_path / name), tmp_path / "good")
    weights = load_file(tmp_path / "good/recovery.safetensors")
    for change, pattern in {
        "less": "not in the file: model.layers.0.mlp.up_proj.U2",
        "more": "not in the model: model.layers.9.U1",
        "rank": r"U1 is \[5, 64\], here \[4, 64\]",
    }.items():
        broken = copy.copy(weights)
        if change == "less":
            del broken["model.layers.0.mlp.up_proj.U2"]
        elif change == "more":
            broken["model.layers.9.U1"] = torch.zeros(4, 64)
        else:
            broken["model.layers.0.mlp.up_proj.U1"] = torch.zeros(5, 64)
        (tmp_path / change).mkdir()
        save_file(broken, tmp_path / change / "recovery.safetensors")
        (tmp_path / change / "recovery.json").write_bytes((tmp_path / "good/recovery.json").read_bytes())
        with pytest.raises(StepFailed, match=pattern):
            recover.attach_saved_recovery(model, tmp_path / change)
        assert torch.equal(answer(model), before) and not hasattr(model, "cpet_recovery")
    with pytest.raises(StepFailed, match="init svd needs the compensation"):
        recover.attach_recovery(model, RecoverSettings(r=4, act="identity", init="svd"), seed=0)
    with pytest.raises(StepFailed, match=r"U1 is \[4, 64\], here \[8, 64\]"):
        recover.attach_recovery(model, RecoverSettings(r=8, act="identity", init="svd"), seed=0, init=tmp_path / "good")
