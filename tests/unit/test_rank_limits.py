"""Ranks above what a weight can have, by the shapes of layers alone."""

import pytest

from cpet_bench.compression.sizes import ModelSize
from cpet_bench.errors import InputError
from cpet_bench.pet import layer_limits
from cpet_bench.pet.rank_limits import LIMITS, refuse_recovery, told
from cpet_bench.settings import PetSettings

SHAPES = {f"model.layers.{i}.self_attn.{n}": s for i in range(2) for n, s in {"q_proj": (64, 64), "v_proj": (64, 32)}.items()}
HEADLESS = {f"h.{i}.attn.{n}": s for i in range(2) for n, s in {"c_attn": (64, 192), "c_proj": (64, 48)}.items()}


def says(method, shapes=SHAPES, model_type="llama", **fields):
    try:
        told(PetSettings(method=method, **fields), shapes, model_type)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("method", [m for m in LIMITS if m not in ("adalora", "hra", "miss", "shira")])
def test_a_product_has_no_rank_above_the_narrower_side(method):
    assert says(method, r=32, target_modules=["v_proj"]) is None
    text = says(method, r=33, target_modules=["q_proj", "v_proj"])
    assert text.startswith("pet.r: model.layers.0.self_attn.v_proj has 64 inputs and 32 outputs, so a rank of 33 is more than")
    assert "give at most 32, or leave this layer out of target_modules" in text


def test_methods_with_limits_of_their_own():
    assert "pet.init_r" in says("adalora", init_r=33, total_step=9, target_modules=["v_proj"])
    assert says("adalora", r=99, init_r=8, total_step=9, target_modules=["v_proj"]) is None  # it makes no use of r
    for method in ("hra", "miss"):
        assert says(method, r=64, target_modules=["v_proj"]) is None and "at most 64" in says(method, r=65)
    assert says("shira", r=21, target_modules=["v_proj"]) is None  # 21 * 96 of 2048 entries
    assert "at most 21" in says("shira", r=22, target_modules=["v_proj"])
    for method in ("vera", "lokr", "randlora", "oft", "deft", "tinylora", "adamss", "ia3", "bitfit"):
        assert says(method, **({} if method in ("ia3", "bitfit") else {"r": 4096})) is None
    assert says("supertuning", target_modules=["v_proj"]) is None  # no rank at all where none is given


def test_where_the_matrix_names_no_layers_the_usual_ones_count():
    assert "v_proj" in says("lora", r=33) and says("lora", r=33, model_type="unheard-of") is None
    assert "v_proj" in says("nola", r=33)
    assert "c_attn" in says("lora", HEADLESS, "gpt2", r=65)


def test_it_is_told_of_layers_it_is_put_on_alone():
    more = {"r": 33, "target_modules": "all-linear"}
    assert "v_proj" in says("lora", **more)
    assert says("lora", **more, exclude_modules=["v_proj"]) is None
    assert says("lora", r=33, target_modules=r".*\.q_proj") is None and "v_proj" in says("lora", r=33, target_modules=r".*v_.*")
    assert says("lora", r=33, target_modules="*") is None  # no regular expression
    assert "v_proj" in says("loha", **more, rank_pattern={"q_proj": 4})
    assert says("loha", **more, rank_pattern={"v_proj": 32}) is None
    assert "rank of 65" in says("lora", r=8, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 65})


@pytest.mark.parametrize(
    "more",
    [
        {"exclude_modules": r"transformer\.h\.\d+\.attn\.c_proj"},
        {"exclude_modules": ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]},
        {"rank_pattern": {r"transformer\.h\.\d+\.attn\.c_proj": 8}},
        {"layers_to_transform": [7]},
        {"modules_to_save": ["c_proj"]},
    ],
)
def test_what_names_in_files_do_not_tell_is_left_to_the_run(more):
    assert "c_proj" in says("lora", HEADLESS, "gpt2", r=49, target_modules=["c_proj"])
    assert says("lora", HEADLESS, "gpt2", r=49, target_modules=["c_proj"], **more) is None


def test_recovery_names_the_narrowest_layer_and_passes_over_gates():
    with pytest.raises(InputError, match=r"recover.r: .*v_proj has 64 inputs and 32 outputs.*give at most 32\.$"):
        refuse_recovery(1000, SHAPES)
    refuse_recovery(32, SHAPES)
    refuse_recovery(32, {**SHAPES, "model.layers.0.mlp.shared_expert_gate": (64, 1)})
    with pytest.raises(InputError, match="at most 8"):
        refuse_recovery(9, {"a": (8, 8)})


def layers_say(method, shapes=SHAPES, model_type="llama", same_names=True, same_shapes=True, **fields):
    modules = {n.rsplit(".", k)[0] for n in shapes for k in range(n.count(".") + 1)} | {"model.norm"}
    lists = {"model.layers" if shapes is SHAPES else "h": 2}
    names = ("total", "blocks", "block", "layer", "outside", "largest", "depth", "width", "widest", "vocabulary", "heads")
    numbers = dict.fromkeys(names, 1)
    size = ModelSize(**numbers, pairs=False, shapes=shapes, model_type=model_type, modules=frozenset(modules), lists=lists)
    try:
        layer_limits.told(PetSettings(method=method, **fields), size, same_names=same_names, same_shapes=same_shapes)
    except InputError as error:
        return str(error)
    return None


