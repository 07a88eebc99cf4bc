"""Reading a matrix: what each mistake says, with file, line and key; extending; rules; cells."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_plans import MACHINE
from pydantic import ValidationError

from cpet_bench.cells import expand
from cpet_bench.errors import InputError
from cpet_bench.keys import plain
from cpet_bench.matrix import load_matrix
from cpet_bench.plan import Planner
from cpet_bench.settings import RestoringSettings, TrainSettings
from cpet_bench.settings_training import TrainOverride

REPO = Path(__file__).parents[2]
BASE = """name: test
model:
  tiny: {source: "tiny:llama"}
compression:
  none: none
  nf4: {backend: bitsandbytes, type: nf4}
pet:
  none: none
  lora: {method: lora, r: 4, target_modules: [q_proj]}
restoring:
  vanilla: {}
  cpet: {inherit: true, recover: {r: 4}, distill: true}
  matched: {control: matched, of: cpet}
task:
  movie_reviews: {limit: 10}
seed: [0, 1]
train: {lr: 1e-3}
"""


def load(text, tmp_path, **more):
    path = tmp_path / "matrix.yaml"
    path.write_text(text)
    return load_matrix(path, **more)


MISTAKES = [
    ("unknown key", "seed: [0, 1]", "sead: [0, 1]", "sead", "Did you mean seed", 16),
    ("unknown setting", "train: {lr: 1e-3}", "train: {lrr: 1e-3}", "train.lrr", "Did you mean lr", 17),
    ("nested setting", "recover: {r: 4}", "recover: {rank: 4}", "restoring.cpet.recover.rank", "Allowed: act", 12),
    ("wrong type", "train: {lr: 1e-3}", "train: {lr: fast}", "train.lr", "not 'fast'", 17),
    ("out of range", "train: {lr: 1e-3}", "train: {lr: 0}", "train.lr", "greater than 0", 17),
    ("not a mapping", "train: {lr: 1e-3}", "train: 3", "train", "mapping", 17),
    ("unknown backend", "backend: bitsandbytes", "backend: bitsnbytes", "compression.nf4.backend", "Did you mean bits", 6),
    ("backend setting", "type: nf4", "typ: nf4", "compression.nf4.typ", "Did you mean type", 6),
    ("no such value", "type: nf4", "type: nf5", "compression.nf4.type", "Did you mean nf4", 6),
    ("unknown method", "method: lora", "method: lorra", "pet.lora.method", "Did you mean lora", 9),
    ("unknown PEFT field", "r: 4, target", "rank: 4, target", "pet.lora.rank", "Did you mean rank_pattern", 9),
    ("empty axis", "task:\n  movie_reviews: {limit: 10}", "task: {}", "task", "empty", 14),
    ("missing axis", "task:\n  movie_reviews: {limit: 10}", "", "task", "at least one task", None),
    ("equal names", "  none: none\n  nf4", "  nf4: none\n  nf4", "compression.nf4", "twice", 6),
    ("equal seeds", "seed: [0, 1]", "seed: [1, 1]", "seed.1", "twice", 16),
    ("a name that is a path", "  nf4: {", "  ../nf4: {", "compression.../nf4", "cannot be a name", 6),
    ("control of nothing", "of: cpet", "of: cpat", "restoring.matched.of", "Did you mean cpet", 13),
    ("control alone", "control: matched, of: cpet", "control: matched", "restoring.matched", "go together", 13),
    ("one of a union", "distill: true", "distill: {teacher: 3}", "restoring.cpet.distill.teacher", "dense, {model: ...}.", 12),
    ("null", "r: 4, target_modules: [q_proj]", "r: 4, train: {lr: null}", "pet.lora.train.lr", "null is no value here", 9),
    ("beta", "train: {lr: 1e-3}", "train: {betas: [0.9, 1.5]}", "train.betas.1", "less than 1, not 1.5", 17),
    ("two mistakes", "train: {lr: 1e-3}", "train: {lr: 0, steps: -1}", "train.steps", "(and 1 more problem)", 17),
    ("source", "tiny:llama", "tiny:lama", "model.tiny.source", "Did you mean llama", 3),
    ("source kind", "tiny:llama", "tini:llama", "model.tiny.source", "Did you mean tiny", 3),
    ("source option", '"tiny:llama"', '"tiny:llama", file: x', "model.tiny.file", "takes no file", 3),
]


@pytest.mark.parametrize(("old", "new", "key", "says", "line"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_each_mistake_is_named_with_its_place(old, new, key, says, line, tmp_path):
    assert old in BASE
    with pytest.raises(InputError) as caught:
        load(BASE.replace(old, new, 1), tmp_path)
    error = caught.value
    assert error.key == key and says in str(error) and str(tmp_path / "matrix.yaml") in str(error), str(error)
    assert line is None or error.line == line, str(error)
    assert error.exit_code == 2


def test_what_a_part_of_training_may_be_without(tmp_path):
    """Null is a value of these, and no other part's."""
    nulls = {"clip": None, "micro_batch": None, "batch_tokens": None, "early_stop": None}
    assert TrainOverride(**nulls).changes == nulls and TrainSettings(**TrainOverride(**nulls).changes).clip is None
    for name in TrainOverride.model_fields.keys() - nulls:
        with pytest.raises(ValidationError, match="null is no value here"):
            TrainOverride(**{name: None})


