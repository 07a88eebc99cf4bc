"""AdaLoRA as its authors train it: ranks dealt out over the steps, orthogonal vectors; kept through saves and stops."""

import copy

import pytest
import torch
from test_training_options import folders, rows, run  # noqa: F401
from torch.nn import functional as F

from compressed import compress
from conftest import Cli
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.errors import StepFailed, Stopping
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.settings import PetSettings, TrainSettings
from cpet_bench.training import data_order

STEPS, LAYERS = 6, 4  # a tiny Llama has two blocks, and two of their layers are tuned
FIELDS = {"init_r": 4, "target_r": 2, "lora_alpha": 4, "total_step": STEPS, "target_modules": ["q_proj", "v_proj"]}
TRAIN = {"steps": STEPS, "batch": 8, "lr": 0.02}


@pytest.fixture
def model(folders):
    def load(**fields):
        found = load_model(folders["llama"], dtype="float32")
        return methods.attach(found, PetSettings(method="adalora", **FIELDS | fields), seed=3)

    return load


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def outputs(model):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def test_the_same_as_a_loop_written_from_the_paper(model, tmp_path):
    """Choice loss plus the penalty, AdamW, and PEFT's allocator called after each step, in a loop of this test's own."""
    data = rows(48)
    ours = model()
    run(ours, data, tmp_path, **TRAIN)
    theirs = model()
    tuner = theirs.__dict__[methods._KEPT]["wrapper"].base_model
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAIN["lr"], weight_decay=0)
    theirs.train()
    for step, batch in enumerate(data_order(48, TrainSettings(**TRAIN)), 1):
        loss = 0
        for i in batch:
            logits = theirs(input_ids=torch.tensor([data[i]["context_ids"]])).logits[0, -1, [9, 10]]
            loss = loss + F.cross_entropy(logits[None].float(), torch.tensor([data[i]["gold"]])) / 8
        norms = []
        for name, p in theirs.named_parameters():
            if "lora_A" in name:
                norms.append(((p @ p.T - torch.eye(4)) ** 2).sum().sqrt())
            elif "lora_B" in name:
                norms.append(((p.T @ p - torch.eye(4)) ** 2).sum().sqrt())
        assert len(norms) == 2 * LAYERS
        (loss + 0.5 * sum(norms) / len(norms)).backward()
        optimizer.step()
        tuner.update_and_allocate(step)
        optimizer.zero_grad()
    mine, wanted = weights(ours), weights(theirs)
    for name in wanted:
        torch.testing.assert_close(mine[name], wanted[name], atol=2e-5, rtol=1e-4)
    assert sum(int((v != 0).sum()) for n, v in mine.items() if "lora_E" in n) == 2 * LAYERS


