"""Parts of sharing results: matrices that stand alone, paths taken out, metrics found anew, folders that appear whole."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import metric, record, rows

from cpet_bench import machines
from cpet_bench.cells import expand
from cpet_bench.errors import InputError, StopError
from cpet_bench.keys import plain
from cpet_bench.matrix import load_matrix
from cpet_bench.plan import Planner
from cpet_bench.recording import identity
from cpet_bench.recording import references as recorded
from cpet_bench.results import clean, files, recompute, standalone
from cpet_bench.results.merge import references
from cpet_bench.table import print_table
from cpet_bench.yamlpos import parse
from cpet_leaderboard import view

REPO = Path(__file__).parents[2]
MACHINE = {
    "devices": ["cpu"], "device": "cpu", "name": "A CPU", "dtype": "float32", "attention": "auto", "tf32": False,
    "threads": 1, "tokens_per_batch": 2048, "deterministic": True,
}  # fmt: skip


# -- matrices that stand alone -------------------------------------------------------------------------------------------
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["1e-3", "2:4", "no", "~", "", "0x10", "1_0", " a", "a: b", "- x", "#", "\n", "é\u2028"]
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
KEYS = TEXTS.filter(lambda t: t != "<<")


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        KEYS, st.recursive(SCALARS, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=4), max_leaves=10)
    )
)
def test_what_is_dumped_is_read_back(data):
    if any(not c.isprintable() and c not in "\n\u2028" for c in str(data)):
        return  # YAML has no such characters
    assert parse(standalone.dump(data), Path("x.yaml")).data == data


def user_files(folder: Path, big: int = 10) -> Path:
    """A matrix that extends another, with a task whose YAML and data lie about, training data, and a local model."""
    for name in ("shared/tasks", "data", "work", "model"):
        (folder / name).mkdir(parents=True)
    source = REPO / "matrices/smoke_task"
    text = (source / "smoke_sentiment.yaml").read_text()
    (folder / "shared/common.yaml").write_text(
        text.replace("task: smoke_sentiment\n", "").replace(": train.j", ": ../../data/train.j")
    )
    (folder / "shared/tasks/mine.yaml").write_text("include: ../common.yaml\ntask: mine\n")
    (folder / "shared/tasks/unused.yaml").write_text("task: unused\ndataset_path: json\noutput_type: multiple_choice\n")
    for name in ("validation", "test"):
        shutil.copy(source / f"{name}.jsonl", folder / f"shared/tasks/{name}.jsonl")
    shutil.copy(source / "train.jsonl", folder / "data/train.jsonl")
    (folder / "data/own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "model/config.json").write_text("{}")
    (folder / "model/model.safetensors").write_bytes(b"0" * big)
    (folder / "shared/base.yaml").write_text(
        "model: {m: {source: 'local:../model'}}\n"
        "task:\n  mine: {include: tasks, train_data: {jsonl: ../data/own.jsonl}}\n"
        "device: {devices: [cpu], dtype: float32}\n"
    )
    matrix = folder / "work/matrix.yaml"
    matrix.write_text("# mine\nextends: ../shared/base.yaml\nname: own\npet: {lora: {method: lora, r: 4}}\ntrain: {lr: 1e-3}\n")
    return matrix


def kept(path: Path, folder: Path):
    matrix = load_matrix(path)
    plan = Planner(matrix, MACHINE).build(expand(matrix))
    return matrix, plan, standalone.keep(matrix, plan.steps.values(), folder)


def test_a_kept_matrix_needs_nothing_but_its_folder(tmp_path):
    path = user_files(tmp_path / "user")
    matrix, plan, body = kept(path, tmp_path / "run")
    assert body["outside"] == [] and str(tmp_path) not in body["matrix_text"] and "extends" not in body["matrix_text"]
    shutil.rmtree(tmp_path / "user")
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    again = load_matrix(Path(moved, "matrix.yaml"))
    there = {p.relative_to(moved).as_posix() for p in Path(moved).rglob("*") if p.is_file()}
    assert not any("unused" in name for name in there) and len(there) == 9
    assert plain(again.train) == plain(matrix.train) and [c.id for c in expand(again)] == [c.id for c in expand(matrix)]
    steps = Planner(again, MACHINE).build(expand(again)).steps

    def content(found, kind):
        """Settings of a step without the places of its files."""
        step = next(s for s in found.values() if s.kind == kind)
        spec = step.settings.get("spec") or {}
        return sorted(spec.get("files", {}).values()), step.settings.get("content")

    assert content(steps, "requests") == content(plan.steps, "requests") and content(steps, "requests")[0]
    assert content(steps, "pairs") == content(plan.steps, "pairs") and content(steps, "model") == content(plan.steps, "model")


def test_comments_stay_where_the_text_can(tmp_path):
    shutil.copytree(REPO / "matrices", tmp_path / "matrices")
    _, _, body = kept(tmp_path / "matrices/smoke.yaml", tmp_path / "run")
    old = (REPO / "matrices/smoke.yaml").read_text()
    assert body["matrix_text"] == old.replace("include: smoke_task", "include: files/task/smoke_sentiment")


def test_what_is_large_is_named_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "LIMIT", 100_000)
    _, _, body = kept(user_files(tmp_path / "user", big=200_000), tmp_path / "run")
    (entry,) = body["outside"]
    assert entry["key"] == ["model", "m", "source"] and entry["place"] == "local:files/model/m" and entry["bytes"] == 200_002
    assert entry["path"] == f"local:{tmp_path / 'user/model'}" in body["matrix_text"]
    assert load_matrix(tmp_path / "run/matrix.yaml").model["m"].source == entry["path"]
    assert not (tmp_path / "run/files/model").exists()


# -- without paths -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('File "/home/u/venv/lib/python3.11/site-packages/torch/nn/x.py", line 3', 'File "…/torch/nn/x.py", line 3'),
        ("no /data/models/llama: gone", "no …/llama: gone"),
        ("local:/data/models/llama", "local:…/llama"),
        ("file:///data/models/llama", "file:…/llama"),
        ("~/models/llama", "…/llama"),
        ("../../../home/u/tasks", "…/tasks"),
        (r"C:\Users\me\model.bin is gone", "…/model.bin is gone"),
        (r"\\server\share\model.bin", "…/model.bin"),
        (f"{Path.home()}/with space", "…/with space"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("tokens/s and GB/s, yes/no, data/x.json, hf:org/name", "tokens/s and GB/s, yes/no, data/x.json, hf:org/name"),
        ("a / b / c", "a / b / c"),
    ],
)
def test_paths_keep_their_last_part(text, wanted):
    assert clean.without_paths(text) == wanted


def test_identity_and_prompts_stay_as_they_are():
    one = record()
    one["settings"]["prompt"] = {"system": "Think in /a/b/ c"}
    one["settings"]["model"] = {"source": "local:/home/u/m"}
    assert clean.clean_record(record()) == record()
    found = clean.clean_record(one)
    assert found["settings"]["prompt"] == one["settings"]["prompt"] and found["settings"]["model"]["source"] == "local:…/m"


# -- metrics anew --------------------------------------------------------------------------------------------------------
def test_metrics_against_formulas_of_their_own():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 40)
    logits = rng.normal(size=(40, 2))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    right = (logits.argmax(axis=1) == gold).astype(float)
    scores = logits[:, 1] - logits[:, 0]
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[gold == 1], scores[gold == 0])]
    nats, words = rng.uniform(1, 3, 30), rng.integers(5, 50, 30)
    losses = [-logprobs[i, g] for i, g in enumerate(gold)]
    both = {"logprobs": logprobs, "gold": gold}
    table = pandas.DataFrame(
        rows(right, **both)
        + rows([None] * 40, metric="auroc", **both)
        + rows(losses, metric="log_loss", **both)
        + rows(nats, metric="word_perplexity", task="text", weight=words)
        + rows(nats, metric="bits_per_byte", task="text", weight=words)
        + rows([0.5, 0.25, 0.125], metric="own", task="odd")
    )
    mean = float((nats * words).sum() / words.sum())
    metrics = {
        "movies/acc": metric(right.mean(), n=40),
        "movies/auroc": metric(float(np.mean(pairs)), n=40),
        "movies/log_loss": metric(float(np.mean(losses)), n=40, higher=False),
        "text/word_perplexity": metric(math.exp(mean), n=30, higher=False),
        "text/bits_per_byte": metric(mean / math.log(2), n=30, higher=False),
        "odd/own": metric(0.5, n=3),
        "acc": metric(right.mean(), n=40, weights={"movies": 1.0}),
    }
    body = {"metrics": metrics}
    assert recompute.faults(body, table) == ([], ["odd/own"])  # added up in a way of its own, as it seems
    for name in ("movies/acc", "movies/auroc", "movies/log_loss", "acc"):
        wrong = {"metrics": {**metrics, name: metrics[name] | {"value": metrics[name]["value"] + 1e-6}}}
        assert any(name in what for what in recompute.faults(wrong, table)[0]), name
    table.loc[(table.metric == "log_loss") & (table.index % 2 == 0), "value"] += 0.1
    assert any("log-probabilities" in what for what in recompute.faults(body, table)[0])


# -- merging -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["matrices/smoke.yaml", "matrix.yaml"])
def test_references_are_as_a_run_writes_them(file):
    matrix = load_matrix(REPO / file)
    cells = expand(matrix)
    for ids in ({c.id for c in cells}, {c.id for c in cells[::2]}):
        for cell in cells:
            body = {"id": cell.id, "axes": cell.axes, "settings": identity(cell)}
            assert references(body, plain(matrix), ids) == recorded(cell, ids)


@pytest.mark.parametrize("name", ["cpet-ablation", "cpet-ablation-grid", "cpet-recipe", "pet-variants"])
def test_settings_that_came_later_change_no_published_matrix(name):
    """Where they have their defaults, or no run of today could be merged with what is published."""
    folder = REPO / "results" / name
    published = json.loads((folder / "run.json").read_text())["matrix"]
    now = plain(load_matrix(folder / "matrix.yaml"))
    assert {key: now[key] for key in published} == published


def test_a_staged_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "x"
    with pytest.raises(RuntimeError), files.staged(target) as fresh:
        (fresh / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.staged(target) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(InputError), files.staged(target):
        pass
    with pytest.raises(StopError), files.staged(target, replace=True) as fresh:
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "1"
    with files.staged(target, replace=True) as fresh:
        (fresh / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"] and [p.name for p in tmp_path.iterdir()] == ["x"]


# -- several machines ----------------------------------------------------------------------------------------------------
def two_machines() -> list[dict]:
    found = [
        record("nf4", speed=(90, 100, 110)),
        record("wanda24", speed=(900, 1000, 1100)),
        record("int8", speed=(40, 50, 60)),
    ]
    found[1]["provenance"]["device"] = found[1]["provenance"]["device"] | {"threads": 64}
    return found


def test_machines_are_told_apart():
    made = two_machines()
    assert machines.labels(made) == ["A processor, 2 threads", "A processor, 64 threads", "A processor, 2 threads"]
    assert machines.labels(made[:1]) == ["A processor"]


def test_the_table_names_the_machine_where_there_are_several(capsys):
    print_table(two_machines())
    assert "A processor, 64 threads" in capsys.readouterr().out
    print_table(two_machines()[::2])
    assert "A processor" not in capsys.readouterr().out


def test_the_page_does_not_rank_speeds_of_different_machines():
    made = two_machines()
    named = machines.labels(made)
    entries = [view.Entry(r, "made", machine=m) for r, m in zip(made, named, strict=True)]
    (table,) = view.tables(entries)
    at = [c.key for c in table.columns].index("decode")
    assert table.ranks[at] == [1, 2, 0] and "cannot be compared" in table.columns[at].hint
    assert "device used" in [c.key for c in table.columns]
    assert [c.title for c in table.charts if "speed" in c.title] == ["Quality by decoding speed on A processor, 2 threads"]


# -- the API -------------------------------------------------------------------------------------------------------------
def test_the_api_keeps_its_functions():
    import cpet_bench

    __import__("cpet_bench.plan")
    assert cpet_bench.plan.__module__ == "cpet_bench" and callable(cpet_bench.plan) and Planner.__module__ == "cpet_bench.plan"