def test_eora_needs_a_linear_recovery(tmp_path):
    with pytest.raises(InputError, match="act identity") as caught:
        load(BASE.replace("recover: {r: 4}", "recover: {r: 4, init: eora}"), tmp_path)
    assert caught.value.line == 12


def test_a_sequential_start_is_one_of_eora(tmp_path):
    with pytest.raises(InputError, match="sequential is a way of init eora, and init is svd") as caught:
        load(BASE.replace("recover: {r: 4}", "recover: {r: 4, act: identity, init: svd, sequential: true}"), tmp_path)
    assert caught.value.key == "restoring.cpet.recover" and caught.value.line == 12


COMPRESSIONS = [
    ("gptq, bits: 5", "bits", "5 is not one of 2, 3, 4 or 8"),
    ("gptq, group: 48", "group", "48 is not one of -1, 16, 32, 64, 128, 256, 512 or 1024"),
    ("rtn, bits: 9", "bits", "at least 2 and at most 8, not 9"),
    ("rtn", "bits", "it is missing: at least 2 and at most 8"),
    ("rtn, bits: 4, group: 12", "group", "at least 8 and at most 1024 and a multiple of 8, not 12"),
    ("bitsandbytes, type: int4", "type", "Did you mean int8? Allowed: fp4, int8, nf4"),
    ("bitsandbytes", "type", "it is missing. Allowed: fp4, int8, nf4"),
    ('wanda, pattern: "4:2"', "pattern", "'4:2' is no n:m pattern with n < m"),
    ("magnitude, sparsity: 50", "sparsity", "greater than 0 and less than 1, not 50"),
    ("structured, ratio: 1", "ratio", "greater than 0 and less than 1, not 1"),
    ("depth, ratio: -0.2", "ratio", "greater than 0 and less than 1, not -0.2"),
    ("moefy, top: 1.5", "top", "greater than 0 and at most 1, not 1.5"),
    ("student, width: 0", "width", "greater than 0 and less than 1, not 0"),
]


@pytest.mark.parametrize(("given", "key", "says"), COMPRESSIONS, ids=[given for given, *_ in COMPRESSIONS])
def test_settings_that_no_backend_has_are_refused_with_what_it_has(tmp_path, given, key, says):
    with pytest.raises(InputError) as caught:
        load(BASE.replace("nf4: {backend: bitsandbytes, type: nf4}", f"nf4: {{backend: {given}}}"), tmp_path)
    assert caught.value.key == f"compression.nf4.{key}" and caught.value.line == 6 and says in str(caught.value)


PACKED_FIRST = ['{backend: magnitude, pattern: "2:4"}', "{backend: sparsegpt, sparsity: 0.5}", "{backend: depth, drop: [0]}"]


@pytest.mark.parametrize("second", PACKED_FIRST)
def test_mixture_that_cannot_work_is_refused_before_any_work(tmp_path, second):
    chain = f"mix: [{{backend: bitsandbytes, type: nf4}}, {second}]"
    with pytest.raises(InputError, match="put the pruning first") as caught:
        load(BASE.replace("  nf4: {backend", f"  {chain}\n  nf4: {{backend"), tmp_path)
    assert caught.value.line == 6 and caught.value.key == "compression.mix.1"


