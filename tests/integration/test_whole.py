"""Full fine-tuning and BitFit against really unfrozen weights: the same gradients and steps, kept apart from the model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from whole_modules import (
    ALL,
    ELSE,
    EXISTING,
    FULL,
    folders,  # noqa: F401
    learn,
    loss_of,
    shake,
    trained,
)

from compressed import answer
from cpet_bench.deployment import deploy
from cpet_bench.errors import Unsupported
from cpet_bench.models.arch import block_linears
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring.fairness import trainable_count
from cpet_bench.settings import PetSettings


# -- the same as training the weights themselves -----------------------------------------------------------------------
def unfrozen(model, pet):
    """The weights themselves, ready to be trained; biases that are not there are put there."""
    model.requires_grad_(False)
    if pet.fields.get("where") == "all":
        for layer in block_linears(model).values():
            if layer.bias is None:
                layer.bias = torch.nn.Parameter(torch.zeros(layer.weight.shape[0]))
    ours = {n: p for n, p in model.named_parameters() if not any(part in n for part in ELSE)}
    ours = {n: p for n, p in ours.items() if pet is FULL or n.endswith(".bias")}
    for p in ours.values():
        p.requires_grad_(True)
    return ours


@pytest.mark.parametrize(
    ("arch", "pet"), [("llama", FULL), ("gpt2", FULL), ("t5", FULL), ("gpt2", EXISTING), ("llama", ALL), ("t5", ALL)]
)
def test_gradients_and_steps_are_those_of_the_weights_themselves(folders, arch, pet):
    model, reference = load_model(folders / arch), load_model(folders / arch)
    start = answer(model)
    methods.attach(model, pet)
    assert torch.equal(answer(model), start)
    wanted = unfrozen(reference, pet)
    found = trained(model)
    assert found.keys() == wanted.keys() and trainable_count(model) == sum(p.numel() for p in wanted.values())
    assert all(p.dtype == torch.float32 and p.shape == wanted[n].shape and not p.any() for n, p in found.items())
    losses = []
    for _ in range(2):  # the second step starts from differences that are not zero
        for one in (model, reference):
            loss = loss_of(one)
            loss.backward()
            losses.append(loss.item())
        for n, p in found.items():
            torch.testing.assert_close(p.grad, wanted[n].grad, atol=1e-6, rtol=1e-5, msg=lambda text, n=n: f"{n}: {text}")
        for parameters in (found, wanted):
            torch.optim.SGD(parameters.values(), lr=0.3).step()
            for p in parameters.values():
                p.grad = None
    assert losses[2] < losses[0] - 1e-3 and losses[2] == pytest.approx(losses[3], abs=1e-5)
    torch.testing.assert_close(answer(model), answer(reference), atol=1e-5, rtol=1e-5)
    methods.detach(model)
    assert torch.equal(answer(model), start)


def test_checkpointed_passes_have_the_same_gradients(folders):
    """Blocks that are run again for their gradients, and left in the middle of it, compute with the differences too."""
    found = []
    for checkpointed in (False, True):
        model = methods.attach(load_model(folders / "gpt2"), FULL)
        shake(model)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        loss_of(model).backward()
        found.append({n: p.grad for n, p in trained(model).items()})
        assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-7, rtol=1e-5)


def test_steps_too_small_for_bf16_add_up(folders):
    """W + D is rounded once: what single steps leave unchanged, a sum of them changes. An error puts W back."""
    model = load_model(folders / "llama", dtype="bfloat16")
    layer = model.model.layers[1].mlp.up_proj
    weight, seen = layer.weight, []
    methods.attach(model, FULL)
    forward = layer.forward
    layer.forward = lambda x: seen.append(layer.weight.detach().clone()) or forward(x)
    step = weight.float().abs() * 2.0**-11  # an eighth of the distance to the next number at the least
    d = trained(model)["model.layers.1.mlp.up_proj.weight"]
    for _ in range(16):
        with torch.no_grad():
            d += step
        answer(model)
        assert layer.weight is weight
    assert torch.equal(seen[0], weight) and torch.equal(seen[-1], (weight.float() + 16 * step).bfloat16())
    assert (seen[-1] != weight).all()
    layer.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        answer(model)
    assert layer.weight is weight


# -- pruned models keep their zeros ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "dense"), [("pruned", "llama"), ("pruned2", "gpt2")])
def test_a_pruned_model_keeps_its_zeros(folders, kind, dense, tmp_path):
    """Trained, inherited from a dense model, deployed; unless they shall be trained as well."""
    model = load_model(folders / kind)
    zeros = {f"{n}.weight": m.weight == 0 for n, m in block_linears(model).items()}
    assert all(z.float().mean() == 0.5 for z in zeros.values())

    def kept(part):
        """Whether all weights that were zero, and no others, are zero in this model or file."""
        return all(torch.equal(part[n] == 0, z) for n, z in zeros.items())

    methods.attach(model, FULL)
    learn(model, tmp_path / "scratch")
    biases = [p for n, p in trained(model).items() if n.endswith(".bias")]
    assert all(p.any() for p in biases)  # a bias that starts from zeros is no pruned weight
    methods.save(model, tmp_path / "own/adapter")
    methods.detach(model)
    other = methods.attach(load_model(folders / dense), FULL)
    shake(other)
    methods.save(other, tmp_path / "dense/adapter")
    assert json.loads((tmp_path / "dense/adapter/whole.json").read_text())["zeros"] == []
    assert kept(load_file(tmp_path / "own/adapter/whole.safetensors"))
    assert json.loads((tmp_path / "own/adapter/whole.json").read_text())["zeros"] == list(zeros)
    for folder in ("own", "dense"):
        with deploy(model, [tmp_path / folder]) as deployed:
            assert kept(dict(deployed.named_parameters()))
    methods.attach_saved(model, tmp_path / "dense/adapter", trainable=True)
    assert kept(trained(model))
    learn(model, tmp_path / "inherited", steps=2)
    assert kept(trained(model))
    methods.detach(model)
    methods.attach(model, PetSettings(method="full", zeros="train"))
    loss_of(model).backward()
    assert all(p.grad[zeros[n]].any() for n, p in trained(model).items() if n in zeros)


# -- classes of layers -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "pet", "says"),
    [
        ("nf4", FULL, r"those of model.layers.0.self_attn.q_proj are packed \(Linear4bit\): lora, nola, or bitfit"),
        ("packed", FULL, r"transformer.h.0.attn.c_attn are packed \(PackedLinear\)"),
        ("nf4", EXISTING, "LlamaForCausalLM have no biases for bitfit to train; where: all adds one"),
        ("t5", EXISTING, "no biases"),
    ],
)
def test_what_cannot_be_trained(folders, kind, pet, says):
    model = load_model(folders / kind)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(Unsupported, match=says):
        methods.attach(model, pet)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted and not hasattr(model, "cpet_whole")


@pytest.mark.parametrize(("kind", "pet"), [("nf4", ALL), ("packed", EXISTING), ("moefy", FULL)])
def test_beside_other_layers(folders, kind, pet, tmp_path):
    """Every tensor learns on quantised layers and beside routers; saved and put on afresh they compute what was trained."""
    model = load_model(folders / kind)
    methods.attach(model, pet)
    learn(model, tmp_path / "scratch")
    methods.save(model, tmp_path / "a/adapter")
    names = {n.rpartition(".")[0] for n in trained(model)}
    assert set(block_linears(model)) <= names
    model.eval()
    found, bare = answer(model), answer(load_model(folders / kind))
    with deploy(load_model(folders / kind), [tmp_path / "a"]) as deployed:
        torch.testing.assert_close(answer(deployed), found, atol=1e-5, rtol=1e-5)
        assert (found - bare).abs().max() > 1e-2
