"""Task specs while planning, and lm-eval's task objects made from them."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from task_folder import make_folder

from cpet_bench.errors import InputError, StepFailed, StopError
from cpet_bench.evaluation import catalogue
from cpet_bench.evaluation.tasks import load_tasks, task_spec
from cpet_bench.keys import canonical
from cpet_bench.settings import PromptSettings, TaskSettings

CODE = """
include: shared.yaml
task: coded
output_type: multiple_choice
process_docs: !function own.process
doc_to_text: "{{text}}"
doc_to_choice: [negative, positive]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
OWN = """
from pathlib import Path

Path(__file__).with_name("ran").touch()


def process(docs):
    return docs.map(lambda d: {"text": "checked " + d["text"]})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The task folder, and a working folder elsewhere."""
    make_folder(tmp_path / "tasks")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "tasks"


@pytest.fixture
def few_lm_eval_tasks(monkeypatch):
    """Names as lm-eval has them, without asking it (a slow test below does)."""
    table = {"hellaswag": ["task", "hellaswag/hellaswag.yaml", []], "piqa": ["task", "piqa/piqa.yaml", []]}
    monkeypatch.setattr("cpet_bench.evaluation.tasks.lm_eval_tasks", lambda: table)


def spec_of(folder, name, allow_code=False, **settings):
    return task_spec(TaskSettings(include=folder.name, **settings), name, folder.parent, allow_code)


def texts(spec, name=None, split=None):
    tasks = load_tasks(spec, PromptSettings(), split)["tasks"]
    return [d["text"] for d in (tasks[name] if name else next(iter(tasks.values()))).eval_docs]


# -- specs -------------------------------------------------------------------------------------------------------------
def test_a_spec_holds_configuration_and_data_and_is_json(folder):
    spec = spec_of(folder, "choose")
    assert json.loads(canonical(spec)) == spec
    assert spec["origin"] == "folder" and spec["split"] == "test" and not spec["code"]
    assert set(spec["tasks"]) == {"choose"} and spec["tasks"]["choose"]["training_split"] == "train"  # of the include
    assert sorted(os.path.basename(p) for p in spec["files"]) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
    assert all(os.path.isabs(p) for p in spec["files"])


def test_a_spec_changes_with_prompt_and_data_and_with_nothing_else(folder):
    before = spec_of(folder, "choose")
    (folder / "answer.yaml").write_text((folder / "answer.yaml").read_text() + "# another task\n")
    (folder / "notes.txt").write_text("x")
    assert spec_of(folder, "choose") == before
    (folder / "data/train.jsonl").write_text((folder / "data/train.jsonl").read_text() + "\n")
    assert spec_of(folder, "choose")["files"] != before["files"]
    (folder / "shared.yaml").write_text((folder / "shared.yaml").read_text() + "description: 'Read. '\n")
    assert spec_of(folder, "choose")["tasks"] != before["tasks"]


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("both", {"choose", "last_word"}),
        ("nested", {"choose", "last_word", "answer"}),
        ("made_up", {"choose", "answer"}),
        ("all_made_up", {"choose"}),
    ],
)
def test_groups_and_tags_bring_their_members(folder, name, members):
    spec = spec_of(folder, name)
    loaded = load_tasks(spec, PromptSettings())
    assert set(loaded["tasks"]) == members
    assert {n for n, c in spec["tasks"].items() if "group" not in c} == members
    if name == "nested":
        assert set(loaded["groups"]) == {"nested", "both"} and set(loaded["group_map"]["nested"]) == {"both", "answer"}


def test_the_users_task_wins_over_ours(folder):
    text = (folder / "choose.yaml").read_text()
    (folder / "movie_reviews.yaml").write_text(text.replace("task: choose", "task: movie_reviews"))
    assert spec_of(folder, "movie_reviews")["origin"] == "folder"
    ours = task_spec(TaskSettings(), "movie_reviews", folder)
    assert ours["origin"] == "cpet_tasks" and "vader.py" in ours["files"] and "folder" not in ours
    assert str(catalogue.our_folder()) not in canonical(ours)  # no place on this machine in a key


def test_unknown_names_show_the_nearest(folder, few_lm_eval_tasks):
    with pytest.raises(InputError, match="Did you mean choose") as found:
        spec_of(folder, "chose")
    assert found.value.key == "task" and {"choose", "movie_reviews", "hellaswag"} <= set(found.value.allowed)
    with pytest.raises(InputError, match="Did you mean hellaswag"):
        task_spec(TaskSettings(), "helaswag", folder)
    (folder / "both.yaml").write_text("group: both\ntask: [choose, last_wort]\n")
    with pytest.raises(InputError, match="both needs the task 'last_wort'.*Did you mean last_word"):
        spec_of(folder, "both")