def test_cells_and_their_references(tmp_path):
    matrix = load(BASE, tmp_path)
    cells = {c.id: c for c in expand(matrix)}
    assert len(cells) == 2 + 2 * 2 * 3  # two untuned ones, whatever the seeds; the others by seed
    assert "tiny--nf4--none--none--movie_reviews--s0" in cells
    cpet = cells["tiny--nf4--lora--cpet--movie_reviews--s1"]
    assert cpet.dense.id == "tiny--none--lora--vanilla--movie_reviews--s1" and cpet.dense.is_dense
    matched = cells["tiny--nf4--lora--matched--movie_reviews--s1"]
    assert matched.control_of.id == cpet.id


def test_training_settings_are_layered_and_d_keeps_its_own(tmp_path):
    text = BASE.replace("r: 4, target_modules: [q_proj]", "r: 4, target_modules: [q_proj], train: {lr: 2e-3, steps: 7}")
    text = text.replace("vanilla: {}", "vanilla: {train: {lr: 3e-3}}")
    cells = {c.id: c for c in expand(load(text, tmp_path))}
    vanilla = cells["tiny--nf4--lora--vanilla--movie_reviews--s0"]
    assert (vanilla.train.lr, vanilla.train.steps) == (3e-3, 7)
    assert (vanilla.dense.train.lr, vanilla.dense.train.steps) == (2e-3, 7)
    assert cells["tiny--nf4--lora--cpet--movie_reviews--s0"].train.lr == 2e-3
    assert cells["tiny--nf4--none--none--movie_reviews--s0"].train.lr == 1e-3


def test_an_ablation_is_one_line(tmp_path):
    text = BASE.replace("cpet: {", "cpet: {ablate: true, train: {lr: 2e-3}, ").replace("  vanilla: {}\n", "")
    matrix = load(text, tmp_path)
    assert list(matrix.restoring) == [
        *("cpet-vanilla", "cpet-inherit", "cpet-recover", "cpet-distill"),
        *("cpet-inherit+recover", "cpet-inherit+distill", "cpet-recover+distill", "cpet", "matched"),
    ]
    for name, own in matrix.restoring.items():
        if name.startswith("cpet-"):
            wanted = [] if name == "cpet-vanilla" else name.removeprefix("cpet-").split("+")
            assert own.named_parts == wanted and own.train.lr == 2e-3 and not own.ablate
    assert matrix.nothing["restoring"] == "cpet-vanilla" and matrix.restoring["cpet-recover"].recover.r == 4
    cells = {c.id for c in expand(matrix)}
    assert "tiny--nf4--lora--cpet-recover+distill--movie_reviews--s1" in cells
    for old, new, says in (
        ("ablate: true", "ablate: 3", "valid boolean"),
        ("of: cpet}", "of: cpet, ablate: true}", "ablate takes two or three"),
        ("  matched:", "  cpet-inherit: {}\n  matched:", "makes a restoring of this name, too"),
    ):
        with pytest.raises(InputError, match=says):
            load(text.replace(old, new), tmp_path)


def test_a_tasks_own_training_settings(tmp_path):
    text = BASE.replace("limit: 10}", "limit: 10, train: {lr: 5e-4, steps: 9}}\n  movie_snippets: {}")
    text = text.replace("cpet: {", "cpet: {train: {steps: 11}, ")
    cells = {c.id: c for c in expand(load(text, tmp_path))}
    vanilla, other = (cells[f"tiny--nf4--lora--vanilla--{t}--s0"] for t in ("movie_reviews", "movie_snippets"))
    assert (vanilla.train.lr, vanilla.train.steps, other.train.lr, other.train.steps) == (5e-4, 9, 1e-3, 40)
    cpet = cells["tiny--nf4--lora--cpet--movie_reviews--s0"]
    assert (cpet.train.steps, cpet.dense.train.steps, cpet.train.lr) == (11, 9, 5e-4)
    keys = Planner(load(text, tmp_path), MACHINE).build(list(cells.values())).roles
    assert keys[vanilla.id]["tune"] != keys[other.id]["tune"]


