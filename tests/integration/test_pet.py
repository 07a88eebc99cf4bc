"""PET modules on a model: put on, saved as PEFT saves them, taken off without a trace, and refused where they do not fit."""

import json

import pytest
import torch

from cpet_bench.errors import InputError, StepFailed, Unsupported
from cpet_bench.models.loading import load_model
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.pet.catalogue import peft_fields
from cpet_bench.pet.rank_limits import FIELD, LIMITS
from cpet_bench.pet.values import wrong
from cpet_bench.settings import PetSettings

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "v"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for arch in TARGETS:
        found[arch] = tmp_path_factory.mktemp(arch)
        make(arch, DEFAULTS, found[arch])
    return found


def logits(model):
    ids = torch.arange(3, 15)[None]
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def lora(arch, **more):
    return PetSettings(**{"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": TARGETS[arch], **more})


def shake(model):
    """Weights that are no longer those of the start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("arch", TARGETS)
def test_on_and_off_again(arch, folders):
    model = load_model(folders[arch])
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert methods.attach(model, lora(arch), seed=3) is model
    torch.testing.assert_close(logits(model), before)  # B is zero
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    shake(model)
    assert (logits(model) - before).abs().max() > 1e-3
    methods.detach(model)
    assert torch.equal(logits(model), before)
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)


@pytest.mark.parametrize("arch", TARGETS)
def test_saved_in_pefts_own_format(arch, folders, tmp_path):
    from peft import PeftModel

    model = load_model(folders[arch])
    methods.attach(model, lora(arch))
    shake(model)
    wanted = logits(model)
    methods.save(model, tmp_path / "a")
    methods.detach(model)
    methods.attach_saved(model, tmp_path / "a", trainable=False)
    assert torch.equal(logits(model), wanted) and not any(p.requires_grad for p in model.parameters())
    methods.save(model, tmp_path / "b")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (tmp_path / "b/adapter_model.safetensors").read_bytes()
    theirs = PeftModel.from_pretrained(load_model(folders[arch]), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits(theirs), wanted)


def test_the_seed_alone_says_what_the_start_is(folders):
    def start(seed, noise):
        torch.manual_seed(noise)
        model = load_model(folders["llama"])
        methods.attach(model, lora("llama"), seed=seed)
        drawn = torch.rand(1)  # the global generator goes on as if nothing had been drawn
        torch.manual_seed(noise)
        assert torch.equal(drawn, torch.rand(1))
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(start(0, 1), start(0, 2)) and not torch.equal(start(0, 1), start(1, 1))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"target_modules": ["q_prj"]}, InputError, "Did you mean q_proj"),
        ({"target_modules": ["q_proj", "nothing"]}, InputError, "nothing"),
        ({"rnk": 4}, InputError, "rnk"),
        ({"method": "lorra"}, InputError, "lora"),
        ({"r": 0}, Unsupported, "positive integer"),
        ({"r": 33}, InputError, "v_proj has 64 inputs and 32 outputs, so a rank of 33 .* give at most 32"),
        ({"r": 8, "rank_pattern": {"layers.1.self_attn.q_proj": 65}}, InputError, "layers.1.self_attn.q_proj .* at most 64"),
        ({"r": 40, "target_modules": None}, InputError, "v_proj .* at most 32"),
        ({"r": 40, "target_modules": "all-linear", "exclude_modules": ["q_proj"]}, InputError, "k_proj .* at most 32"),
        ({"r": 40, "target_modules": r".*\.v_proj", "init_lora_weights": "pissa"}, InputError, "v_proj .* at most 32"),
        ({"method": "adalora", "r": 8, "init_r": 33, "total_step": 9}, InputError, "v_proj .* at most 32"),
        ({"method": "loha", "r": 100_000, "lora_alpha": None}, InputError, "v_proj .* rank of 100000 .* at most 32"),
        ({"method": "hira", "r": 33, "lora_alpha": None, "target_modules": None}, InputError, "v_proj .* at most 32"),
        ({"method": "psoft", "r": 33, "lora_alpha": None}, InputError, "v_proj .* at most 32"),
        ({"method": "shira", "r": 22, "lora_alpha": None}, InputError, "v_proj .* at most 21"),
        ({"method": "miss", "r": 65, "lora_alpha": None}, InputError, "q_proj .* at most 64"),
    ],
)
def test_what_cannot_be_put_on(change, error, says, folders):
    model = load_model(folders["llama"])
    before = logits(model)
    with pytest.raises(error, match=says):
        given = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"], **change}
        methods.attach(model, PetSettings(**{k: v for k, v in given.items() if v is not None or k != "lora_alpha"}))
    assert torch.equal(logits(model), before)


def test_a_rank_counts_where_it_is_used(folders):
    """A layer that is left out, or has a rank of its own, may be narrower than the rank of the others."""
    for more in ({"exclude_modules": ["v_proj"]}, {"rank_pattern": {"v_proj": 32}}, {"layers_to_transform": [], "r": 32}):
        model = methods.attach(load_model(folders["llama"]), lora("llama", **{"r": 33, **more}))
        assert any("lora_A" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("method", [m for m in LIMITS if m not in ("nola", "poly")])
def test_the_largest_rank_can_be_put_on(method, folders):
    """What is refused begins just above what PEFT puts on every layer."""
    from cpet_bench.doctor_tries import FIELDS

    model, (n_in, n_out) = load_model(folders["llama"]), (64, 32)
    rank, largest = FIELD.get(method, "r"), LIMITS[method](n_in, n_out)
    fields = {**FIELDS.get(method, {}), "target_modules": ["v_proj"], **({"gralora_k": 1} if method == "gralora" else {})}
    methods.attach(model, PetSettings(method=method, **{**fields, rank: largest}))
    methods.detach(model)
    with pytest.raises(InputError, match="more than its weight can have"):
        methods.attach(model, PetSettings(method=method, **{**fields, rank: largest + 1}))


def test_every_default_of_peft_is_one_it_takes():
    from dataclasses import MISSING, fields

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        method = kind.value.lower()
        for field in fields(cls):
            value = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(value, "value", value)
            if value is not MISSING:
                assert wrong(method, field.name, value, peft_fields()[method][field.name]) is None, (method, field.name)


def test_what_needs_more_than_virtual_tokens_is_unsupported_and_says_why(folders):
    pet = PetSettings(method="cpt", num_virtual_tokens=2)
    with pytest.raises(Unsupported, match="more than virtual tokens"):
        methods.attach(load_model(folders["llama"]), pet)


def test_no_method_adds_to_the_layers_of_the_blocks(folders):
    """What recovery sits beside are the model's own layers, whatever linear layers a PET method brings along."""
    from cpet_bench.doctor_tries import FIELDS
    from cpet_bench.models.arch import block_linears
    from cpet_bench.pet.catalogue import pet_methods

    model, tried, wrong = load_model(folders["llama"]), 0, []
    layers = list(map(id, block_linears(model).values()))
    for method in pet_methods():
        try:
            methods.attach(model, PetSettings(method=method, **FIELDS.get(method, {})))
        except Unsupported:
            continue
        wrong += [method] if list(map(id, block_linears(model).values())) != layers else []
        tried += 1
        methods.detach(model)
    assert not wrong and tried > 30


