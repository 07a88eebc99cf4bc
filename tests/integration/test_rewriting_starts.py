"""PiSSA and OLoRA, which start from a part of the base weights: what is kept of them is what they learned, on any base."""

from pathlib import Path

import pytest
import torch
from test_pet import logits, shake

from compressed import compress
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models.arch import block_linears, features
from cpet_bench.models.loading import load_model
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.settings import PetSettings

SMOKE = Path(__file__).parents[2] / "matrices/smoke.yaml"
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
MORE = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "dora": {"init_lora_weights": "pissa", "use_dora": True},
    "patterns": {"init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}},
}
CASES = [("llama", kind) for kind in MORE] + [("gpt2", "pissa_niter")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {arch: tmp_path_factory.mktemp(arch) for arch in TARGETS}
    for arch, folder in found.items():
        make(arch, DEFAULTS, folder)
    return found


def tuned(folder, arch, kind, seed=1):
    model = load_model(folder, dtype="float32")
    pet = PetSettings(method="lora", r=4, lora_alpha=8, target_modules=TARGETS[arch], **MORE[kind])
    before = logits(model)
    methods.attach(model, pet, seed=seed)
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)
    shake(model)
    return model, before


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_kept_it_computes_the_same_here_and_in_plain_peft(arch, kind, folders, tmp_path):
    from peft import PeftModel

    model, before = tuned(folders[arch], arch, kind)
    wanted = logits(model)
    assert (wanted - before).abs().max() > 1e-2
    methods.save(model, tmp_path / "a")
    methods.detach(model)
    assert torch.equal(logits(model), before)
    methods.attach_saved(model, tmp_path / "a", trainable=False)
    torch.testing.assert_close(logits(model), wanted, atol=2e-3, rtol=1e-3)
    theirs = PeftModel.from_pretrained(load_model(folders[arch], dtype="float32"), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), wanted, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["pissa_niter", "olora"])
def test_inherited_it_adds_what_was_learned_on_the_dense_model(kind, folders, tmp_path):
    """To the compressed weights: the same difference that it makes to the dense ones."""
    model, _ = tuned(folders["llama"], "llama", kind)
    methods.save(model, tmp_path / "a")
    methods.detach(model)
    merged = _merged(folders["llama"], tmp_path / "a")
    compress(Magnitude, folders["llama"], tmp_path / "c", pattern="2:4")
    dense, both = load_model(folders["llama"], dtype="float32"), load_model(tmp_path / "c", dtype="float32")
    by_name = block_linears(both)
    with torch.no_grad():
        for name, layer in block_linears(dense).items():
            by_name[name].weight += merged[name] - layer.weight
    wanted = logits(both)
    onto = methods.attach_saved(load_model(tmp_path / "c", dtype="float32"), tmp_path / "a", trainable=True)
    torch.testing.assert_close(logits(onto), wanted, atol=1e-3, rtol=1e-3)
    held = {n: p for n, p in onto.named_parameters() if p.requires_grad}
    assert held and all(p.shape[0] == 8 for n, p in held.items() if "lora_A" in n)


def _merged(folder, adapter):
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_model(folder, dtype="float32"), str(adapter)).merge_and_unload()
    return {name: layer.weight.detach() for name, layer in block_linears(theirs).items()}


