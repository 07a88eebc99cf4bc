"""Dropping blocks: the kept ones compute what they computed, in a model that transformers loads by itself."""

import json

import pytest
import torch
from pydantic import ValidationError

from compressed import answer, answer_elsewhere, can_be_trained, compress, documents
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.depth import Depth
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, block_lists
from cpet_bench.models.loading import load_model

EXAMPLES = documents()
BLOCKS = {
    "llama": ["model.layers"],
    "gpt2": ["transformer.h"],
    "opt": ["model.decoder.layers"],
    "t5": ["encoder.block", "decoder.block"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in BLOCKS:
        tiny.make(arch, {**tiny.DEFAULTS, "layers": 5}, root / arch)
    return root


def passing_by(model, kept):
    """The dense model with the blocks that are not kept passed by: what enters one leaves it."""
    for name, indices in kept.items():
        for i, block in enumerate(model.get_submodule(name)):
            if i in indices:
                continue

            def forward(hidden_states, *args, name=name, **kwargs):
                if "block" not in name:
                    return hidden_states
                return hidden_states, args[1], args[4]  # T5's blocks hand on the position biases

            block.forward = forward
    return model


def influence(model, name):
    """ShortGPT's block influence, document by document, with nothing padded."""
    blocks, cosines = model.get_submodule(name), [[] for _ in model.get_submodule(name)]
    for i, block in enumerate(blocks):

        def look(_module, args, kwargs, out, i=i):
            x = args[0] if args else kwargs["hidden_states"]
            y = out[0] if isinstance(out, tuple) else out
            cosines[i].append((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1))

        block.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        for ids in EXAMPLES:
            more = {}
            if model.config.is_encoder_decoder:
                more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
            model(input_ids=torch.tensor([ids]), **more)
    return [float(1 - torch.cat(found, dim=1).mean()) for found in cosines]


@pytest.mark.parametrize("settings", [{"ratio": 0.4}, {"ratio": 0.4, "order": "last"}, {"drop": [1, 3]}], ids=str)
@pytest.mark.parametrize("arch", BLOCKS)
def test_what_is_kept_computes_what_it_computed(folders, tmp_path, arch, settings):
    if arch == "t5" and "drop" in settings:
        settings = {"drop": [2]}  # of both lists
    facts = compress(Depth, folders / arch, tmp_path / "c", EXAMPLES, **settings)
    dense, kept = load_model(folders / arch), facts["kept_blocks"]
    assert list(kept) == block_lists(dense) == BLOCKS[arch]
    for name, indices in kept.items():
        if "drop" in settings:
            assert indices == [i for i in range(5) if i not in settings["drop"]]
        elif "order" in settings:
            assert indices == [0, 1, 2]
        else:
            wanted = influence(load_model(folders / arch), name)
            assert facts["block_influence"][name] == pytest.approx(wanted, abs=1e-5)
            free = range(1 if arch == "t5" else 0, 5)  # T5's first block makes the biases of all
            assert set(range(5)) - set(indices) == set(sorted(free, key=wanted.__getitem__)[:2])
    model = load_model(tmp_path / "c")
    torch.testing.assert_close(answer(model), answer(passing_by(dense, kept)), atol=1e-5, rtol=1e-5)
    assert facts["parameters"] == model.num_parameters() < load_model(folders / arch).num_parameters()
    assert facts["bytes"] == (tmp_path / "c/model.safetensors").stat().st_size
    assert facts["bytes"] < (folders / arch / "model.safetensors").stat().st_size and "simulated" not in facts
    assert json.loads((tmp_path / "c/cpet_compression.json").read_text())["kept_blocks"] == kept


@pytest.mark.parametrize("arch", BLOCKS)
def test_generation_with_a_cache_is_that_without(folders, tmp_path, arch):
    compress(Depth, folders / arch, tmp_path / "c", drop=[1])
    model = load_model(tmp_path / "c")
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ids = torch.tensor([[5, 9, 30, 7, 12]])
    with_cache, without = (model.generate(ids, use_cache=use, **how) for use in (True, False))
    assert torch.equal(with_cache, without)
    if arch == "llama":
        fields = json.loads((tmp_path / "c/config.json").read_text())
        assert fields["num_hidden_layers"] == 4 and [b.self_attn.layer_idx for b in model.model.layers] == [0, 1, 2, 3]
        torch.testing.assert_close(answer_elsewhere(tmp_path / "c", tmp_path / "logits.pt"), answer(model))
    can_be_trained(tmp_path / "c")


def test_kinds_of_attention_stay_with_their_blocks(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 16, "vocab_size": 495}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4, "layer_types": types}
    dense = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, max_position_embeddings=512, initializer_range=0.2)).eval()
    dense.save_pretrained(tmp_path / "dense")
    tiny.make_tokenizer().save_pretrained(tmp_path / "dense")
    facts = compress(Depth, tmp_path / "dense", tmp_path / "c", drop=[0, 3])
    assert json.loads((tmp_path / "c/config.json").read_text())["layer_types"] == types[1:3]
    wanted = answer(passing_by(dense, facts["kept_blocks"]))
    torch.testing.assert_close(answer(load_model(tmp_path / "c")), wanted, atol=1e-5, rtol=1e-5)


