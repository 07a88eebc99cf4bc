"""Trained tensors that the model holds in 16 bits are stepped in float32: LN-tuning's norms, LoRA's modules_to_save."""

import pytest
import torch
from test_training_options import folders, rows, run  # noqa: F401
from torch.nn import functional as F

from cpet_bench.errors import StepFailed, Stopping
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.plan_parts import replaces_weights
from cpet_bench.settings import PetSettings, TrainSettings
from cpet_bench.training import data_order

TRAIN = {"steps": 8, "batch": 8, "lr": 2e-4}  # all eight steps together move a weight by at most 0.0016, half of 1/256 is 0.002
NORMS = {"method": "ln_tuning", "target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}


@pytest.fixture
def model(folders):
    def load(dtype="bfloat16", **fields):
        found = load_model(folders["llama"], dtype=dtype)
        with torch.no_grad():  # norms as a trained model has them, of many sizes
            for name, p in found.named_parameters():
                if "norm" in name:
                    p.copy_(torch.linspace(0.01, 2, len(p)))
        return methods.attach(found, PetSettings(**NORMS | fields), seed=0)

    return load


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def by_hand(model, data, halves):
    """AdamW in a loop of this test's own, on float32 copies of what is trained (halves: on the 16-bit tensors themselves)."""
    own = [p for p in model.parameters() if p.requires_grad]
    copies = own if halves else [p.detach().float().requires_grad_() for p in own]
    optimizer = torch.optim.AdamW(copies, lr=TRAIN["lr"], weight_decay=0)
    for batch in data_order(len(data), TrainSettings(**TRAIN)):
        loss = 0
        for i in batch:
            logits = model(input_ids=torch.tensor([data[i]["context_ids"]])).logits[0, -1, [9, 10]]
            loss = loss + F.cross_entropy(logits[None].float(), torch.tensor([data[i]["gold"]])) / 8
        for p in own:
            p.grad = None
        loss.backward()
        for p, copy in zip(own, copies, strict=True):
            copy.grad = p.grad.to(copy.dtype)
        optimizer.step()
        with torch.no_grad():
            for p, copy in zip(own, copies, strict=True):
                p.copy_(copy)
    return trained(model)


def test_steps_that_bfloat16_would_swallow_add_up(model, tmp_path):
    data = rows(64)
    ours, start = model(), trained(model())
    assert {p.dtype for p in start.values()} == {torch.bfloat16}
    run(ours, data, tmp_path, **TRAIN)
    got, wanted, swallowed = trained(ours), by_hand(model(), data, False), by_hand(model(), data, True)
    size = torch.cat([t.float() for t in start.values()])

    def moved(found):
        return (torch.cat([t.float() for t in found.values()]) - size).abs()

    def mean_from(found):
        return float((moved(found) - moved(wanted)).abs().mean() / moved(wanted).mean())

    assert {p.dtype for p in got.values()} == {torch.bfloat16}
    assert mean_from(got) < 0.1  # not 0: passes of one document round otherwise than those of eight
    assert mean_from(swallowed) > 0.3
    large = size > 1  # each step alone is a twentieth of what such a weight can tell apart
    assert moved(swallowed)[large].sum() == 0 and moved(got)[~large].count_nonzero() > moved(swallowed).count_nonzero()


def test_steps_that_never_reach_the_model_are_no_training(model, tmp_path):
    with pytest.raises(StepFailed, match="too small to change .*norm.* in torch.bfloat16"):
        run(model(), rows(64), tmp_path / "none", **TRAIN | {"lr": 1e-6})
    one = model()
    with torch.no_grad():
        next(p for p in one.parameters() if p.requires_grad).fill_(2.0)  # the largest: 1/128 apart
    facts = run(one, rows(64), tmp_path / "some", **TRAIN)
    assert facts["unchanged"] == [next(n for n, p in one.named_parameters() if p.requires_grad)]


def test_a_stopped_training_goes_on_with_its_masters(model, tmp_path):
    data = rows(64)
    whole = model()
    facts = run(whole, data, tmp_path / "whole", **TRAIN)
    seen = []

    def stop():
        seen.append(1)
        return len(seen) == 3

    with pytest.raises(Stopping):
        run(model(), data, tmp_path / "parts", stop=stop, **TRAIN)
    again = model()
    more = run(again, data, tmp_path / "parts", **TRAIN)
    assert [x["loss"] for x in more["losses"]] == [x["loss"] for x in facts["losses"]]
    wanted = trained(whole)
    assert all(torch.equal(p, wanted[name]) for name, p in trained(again).items())


def test_a_float16_models_own_weights_are_trained(model, tmp_path):
    data = rows(64)
    half = model("float16")
    facts = run(half, data, tmp_path / "half", **TRAIN | {"lr": 1e-2})
    exact = model("float32")
    wanted = run(exact, data, tmp_path / "exact", **TRAIN | {"lr": 1e-2})
    assert facts["loss_scale"] == 2**16
    assert facts["losses"][0]["grad_norm"] == pytest.approx(wanted["losses"][0]["grad_norm"], rel=0.02)
    assert [x["loss"] for x in facts["losses"]] == pytest.approx([x["loss"] for x in wanted["losses"]], rel=5e-3)
    for name, p in trained(half).items():
        assert p.dtype == torch.float16 and torch.allclose(p.float(), trained(exact)[name], atol=5e-3), name


def test_lora_trains_the_modules_it_saves_whole(model, tmp_path):
    """Its own factors are float32 already, and are stepped as they are."""
    more = {"method": "lora", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}
    mixed = model(**more)
    start = trained(mixed)
    assert {p.dtype for p in start.values()} == {torch.bfloat16, torch.float32}
    run(mixed, rows(64), tmp_path, **TRAIN | {"lr": 5e-3})
    for name, p in trained(mixed).items():
        assert p.dtype == start[name].dtype and not torch.equal(p, start[name]), name


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (NORMS, True),
        ({"method": "LN-tuning"}, True),
        ({"method": "adaption_prompt"}, True),
        ({"method": "lora", "bias": "lora_only"}, True),
        ({"method": "lora", "modules_to_save": ["norm"]}, True),
        ({"method": "lora", "bias": "none", "r": 4}, False),
        ({"method": "ia3"}, False),
        ({"method": "bitfit"}, False),  # float32 differences of our own
    ],
)
def test_what_was_trained_before_in_16_bits_has_another_key(fields, wanted):
    assert replaces_weights(PetSettings(**fields)) is wanted