def test_factors_without_their_start_are_refused(folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(load_model(folders["llama"], dtype="float32"), config).save_pretrained(tmp_path)
    with pytest.raises(StepFailed, match="pissa without what it started from.*path_initial_model_for_weight_conversion"):
        methods.attach_saved(load_model(folders["llama"]), tmp_path, trainable=True)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_packed_base_weights_are_not_rewritten(init, folders, tmp_path):
    compress(BitsAndBytes, folders["llama"], tmp_path / "nf4", type="nf4")
    pet = PetSettings(method="lora", r=4, target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(Unsupported, match=f"{init} changes the base weights, which are packed"):
        methods.attach(load_model(tmp_path / "nf4"), pet)


def test_layers_that_peft_takes_for_others(folders):
    pet = PetSettings(method="lora", r=4, target_modules=TARGETS["gpt2"], init_lora_weights="olora")
    with pytest.raises(Unsupported, match="inputs x outputs"):
        methods.attach(load_model(folders["gpt2"]), pet)


def test_a_head_that_is_the_embeddings_is_left_alone(folders):
    model = load_model(folders["llama"], dtype="float32")
    before = logits(model)
    pet = PetSettings(method="lora", r=4, target_modules=["q_proj", "lm_head"], init_lora_weights="pissa")
    with pytest.raises(Unsupported, match="leave the head out"):
        methods.attach(model, pet)
    assert torch.equal(logits(model), before)


def test_loftq_is_a_compression_here(folders):
    pet = PetSettings(method="lora", r=4, target_modules=["q_proj"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})
    with pytest.raises(Unsupported, match="choose nf4 there"):
        methods.attach(load_model(folders["llama"]), pet)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_starts_that_data_make_are_unsupported_and_no_plain_lora(folders, init):
    model = load_model(folders["llama"], dtype="float32")
    before = logits(model)
    with pytest.raises(Unsupported, match=f"{init} is made from a pass over data"):
        methods.attach(model, PetSettings(method="lora", r=4, target_modules=["q_proj"], init_lora_weights=init))
    assert torch.equal(logits(model), before) and not hasattr(model, methods._KEPT)


def test_a_saved_eva_adapter_is_a_lora_like_any_other(folders, tmp_path):
    """PEFT keeps its name in the file, and its factors are all there is to it."""
    pet = PetSettings(method="lora", r=4, target_modules=["q_proj"])
    made = methods.attach(load_model(folders["llama"], dtype="float32"), pet)
    shake(made)
    methods.save(made, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "eva"'))
    assert '"eva"' in config.read_text()
    again = methods.attach_saved(load_model(folders["llama"], dtype="float32"), tmp_path, trainable=False)
    assert torch.equal(logits(again), logits(made))


@pytest.mark.parametrize("restoring", ["vanilla", "matched"])
def test_a_probe_measures_what_is_kept(restoring, folders, tmp_path):
    from safetensors.torch import load_file

    from cpet_bench.cells import expand
    from cpet_bench.matrix import load_matrix
    from cpet_bench.plan import Planner
    from cpet_bench.steps.tuning import attach_parts

    path = tmp_path / "matrix.yaml"
    path.write_text(
        f"extends: {SMOKE}\n"
        "pet:\n  pissa: {method: lora, r: 2, target_modules: [q_proj], init_lora_weights: pissa}\n"
        "restoring:\n  vanilla: {}\n  both: {recover: {r: 2}}\n  matched: {control: matched, of: both}\n"
    )
    matrix = load_matrix(path)
    machine = dict.fromkeys(("device", "name", "dtype", "attention", "tf32", "threads", "tokens_per_batch"))
    cells = [c for c in expand(matrix) if c.axes["restoring"] == restoring and c.axes["pet"] == "pissa"]
    plan = Planner(matrix, machine).build(cells)
    tune, probe = (plan.steps[plan.roles[cells[0].id][role]].fixed.value for role in ("tune", "probe"))
    model = load_model(folders["llama"], dtype="float32")
    with attach_parts(model, tune["pet"], None, tune.get("control"), seed=0):
        methods.save(model, tmp_path / "a")
    kept = sum(t.numel() for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values())
    with attach_parts(model, probe["pet"], None, probe.get("control"), seed=0) as deployed:
        assert sum(p.numel() for n, p in deployed.named_parameters() if "lora_" in n) == kept


def test_a_control_starts_at_random_where_its_method_cannot(folders, tmp_path):
    """On packed weights, which PiSSA cannot rewrite; an inherited one is kept as LoRA, and works there."""
    from cpet_bench.restoring.fairness import trainable_count
    from cpet_bench.steps.tuning import attach_parts

    compress(BitsAndBytes, folders["llama"], tmp_path / "nf4", type="nf4")
    pet = {"method": "lora", "r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    control = {"control": "matched", "pet": pet | {"r": 8, "init_lora_weights": True}, "recover": {"r": 4}}
    with attach_parts(model := load_model(tmp_path / "nf4"), pet, None, control, seed=0) as deployed:
        count = trainable_count(deployed)
    layers = block_linears(model)
    wanted = sum(4 * sum(features(m)) for m in layers.values()) + sum(
        8 * sum(features(m)) for name, m in layers.items() if name.endswith("q_proj")
    )
    assert abs(count - wanted) <= 0.01 * wanted
