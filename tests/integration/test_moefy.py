"""MoEfication against its formula written out in plain operations: experts, routers, what a routed model computes."""

import json
from types import SimpleNamespace

import pytest
import torch
from new_process import answer, answers
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

from cpet_bench import registry
from cpet_bench.compression import moefy
from cpet_bench.compression.moefy import Moefy
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import routers, tiny
from cpet_bench.models.arch import block_linears, dense_weight, resident_bytes
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.settings import PetSettings, RecoverSettings
from cpet_bench.steps.models import run_compress

ARCHS = ("llama", "gpt2", "opt", "t5")
NETWORK = {  # by family: where a block's network is, what feeds the activation, what reads the product
    "llama": ("model.layers.{}.mlp", "gate_proj", "down_proj"),
    "gpt2": ("transformer.h.{}.mlp", "c_fc", "c_proj"),
    "opt": ("model.decoder.layers.{}", "fc1", "fc2"),
}
HOW = {"device": "cpu", "dtype": "float32", "progress": lambda *_: None}
SMALL = Moefy.Settings(experts=16, top=0.25, epochs=15)


def examples(count=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (6 + i % 9,), generator=g).tolist() for i in range(count)]


def networks(arch, model):
    """Name, layer that feeds the activation and layer that reads the product of every network."""
    if arch == "t5":
        names = [f"encoder.block.{i}.layer.1.DenseReluDense" for i in range(2)]
        return [(n, "wi", "wo") for n in [*names, *(f"decoder.block.{i}.layer.2.DenseReluDense" for i in range(2))]]
    name, w_in, w_out = NETWORK[arch]
    return [(name.format(i), w_in, w_out) for i in range(2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {}
    for arch in ARCHS:
        tiny.make(arch, tiny.DEFAULTS, root / arch)
        out = root / f"{arch}-moefy"
        facts = Moefy.compress(root / arch, out, SMALL, examples=examples(), **HOW)
        found[arch] = SimpleNamespace(dense=root / arch, out=out, facts=facts)
    return found


# -- experts -----------------------------------------------------------------------------------------------------------
def test_clusters_are_balanced_and_no_swap_is_better():
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(96, 12, generator=g), dim=1)
    expert, centroids = moefy.balanced_clusters(rows, 8, seed=3)
    assert expert.bincount().tolist() == [12] * 8
    means = torch.stack([rows[expert == e].mean(0) for e in range(8)])
    torch.testing.assert_close(centroids, means)
    distance = torch.cdist(rows, means).square()
    own = distance[torch.arange(96), expert]
    swapped = distance[:, expert]  # i in the expert of j
    assert bool((swapped + swapped.t() >= own[:, None] + own[None, :] - 1e-5).all())
    again, _ = moefy.balanced_clusters(rows, 8, seed=3)
    assert torch.equal(again, expert)


def test_planted_clusters_are_found():
    g = torch.Generator().manual_seed(1)
    centres = F.normalize(torch.randn(6, 40, generator=g), dim=1)
    planted = torch.randperm(48, generator=g) % 6
    rows = F.normalize(centres[planted] + 0.02 * torch.randn(48, 40, generator=g), dim=1)
    expert, _ = moefy.balanced_clusters(rows, 6, seed=0)
    assert len(set(zip(expert.tolist(), planted.tolist(), strict=True))) == 6


def test_equal_rows_still_give_balanced_clusters():
    expert, _ = moefy.balanced_clusters(torch.ones(12, 3) / 3**0.5, 4, seed=0)
    assert expert.bincount().tolist() == [3] * 4


@pytest.mark.parametrize("arch", ARCHS)
def test_experts_are_clusters_of_the_rows_that_feed_the_activation(made, arch):
    saved, model = load_file(made[arch].out / routers.FILE), load_model(made[arch].dense)
    for name, w_in, _ in networks(arch, model):
        expert = saved[f"{name}.expert"]
        assert expert.bincount().tolist() == [8] * 16
        rows = F.normalize(dense_weight(model.get_submodule(f"{name}.{w_in}")), dim=1)
        within = torch.stack([rows[expert == e] - rows[expert == e].mean(0) for e in range(16)]).square().sum()
        split = torch.arange(128).view(16, 8)  # neurons as they come
        assert within < (rows[split] - rows[split].mean(1, keepdim=True)).square().sum()


# -- routers -----------------------------------------------------------------------------------------------------------
def watched(model, arch, texts):
    """By network, (input, |product|) of every token of each text run alone."""
    seen = {name: ([], []) for name, _, _ in networks(arch, model)}
    hooks = []
    for name, *pair in networks(arch, model):
        for kept, layer in zip(seen[name], pair, strict=True):
            module = model.get_submodule(f"{name}.{layer}")
            keep = lambda m, args, kept=kept: kept.append(args[0].reshape(-1, args[0].shape[-1]))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(keep))
    for text in texts:
        ids = torch.tensor([text])
        more = {}
        if model.config.is_encoder_decoder:
            more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *text[:-1]]])
        with torch.no_grad():
            model(input_ids=ids, **more)
    for hook in hooks:
        hook.remove()
    return {name: (torch.cat(x), torch.cat(h).abs()) for name, (x, h) in seen.items()}


