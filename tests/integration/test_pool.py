"""Models that are lent: they come back as they were, or are loaded afresh."""

import pytest
import torch

from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.deployment import deploy
from cpet_bench.errors import StepFailed
from cpet_bench.models.loading import load_model
from cpet_bench.models.pool import ModelPool, canary
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.settings import PetSettings

MACHINE = {"device": "cpu", "dtype": "float32", "attention": "auto"}
LORA = PetSettings(method="lora", r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make("llama", DEFAULTS, folder)
    return folder


@pytest.fixture(scope="module")
def nf4(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("nf4")
    settings = BitsAndBytes.Settings(type="nf4")
    BitsAndBytes.compress(dense, out, settings, examples=None, device="cpu", dtype="float32", progress=lambda *_: None)
    return out


def backward(model) -> dict[str, bool]:
    """Which trainable tensors get a gradient that is not zero, after B is no longer zero."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in trainable.items():
            if "lora_B" in name:
                p.normal_()
    model.train()
    model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
    return {n: p.grad is not None and bool((p.grad != 0).any()) for n, p in trainable.items()}


def test_a_model_is_loaded_once_and_comes_back_as_it_was(dense):
    pool = ModelPool()
    with pool.lend("k", dense, MACHINE, "eval") as model:
        fresh = canary(model)
    with pool.lend("k", dense, MACHINE, "train") as model:
        methods.attach(model, LORA)
        assert all(backward(model).values())
        methods.detach(model)
    with pool.lend("k", dense, MACHINE, "eval") as model:
        assert torch.equal(canary(model), fresh)
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert pool.loads == 1 and not pool.reloads and pool.held() == ["k"]


def change(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3.0)


def test_a_model_that_a_borrower_changed_is_loaded_afresh(dense):
    pool = ModelPool()
    with pool.lend("k", dense, MACHINE, "train") as model:
        fresh = canary(model)
        change(model)
    assert pool.reloads == ["k"] and pool.held() == []
    with pool.lend("k", dense, MACHINE, "eval") as model:
        assert torch.equal(canary(model), fresh)
    assert pool.loads == 2


def test_what_a_model_said_while_it_was_changed_is_no_result(dense):
    pool = ModelPool()
    with pytest.raises(StepFailed, match="changed while it was evaluated"), pool.lend("k", dense, MACHINE, "eval") as model:
        change(model)
    assert pool.held() == []


def test_an_adapter_on_four_bits_that_were_evaluated_before(dense, nf4, tmp_path):
    """bitsandbytes 0.50 loses the scales of packed weights when their state_dict is asked for, as PEFT's loading does."""
    model = load_model(nf4)
    methods.attach(model, LORA)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.2)
    methods.save(model, tmp_path / "adapter")
    wanted = canary(model)
    pool = ModelPool()
    for _ in range(2):
        with pool.lend("k", nf4, MACHINE, "eval") as lent, deploy(lent, [tmp_path]) as deployed:
            torch.testing.assert_close(canary(deployed), wanted, atol=1e-4, rtol=1e-4)
            methods.save(deployed, tmp_path / "again")
            torch.testing.assert_close(canary(deployed), wanted, atol=1e-4, rtol=1e-4)
    assert pool.loads == 1 and not pool.reloads


def test_a_borrower_that_fails_gives_nothing_back(dense):
    pool = ModelPool()
    with pytest.raises(ZeroDivisionError), pool.lend("k", dense, MACHINE, "eval"):
        raise ZeroDivisionError
    assert pool.held() == []


def test_four_bits_evaluated_are_not_the_ones_to_train(nf4):
    """On a processor bitsandbytes repacks 4-bit weights in evaluation, and that path has no gradient."""
    pool = ModelPool()
    with pool.lend("k", nf4, MACHINE, "eval") as model:
        canary(model)
    with pool.lend("k", nf4, MACHINE, "train") as model:
        methods.attach(model, LORA)
        got = backward(model)
        methods.detach(model)
    assert len(got) == 8 and all(got.values())
    assert pool.reloads == ["k"] and pool.loads == 2


def test_only_so_many_are_kept(dense, nf4):
    pool = ModelPool(capacity=1)
    with pool.lend("a", dense, MACHINE, "eval"):
        pass
    with pool.lend("b", nf4, MACHINE, "eval"):
        pass
    assert pool.held() == ["b"]