def test_the_budget_is_reached_saved_and_read_by_plain_peft(model, folders, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    ours = model()
    facts = run(ours, rows(48), tmp_path, **TRAIN)
    assert facts["ranks"]["total"] == 2 * LAYERS and facts["ranks"]["layers"] == LAYERS
    assert facts["ranks"]["smallest"] < facts["ranks"]["largest"]
    assert all(0 < x["penalty"] < x["loss"] for x in facts["losses"])
    methods.save(ours, tmp_path / "adapter")
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert sum(v.shape[0] for n, v in kept.items() if "lora_E" in n) == 2 * LAYERS
    wanted = outputs(ours)
    again = methods.attach_saved(load_model(folders["llama"], dtype="float32"), tmp_path / "adapter", trainable=False)
    torch.testing.assert_close(outputs(again), wanted, atol=1e-6, rtol=1e-5)
    plain = PeftModel.from_pretrained(load_model(folders["llama"], dtype="float32"), str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs(plain), wanted, atol=1e-6, rtol=1e-5)


def test_a_layer_may_lose_all_its_ranks(model, folders, tmp_path):
    """Its singular values are zero again, as they started, which is no sign that it was not trained."""
    ours = model(target_r=1)
    facts = run(ours, rows(48), tmp_path, **TRAIN)
    assert facts["ranks"]["total"] == LAYERS and facts["ranks"]["smallest"] == 0
    assert any(not v.any() for n, v in weights(ours).items() if "lora_E" in n)
    methods.save(ours, tmp_path / "adapter")
    wanted = outputs(ours)
    again = methods.attach_saved(load_model(folders["llama"], dtype="float32"), tmp_path / "adapter", trainable=False)
    torch.testing.assert_close(outputs(again), wanted, atol=1e-6, rtol=1e-5)
    start = methods.attach_saved(load_model(folders["llama"], dtype="float32"), tmp_path / "adapter", trainable=True)
    assert "ranks" not in run(start, rows(48, seed=1), tmp_path / "second", **TRAIN)


def test_a_stop_changes_nothing(model, tmp_path):
    data = rows(48)
    whole = model()
    facts = run(whole, data, tmp_path / "whole", **TRAIN)
    done = []
    with pytest.raises(Stopping):
        run(model(), data, tmp_path / "parts", stop=lambda: len(done) == 3, progress=lambda *_: done.append(1), **TRAIN)
    later = model()
    resumed = run(later, data, tmp_path / "parts", **TRAIN)
    strip = ("seconds",)
    assert [{k: v for k, v in x.items() if k not in strip} for x in resumed["losses"]] == [
        {k: v for k, v in x.items() if k not in strip} for x in facts["losses"]
    ]
    for name, value in weights(whole).items():
        assert torch.equal(weights(later)[name], value), name
    assert resumed["ranks"] == facts["ranks"]


def test_an_inherited_module_keeps_its_ranks(model, folders, tmp_path):
    ours = model()
    run(ours, rows(48), tmp_path / "first", **TRAIN)
    methods.save(ours, tmp_path / "adapter")
    start = methods.attach_saved(load_model(folders["llama"], dtype="float32"), tmp_path / "adapter", trainable=True)
    before = copy.deepcopy(weights(start))
    facts = run(start, rows(48, seed=1), tmp_path / "second", **TRAIN)
    assert "ranks" not in facts and facts["losses"][0]["penalty"] > 0
    after = weights(start)
    assert {n: v.shape for n, v in after.items()} == {n: v.shape for n, v in before.items()}
    assert any(not torch.equal(after[n], before[n]) for n in after)
    methods.save(start, tmp_path / "again")
    wanted = outputs(start)
    again = methods.attach_saved(load_model(folders["llama"], dtype="float32"), tmp_path / "again", trainable=False)
    torch.testing.assert_close(outputs(again), wanted, atol=1e-6, rtol=1e-5)


def test_a_four_bit_model_that_was_run_takes_it_and_is_left_as_it_was(folders, tmp_path):
    """Its weights are repacked by a first pass; what reads the model's `state_dict` afterwards loses their scales."""
    compress(BitsAndBytes, folders["llama"], tmp_path / "nf4", type="nf4")
    tuned = methods.attach(load_model(tmp_path / "nf4", dtype="float32"), PetSettings(method="adalora", **FIELDS), seed=3)
    facts = run(tuned, rows(48), tmp_path / "t", **TRAIN)
    assert facts["ranks"]["total"] == 2 * LAYERS
    methods.save(tuned, tmp_path / "adapter")
    fresh = methods.attach_saved(load_model(tmp_path / "nf4", dtype="float32"), tmp_path / "adapter", trainable=False)
    wanted = outputs(fresh)
    model = load_model(tmp_path / "nf4", dtype="float32")
    before = outputs(model)
    methods.attach_saved(model, tmp_path / "adapter", trainable=False)
    assert torch.equal(outputs(model), wanted) and not torch.equal(wanted, before)
    methods.detach(model)
    assert torch.equal(outputs(model), before)


def test_what_cannot_reach_its_budget_is_refused(model, tmp_path):
    with pytest.raises(StepFailed, match="early_stop may end before that"):
        run(model(), rows(48), tmp_path, early_stop={"every": 2, "documents": 8}, **TRAIN)
    kept_all = model(target_r=4, orth_reg_weight=0.0)
    facts = run(kept_all, rows(48), tmp_path / "all", **TRAIN)
    assert "ranks" not in facts and "penalty" not in facts["losses"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("total_step: 50", "4 are trained: write total_step: 4"),
        ("total_step: 4, train: {early_stop: {documents: 8}}", "leave early_stop out"),
    ],
)
def test_a_matrix_that_says_so_is_refused_before_any_work(change, says, tmp_path):
    cli = Cli(tmp_path)
    pet = "{" + f"method: adalora, init_r: 4, target_r: 2, target_modules: [q_proj], {change}" + "}"
    path = cli.matrix(
        f"pet: {{ada: {pet}}}\ntrain: {{steps: 4}}\nrestoring: {{vanilla: {{}}}}\nexclude: []\ninclude: []\n", "ada.yaml"
    )
    found = cli("plan", path)
    assert found.returncode == 2 and says in found.stderr and "pet.ada" in found.stderr, found.stderr