@pytest.mark.parametrize("arch", ARCHS)
def test_routers_learn_where_the_mass_is(made, arch):
    model, facts, saved = load_model(made[arch].dense), made[arch].facts, load_file(made[arch].out / routers.FILE)
    texts = examples()
    trained = watched(model, arch, [t for i, t in enumerate(texts) if i % 10 != 9])
    held = watched(model, arch, [t for i, t in enumerate(texts) if i % 10 == 9])
    assert facts["held_out_documents"] == 3 and facts["routers"]["measured_on"] == "held-out documents"
    for name, w_in, _ in networks(arch, model):
        first, second, expert = (saved[f"{name}.{part}"] for part in ("first", "second", "expert"))
        rows = F.normalize(dense_weight(model.get_submodule(f"{name}.{w_in}")), dim=1)
        centroids = torch.stack([rows[expert == e].mean(0) for e in range(16)])

        def scores(x, a, b):
            return torch.tanh(x / x.norm(dim=-1, keepdim=True) @ a.t()) @ b.t()

        def masses(h, expert=expert):
            return torch.stack([h[:, expert == e].sum(1) for e in range(16)], 1)

        def bce(a, b, x, h):
            y, p = masses(h), torch.sigmoid(scores(x, a, b))
            y = y / y.max(1, keepdim=True).values
            return float(-(y * p.log() + (1 - y) * (1 - p).log()).mean())

        mine = facts["routers"]["each"][name]
        assert mine["bce_start"] == pytest.approx(bce(centroids, torch.eye(16), *trained[name]), rel=1e-4)
        assert mine["bce_end"] == pytest.approx(bce(first, second, *trained[name]), rel=1e-4)
        assert mine["bce_end"] < mine["bce_start"] - 0.01

        x, h = held[name]
        mass, picked = masses(h), scores(x, first, second).topk(4, 1).indices
        true = mass.topk(4, 1).indices
        recall = sum(len(set(a) & set(b)) for a, b in zip(picked.tolist(), true.tolist(), strict=True)) / picked.numel()
        assert mine["recall"] == pytest.approx(recall, abs=0.01)
        assert mine["mass"] == pytest.approx(float((mass.gather(1, picked).sum(1) / mass.sum(1)).mean()), rel=1e-3)
        assert recall > 0.25 + 0.08 and mine["recall_random"] == 0.25
    assert facts["routers"]["bce_end"] < facts["routers"]["bce_start"]


def test_documents_may_be_run_in_several_passes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(moefy, "KEPT", 1)
    Moefy.compress(made["llama"].dense, tmp_path / "out", SMALL, examples=examples(), **HOW)
    one, several = (load_file(f / routers.FILE) for f in (made["llama"].out, tmp_path / "out"))
    assert one.keys() == several.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(several[name], tensor)


def test_the_seed_says_what_comes_out(made, tmp_path):
    def first(seed, out):
        settings = SMALL.model_copy(update={"seed": seed})
        Moefy.compress(made["opt"].dense, out, settings, examples=examples(), **HOW)
        return (out / routers.FILE).read_bytes()

    same = first(0, tmp_path / "a")
    assert same == (made["opt"].out / routers.FILE).read_bytes()
    assert same != first(1, tmp_path / "b")


# -- what a routed model computes ----------------------------------------------------------------------------------------
def reference(model, arch, saved, k):
    """The dense model with every network's product masked, token by token, as the formula says."""
    for name, w_in, w_out in networks(arch, model):
        first, second, expert = (saved[f"{name}.{part}"] for part in ("first", "second", "expert"))
        seen = {}

        def read(module, args, seen=seen):
            seen["x"] = args[0]

        def masked(module, args, seen=seen, first=first, second=second, expert=expert):
            h = args[0].clone()
            for at, x in enumerate(seen["x"].reshape(-1, first.shape[1])):
                score = second @ torch.tanh(first @ (x / x.norm()))
                off = ~torch.isin(expert, score.argsort(descending=True)[:k])
                h.view(-1, h.shape[-1])[at][off] = 0
            return (h,)

        model.get_submodule(f"{name}.{w_in}").register_forward_pre_hook(read)
        model.get_submodule(f"{name}.{w_out}").register_forward_pre_hook(masked)
    return model


