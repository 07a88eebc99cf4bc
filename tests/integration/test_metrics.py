"""Metrics over replayed responses against lm-eval's own simple_evaluate with its own HFLM, on a tiny model."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.evaluation.metrics import measure
from cpet_bench.evaluation.requests import build_requests
from cpet_bench.evaluation.tasks import task_spec
from cpet_bench.settings import PromptSettings, TaskSettings

WORDS = ["good", "bad", "great", "awful", "fine", "poor", "boring", "brilliant", "happy", "sad"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = PromptSettings()


def documents(n, seed):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        text = " ".join(rng.choice(WORDS, 5))
        choices = [" " + " ".join(rng.choice(WORDS, k)) for k in (1, 2, 3)]
        rows.append({"text": text, "label": int(rng.integers(0, 2)), "choices": choices, "answer": int(rng.integers(0, 3))})
    return rows


def write_task(folder, name, rows, **config):
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows[split])
        (folder / f"{name}.{split}.jsonl").write_text(lines)
    files = {split: f"{name}.{split}.jsonl" for split in ("train", "test")}
    body = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "Review: {{text}}\nSentiment:",
        **config,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cpet_bench.models.tiny import DEFAULTS, make

    folder = tmp_path_factory.mktemp("model")
    make("llama", DEFAULTS, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer, batch_size=1, device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model):
    """A folder with tasks of each kind; half of the generated answers are right."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {"train": documents(6, 1), "test": documents(30, 2)}
    choice = {"output_type": "multiple_choice", "doc_to_choice": [" negative", " positive"], "doc_to_target": "label"}
    metrics = [{"metric": m} for m in ("acc", "acc_norm", "f1", "mcc", "brier_score")]
    write_task(folder, "labels", rows, **choice, metric_list=metrics)
    own = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
    few = {"train": documents(3, 3), "test": documents(11, 4)}
    write_task(folder, "endings", few, **own, metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])
    write_task(
        folder,
        "text",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )
    write_task(
        folder,
        "last",
        rows,
        output_type="loglikelihood",
        doc_to_target="{{choices[0]}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    kwargs = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = [f"Review: {row['text']}\nSentiment:" for row in rows["test"]]
    said = model.generate_until([instance("generate_until", p, kwargs) for p in prompts])
    for i, (row, text) in enumerate(zip(rows["test"], said, strict=True)):
        row["wanted"] = text[:3].strip() if i % 2 else "?"
    for row in rows["train"]:
        row["wanted"] = "?"
    first = [{"function": "regex", "regex_pattern": "(?s)^(.{0,3})"}, {"function": "take_first"}]
    write_task(
        folder,
        "says",
        rows,
        output_type="generate_until",
        doc_to_target="wanted",
        generation_kwargs=kwargs,
        filter_list=[{"name": "begin", "filter": first}, {"name": "whole", "filter": [{"function": "take_first"}]}],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    aggregates = [{"metric": "acc", "weight_by_size": True}, {"metric": "acc_norm", "weight_by_size": False}]
    group = {"group": "both", "task": ["labels", "endings"], "aggregate_metric_list": aggregates}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def answer(model, requests, out):
    """responses.parquet of HFLM itself, request by request."""
    rows = pq.read_table(requests / "requests.parquet").to_pylist()
    found = []
    for row in rows:
        kind, blank = row["request_type"], {"index": row["index"], "logprob": None, "greedy": None, "text": None}
        if kind == "loglikelihood":
            logprob, greedy = model.loglikelihood([instance(kind, row["context"], row["continuation"])])[0]
            found.append(blank | {"logprob": logprob, "greedy": greedy})
        elif kind == "loglikelihood_rolling":
            found.append(blank | {"logprob": model.loglikelihood_rolling([instance(kind, row["continuation"])])[0]})
        else:
            asked = instance(kind, row["context"], json.loads(row["gen_kwargs"]))
            found.append(blank | {"text": model.generate_until([asked])[0]})
    types = [("index", pa.int64()), ("logprob", pa.float64()), ("greedy", pa.bool_()), ("text", pa.string())]
    out.mkdir()
    pq.write_table(pa.Table.from_pylist(found, schema=pa.schema(types)), out / "responses.parquet")


def both(model, tasks, tmp_path, name, prompt=PLAIN, limit=None):
    """(measure's metrics, its outcomes, lm-eval's results) of a task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    spec = task_spec(TaskSettings(include=str(tasks)), name, tasks)
    for part in ("requests", "out"):
        (tmp_path / part).mkdir()
    build_requests(spec, prompt, model.tokenizer, tmp_path / "requests", limit)
    answer(model, tmp_path / "requests", tmp_path / "responses")
    found = measure(
        spec, prompt, tmp_path / "requests", tmp_path / "responses", tmp_path / "out", model.tokenizer, limit=limit
    )
    folder = shutil.copytree(tasks, tmp_path / "tasks")  # whose data files stand where lm-eval looks for them
    for file in folder.glob("*.yaml"):
        config = yaml.safe_load(file.read_text())
        if "dataset_kwargs" in config:
            files = config["dataset_kwargs"]["data_files"]
            config["dataset_kwargs"]["data_files"] = {k: str(folder / v) for k, v in files.items()}
            file.write_text(yaml.safe_dump(config))
    theirs = simple_evaluate(
        model=model,
        tasks=[name],
        num_fewshot=prompt.fewshot,
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=prompt.chat_template,
        fewshot_as_multiturn=prompt.chat_template,
        system_instruction=prompt.system,
    )
    json.dumps(found, allow_nan=False)
    return found, pd.read_parquet(tmp_path / "out" / "outcomes.parquet"), theirs


def numbers(results):
    """lm-eval's values of a task under our names."""
    found = {k: v for k, v in results.items() if "," in k and "_stderr" not in k}
    return {k.removesuffix(",none"): v for k, v in found.items()}


PROMPTS = {
    "plain": PLAIN,
    "shots": PromptSettings(fewshot=2),
    "chat": PromptSettings(fewshot=1, chat_template=True, system="Say what it is."),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_labels(model, tasks, tmp_path, prompt):
    from sklearn.metrics import log_loss, roc_auc_score

    found, outcomes, theirs = both(model, tasks, tmp_path, "labels", PROMPTS[prompt])
    wanted = numbers(theirs["results"]["labels"])
    assert {k: found[k]["value"] for k in wanted} == wanted
    assert list(found) == [*wanted, "auroc", "log_loss"]

    samples = theirs["samples"]["labels"]
    gold = [s["target"] for s in samples]
    raw = np.array([[float(r[0][0]) for r in s["resps"]] for s in samples])
    share = np.exp(raw - np.logaddexp(raw[:, :1], raw[:, 1:]))
    assert found["auroc"]["value"] == pytest.approx(roc_auc_score(gold, raw[:, 1] - raw[:, 0]))
    assert found["log_loss"]["value"] == pytest.approx(log_loss(gold, share))
    for name, entry in found.items():
        assert entry["low"] <= entry["value"] <= entry["high"], name
        assert entry["n"] == 30 and entry["level"] == 0.95 and entry["filter"] == "none"
        assert entry["higher_is_better"] is (name not in ("log_loss", "brier_score"))
    assert found["acc"]["interval"] == "Wilson score" and "bootstrap" in found["auroc"]["interval"]

    acc = outcomes[outcomes.metric == "acc"]
    assert list(acc.value) == [s["acc"] for s in samples] and list(acc.gold) == gold
    assert np.allclose(np.stack(acc.logprobs), np.log(share))
    assert acc.document.str.len().eq(16).all() and acc.document.nunique() == 30
    assert outcomes[outcomes.metric == "brier_score"].value.mean() == pytest.approx(found["brier_score"]["value"])
    assert outcomes[outcomes.metric == "f1"].value.isna().all()


def test_endings_have_no_auroc_since_labels_differ(model, tasks, tmp_path):
    found, outcomes, theirs = both(model, tasks, tmp_path, "endings", limit=7)
    assert {k: found[k]["value"] for k in ("acc", "acc_norm")} == numbers(theirs["results"]["endings"])
    assert list(found) == ["acc", "acc_norm", "log_loss"] and found["acc"]["n"] == 7
    assert np.allclose(np.exp(np.stack(outcomes.logprobs)).sum(axis=1), 1)


def test_generation_with_filters(model, tasks, tmp_path):
    found, outcomes, theirs = both(model, tasks, tmp_path, "says")
    assert {k: e["value"] for k, e in found.items()} == numbers(theirs["results"]["says"])
    begin, whole = found["exact_match,begin"], found["exact_match,whole"]
    assert 0.3 < begin["value"] <= 0.5 and begin["filter"] == "begin" and whole["value"] < begin["value"]
    means = outcomes.groupby("filter").value.mean()
    assert means["begin"] == pytest.approx(begin["value"])
    assert set(outcomes.metric) == {"exact_match"} and set(outcomes.gold) == {-1}


def test_perplexities(model, tasks, tmp_path):
    found, outcomes, theirs = both(model, tasks, tmp_path, "text")
    assert {k: e["value"] for k, e in found.items()} == numbers(theirs["results"]["text"])
    for entry in found.values():
        assert entry["low"] < entry["value"] < entry["high"] and entry["higher_is_better"] is False
    rows = outcomes[outcomes.metric == "word_perplexity"]
    assert set(rows.weight) == {5.0}
    assert math.exp(np.average(rows.value, weights=rows.weight)) == pytest.approx(found["word_perplexity"]["value"])


def test_likelihood(model, tasks, tmp_path):
    found, outcomes, theirs = both(model, tasks, tmp_path, "last")
    assert {k: e["value"] for k, e in found.items()} == numbers(theirs["results"]["last"])
    rows = outcomes[outcomes.metric == "perplexity"]
    assert math.exp(rows.value.mean()) == pytest.approx(found["perplexity"]["value"])
    assert found["perplexity"]["low"] < found["perplexity"]["value"] < found["perplexity"]["high"]


def test_group(model, tasks, tmp_path):
    found, outcomes, theirs = both(model, tasks, tmp_path, "both")
    ours = {k: e["value"] for k, e in found.items()}
    assert {k: ours[k] for k in ("acc", "acc_norm")} == numbers(theirs["groups"]["both"])
    for task in ("labels", "endings"):
        assert {k: ours[f"{task}/{k}"] for k in ("acc", "acc_norm")}.items() <= numbers(theirs["results"][task]).items()
    assert list(found)[:2] == ["acc", "acc_norm"]
    assert found["acc"]["weights"] == pytest.approx({"labels": 30 / 41, "endings": 11 / 41}) and found["acc"]["n"] == 41
    assert found["acc_norm"]["weights"] == {"labels": 0.5, "endings": 0.5}
    assert found["acc"]["low"] < found["acc"]["value"] < found["acc"]["high"]
    assert found["acc"]["interval"].startswith("MOVER")
    assert set(outcomes.task) == {"labels", "endings"}
    assert len(outcomes[(outcomes.metric == "acc")]) == 41


def test_refuses_responses_to_other_requests(model, tasks, tmp_path):
    spec = task_spec(TaskSettings(include=str(tasks)), "endings", tasks)
    for part in ("requests", "out"):
        (tmp_path / part).mkdir()
    build_requests(spec, PLAIN, model.tokenizer, tmp_path / "requests", 4)
    answer(model, tmp_path / "requests", tmp_path / "responses")
    table = pq.read_table(tmp_path / "requests" / "requests.parquet")
    kept = pq.read_table(tmp_path / "responses" / "responses.parquet")

    def run(limit=4):
        folders = (tmp_path / part for part in ("requests", "responses", "out"))
        return measure(spec, PLAIN, *folders, model.tokenizer, limit=limit)

    def put(which, rows):
        schema = {"requests": table, "responses": kept}[which].schema
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / which / f"{which}.parquet")

    assert run()["acc"]["n"] == 4
    with pytest.raises(StepFailed, match="asks 15 loglikelihood requests, 12 were kept"):
        run(limit=5)
    rows = table.to_pylist()
    for field in ("context", "continuation"):
        put("requests", [r | {field: r[field] + ("!" if i == 5 else "")} for i, r in enumerate(rows)])
        with pytest.raises(StepFailed, match=r"request 5 \(endings, document 1\) is not the one"):
            run()
    put("requests", rows)
    answers = kept.to_pylist()
    for broken, message in (({"logprob": None}, "no response"), ({"logprob": float("nan")}, "no number")):
        put("responses", [a | (broken if i == 2 else {}) for i, a in enumerate(answers)])
        with pytest.raises(StepFailed, match=message):
            run()
    put("responses", answers[:-1])
    with pytest.raises(StepFailed, match="one by one"):
        run()


def test_refuses_tasks_that_run_written_code(model, tasks, tmp_path, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    spec = task_spec(TaskSettings(include=str(tasks)), "labels", tasks)
    with pytest.raises(Unsupported, match="code that the model wrote"):
        measure(spec, PLAIN, tmp_path, tmp_path, tmp_path, model.tokenizer, limit=None)