def test_a_group_may_name_lm_evals_own_tasks(folder, few_lm_eval_tasks):
    (folder / "both.yaml").write_text("group: both\ntask: [choose, piqa]\n")
    assert spec_of(folder, "both")["external"] == ["piqa"]
    assert task_spec(TaskSettings(), "piqa", folder) == {
        "name": "piqa",
        "split": "test",
        "origin": "lm_eval",
        "external": ["piqa"],
    }


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("shared.yaml", "dataset_kwargs: {data_files: {test: gone.jsonl}}\n", "there is no file .*gone.jsonl"),
        ("choose.yaml", "task: [choose\n", r"choose.yaml:\d+: no valid YAML"),
        ("choose.yaml", "- choose\n", "must be a mapping"),
        ("choose.yaml", "task: !!python/object/apply:os.getcwd []\n", "no valid YAML: could not determine a constructor"),
        ("choose.yaml", "include: gone.yaml\ntask: choose\n", "gone.yaml: this task file cannot be read"),
        ("shared.yaml", "include: choose.yaml\n", "include each other: "),
        ("shared.yaml", "dataset_path: json\ndataset_kwargs: {data_files: {test: 'gone/*.jsonl'}}\n", "there is no file"),
        ("shared.yaml", "dataset_path: ./gone\n", "dataset_path: there is no file"),
        ("shared.yaml", "dataset_path: x\ndataset_kwargs: {trust_remote_code: true}\n", "needs allow_code: true"),
        ("shared.yaml", "use_prompt: other.yaml:x\n", "use_prompt: prompts out of another file"),
    ],
)
def test_wrong_task_files_are_named(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=message) as found:
        spec_of(folder, "choose")
    assert str(folder) in str(found.value.file)


def test_a_folder_that_is_not_there_is_named(folder):
    with pytest.raises(InputError, match="task.include: there is no folder"):
        task_spec(TaskSettings(include="nowhere"), "choose", folder)


# -- code --------------------------------------------------------------------------------------------------------------
def test_functions_are_refused_and_run_where_allowed(folder):
    (folder / "coded.yaml").write_text(CODE)
    (folder / "own.py").write_text(OWN)
    with pytest.raises(InputError, match="!function own.process.*allow_code: true") as found:
        spec_of(folder, "coded")
    assert found.value.file == folder / "coded.yaml"
    assert texts(spec_of(folder, "choose"))  # what lies beside it does not run
    assert not (folder / "ran").exists()
    spec = spec_of(folder, "coded", allow_code=True)
    assert not (folder / "ran").exists()  # planning runs nothing
    assert spec["code"] and str(folder / "own.py") in spec["files"]
    assert all(t.startswith("checked ") for t in texts(spec)) and (folder / "ran").exists()


@pytest.mark.parametrize("file", ["own.py", "coded.yaml"])
def test_code_that_changed_after_planning_does_not_run(folder, file):
    (folder / "coded.yaml").write_text(CODE)
    (folder / "own.py").write_text(OWN)
    spec = spec_of(folder, "coded", allow_code=True)
    (folder / file).write_text((folder / file).read_text().replace("process", "other"))
    with pytest.raises(StepFailed, match=rf"{file} is not what it was"):
        load_tasks(spec, PromptSettings())
    assert not (folder / "ran").exists()


def test_metrics_that_would_be_fetched_and_run_are_refused(folder):
    text = (folder / "choose.yaml").read_text()
    (folder / "choose.yaml").write_text(text.replace("metric: acc,", "metric: ./accuracy,"))
    with pytest.raises(InputError, match="'./accuracy' is no metric of lm-eval itself; its code needs allow_code: true"):
        spec_of(folder, "both")
    (folder / "choose.yaml").write_text(text.replace("metric: acc,", "metric: exact_match, hf_evaluate: true,"))
    with pytest.raises(InputError, match="allow_code"):
        spec_of(folder, "choose")
    assert spec_of(folder, "choose", allow_code=True)


def test_the_metrics_held_for_lm_evals_own_are_those_it_registers():
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry

    assert set(catalogue.metric_names()) == set(metric_registry.keys())