@pytest.mark.parametrize("arch", ARCHS)
def test_a_share_of_the_experts_is_the_formula(made, arch):
    saved = load_file(made[arch].out / routers.FILE)
    dense = answer(load_model(made[arch].dense))
    wanted = answer(reference(load_model(made[arch].dense), arch, saved, 4))
    found = answer(load_model(made[arch].out))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, dense, atol=1e-2)


@pytest.mark.parametrize("arch", ARCHS)
def test_all_experts_are_the_dense_model(made, arch, tmp_path):
    settings = Moefy.Settings(experts=4, top=1.0, epochs=1)
    facts = Moefy.compress(made[arch].dense, tmp_path / "all", settings, examples=examples(4), **HOW)
    assert facts["experts_used"] == 4 and facts["routers"]["measured_on"] == "training documents"
    assert torch.equal(answer(load_model(tmp_path / "all")), answer(load_model(made[arch].dense)))


def test_tokens_are_routed_each_for_itself(made):
    model = load_model(made["llama"].out)
    router = model.model.layers[0].mlp.cpet_router
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    mask = router(x)
    assert mask.shape == (5, 7, 128) and mask.sum(-1).unique().tolist() == [32]
    assert torch.equal(mask[3, 4], router(x[3, 4])) and torch.equal(mask.flip(0, 1), router(x.flip(0, 1)))
    ids = torch.arange(3, 51).view(4, 12)
    other = torch.cat([ids[:1], ids[1:].flip(0, 1) + 100])
    torch.testing.assert_close(answer(model, ids)[0], answer(model, other)[0], atol=1e-5, rtol=1e-5)


def test_routers_are_in_the_sizes_and_not_among_the_layers(made):
    model, dense = load_model(made["llama"].out), load_model(made["llama"].dense)
    assert set(block_linears(model)) == set(block_linears(dense))
    assert set(model.state_dict()) == set(dense.state_dict())
    weights = 4 * (2 * (16 * 64 + 16 * 16)) + 8 * 2 * 128  # fp32 routers, int64 expert of each neuron
    assert resident_bytes(model) - resident_bytes(dense) == weights
    facts = made["llama"].facts
    assert facts["router_parameters"] == 2 * (16 * 64 + 16 * 16)
    added = sum(p.stat().st_size for p in made["llama"].out.glob("*.safetensors"))
    added -= sum(p.stat().st_size for p in made["llama"].dense.glob("*.safetensors"))
    assert facts["router_bytes"] == added and facts["simulated"] == ["speed"]


def test_what_is_beyond_the_paper_is_said(made):
    assert made["opt"].facts["extension"] is made["t5"].facts["extension"] is None
    assert "gate" in made["llama"].facts["extension"] and "GELU" in made["gpt2"].facts["extension"]


def test_the_papers_expert_size_is_the_default(made, tmp_path):
    facts = Moefy.compress(made["opt"].dense, tmp_path / "out", Moefy.Settings(epochs=1), examples=examples(4), **HOW)
    assert (facts["experts"], facts["neurons"], facts["experts_used"]) == (4, 32, 1)


# -- with the other parts ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ARCHS)
def test_lora_and_recovery_train_on_it_and_come_off_again(made, arch):
    model = load_model(made[arch].out)
    before = answer(model)
    layers = sorted({name.rpartition(".")[2] for name in block_linears(model)})
    deployed = methods.attach(model, PetSettings(method="lora", r=4, target_modules=layers), seed=0)
    recover.attach_recovery(deployed, RecoverSettings(r=4), seed=0)
    assert torch.equal(answer(deployed), before)
    trained = {n: p for n, p in deployed.named_parameters() if p.requires_grad}
    assert not any("cpet_router" in n for n in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids, losses, reached = torch.arange(3, 51).view(4, 12), [], set()
    for _ in range(3):
        loss = deployed(input_ids=ids, labels=ids).loss
        loss.backward()
        reached |= {n for n, p in trained.items() if p.grad is not None and float(p.grad.abs().max()) > 0}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0] and reached == set(trained)
    recover.detach_recovery(deployed)
    methods.detach(deployed)
    assert torch.equal(answer(model), before)


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_a_lora_on_the_output_layer_reads_the_picked_neurons_alone(made, arch):
    model = load_model(made[arch].out)
    name, w_in, w_out = networks(arch, model)[0]
    deployed = methods.attach(model, PetSettings(method="lora", r=4, target_modules=[w_in, w_out]), seed=0)
    seen = {}
    model.get_submodule(f"{name}.{w_out}.lora_A.default").register_forward_pre_hook(lambda m, a: seen.update(h=a[0]))
    model.get_submodule(f"{name}.{w_in}").register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    answer(deployed)
    mask = model.get_submodule(f"{name}.cpet_router")(seen["x"])
    assert bool((seen["h"].reshape(mask.shape)[~mask] == 0).all()) and float(seen["h"].abs().max()) > 0