def test_tasks_trained_on_the_same_rows_share_the_training(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "a", "a": "b"}\n')
    data = "train_data: {jsonl: rows.jsonl, prompt: '{{ q }}', completion: '{{ a }}'}"
    text = BASE.replace("movie_reviews: {limit: 10}", f"movie_reviews: {{{data}}}\n  movie_snippets: {{{data}}}")
    plan = Planner(matrix := load(text, tmp_path), MACHINE).build(expand(matrix))
    one, two = (plan.roles[f"tiny--nf4--lora--cpet--{t}--s0"] for t in ("movie_reviews", "movie_snippets"))
    assert one["tune"] == two["tune"] and one["dense_tune"] == two["dense_tune"] and one["responses"] != two["responses"]


def test_a_training_file_without_rows_is_refused_before_any_work(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n  \n")
    text = BASE.replace("movie_reviews: {limit: 10}", "movie_reviews: {train_data: {jsonl: rows.jsonl}}")
    matrix = load(text, tmp_path)
    with pytest.raises(InputError, match="rows.jsonl has no rows; a row is a line such as") as found:
        Planner(matrix, MACHINE).build(expand(matrix))
    assert found.value.key == "task.movie_reviews.train_data.jsonl" and found.value.line


def test_training_options_leave_keys_alone_until_they_are_used(tmp_path):
    known = "steps batch micro_batch documents lr weight_decay betas warmup schedule clip max_tokens order_seed"
    known = {*known.split(), "checkpoint_every", "gradient_checkpointing"}
    assert set(plain(TrainSettings())) == known == set(plain(RestoringSettings())["train"])

    def tune(text):
        matrix = load(text, tmp_path)
        cells = {c.id: c for c in expand(matrix)}
        plan = Planner(matrix, MACHINE).build(list(cells.values()))
        of = {c: plan.roles[f"tiny--{c}--movie_reviews--s0"] for c in ("none--lora--vanilla", "nf4--lora--cpet")}
        return {c: roles["tune"] for c, roles in of.items()}, plan, cells

    keys, plan, _ = tune(BASE)
    assert set(plan.steps[keys["nf4--lora--cpet"]].settings["train"]) == known - {"checkpoint_every"}
    text = BASE.replace("train: {lr", "train: {batch_tokens: 2048, early_stop: true, lr")
    other, plan, cells = tune(text.replace("cpet: {", "cpet: {train: {early_stop: {every: 5}}, "))
    assert not keys.keys() - other.keys() and not set(keys.values()) & set(other.values())
    step = plan.steps[other["nf4--lora--cpet"]]
    assert step.settings["train"]["early_stop"] == {"every": 5, "patience": 3, "documents": 100}
    order = plan.steps[step.needs["features"]].settings["order"]
    assert (order["batch_tokens"], order["early_stop"]) == (2048, {"documents": 100})
    assert cells["tiny--none--lora--vanilla--movie_reviews--s0"].train.early_stop.every == 10
    off = tune(text.replace("cpet: {", "cpet: {train: {early_stop: false, batch_tokens: null}, "))[1:]
    train = off[1]["tiny--nf4--lora--cpet--movie_reviews--s0"].train
    assert train == TrainSettings(lr=1e-3) and off[1]["tiny--none--lora--vanilla--movie_reviews--s0"].train.batch_tokens == 2048


def test_holding_out_all_documents_is_refused(tmp_path):
    text = BASE.replace("train: {lr: 1e-3}", "train:\n  documents: 80\n  early_stop: true")
    with pytest.raises(InputError, match="100 documents are held out of the 80 there are") as found:
        matrix = load(text, tmp_path)
        Planner(matrix, MACHINE).build(expand(matrix))
    assert found.value.key == "train.early_stop.documents" and found.value.line


def test_rules(tmp_path):
    text = BASE + "exclude:\n  - {compression: none, restoring: [cpet, matched]}\n  - {seed: 1, compression: nf*}\n"
    ids = [c.id for c in expand(load(text, tmp_path))]
    assert not any("none--lora--cpet" in i for i in ids) and not any("nf4--lora" in i and i.endswith("s1") for i in ids)
    assert any("none--lora--vanilla" in i and i.endswith("s1") for i in ids)
    text = BASE + "include:\n  - {restoring: cpet, seed: 1}\n"
    assert [c.axes["restoring"] for c in expand(load(text, tmp_path))] == ["cpet", "cpet"]


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("{compresion: none}", "Did you mean compression"),
        ("{compression: nf5}", "Did you mean nf4"),
        ("{compression: x*}", "no compression"),
        ("{}", "names no axis"),
        ("{compression: []}", "no names"),
        ("3", "mapping"),
    ],
)
def test_rules_that_match_nothing_are_mistakes(rule, says, tmp_path):
    with pytest.raises(InputError, match=says) as caught:
        load(BASE + f"exclude:\n  - {rule}\n", tmp_path)
    assert caught.value.line == 19


