"""lm-eval's own metrics over kept responses, with intervals and the outcomes by document.

lm-eval's `evaluate()` runs over a model that replays the responses, so that every value is lm-eval's; what is added is an
interval for each, and for multiple choice the AUROC and log-loss of the labels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lm_eval.api.metrics import mean
from scipy.special import log_softmax

from .. import stats
from ..errors import StepFailed, Unsupported
from ..settings import PromptSettings
from .encoding import Encoder
from .intervals import LEVEL, NONE, Interval, by_document, interval_of, number, resampled
from .replay import Replay
from .requests import prompt_arguments
from .tasks import load_tasks

LOWEST = -1e6  # stands for a log-probability of minus infinity, so that differences stay numbers
ASKED = ["index", "task", "doc_id", "document", "request_type", "context", "continuation", "gen_kwargs"]
OUTCOMES = pa.schema(
    [
        ("task", pa.string()),
        ("document", pa.string()),
        ("metric", pa.string()),
        ("filter", pa.string()),
        ("repeat", pa.int32()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
        ("gold", pa.int32()),
        ("logprobs", pa.list_(pa.float64())),
    ]
)


def measure(
    spec: dict[str, Any],
    prompt: PromptSettings,
    requests: Path,
    responses: Path,
    out: Path,
    tokenizer,
    *,
    limit: int | None,
) -> dict[str, dict[str, Any]]:
    """The metrics of a task or group, and `out`/outcomes.parquet.

    Args:
        requests, responses: folders with requests.parquet and responses.parquet (index, logprob, greedy, text).
        limit: documents scored, as the requests were built with.

    Returns:
        name → value, low, high (null where no interval is honest), level, n (documents), higher_is_better, interval (how it
        was found), filter. The name is lm-eval's for one task, `task/metric` for several; a filter other than `none` follows
        after a comma. A group's own aggregates come first: the spec's under the plain name, with `weights` of its tasks.

    Outcomes, one row per document, metric and filter: value (of perplexities the loss in nats per word or byte; null where a
    document alone has none), weight (that value's in the mean: words or bytes, else 1), gold and normalised log-probabilities
    of the labels (-1 and null where there are none).

    Raises StepFailed where the responses are not those of this task's requests, Unsupported for tasks that run code which
    the model wrote.
    """
    from lm_eval.evaluator import evaluate

    loaded = load_tasks(spec, prompt)
    tasks = loaded["tasks"]
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise Unsupported(f"task {name} runs code that the model wrote")
    asked = pq.read_table(Path(requests, "requests.parquet"), columns=ASKED).to_pylist()
    model = Replay(asked, pq.read_table(Path(responses, "responses.parquet")).to_pylist(), Encoder(tokenizer))
    try:
        found = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, **prompt_arguments(prompt))
    except OverflowError as error:
        raise StepFailed(f"a metric of {spec['name']} is larger than a number can be ({error})") from error
    names = {(row["task"], row["doc_id"]): row["document"] for row in asked}
    outcomes: list[dict[str, Any]] = []
    by_task = {}
    for name, task in tasks.items():
        higher = found["higher_is_better"].get(name, {})
        rows = _Rows(name, names, outcomes)
        by_task[name] = _task_metrics(task, found["results"][name], higher, found["samples"][name], rows)
    pq.write_table(pa.Table.from_pylist(outcomes, schema=OUTCOMES), Path(out, "outcomes.parquet"), compression="zstd")
    if len(tasks) == 1:
        return next(iter(by_task.values()))
    metrics = _group_metrics(spec["name"], loaded["groups"], found, by_task)
    return metrics | {f"{task}/{name}": entry for task, own in by_task.items() for name, entry in own.items()}


# -- one task --------------------------------------------------------------------------------------------------------
class _Rows:
    """Collects the outcome rows of one task."""

    def __init__(self, task: str, names: dict[tuple[str, int], str], rows: list[dict[str, Any]]):
        self.task, self.names, self.rows = task, names, rows
        self.labels: dict[int, tuple[list[float], int]] = {}

    def add(self, metric: str, filter_: str, doc_id: int, value: Any, weight: float = 1.0) -> None:
        logprobs, gold = self.labels.get(doc_id, (None, -1))
        row = {"task": self.task, "document": self.names[self.task, doc_id], "metric": metric, "filter": filter_}
        row |= {"weight": weight, "gold": gold, "logprobs": logprobs}
        for repeat, single in enumerate(value if isinstance(value, list) else [value]):
            self.rows.append(row | {"repeat": repeat, "value": single})


def _task_metrics(task, values: dict, higher: dict, samples: list[dict], rows: _Rows) -> dict[str, dict[str, Any]]:
    """lm-eval's metrics of one task with their intervals, in its order; then those of the labels."""
    labels = _labels(task, samples)
    rows.labels = {d: (logprobs, gold) for d, logprobs, gold in zip(*labels[:3], strict=True)} if labels else {}
    metrics: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr"):
            continue
        mine = [s for s in samples if s["filter"] == filter_ and metric in s["metrics"]]
        items = [s[metric] for s in mine]
        aggregate = task.aggregation().get(metric, mean)
        for sample, (single, weight) in zip(mine, by_document(aggregate, items), strict=True):
            rows.add(metric, filter_, sample["doc_id"], single, weight)
        name = metric if filter_ == "none" else key
        metrics[name] = _entry(value, interval_of(aggregate, items), len(items), higher.get(metric), filter_)
    if labels:
        metrics |= _label_metrics(*labels, rows)
    return metrics


def _entry(value: Any, interval: Interval, n: int, higher: bool | None, filter_: str) -> dict[str, Any]:
    low, high, how = interval
    honest = number(low) is not None and number(high) is not None and number(value) is not None
    return {
        "value": number(value),
        "low": number(low) if honest else None,
        "high": number(high) if honest else None,
        "level": LEVEL,
        "n": n,
        "higher_is_better": higher,
        "interval": how if honest else None,
        "filter": filter_,
    }


# -- labels ----------------------------------------------------------------------------------------------------------
def _labels(task, samples: list[dict]) -> tuple[list[int], list[list[float]], list[int], bool] | None:
    """(lm-eval's document numbers, log-probabilities normalised over the labels, gold labels, whether all documents share the
    labels) of a multiple-choice task; gold is -1 where a document has not exactly one right label."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    first = samples[0]["filter"]
    docs, logprobs, golds, seen = [], [], [], []
    contexts = bool(getattr(task, "multiple_input", 0))  # the labels are the contexts: they are in no order
    for sample in samples:
        if sample["filter"] != first:
            continue
        choices = list(task.doc_to_choice(sample["doc"]))
        raw = [answers[0][0] for answers in sample["resps"]]
        if len(raw) == 2 * len(choices) and "acc_mutual_info" in sample["metrics"]:
            raw = raw[: len(choices)]
        gold = task.doc_to_text(sample["doc"]) if contexts else sample["target"]
        if isinstance(gold, str):
            gold = choices.index(gold) if gold in choices else -1
        if isinstance(gold, bool) or not isinstance(gold, (int, np.integer)) or not 0 <= gold < len(raw):
            gold = -1
        docs.append(sample["doc_id"])
        logprobs.append(log_softmax(np.maximum(raw, LOWEST)).tolist())
        golds.append(int(gold))
        seen.append(choices)
    return docs, logprobs, golds, not contexts and all(choices == seen[0] for choices in seen)


def _label_metrics(docs: list[int], logprobs: list[list[float]], golds: list[int], shared: bool, rows: _Rows) -> dict:
    """log_loss (nats) of the right label; auroc of the labels (macro one-vs-rest for more than two) where all documents share
    them. Neither where a document has not exactly one right label, no auroc where only one label is ever right."""
    if min(golds) < 0:
        return {}
    metrics, n = {}, len(docs)
    if shared and len(set(golds)) > 1:
        x, y = np.asarray(logprobs), np.asarray(golds)
        statistic = stats.macro_of(x, y)
        metrics["auroc"] = _entry(stats.auroc_macro(x, y), resampled(statistic, n), n, True, "none")
        for doc in docs:
            rows.add("auroc", "none", doc, None)
    losses = [-row[gold] for row, gold in zip(logprobs, golds, strict=True)]
    metrics["log_loss"] = _entry(np.mean(losses), resampled(stats.mean_of(losses), n), n, False, "none")
    for doc, loss in zip(docs, losses, strict=True):
        rows.add("log_loss", "none", doc, loss)
    return metrics


# -- groups ----------------------------------------------------------------------------------------------------------
def _group_metrics(top: str, groups: dict, found: dict, by_task: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """The aggregates that lm-eval gives for groups; their intervals from those of the tasks (MOVER)."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, group in sorted(groups.items(), key=lambda item: item[0] != top):
        values = found.get("groups", {}).get(name, {})
        sized = {a.metric: a.weight_by_size for a in group.aggregate_metric_list or []}
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr"):
                continue
            plain = metric if filter_ == "none" else key
            parts = {t.task_name: by_task[t.task_name][plain] for t in group.get_all_tasks() if plain in by_task[t.task_name]}
            sizes = {t: found["results"][t]["sample_len"] if sized[metric] else 1 for t in parts}
            weights = {t: size / sum(sizes.values()) for t, size in sizes.items()}
            higher = found["higher_is_better"].get(name, {}).get(metric)
            entry = _entry(value, _combined(value, weights, parts), sum(p["n"] for p in parts.values()), higher, filter_)
            metrics[plain if name == top else f"{name}/{plain}"] = entry | {"weights": weights}
    return metrics


def _combined(value: Any, weights: dict[str, float], parts: dict[str, dict]) -> Interval:
    columns = [[part[k] for part in parts.values()] for k in ("value", "low", "high")]
    if any(x is None for column in columns for x in column):
        return NONE
    if not math.isclose(np.dot(list(weights.values()), columns[0]), value, rel_tol=1e-9, abs_tol=1e-12):
        return NONE  # another aggregate than the weighted mean
    return *stats.mover(list(weights.values()), *columns), "MOVER over the tasks' intervals"
