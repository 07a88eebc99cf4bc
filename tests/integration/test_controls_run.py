"""Controls as they are run: the size of the cell they are matched to, whatever it inherited; what they are called; and
layer-wise distillation on a model that lost neurons and heads."""

from pathlib import Path

import pytest

SMOKE = Path(__file__).parents[2] / "matrices/smoke.yaml"
MATRIX = """
name: controls
model: {tiny: {source: "tiny:llama", options: {hidden: 64, layers: 2, heads: 4, seed: 0}}}
compression: {none: none, nf4: {backend: bitsandbytes, type: nf4}, wanda24: null}
pet:
  none: none
  ptuning: {method: p-tuning, num_virtual_tokens: 4}
  adalora: {method: adalora, init_r: 4, target_r: 2, total_step: 8, tinit: 1, tfinal: 2, target_modules: all-linear}
restoring:
  vanilla: {}
  inherit: {inherit: true}
  cpet: {inherit: true, recover: {r: 4}}
  cpet-eora: null
  matched: {control: matched, of: cpet}
  small: {control: matched, of: inherit}
  wider: {inherit: true, control: wider, of: cpet}
train: {steps: 8, batch: 4, documents: 48, max_tokens: 64, warmup: 2}
task: {smoke_sentiment: {limit: 10}}
seed: [0]
probes: {throughput: false, memory: true}
exclude:
  - {pet: none}
  - {compression: none}
  - {restoring: [vanilla, inherit]}
  - {pet: adalora, restoring: [small, wider]}
  - {pet: ptuning, restoring: wider}
  - {pet: lora, restoring: [matched, small]}
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    from conftest import Cli

    cli = Cli(tmp_path_factory.mktemp("controls"))
    done = cli("run", cli.matrix(MATRIX))
    assert done.returncode == 4, done.stdout + done.stderr  # one of them cannot be, and says so
    return {(r["axes"]["pet"], r["axes"]["restoring"]): r for r in cli.records("controls").values()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pet", "restoring", "of"),
    [("ptuning", "matched", "cpet"), ("adalora", "matched", "cpet")],
)
def test_a_control_has_the_size_of_what_was_inherited(pet, restoring, of, records):
    control, other = records[pet, restoring], records[pet, of]
    assert control["status"] == other["status"] == "done", control["reason"] or other["reason"]
    wanted, found = other["training"]["trainable_parameters"], control["training"]["trainable_parameters"]
    assert abs(found - wanted) <= 0.01 * wanted
    assert control["training"]["by_part"] == {"lora": found}  # controls are LoRA


@pytest.mark.slow
def test_an_extended_module_is_as_large_in_memory_as_what_it_is_held_against(records):
    wider, other = records["lora", "wider"], records["lora", "cpet"]
    assert wider["status"] == other["status"] == "done", wider["reason"] or other["reason"]
    trained = 4 * other["training"]["trainable_parameters"]  # bytes
    assert abs(wider["probes"]["resident"]["value"] - other["probes"]["resident"]["value"]) <= 0.01 * trained


@pytest.mark.slow
def test_a_control_too_small_for_any_rank_says_so(records):
    """Four virtual tokens are fewer numbers than LoRA of rank 1 on every layer has."""
    failed = records["ptuning", "small"]
    assert failed["status"] != "done" and "more than the 256 to be matched" in str(failed["reason"])


@pytest.mark.slow
def test_methods_have_the_names_that_peft_has(records):
    assert set(records["ptuning", "cpet"]["training"]["by_part"]) == {"p_tuning", "recovery"}


def test_layers_all_and_a_sequential_start_on_a_model_that_lost_neurons_and_heads(cli):
    matrix = """
name: narrow
compression: {none: none, narrow: {backend: structured, ratio: 0.25, calibration: {documents: 16}}, nf4: null, wanda24: null}
restoring:
  vanilla: {}
  cpet: null
  cpet-eora: null
  matched: null
  all: {distill: {layers: all}}
  seq: {recover: {r: 4, act: identity, init: eora, sequential: true, calibration: {documents: 16}}}
