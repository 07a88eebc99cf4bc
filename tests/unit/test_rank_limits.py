"""Ranks above what a weight can have, by the shapes of layers alone."""

import pytest

from cpet_bench.errors import InputError
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