def test_templates_reach_no_python_internals(folder):
    text = (folder / "choose.yaml").read_text()
    reach = "{{ cycler.__init__.__globals__.os.getcwd() }}"
    (folder / "choose.yaml").write_text(text.replace("Review: {{text}}", reach))
    spec = spec_of(folder, "choose")
    script = (
        "import json, sys\n"
        "from cpet_bench.evaluation.tasks import load_tasks\n"
        "from cpet_bench.settings import PromptSettings\n"
        "load_tasks(json.loads(sys.argv[1]), PromptSettings())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, json.dumps(spec)], capture_output=True, text=True)
    assert done.returncode and "SecurityError" in done.stderr


# -- loading -----------------------------------------------------------------------------------------------------------
def test_data_lies_beside_the_file_wherever_the_run_starts(folder):
    assert os.getcwd() != str(folder)
    found = texts(spec_of(folder, "choose"))
    assert len(found) == 9 and all(" test " in t for t in found)


@pytest.mark.parametrize("change", ["edit", "remove"])
def test_data_changed_after_planning_is_not_used(folder, change):
    spec = spec_of(folder, "both")
    file = folder / "data/test.jsonl"
    file.unlink() if change == "remove" else file.write_text(file.read_text().replace("good", "bad"))
    with pytest.raises(StepFailed, match="test.jsonl is not what it was when the run was planned"):
        load_tasks(spec, PromptSettings())


def test_a_prompt_edited_after_planning_is_the_planned_one(folder):
    spec = spec_of(folder, "choose")
    (folder / "choose.yaml").write_text((folder / "choose.yaml").read_text().replace("Review:", "Opinion:"))
    task = load_tasks(spec, PromptSettings())["tasks"]["choose"]
    assert task.doc_to_text(task.eval_docs[0]).startswith("Review:")
    (folder / "choose.yaml").unlink()
    with pytest.raises(StepFailed, match="choose is no longer in"):
        load_tasks(spec, PromptSettings())


def test_splits_stand_in_for_the_scored_one(folder):
    assert all(" validation " in t for t in texts(spec_of(folder, "choose", split="validation")))
    spec = spec_of(folder, "choose")
    assert len(texts(spec, split="train")) == 12 and len(texts(spec)) == 9
    text = (folder / "shared.yaml").read_text()
    (folder / "shared.yaml").write_text(text.replace("validation_split: validation\n", ""))
    with pytest.raises(InputError, match=r"choose has no validation split \(it has: training, test\)"):
        texts(spec_of(folder, "choose", split="validation"))


@pytest.mark.parametrize(("own", "asked", "expected"), [(None, None, 0), (None, 2, 2), (3, None, 3), (3, 1, 1), (0, 2, 0)])
def test_fewshot_counts_are_lm_evals(folder, own, asked, expected):
    if own is not None:
        with (folder / "choose.yaml").open("a") as f:
            f.write(f"num_fewshot: {own}\n")
    loaded = load_tasks(spec_of(folder, "choose"), PromptSettings(fewshot=asked))
    assert loaded["tasks"]["choose"].get_config("num_fewshot") == expected


def test_loading_leaves_the_global_generators_alone(folder):
    before = random.getstate(), np.random.get_state()[1].tolist()
    load_tasks(spec_of(folder, "both"), PromptSettings(fewshot=1))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_data_set_without_a_network_is_a_stop(folder):
    spec = spec_of(folder, "choose")
    spec["tasks"]["choose"] |= {"dataset_path": "some-org/some-set"}
    spec["tasks"]["choose"].pop("dataset_kwargs")
    script = (
        "import json, sys\n"
        "from cpet_bench.errors import CpetError\n"
        "from cpet_bench.evaluation.tasks import load_tasks\n"
        "from cpet_bench.settings import PromptSettings\n"
        "try:\n    load_tasks(json.loads(sys.argv[1]), PromptSettings())\n"
        "except CpetError as e:\n    print(type(e).__name__, e)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(spec)], capture_output=True, text=True, env=env)
    assert done.stdout.startswith(f"{StopError.__name__} the data of task choose could not be fetched"), done.stderr


def test_planning_imports_neither_torch_nor_lm_eval(folder):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cpet_bench.evaluation.tasks import task_spec\n"
        "from cpet_bench.settings import TaskSettings\n"
        "for name in ('both', 'cpet_sentiment'):\n"
        "    task_spec(TaskSettings(include=sys.argv[1]), name, Path())\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'lm_eval', 'datasets', 'transformers'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_through_its_index(tmp_path, monkeypatch):
    monkeypatch.setenv("CPET_BENCH_CACHE", str(tmp_path))
    catalogue.lm_eval_tasks.cache_clear()
    try:
        table = catalogue.lm_eval_tasks()
        assert len(table) > 5000 and table["hellaswag"][:2] == ["task", "hellaswag/hellaswag.yaml"]
        assert task_spec(TaskSettings(), "hellaswag", tmp_path)["external"] == ["hellaswag"]
        assert "mmlu_anatomy" in catalogue.closure(table, "mmlu")
        kept = list((tmp_path / "indexes").iterdir())
        assert len(kept) == 1 and json.loads(kept[0].read_text()) == table
    finally:
        catalogue.lm_eval_tasks.cache_clear()
