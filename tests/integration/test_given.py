"""An adapter that the user has, named in `inherit: {from: ...}`: it must be what `pet` says, for that is what is trained."""

import pytest

from cpet_bench.errors import InputError, StepFailed
from cpet_bench.models.loading import load_model
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.pet.given import check_given, differs
from cpet_bench.settings import PetSettings

LORA = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
NOLA = {"method": "nola", "k": 8, "r": 4, "target_modules": ["q_proj"]}
ADALORA = {"method": "adalora", "init_r": 6, "target_r": 4, "total_step": 30, "target_modules": ["q_proj"]}
BITFIT = {"method": "bitfit", "where": "all"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    make("llama", DEFAULTS, made)
    return made


def saved(folder, tmp_path, fields):
    model = methods.attach(load_model(folder), PetSettings(**fields))
    methods.save(model, tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("given", "pet", "says"),
    [
        (LORA, LORA, ""),
        (LORA, {**LORA, "init_lora_weights": "gaussian"}, ""),
        (LORA, {**LORA, "modules_to_save": [], "rank_pattern": None}, ""),
        (LORA, {"method": "LoRA", "r": 4, "lora_alpha": 8}, ""),
        (LORA, {**LORA, "r": 16}, "r is 4, and `pet` says 16"),
        (LORA, {**LORA, "use_dora": True, "lora_alpha": 4}, "use_dora is false, and `pet` says true|lora_alpha is 8"),
        (LORA, {"method": "ia3"}, "it is lora, and `pet` says ia3"),
        (ADALORA, {**ADALORA, "total_step": 5}, ""),
        (ADALORA, {**ADALORA, "init_r": 12}, "init_r is 6, and `pet` says 12"),
        ({**LORA, "init_lora_weights": "pissa"}, {**LORA, "init_lora_weights": "pissa"}, ""),
        (NOLA, NOLA, ""),
        (NOLA, {**NOLA, "k": 9}, "k is 8, and `pet` says 9"),
        (NOLA, LORA, "it is nola, and `pet` says lora"),
        (BITFIT, BITFIT, ""),
        (BITFIT, {"method": "full"}, "it is bitfit, and `pet` says full"),
    ],
)
def test_what_its_settings_say(given, pet, says, folder, tmp_path):
    found = differs(saved(folder, tmp_path, given), PetSettings(**pet))
    assert all(part in found for part in says.split("|")) and bool(found) == bool(says), found


def test_the_layers_it_is_on(folder, tmp_path):
    model, adapter = load_model(folder), saved(folder, tmp_path, LORA)
    check_given(adapter, PetSettings(**LORA), model)
    check_given(adapter, PetSettings(**{**LORA, "target_modules": r".*\.[qv]_proj"}), model)
    before = [n for n, _ in model.named_modules()]
    with pytest.raises(StepFailed, match="it is on q_proj, v_proj, and `pet` says k_proj, q_proj"):
        check_given(adapter, PetSettings(**{**LORA, "target_modules": ["q_proj", "k_proj"]}), model)
    assert [n for n, _ in model.named_modules()] == before
    with pytest.raises(InputError, match="holds no PET adapter"):
        check_given(tmp_path, PetSettings(**LORA), model)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match="is no mapping"):
        check_given(adapter, PetSettings(**LORA), model)


def test_a_matrix_that_names_another_is_refused(cli, folder, tmp_path):
    saved(folder, cli.folder, LORA)
    text = (
        "name: given\npet: {lora: null, %s}\nrestoring: {mine: {inherit: {from: local:a}}}\n"
        "exclude: [{pet: none}, {compression: [none, nf4]}, {restoring: [vanilla, matched, cpet, cpet-eora]}]\n"
    )
    done = cli("plan", cli.matrix(text % "theirs: {method: ia3}"))
    assert done.returncode == 2 and "restoring.mine.inherit.from: local:a is not the module that is trained" in done.stderr
    assert "it is lora, and `pet` says ia3" in done.stderr and "Traceback" not in done.stderr


def test_a_start_that_was_not_converted_is_refused_before_anything_runs(cli, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    pissa = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"}
    get_peft_model(load_model(folder, dtype="float32"), LoraConfig(**pissa)).save_pretrained(cli.folder / "a")
    text = (
        "name: given\npet: {lora: null, pissa: {method: lora, r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj], "
        "init_lora_weights: pissa}}\nrestoring: {mine: {inherit: {from: local:a}}}\n"
        "exclude: [{pet: none}, {compression: [none, nf4]}, {restoring: [vanilla, matched, cpet, cpet-eora]}]\n"
    )
    done = cli("plan", cli.matrix(text))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pissa without what it started from" in done.stderr and "path_initial_model_for_weight_conversion" in done.stderr
