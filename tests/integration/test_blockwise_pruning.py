"""Wanda and SparseGPT against their formulas, written out layer by layer from what each layer really reads."""

import pytest
import torch
from pydantic import ValidationError

from compressed import answer, answer_elsewhere, can_be_trained, compress, documents, inputs_of
from cpet_bench.compression import sparsegpt
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.masks import weight_out_in
from cpet_bench.compression.sparsegpt import SparseGpt
from cpet_bench.compression.wanda import Wanda
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, block_lists, dense_weight
from cpet_bench.models.loading import load_model

ARCHITECTURES = ("llama", "gpt2", "t5", "opt")
EXAMPLES = documents()
PATTERNS = [{"pattern": "2:4"}, {"sparsity": 0.6}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ARCHITECTURES:
        tiny.make(arch, {**tiny.DEFAULTS, "hidden": 48}, root / arch)
    gemma(root / "gemma3")
    return root


def gemma(out):
    """A model whose blocks differ in the mask and the rotary angles they are given: a window of 4 tokens, and all of them."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    types = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 495}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4, "layer_types": types}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, max_position_embeddings=512, initializer_range=0.2))
    model.save_pretrained(out)
    tiny.make_tokenizer().save_pretrained(out)


def as_it_was_pruned(dense, done):
    """By layer, what it read when its block was pruned (tokens x in): the blocks before it pruned, its own not yet."""
    dense, done = load_model(dense), load_model(done)
    layers, after = block_linears(dense), block_linears(done)
    found = {}
    with torch.no_grad():
        for blocks in block_lists(dense):
            for i in range(len(dense.get_submodule(blocks))):
                mine = [name for name in layers if name.startswith(f"{blocks}.{i}.")]
                found |= inputs_of(dense, EXAMPLES, mine)
                for name in mine:
                    layers[name].weight.copy_(after[name].weight)
    weights = {name: weight_out_in(module).double() for name, module in after.items()}
    return found, weights


def kept(score, settings, per_row):
    """Which weights stay, by sorting: the highest n of each m, or the highest share (of each row, or of all)."""
    if settings.get("pattern"):
        n, m = map(int, settings["pattern"].split(":"))
        rank = score.unflatten(1, (-1, m)).argsort(-1, descending=True).argsort(-1)
        return (rank < n).flatten(1)
    flat = score if per_row else score.reshape(1, -1)
    rank = flat.argsort(-1).argsort(-1)
    return (rank >= int(flat.shape[1] * settings["sparsity"])).view_as(score)


@pytest.mark.parametrize("settings", PATTERNS, ids=str)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "gemma3"])
def test_wanda_is_its_formula(folders, tmp_path, arch, settings):
    compress(Wanda, folders / arch, tmp_path / "c", EXAMPLES, **settings)
    dense = block_linears(load_model(folders / arch))
    inputs, after = as_it_was_pruned(folders / arch, tmp_path / "c")
    wrong = total = 0
    for name, x in inputs.items():
        weight = weight_out_in(dense[name]).double()
        mask = kept(weight.abs() * x.norm(dim=0), settings, per_row=True)
        wrong += int((mask != (after[name] != 0)).sum())
        total += mask.numel()
        stays = after[name] != 0
        assert torch.equal(after[name][stays], weight[stays])  # nothing is updated
    assert wrong < 2e-4 * total  # scores that differ in their last digits alone


def reference(weight, x, settings, damp=0.01, block=128):
    """SparseGPT written out in fp64: for every column the inverse of H over it and those right of it, found anew."""
    weight, n = weight.clone(), weight.shape[1]
    h = 2 / len(x) * x.t() @ x
    h += damp * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(n)]
    diagonal = torch.stack([inverse[0, 0] for inverse in inverses])
    step = int(settings["pattern"].split(":")[1]) if "pattern" in settings else block
    for j in range(n):
        if j % step == 0:
            here = slice(j, j + step)
            mask = kept(weight[:, here] ** 2 / diagonal[here], settings, per_row=False)
        error = torch.where(mask[:, j % step], 0.0, weight[:, j]) / diagonal[j]
        weight[:, j:] -= torch.outer(error, inverses[j][0])
        weight[:, j][~mask[:, j % step]] = 0
    return weight


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        *((arch, settings) for arch in ARCHITECTURES for settings in PATTERNS),
        ("llama", {"pattern": "5:8", "block": 24}),
        ("gpt2", {"sparsity": 0.5, "block": 20}),
    ],
    ids=str,
)
def test_sparsegpt_is_as_good_as_its_formula_and_better_than_the_others(folders, tmp_path, arch, settings):
    facts = compress(SparseGpt, folders / arch, tmp_path / "c", EXAMPLES, **settings)
    dense = block_linears(load_model(folders / arch))
    inputs, after = as_it_was_pruned(folders / arch, tmp_path / "c")
    assert facts["zeros_checked"] and facts["calibration_tokens"] == sum(map(len, EXAMPLES))
    sums = dict.fromkeys(("ours", "wanda", "magnitude"), 0.0)
    for name, x in inputs.items():
        weight = weight_out_in(dense[name]).double()

        def lost(other, x=x, weight=weight):
            return float((x @ (weight - other).t()).square().sum())

        ours = lost(after[name])
        assert ours <= 1.1 * lost(reference(weight, x, settings, block=settings.get("block", 128))), name
        sums["ours"] += ours
        sums["wanda"] += lost(weight * kept(weight.abs() * x.norm(dim=0), settings, per_row=True))
        sums["magnitude"] += lost(weight * kept(weight.abs(), settings, per_row=False))
        zeros = float((after[name] == 0).double().mean())
        if "pattern" in settings:
            n, m = map(int, settings["pattern"].split(":"))
            assert ((after[name].unflatten(1, (-1, m)) != 0).sum(-1) <= n).all(), name
            assert zeros >= 1 - n / m - 1e-9
        else:
            assert abs(zeros - settings["sparsity"]) < 1e-3, name
    assert sums["ours"] < 0.95 * sums["wanda"] and sums["ours"] < 0.95 * sums["magnitude"], sums


def test_one_layer_weight_by_weight():
    """Where inputs are mildly correlated no mask is a toss-up, and the sweep gives the very weights of the formula."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 60, generator=g)
    x = torch.randn(500, 60, generator=g) @ (torch.eye(60) + 0.1 * torch.randn(60, 60, generator=g))
    for settings in ({"sparsity": 0.5, "block": 25}, {"pattern": "2:4", "block": 20}, {"pattern": "3:5", "block": 5}):
        factor = sparsegpt.inverse_factor(2 / 500 * x.t() @ x, 0.01)
        found = sparsegpt.pruned(weight, factor, SparseGpt.Settings(**settings))
        wanted = reference(weight.double(), x.double(), settings, block=settings["block"])
        torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


def test_uncorrelated_inputs_need_no_update():
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    found = sparsegpt.pruned(weight, sparsegpt.inverse_factor(torch.eye(32), 0.01), SparseGpt.Settings(pattern="2:4"))
    assert torch.equal(found, weight * kept(weight.abs(), {"pattern": "2:4"}, per_row=False))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_saved_loaded_and_trained(folders, tmp_path, arch):
    compress(SparseGpt, folders / arch, tmp_path / "c", EXAMPLES, pattern="2:4")
    model = load_model(tmp_path / "c")
    assert not torch.equal(answer(model), answer(load_model(folders / arch)))
    if arch == "llama":
        torch.testing.assert_close(answer_elsewhere(tmp_path / "c", tmp_path / "logits.pt"), answer(model))
    can_be_trained(tmp_path / "c")


def test_the_zeros_stay_where_the_result_is_quantised(folders, tmp_path):
    compress(SparseGpt, folders / "llama", tmp_path / "pruned", EXAMPLES, pattern="2:4")
    compress(BitsAndBytes, tmp_path / "pruned", tmp_path / "c", type="int8")
    for name, module in block_linears(load_model(tmp_path / "c")).items():
        assert float((dense_weight(module) == 0).float().mean()) >= 0.5, name
    with pytest.raises(Unsupported, match="plain weights"):
        compress(SparseGpt, tmp_path / "c", tmp_path / "again", EXAMPLES, pattern="2:4")
    assert "put the pruning first" in SparseGpt.refuse(SparseGpt.Settings(pattern="2:4"), ["bitsandbytes"])
    assert SparseGpt.refuse(SparseGpt.Settings(pattern="2:4"), ["magnitude"]) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pattern": "2:3"}, "block 128 cuts a group of 2:3; 126 would not"),
        ({"pattern": "4:8", "block": 4}, "block 4 cuts a group of 4:8; 8 would not"),
        ({"pattern": "2:4", "damp": 0}, "greater than 0"),
        ({"pattern": "2:4", "sparsity": 0.5}, "either pattern"),
        ({"sparsity": 0.5, "dampening": 0.1}, "dampening"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValidationError, match=says):
        SparseGpt.Settings(**settings)


def test_widths_and_texts_that_cannot_be(folders, tmp_path):
    for backend in (SparseGpt, Wanda):
        more = {"block": 125} if backend is SparseGpt else {}
        with pytest.raises(
            Unsupported, match=r"model.layers.0.self_attn.q_proj reads 48 inputs, which 5 .*; n:m works with m of 2"
        ):
            compress(backend, folders / "llama", tmp_path / "c", EXAMPLES, pattern="2:5", **more)
        with pytest.raises(StepFailed, match="calibration documents"):
            compress(backend, folders / "llama", tmp_path / "c", [], pattern="2:4")
    with pytest.raises(StepFailed, match="inputs of lay are all zero"):
        sparsegpt.inverse_factor(torch.zeros(4, 4), 0.01, "lay")
    with pytest.raises(StepFailed, match="inputs of lay are not finite"):
        sparsegpt.inverse_factor(torch.full((4, 4), float("nan")), 0.01, "lay")
