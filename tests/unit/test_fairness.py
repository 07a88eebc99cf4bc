"""Ranks that train a given number of parameters, against a search through all of them; D widened computes what D computes."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, features
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring.fairness import matched_ranks, trainable_count, wider
from cpet_bench.settings import PetSettings
from cpet_bench.steps.tuning import control_ranks, target_parameters

# in, out of a 135 M Llama's linear layers (30 blocks; q, k, v, o, gate, up, down)
WIDTHS = {"q": 576, "k": 192, "v": 192, "o": 576, "g": 1536, "u": 1536}
KINDS = {**{kind: (576, out) for kind, out in WIDTHS.items()}, "d": (1536, 576)}
LLAMA = {f"{i}.{kind}": shape for i in range(30) for kind, shape in KINDS.items()}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def total(ranks, shapes):
    return sum(r * sum(shapes[name]) for name, r in ranks.items())


def test_trainable_count_counts_what_requires_a_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    model[0].requires_grad_(False)
    assert trainable_count(model) == 20
    model[0].bias.requires_grad_(True)
    assert trainable_count(model) == 24


@pytest.mark.parametrize("target", [3_000_000, 5_806_080, 4_999_999, 390_000, 26_000_000])
def test_matched_ranks_reach_the_number_and_are_even(target):
    ranks = matched_ranks(LLAMA, target)
    assert list(ranks) == list(LLAMA)
    assert abs(total(ranks, LLAMA) - target) <= 0.01 * target
    assert max(ranks.values()) - min(ranks.values()) <= 1
    assert ranks == matched_ranks(dict(LLAMA), target)
    base = min(ranks.values())
    share = sum(r - base for r in ranks.values()) / len(ranks)
    for kinds in ("qo", "kv", "gud"):  # no size of layer, and no end of the model, gets all of the extra ranks
        extra = [ranks[f"{i}.{kind}"] - base for i in range(30) for kind in kinds]
        half = len(extra) // 2
        assert abs(sum(extra) / len(extra) - share) < 0.25
        assert abs(sum(extra[:half]) - sum(extra[half:])) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=7),
    st.integers(1, 600),
)
@settings(max_examples=150, deadline=None)
def test_matched_ranks_against_all_choices(sizes, target):
    shapes = {f"layer{i}": size for i, size in enumerate(sizes)}
    costs = [a + b for a, b in sizes]
    base = target // sum(costs)
    sums = [
        sum(r * c for r, c in zip(choice, costs, strict=True))
        for choice in itertools.product(*[[max(1, base), base + 1]] * len(costs))
    ]
    nearest = min(abs(s - target) for s in sums)
    try:
        ranks = matched_ranks(shapes, target)
    except StepFailed:
        assert nearest > 0.01 * target
        return
    assert abs(total(ranks, shapes) - target) == nearest <= 0.01 * target
    assert min(ranks.values()) >= 1 and max(ranks.values()) - min(ranks.values()) <= 1


def test_matched_ranks_say_what_is_nearest():
    with pytest.raises(StepFailed, match="rank 1 on 1 layers trains 128 parameters, more than the 100"):
        matched_ranks({"a": (64, 64)}, 100)
    with pytest.raises(StepFailed, match="train 256 parameters at the nearest, not 300"):
        matched_ranks({"a": (64, 64)}, 300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gpt2", "t5"):
        tiny.make(arch, tiny.DEFAULTS, root / arch)
    return root


def trained(folder, out, **fields):
    """An adapter whose B is not zero, saved by PEFT itself."""
    model = get_peft_model(load_model(folder), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1, generator=generator)
    model.save_pretrained(out)
    return out


def answer(model):
    ids = torch.arange(3, 27).view(2, 12)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


CASES = {
    "plain": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": EVERY,
            "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
            "alpha_pattern": {"q_proj": 21},
        },
    ),
    "regex": ("llama", {"r": 8, "target_modules": r".*\.(up|down)_proj"}),
    "gpt2": ("gpt2", {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "t5": ("t5", {"r": 4, "target_modules": ["q", "k"], "task_type": "SEQ_2_SEQ_LM"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("factor", [1.0, 1.37, 3.2])
def test_wider_computes_the_same(folders, tmp_path, case, factor):
    arch, fields = CASES[case]
    old = trained(folders / arch, tmp_path / "d", **fields)
    before = load_file(old / "adapter_model.safetensors")
    target = int(factor * sum(t.numel() for t in before.values()))
    wider(old, target, tmp_path / "wide")
    wide = load_file(tmp_path / "wide/adapter_model.safetensors")
    assert abs(sum(t.numel() for t in wide.values()) - target) <= 0.01 * target
    assert wide.keys() == before.keys()
    for key, tensor in before.items():
        if "lora_A" in key:
            assert torch.equal(wide[key][: len(tensor)], tensor)
            bound = tensor.shape[1] ** -0.5
            assert (wide[key][len(tensor) :].abs() <= bound).all()
            assert len(tensor) == len(wide[key]) or wide[key][len(tensor) :].abs().max() > bound / 2
        else:
            assert torch.equal(wide[key][:, : tensor.shape[1]], tensor)
            assert not wide[key][:, tensor.shape[1] :].any()
    plain = answer(load_model(folders / arch))
    d, w = (answer(PeftModel.from_pretrained(load_model(folders / arch), f)) for f in (old, tmp_path / "wide"))
    assert (d - plain).abs().max() > 1e-3  # the adapter does something
    torch.testing.assert_close(w, d, atol=1e-6 * max(1.0, float(d.abs().max())), rtol=0)
    model = methods.attach_saved(load_model(folders / arch), tmp_path / "wide", trainable=True)
    assert trainable_count(model) == sum(t.numel() for t in wide.values())


def test_wider_is_the_same_each_time(folders, tmp_path):
    old = trained(folders / "llama", tmp_path / "d", r=4, target_modules=["q_proj"])
    for name in ("one", "two"):
        wider(old, 4000, tmp_path / name)
        torch.rand(7)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_wider_refuses_to_shrink_and_what_it_cannot_reach(folders, tmp_path):
    old = trained(folders / "llama", tmp_path / "d", r=8, target_modules=["q_proj"])
    with pytest.raises(StepFailed, match="has 2048 parameters, more than the 1000"):
        wider(old, 1000, tmp_path / "x")
    with pytest.raises(StepFailed, match="2176 parameters at the nearest, not 2230"):
        wider(old, 2230, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_wider_wants_plain_lora(folders, tmp_path, more):
    old = trained(folders / "llama", tmp_path / "d", r=4, target_modules=["q_proj"], **more)
    with pytest.raises(Unsupported, match=f"plain LoRA alone, and this adapter is .or has. .*{next(iter(more))}"):
        wider(old, 4000, tmp_path / "x")


def test_wider_names_another_method(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    from safetensors.torch import save_file

    save_file({"base_model.model.x.ia3_l": torch.ones(3, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match="IA3"):
        wider(tmp_path, 4000, tmp_path / "x")


def test_matched_ranks_become_a_lora_of_that_size(folders):
    """The whole way of control `matched`: alpha / r is one number on all layers."""
    model = load_model(folders / "llama")
    shapes = {name: features(m) for name, m in block_linears(model).items()}
    target = int(5.4 * sum(map(sum, shapes.values())))
    pet = PetSettings(method="lora", r=16, lora_alpha=32, target_modules=["q_proj"])
    methods.attach(model, pet, targets=matched_ranks(shapes, target))
    assert abs(trainable_count(model) - target) <= 0.01 * target
    scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    ranks = {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scales == {2.0} and ranks == {5, 6}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True, "modules_to_save": ["lm_head"], "use_rslora": True},
    ],
)
def test_what_a_variant_trains_beside_its_factors_counts(more, folders):
    """DoRA's magnitudes and the like: the control of a cell trains as many parameters as the cell, with them."""
    model = load_model(folders / "llama")
    pet = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **more}
    control = {"control": "matched", "pet": pet, "recover": {"r": 6}}
    wanted = target_parameters(model, control)
    methods.attach(model, PetSettings(**pet), targets=control_ranks(model, PetSettings(**pet), control), seed=0)
    assert abs(trainable_count(model) - wanted) <= 0.01 * wanted


def test_a_control_without_room_for_ranks_says_so(folders):
    model = load_model(folders / "llama")
    pet = PetSettings(method="lora", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    control = {"control": "matched", "pet": {"method": "lora", "r": 2, "target_modules": ["q_proj"]}, "recover": {"r": 6}}
    with pytest.raises(StepFailed, match="train 31680 parameters beside LoRA's factors, which leaves none"):
        control_ranks(model, pet, control)
    assert not hasattr(model, "_cpet_pet")


def test_d_is_widened_by_other_rows_at_another_seed(folders, tmp_path):
    trained(folders / "llama", tmp_path / "d", r=4, target_modules=["q_proj"])
    found = []
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        wider(tmp_path / "d", 4000, tmp_path / name, seed=seed)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        found.append(torch.cat([t[4:].flatten() for n, t in sorted(tensors.items()) if "lora_A" in n]))
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
