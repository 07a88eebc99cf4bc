"""D on structurally cut models, against D on the dense model with the same groups' activations zero and blocks passed over."""

import json

import pytest
import torch
from inherited import EVERY, LORA, answer, answer_of, cut, folders, masked, pruned, same, train_d  # noqa: F401

from compressed import compress as run_backend
from cpet_bench.compression.depth import Depth
from cpet_bench.errors import Unsupported
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods

CASES = [
    ("llama", LORA),
    ("llama", {**LORA, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"down_proj": 1}}),
    ("llama", {**LORA, "use_dora": True, "use_rslora": True}),
    ("llama", {**LORA, "bias": "all"}),
    ("llama", {"method": "ia3", "feedforward_modules": ["down_proj", "o_proj"]}),
    ("llama", {"method": "loha", "r": 3}),
    ("llama", {"method": "oft", "oft_block_size": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
    ("llama", {"method": "adalora", "init_r": 3, "total_step": 10}),
    ("llama", {"method": "ln_tuning", "target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    ("llama", {"method": "full", "target_modules": None}),
    ("gpt2", {"method": "full", "target_modules": None}),
    ("gpt2", {"method": "bitfit", "target_modules": None}),
    ("gpt2", LORA),
    ("gpt2", {**LORA, "bias": "all"}),
    ("gpt2", {**LORA, "use_dora": True}),
    ("gpt2", {"method": "ia3", "feedforward_modules": ["mlp.c_proj"]}),
    ("t5", LORA),
    ("t5", {"method": "ln_tuning", "target_modules": ["layer_norm"]}),
]


@pytest.mark.parametrize(("arch", "pet"), CASES)
def test_computes_what_d_does_on_the_masked_dense_model(arch, pet, folders, pruned, tmp_path):
    dense, (out, groups) = folders / arch, pruned[arch]
    adapter = train_d(dense, tmp_path / "d", arch, **pet)
    facts = cut(out, adapter, tmp_path / "cut", dense=dense)
    assert (facts["tensors"]["cut"] > 0) == (pet.get("method") not in ("oft", "ln_tuning"))
    assert facts["tensors"]["renamed"] == facts["tensors"]["gone"] == 0
    full = load_model(dense)
    methods.attach_saved(full, adapter, trainable=False)
    plain = answer(full)
    with masked(full, arch, groups, {}) as reference:
        wanted = answer(reference)
    found = answer_of(out, tmp_path / "cut")
    same(found, wanted)
    assert (found - plain).abs().max() > 1e-2 and (found - answer(load_model(out))).abs().max() > 1e-2


DEEP = [
    ("llama", [1], LORA),
    ("llama", [0, 2], {**LORA, "rank_pattern": {"layers.3.self_attn.q_proj": 5}, "alpha_pattern": {"layers.1.mlp.*": 1}}),
    ("llama", [1], {**LORA, "layers_to_transform": [1, 2]}),
    ("llama", [1], {**LORA, "target_modules": r"model\.layers\.[0-2]\.(self_attn\.o_proj|mlp\.up_proj)"}),
    (
        "llama",
        [2],
        {
            "method": "ia3",
            "target_modules": ["layers.3.mlp.down_proj", "k_proj"],
            "feedforward_modules": ["layers.3.mlp.down_proj"],
        },
    ),
    ("llama", [0], {"method": "vera", "r": 3, "target_modules": ["q_proj", "o_proj"]}),
    ("llama", [2], {"method": "nola", "k": 16, "r": 2, "lora_alpha": 40, "target_modules": ["q_proj", "down_proj"]}),
    ("gpt2", [1], {"method": "full", "target_modules": None}),
    ("gpt2", [1, 2], LORA),
    ("t5", [1, 3], LORA),
]


@pytest.mark.parametrize(("arch", "drop", "pet"), DEEP)
def test_blocks_that_are_left_take_their_own_part(arch, drop, pet, folders, tmp_path):
    dense, out = folders / arch, tmp_path / "c"
    adapter = train_d(dense, tmp_path / "d", arch, **pet)
    kept = run_backend(Depth, dense, out, drop=drop)["kept_blocks"]
    facts = cut(out, adapter, tmp_path / "cut")
    assert facts["tensors"]["cut"] == 0 and facts["parameters"][1] < facts["parameters"][0]
    full = load_model(dense)
    methods.attach_saved(full, adapter, trainable=False)
    with masked(full, arch, {}, kept) as reference:
        wanted = answer(reference)
    found = answer_of(out, tmp_path / "cut")
    same(found, wanted)
    assert (found - answer(load_model(out))).abs().max() > 1e-3
    if len(set(map(len, kept.values()))) == 1 and pet is LORA:  # trained on here, PEFT still knows each layer by its name
        assert json.loads((tmp_path / "cut/adapter_config.json").read_text())["target_modules"] == sorted(EVERY[arch])


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "CartridgeConfig"])
def test_prefixes_of_the_blocks_that_are_left(kind, folders, pruned, tmp_path):
    """As PEFT itself puts them in front of each block's keys and values."""
    import peft
    from peft import PeftModel, get_peft_model

    def answer_with(model):
        return model(input_ids=torch.arange(3, 51).view(4, 12)).logits

    with torch.no_grad():
        settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        full = get_peft_model(load_model(folders / "llama"), settings)
        own = full.prompt_encoder["default"]
        own.load_prompt_embeddings(torch.randn(own.embedding.weight.shape, generator=torch.Generator().manual_seed(0)))
        full.save_pretrained(tmp_path / "d")
        kept = run_backend(Depth, folders / "llama", tmp_path / "c", drop=[0, 2])["kept_blocks"]
        cut(tmp_path / "c", tmp_path / "d", tmp_path / "cut")
        with masked(full.base_model, "llama", {}, kept):
            wanted = answer_with(full.eval())
        short = load_model(tmp_path / "c")
        plain = answer(short)
        same(answer_with(PeftModel.from_pretrained(short, str(tmp_path / "cut")).eval()), wanted)
        assert (wanted - plain).abs().max() > 1e-3
    with pytest.raises(Unsupported, match="self_attn.q_proj lost heads; do not inherit"):
        cut(pruned["llama"][0], tmp_path / "d", tmp_path / "cut")