def test_only_on_the_command_line(tmp_path):
    ids = [c.id for c in expand(load(BASE, tmp_path, only=["restoring=vanilla,cp*", "compression=nf4", "seed=0"]))]
    assert ids == ["tiny--nf4--lora--vanilla--movie_reviews--s0", "tiny--nf4--lora--cpet--movie_reviews--s0"]
    wrongs = (("restoring=vanila", "Did you mean vanilla"), ("restorin=x", "Did you mean restoring"), ("x", "AXIS=NAME"))
    for wrong, says in wrongs:
        with pytest.raises(InputError, match=says):
            load(BASE, tmp_path, only=[wrong])
    with pytest.raises(InputError, match="no cell is left"):
        expand(load(BASE + "exclude: [{seed: [0, 1]}]\n", tmp_path))


def test_extending_another_file(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "base.yaml").write_text(BASE.replace("limit: 10", "include: tasks, limit: 10"))
    text = "extends: inner/base.yaml\nname: child\ntask:\n  movie_reviews: {limit: 20}\nseed: 3\n"
    matrix = load(text, tmp_path)
    assert matrix.name == "child" and matrix.task["movie_reviews"].limit == 20 and matrix.seed == (3,)
    assert matrix.task["movie_reviews"].include == "inner/tasks"  # relative to where it was written
    assert set(matrix.restoring) == {"vanilla", "cpet", "matched"}
    (inner / "base.yaml").write_text(BASE.replace("lr: 1e-3", "lr: x"))
    with pytest.raises(InputError) as caught:
        load(text, tmp_path)
    assert "inner/base.yaml:17" in str(caught.value)  # the file in which the mistake stands


def test_files_that_extend_each_other(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(InputError, match="a.yaml → b.yaml → a.yaml"):
        load_matrix(tmp_path / "a.yaml")
    with pytest.raises(InputError, match="there is no file"):
        load("extends: nothing.yaml\n", tmp_path)


def test_reading_a_matrix_loads_no_heavy_library():
    code = (
        "import sys; from cpet_bench.matrix import load_matrix; from cpet_bench.cells import expand; "
        f"expand(load_matrix({str(REPO / 'matrix.yaml')!r})); "
        "print([m for m in ('torch', 'transformers', 'peft', 'lm_eval', 'datasets', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


MATRICES = [REPO / "matrix.yaml", REPO / "harness/cpet_bench/cli/first.yaml", *sorted((REPO / "matrices").glob("*.yaml"))]


@pytest.mark.parametrize("path", MATRICES, ids=lambda p: p.name)
def test_our_own_matrices_are_right_and_fit_the_schema(path):
    import jsonschema
    import yaml

    from cpet_bench.schema import matrix_schema

    matrix = load_matrix(path)
    assert expand(matrix)
    validator = jsonschema.Draft202012Validator(matrix_schema())
    from cpet_bench.yamlpos import read

    data = json.loads(json.dumps(read(path).data))
    assert not [f"{list(e.absolute_path)}: {e.message}" for e in validator.iter_errors(data)]
    assert yaml.safe_load(path.read_text())  # other tools read it as well
    first = next(iter(data.get("task") or {"x": 0}))
    for wrong in ({**data, "sead": 1}, {**data, "train": {"lr": "fast"}}, {**data, "task": {first: {"limmit": 1}}}):
        assert not validator.is_valid(wrong)


def test_the_default_is_twelve_records():
    assert len(expand(load_matrix(REPO / "matrix.yaml"))) == 12