task: {smoke_sentiment: {limit: 10}}
train: {steps: 3, batch: 2, documents: 8}
seed: [0]
probes: {throughput: false, memory: false}
exclude: [{pet: none}, {restoring: vanilla}]
"""
    done = cli("run", cli.matrix(matrix))
    records = cli.records("narrow")
    record = records["tiny--narrow--lora--all--smoke_sentiment--s0"]
    assert done.returncode == 0 and record["status"] == "done", done.stdout + done.stderr
    assert all(row["distill"] > 0 for row in record["training"]["losses"])
    for compression in ("none", "narrow"):
        record = records[f"tiny--{compression}--lora--seq--smoke_sentiment--s0"]
        assert record["status"] == "done" and record["training"]["by_part"]["recovery"] > 0
        assert record["settings"]["restoring"]["recover"]["sequential"] is True


def test_weights_of_distillation_are_not_chosen_for_an_encoder_decoder(cli):
    matrix = """
name: pairs
model: {tiny: {source: "tiny:t5"}}
compression: {none: none, nf4: null, wanda24: null}
pet: {none: null, lora: {method: lora, r: 2, target_modules: [q, v]}}
restoring:
  vanilla: null
  cpet: null
  cpet-eora: null
  matched: null
  taught: {distill: true, select: {lr: [1e-3, 1e-2], weight: [0.1, 10], documents: 8}}
task: {smoke_sentiment: {limit: 10}}
train: {steps: 1, batch: 2, documents: 8}
seed: [0]
probes: {throughput: false, memory: false}
exclude: []
"""
    done = cli("run", cli.matrix(matrix))  # its files are not there before, so the plan cannot tell
    assert done.returncode == 4 and "write both under `distill`" in done.stdout + done.stderr
    done = cli("plan", cli.matrix(matrix.replace("weight: [0.1, 10]", "weight: [0.1, 9]")))
    assert done.returncode == 2 and "restoring.taught: tiny cannot be restored so: an encoder-decoder model" in done.stderr


@pytest.mark.parametrize("name", ["ptuning", "adalora"])
def test_what_is_inherited_is_counted(name, tmp_path):
    """In small: the plan brings D to the control and its probe, and what D's file holds is the size that is matched."""
    from cpet_bench.cells import expand
    from cpet_bench.matrix import load_matrix
    from cpet_bench.models.arch import block_linears, features
    from cpet_bench.models.loading import load_model
    from cpet_bench.models.tiny import DEFAULTS, make
    from cpet_bench.pet import methods
    from cpet_bench.plan import Planner
    from cpet_bench.restoring.fairness import trainable_count
    from cpet_bench.settings import PetSettings
    from cpet_bench.steps.tuning import attach_parts

    path = tmp_path / "matrix.yaml"
    path.write_text(f"extends: {SMOKE}\n{MATRIX}")
    matrix = load_matrix(path)
    machine = dict.fromkeys(("device", "name", "dtype", "attention", "tf32", "threads", "tokens_per_batch"))
    cells = [c for c in expand(matrix) if c.axes["pet"] == name and c.axes["restoring"] in ("matched", "cpet")]
    plan = Planner(matrix, machine).build(cells)
    roles = {c.axes["restoring"]: plan.roles[c.id] for c in cells}
    tune, probe = (plan.steps[roles["matched"][role]] for role in ("tune", "probe"))
    assert tune.needs["of"] == probe.needs["of"] == plan.steps[roles["cpet"]["tune"]].needs["inherit"]
    make("llama", {**DEFAULTS, "hidden": 64}, tmp_path / "m")
    model = load_model(tmp_path / "m", dtype="float32")
    pet = tune.fixed.value["pet"]
    methods.attach(model, PetSettings(**pet | ({"init_r": 2} if name == "adalora" else {})))  # as if ranks had gone
    methods.save(model, tmp_path / "d")
    methods.detach(model)
    inherited = trainable_count(methods.attach_saved(model, tmp_path / "d", trainable=True))
    methods.detach(model)
    control = tune.fixed.value["control"]
    with attach_parts(model, pet, None, control, seed=0, kept=tmp_path / "d") as deployed:
        found = trainable_count(deployed)
    wanted = inherited + sum(4 * sum(features(m)) for m in block_linears(model).values())
    assert abs(found - wanted) <= 0.01 * wanted
    with attach_parts(model, pet, None, control, seed=0) as deployed:
        assert trainable_count(deployed) > 1.1 * wanted  # what its fields alone would have said