def compress_step(source, out, backend, settings):
    """The step that a plan makes, without calibration."""
    context = SimpleNamespace(
        settings={"backend": backend, "settings": settings},
        inputs={"source": source},
        out=out,
        pool=SimpleNamespace(clear=lambda: None),
        machine={"owns": ["cpu"], "dtype": "float32"},
        progress=lambda *_: None,
    )
    return run_compress(context)


def test_compressed_further_it_keeps_its_routers(made, tmp_path):
    source = made["llama"].out
    for backend, settings in (("bitsandbytes", {"type": "nf4"}), ("magnitude", {"pattern": "2:4"})):
        out = tmp_path / backend
        facts = compress_step(source, out, backend, settings)
        assert facts["bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))
        assert (out / routers.FILE).read_bytes() == (source / routers.FILE).read_bytes()
        model = load_model(out)
        saved = load_file(out / routers.FILE)
        (out / routers.FILE).unlink()
        alone = load_model(out)
        plain = answer(alone)
        wanted = answer(reference(load_model(out), "llama", saved, 4))
        torch.testing.assert_close(answer(model), wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, plain, atol=1e-2)
        (out / routers.FILE).write_bytes((source / routers.FILE).read_bytes())


def test_the_same_in_a_new_process(made, tmp_path):
    compress_step(made["llama"].out, tmp_path / "nf4", "bitsandbytes", {"type": "nf4"})
    folders = [made["llama"].out, made["gpt2"].out, made["t5"].out, tmp_path / "nf4"]
    for folder, found in zip(folders, answers(folders, tmp_path / "logits"), strict=True):
        assert torch.equal(found, answer(load_model(folder)))


# -- what cannot be ----------------------------------------------------------------------------------------------------
def test_experts_that_cannot_be_equal(made, tmp_path):
    with pytest.raises(Unsupported, match=r"model.layers.0.mlp: 128 neurons .* 12 equal experts; .*8, 16"):
        Moefy.compress(made["llama"].dense, tmp_path / "out", Moefy.Settings(experts=12), examples=examples(4), **HOW)
    tiny.make("opt", {**tiny.DEFAULTS, "intermediate": 40}, tmp_path / "narrow")
    with pytest.raises(Unsupported, match="40 neurons"):
        Moefy.compress(tmp_path / "narrow", tmp_path / "out", Moefy.Settings(), examples=examples(4), **HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"experts": 1}, {"top": 0}, {"top": 1.5}, {"epochs": 0}, {"lr": 0}, {"expert": 4}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValidationError):
        Moefy.Settings.model_validate(wrong)


def test_orders_that_cannot_work():
    assert registry.get("compression", "moefy") is Moefy
    assert Moefy.refuse(SMALL, ["bitsandbytes"]) is None
    assert "already" in Moefy.refuse(SMALL, ["moefy", "magnitude"])
    assert Moefy.refuse(SMALL, ["magnitude"]) is None


@pytest.mark.parametrize(("backend", "settings"), [("bitsandbytes", {"type": "nf4"}), ("rtn", {"bits": 4})])
def test_experts_of_packed_weights(made, tmp_path, backend, settings):
    """The paper's order: quantised first. The weights stay packed; clusters are of what they stand for."""
    facts = compress_step(made["llama"].dense, tmp_path / "packed", backend, settings)
    found = Moefy.compress(tmp_path / "packed", tmp_path / "out", SMALL, examples=examples(8), **HOW)
    assert found["bytes"] == facts["bytes"] + found["router_bytes"]
    saved, model = load_file(tmp_path / "out" / routers.FILE), load_model(tmp_path / "out")
    wanted = answer(reference(load_model(tmp_path / "packed"), "llama", saved, found["experts_used"]))
    torch.testing.assert_close(answer(model), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, answer(load_model(tmp_path / "packed")), atol=1e-2)


def test_without_text(made, tmp_path):
    with pytest.raises(StepFailed, match="calibration"):
        Moefy.compress(made["llama"].dense, tmp_path / "out", SMALL, examples=None, **HOW)


def test_a_model_without_a_known_network():
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))])
    with pytest.raises(Unsupported, match="layers.0 has no feed-forward network.* wi act wo; .*layers.0 has 0, 2; pruning"):
        routers.feed_forwards(model)


@pytest.mark.parametrize("options", [{"layers": 1}, {"hidden": 32}, {"intermediate": 256}])
def test_routers_of_another_model(made, tmp_path, options):
    tiny.make("llama", {**tiny.DEFAULTS, **options}, tmp_path / "other")
    (tmp_path / "other" / routers.FILE).write_bytes((made["llama"].out / routers.FILE).read_bytes())
    with pytest.raises(StepFailed, match="router"):
        load_model(tmp_path / "other")


def test_facts_are_json(made):
    for arch in ARCHS:
        assert json.loads(json.dumps(made[arch].facts))["calibration_documents"] == 30