def test_a_class_whose_blocks_know_their_place_is_refused(tmp_path):
    """GPT-2 that scales each block's attention by its number: blocks that move down would compute something else."""
    from transformers import AutoModelForCausalLM

    tiny.make("gpt2", {**tiny.DEFAULTS, "layers": 3}, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    model.config.scale_attn_by_inverse_layer_idx = True
    model.save_pretrained(tmp_path / "dense")
    tiny.make_tokenizer().save_pretrained(tmp_path / "dense")
    compress(Depth, tmp_path / "dense", tmp_path / "end", drop=[2])
    with pytest.raises(Unsupported, match="GPT2LMHeadModel loads as another model"):
        compress(Depth, tmp_path / "dense", tmp_path / "start", drop=[0])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_masks_and_further_cuts_come_after(folders, tmp_path, arch):
    compress(Depth, folders / arch, tmp_path / "one", EXAMPLES, ratio=0.4)
    facts = compress(Magnitude, tmp_path / "one", tmp_path / "two", sparsity=0.5)
    assert facts["sparsity"] == pytest.approx(0.5, abs=1e-3)
    for layer in block_linears(load_model(tmp_path / "two")).values():
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    compress(Depth, tmp_path / "two", tmp_path / "three", drop=[0])
    compress(BitsAndBytes, tmp_path / "three", tmp_path / "four", type="int8")
    note = json.loads((tmp_path / "four/cpet_compression.json").read_text())
    assert note["backend"] == "bitsandbytes" and [n["backend"] for n in note["before"]] == ["depth", "magnitude", "depth"]
    assert [len(n["kept_blocks"][BLOCKS[arch][0]]) for n in note["before"] if "kept_blocks" in n] == [3, 2]
    assert answer(load_model(tmp_path / "four")).isfinite().all()
    with pytest.raises(Unsupported, match="plain weights"):
        compress(Depth, tmp_path / "four", tmp_path / "five", drop=[0])
    assert "put the pruning first" in Depth.refuse(Depth.Settings(drop=[0]), ["bitsandbytes"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "either ratio"),
        ({"ratio": 0.5, "drop": [1]}, "either ratio"),
        ({"ratio": 1.0}, "less than 1"),
        ({"ratio": 0}, "greater than 0"),
        ({"drop": []}, "at least one block"),
        ({"drop": [1, 1]}, "each once"),
        ({"drop": [-1]}, "greater than or equal to 0"),
        ({"drop": [1], "order": "last"}, "drop names them itself"),
        ({"ratio": 0.5, "order": "last", "calibration": {"documents": 4}}, "belongs to order bi"),
        ({"ratio": 0.5, "order": "first"}, "'bi' or 'last'"),
        ({"ration": 0.5}, "ration"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ValidationError, match=says):
        Depth.Settings(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"drop": [2, 5]}, "model.layers has blocks 0 to 4; there is no block 5"),
        ({"drop": [0, 1, 2, 3, 4]}, "drops 5 of the 5 blocks"),
        ({"ratio": 0.05}, "ratio 0.05 drops 0 of the 5 blocks of model.layers; it must be 1 to 4"),
        ({"ratio": 0.95}, "drops 5 of the 5 blocks"),
    ],
    ids=str,
)
def test_blocks_that_are_not_there(folders, tmp_path, settings, says):
    with pytest.raises(Unsupported, match=says):
        compress(Depth, folders / "llama", tmp_path / "c", EXAMPLES, **settings)
    assert not (tmp_path / "c").exists()


def test_only_influence_wants_text(folders, tmp_path):
    wants = {"bi": {"ratio": 0.4}, "last": {"ratio": 0.4, "order": "last"}, "named": {"drop": [0]}}
    settings = {name: Depth.Settings(**given) for name, given in wants.items()}
    assert {name: Depth.calibrated(s) for name, s in settings.items()} == {"bi": True, "last": False, "named": False}
    for one in settings.values():  # a step reads back what the plan wrote
        assert Depth.Settings.model_validate(one.model_dump(mode="json")) == one
    with pytest.raises(StepFailed, match="calibration documents"):
        compress(Depth, folders / "llama", tmp_path / "c", [], ratio=0.4)