def test_layers_that_are_not_there_are_told():
    text = layers_say("lora", target_modules=["q_proj", "vproj"])
    assert text.startswith("pet.target_modules: No module of the model is named 'vproj'. Did you mean v_proj")
    for method in ("loha", "nola", "ln_tuning"):
        assert "'vproj'" in layers_say(method, target_modules=["vproj"])
    for wrong in (["mlp.q_proj"], ["layers.2.self_attn.q_proj"], ".*vproj", "q_proj"):
        assert "No module of the model" in layers_say("lora", target_modules=wrong), wrong


@pytest.mark.parametrize(
    "wanted",
    [
        ["q_proj"],
        ["self_attn.q_proj", "norm"],
        ["model.layers.1.self_attn.q_proj"],
        ["base.layers.1.self_attn.q_proj"],  # files may lack a beginning, or have another
        ["lm_head", "embed_tokens"],  # a head may be the embeddings' table, and in no file
        "all-linear",
        r"model\.layers\.\d+\.self_attn\.(q|v)_proj",
        ".*lm_head",
        "(q_proj",
        None,
    ],
)
def test_layers_that_are_there_or_may_be_are_not(wanted):
    assert layers_say("lora", target_modules=wanted) is None


def test_names_that_files_and_models_may_not_share_are_left_to_the_run():
    assert layers_say("lora", target_modules=["vproj"], model_type="unheard-of") is None
    assert layers_say("lora", target_modules=["w1"], same_names=False) is None
    assert layers_say("lora", {}, target_modules=["vproj"]) is None
    assert layers_say("adaption_prompt", target_modules="attn") is None
    assert layers_say("lora", HEADLESS, "gpt2", target_modules=r"transformer\.h\.\d+\.attn\.c_attn") is None
    assert layers_say("lora", HEADLESS, "gpt2", target_modules=["transformer.h.1.attn.c_attn"]) is None
    assert "'q_proj'" in layers_say("lora", HEADLESS, "gpt2", target_modules=["q_proj"])


def test_layers_that_are_usual_for_no_such_model_have_to_be_named():
    text = layers_say("lora", model_type="unheard-of")
    assert text.startswith("pet.target_modules: PEFT has no usual layers for lora on models of type unheard-of: name some.")
    assert text.endswith("Allowed: q_proj, v_proj.")
    assert layers_say("lora", {}, model_type="unheard-of").endswith("name some")  # packed weights show no shapes
    assert "Allowed: norm." in layers_say("ln_tuning", model_type="opt") and layers_say("ln_tuning") is None
    for method in ("ia3", "nola", "vera"):
        assert "pet.target_modules" in layers_say(method, model_type="unheard-of")
    assert "pet.feedforward_modules" in layers_say("ia3", model_type="unheard-of", target_modules=["q_proj"])
    named = {"target_modules": ["q_proj"], "feedforward_modules": []}
    assert layers_say("ia3", model_type="unheard-of", **named) is None
    assert layers_say("lora", model_type="unheard-of", target_parameters=["q_proj.weight"]) is None
    for method in ("bitfit", "full", "prompt_tuning", "adaption_prompt", "osf"):  # not named, or found by PEFT's code
        assert layers_say(method, model_type="unheard-of") is None


def test_blocks_that_are_not_there_are_told():
    text = layers_say("lora", target_modules=["q_proj"], layers_to_transform=[9])
    assert text == "pet.layers_to_transform: its blocks are 0 to 1; there is no block 9 to put a module on"
    assert "no block 2" in layers_say("loha", layers_to_transform=2)
    assert "no block 2" in layers_say("lora", HEADLESS, "gpt2", layers_to_transform=[2])
    assert "no block 9" in layers_say("lora", layers_to_transform=[9], layers_pattern="layers")
    for fine in (0, [1], [1, 9], [], None):
        assert layers_say("lora", target_modules=["q_proj"], layers_to_transform=fine) is None
    assert layers_say("loha", target_modules=".*q_proj", layers_to_transform=[9]) is None  # PEFT passes over it
    assert layers_say("lora", target_modules=["model.layers.0.self_attn.q_proj"], layers_to_transform=[9]) is None


def test_blocks_of_oft_fill_a_layer():
    text = layers_say("oft", oft_block_size=24)
    assert text.startswith("pet.oft_block_size: model.layers.0.self_attn.q_proj has 64 inputs, which 24 does not divide")
    assert text.endswith("it can be 16 or 32.") and "32 or 64" not in layers_say("oft", oft_block_size=65)
    assert "pet.r: " in layers_say("oft", r=5, oft_block_size=0)
    odd = {"model.layers.0.self_attn.q_proj": (48, 48), "model.layers.0.self_attn.v_proj": (48, 48)}
    assert layers_say("oft", odd) is None  # PEFT's own number is PEFT's to change
    assert layers_say("oft", oft_block_size=16) is None and layers_say("oft", r=4, oft_block_size=0) is None
    assert layers_say("oft", oft_block_size=24, same_shapes=False) is None