def test_what_is_saved_of_every_method_is_what_plain_peft_loads(folders, tmp_path):
    """Each of PEFT's methods that can be put on, with weights that are not those of the start."""
    from peft import PeftModel

    from cpet_bench.doctor_tries import FIELDS

    bare, apart = logits(load_model(folders["llama"])), {}
    for method in peft_fields().keys() - {"multitask_prompt_tuning", "poly"}:  # theirs asks for a task's number
        model = load_model(folders["llama"])
        try:
            methods.attach(model, PetSettings(method=method, **FIELDS.get(method, {})), seed=3)
        except Unsupported:
            continue
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape, generator=generator)
        methods.save(model, tmp_path / method)
        methods.detach(model)
        methods.attach_saved(model, tmp_path / method, trainable=False)
        own = logits(model)
        theirs = logits(PeftModel.from_pretrained(load_model(folders["llama"]), str(tmp_path / method)).eval())
        moved = float((own - bare).abs().max())
        apart[method] = float((own - theirs[:, -own.shape[1] :]).abs().max()) if moved > 1e-4 else f"moved {moved}"
    assert len(apart) > 38 and {m: a for m, a in apart.items() if isinstance(a, str) or a > 1e-4} == {}


def test_a_saved_adapter_that_does_not_fit(folders, tmp_path):
    """PEFT passes over shapes that differ (its issue 1746); here they are named."""
    model = load_model(folders["llama"])
    methods.attach(model, lora("llama"))
    methods.save(model, tmp_path / "a")
    methods.detach(model)
    make("llama", {**DEFAULTS, "hidden": 96}, tmp_path / "wider")
    other = load_model(tmp_path / "wider")
    before = logits(other)
    with pytest.raises(StepFailed, match=r"other shapes: .*lora_A.weight is \[4, 64\], here \[4, 96\]"):
        methods.attach_saved(other, tmp_path / "a", trainable=True)
    assert torch.equal(logits(other), before)
    make("llama", {**DEFAULTS, "layers": 3}, tmp_path / "deeper")
    with pytest.raises(StepFailed, match="not in the file: .*layers.2"):
        methods.attach_saved(load_model(tmp_path / "deeper"), tmp_path / "a", trainable=True)
    (tmp_path / "a/adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no PEFT adapter"):
        methods.attach_saved(model, tmp_path / "a", trainable=True)


def test_ranks_by_layer_keep_their_scale(folders):
    model = load_model(folders["llama"])
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    methods.attach(model, lora("llama"), targets=dict(zip(names, (3, 5), strict=True)))
    for name, rank in zip(names, (3, 5), strict=True):
        layer = model.get_submodule(name)
        assert layer.lora_A["default"].weight.shape[0] == rank and layer.scaling["default"] == pytest.approx(2.0)


def test_settings_of_an_adapter_name_no_place_on_this_machine(folders, tmp_path):
    model = load_model(folders["llama"])
    methods.attach(model, lora("llama"))
    methods.save(model, tmp_path / "a")
    text = (tmp_path / "a/adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] is None and str(tmp_path) not in text
