"""A record's metrics found anew from its outcomes by document, without lm-eval."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas

from .. import stats

KEY = ["task", "metric", "filter", "repeat", "document"]
COLUMNS = {*KEY, "value", "weight", "gold", "logprobs"}
TOLERANCE = 1e-9  # relative; sums are only taken in another order
MEANS = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "brier_score", "log_loss", "em", "mc1", "mc2"}
FROM_LABELS = {"auroc": stats.macro_of, "f1": stats.f1_of, "mcc": stats.mcc_of}


def faults(record: dict[str, Any], outcomes: pandas.DataFrame) -> tuple[list[str], list[str]]:
    """(what is wrong, metrics that could not be found anew) of a done cell.

    Every document must stand once for each task, metric, filter and repeat, and each metric must be what its documents give:
    the mean for accuracies and the like, for perplexities the exponential, for labels (AUROC, F1, Matthews) the statistic of
    the log-probabilities, for groups the weighted mean of the tasks.
    """
    missing = COLUMNS - set(outcomes.columns)
    if missing:
        return [f"the outcomes have no column {', '.join(sorted(missing))}"], []
    wrong, unchecked = [], []
    twice = outcomes.duplicated(KEY)
    if twice.any():
        first = outcomes[twice].iloc[0]
        wrong.append(f"{int(twice.sum())} outcomes stand there twice, such as {first['document']} of {first['metric']}")
    for name, entry in record["metrics"].items():
        if entry.get("weights"):
            found = _group(record, name, entry)
        else:
            rows = select(outcomes, name, entry)
            n = rows["document"].nunique() if rows["task"].nunique() < 2 else len(rows[["task", "document"]].drop_duplicates())
            if n != entry["n"]:
                wrong.append(f"{name} is of {entry['n']} documents, the outcomes have {n}")
                continue
            found = value(name, rows)
        if found is None or entry["value"] is None:
            unchecked.append(name)
        elif not math.isclose(found, entry["value"], rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            if entry.get("weights") or certain(name, entry):
                wrong.append(f"{name} is {entry['value']!r} in the record and {found!r} by its outcomes")
            else:
                unchecked.append(name)  # a task's own way of adding up
    losses = outcomes[(outcomes.metric == "log_loss") & (outcomes.gold >= 0)]
    pairs = zip(losses["logprobs"], losses["gold"], strict=True)
    own = np.array([-p[g] if p is not None and g < len(p) else np.nan for p, g in pairs], float)
    off = int((~np.isclose(own, losses["value"].to_numpy(float), rtol=0, atol=1e-9)).sum())
    if off:
        wrong.append(f"log_loss of {off} documents is not what their log-probabilities say")
    return wrong, unchecked


def split(name: str, entry: dict[str, Any]) -> tuple[str, str]:
    """(task or "", metric) of a metric's name in a record, such as `task/acc,filter`."""
    task, _, metric = name.removesuffix(f",{entry['filter']}").rpartition("/")
    return task, metric


def select(outcomes: pandas.DataFrame, name: str, entry: dict[str, Any]) -> pandas.DataFrame:
    """Rows of one metric; of a group's aggregate those of its tasks."""
    task, metric = split(name, entry)
    rows = outcomes[(outcomes["metric"] == metric) & (outcomes["filter"] == entry["filter"])]
    if entry.get("weights"):
        return rows[rows["task"].isin(entry["weights"])]
    return rows[rows["task"] == task] if task else rows


def certain(name: str, entry: dict[str, Any]) -> bool:
    """Whether lm-eval aggregates this metric in the one way we know."""
    metric = split(name, entry)[1]
    return metric in MEANS or metric == "auroc" or entry.get("interval") == "Wilson score"


def value(name: str, rows: pandas.DataFrame) -> float | None:
    """The metric of these rows, or None where documents alone do not give it."""
    metric = name.rpartition("/")[2].partition(",")[0]
    values, weights = rows["value"].to_numpy(float), rows["weight"].to_numpy(float)
    if not len(values):
        return None
    if np.isfinite(values).all():
        mean = float(weights @ values / weights.sum()) if weights.sum() else math.nan
        if metric in ("word_perplexity", "byte_perplexity", "perplexity"):
            return math.exp(mean) if mean < 700 else None
        return mean / math.log(2) if metric == "bits_per_byte" else mean
    labels = [x for x in rows["logprobs"] if x is not None]
    if metric not in FROM_LABELS or len(labels) < len(rows) or len({len(x) for x in labels}) != 1:
        return None
    x, y = np.array([list(row) for row in labels], float), rows["gold"].to_numpy()
    found = float(FROM_LABELS[metric](x if metric == "auroc" else x.argmax(axis=1), y)(np.ones((1, len(y))))[0])
    return found if math.isfinite(found) else None


def _group(record: dict[str, Any], name: str, entry: dict[str, Any]) -> float | None:
    """A group's aggregate from its tasks' metrics, which are checked themselves."""
    plain = name.rpartition("/")[2]
    parts = [record["metrics"].get(f"{task}/{plain}") for task in entry["weights"]]
    if any(p is None or p["value"] is None for p in parts):
        return None
    return float(np.dot(list(entry["weights"].values()), [p["value"] for p in parts]))
