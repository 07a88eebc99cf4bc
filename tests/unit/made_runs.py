"""Run folders made up for tests: records as recording.py writes them, outcomes as evaluation/metrics.py does."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DEVICE = {"device": "cpu", "name": "A processor", "dtype": "float32", "attention": "auto", "tf32": False, "threads": 2}


def metric(value, low=None, high=None, n=100, higher=True, filter="none", **more):
    entry = {"value": value, "low": low, "high": high, "level": 0.95, "n": n}
    return entry | {"higher_is_better": higher, "interval": "made up" if low is not None else None, "filter": filter, **more}


def record(compression="nf4", pet="lora", restoring="cpet", *, status="done", metrics=None, speed=None, key="k", **axes):
    axes = {"model": "tiny", "compression": compression, "pet": pet, "restoring": restoring, "task": "movies", "seed": 0} | axes
    name = "--".join(f"s{v}" if k == "seed" else str(v) for k, v in axes.items())
    done = status == "done"
    training = {"trainable_parameters": 4_880_000, "lr": 1e-3, "losses": [{"step": 1, "loss": 2.0}] * 40}
    probe = {"unit": "tokens/s", "batch": 1, "prompt_tokens": 128, "new_tokens": 16, "dtype": "float32", "device": "cpu"}
    speeds = {what: probe | dict(zip(("low", "value", "high"), speed, strict=True)) for what in ("prefill", "decode") if speed}
    reason = {"type": "StepFailed", "message": f"the loss is not finite in {name}", "step": f"tune {name}", "log": "..."}
    found = {
        "schema": 1,
        "id": name,
        "matrix": "made",
        "run": "made",
        "axes": axes,
        "settings": {"train": {"lr": 1e-3}},
        "references": {"dense": None, "dense_pet": None, "vanilla": None, "control_of": None},
        "provenance": {
            "versions": {"torch": "2.13.0"},
            "device": DEVICE | {"cores": 2},
            "commit": None,
            "created": "2025-01-01T00:00:00+00:00",
            "keys": {"metrics": f"{key}-{name}"},
        },
        "status": status,
        "reason": None if status in ("done", "pending") else reason,
        "metrics": (metrics or {"acc": metric(0.8, 0.7, 0.9)}) if done else {},
        "primary": None,
        "probes": {**speeds, "disk": {"value": 269_000_000, "unit": "bytes", "model": 1, "adapter": 2}} if done else {},
        "compression": None,
        "training": training if done else None,
        "costs": {"seconds": 75.0, "estimated_seconds": 80.0, "flops": 10, "peak_memory": 1, "steps": {"tune": 75.0}},
        "simulated": [],
    }
    found["primary"] = next(iter(found["metrics"]), None)
    return found


def rows(values, *, metric="acc", task="movies", filter="none", logprobs=None, gold=None, weight=None, first=0):
    n = len(values)
    return [
        {
            "task": task,
            "document": f"{first + i:016x}",
            "metric": metric,
            "filter": filter,
            "repeat": 0,
            "value": None if values[i] is None else float(values[i]),
            "weight": 1.0 if weight is None else float(weight[i]),
            "gold": -1 if gold is None else int(gold[i]),
            "logprobs": None if logprobs is None else list(map(float, logprobs[i])),
        }
        for i in range(n)
    ]


SCHEMA = pa.schema(
    [(c, pa.string()) for c in ("task", "document", "metric", "filter")]
    + [("repeat", pa.int32()), ("value", pa.float64()), ("weight", pa.float64()), ("gold", pa.int32())]
    + [("logprobs", pa.list_(pa.float64()))]
)


def write_run(folder, records, outcomes=None):
    """records: dicts; outcomes: by id, rows. Returns the folder."""
    (folder / "records").mkdir(parents=True)
    (folder / "outcomes").mkdir()
    for one in records:
        (folder / "records" / f"{one['id']}.json").write_text(json.dumps(one))
    for name, found in (outcomes or {}).items():
        pq.write_table(pa.Table.from_pylist(found, schema=SCHEMA), folder / "outcomes" / f"{name}.parquet")
    (folder / "run.json").write_text(json.dumps({"cells": [one["id"] for one in records]}))
    return folder


def labels(n, seed, shift=1.5, noise=0):
    """(normalised log-probabilities of two labels, gold) of a model that is right more often the larger `shift`."""
    rng = np.random.default_rng(seed)
    gold = rng.integers(0, 2, n)
    odds = rng.normal(size=n) + shift * (gold - 0.5) + np.random.default_rng(noise).normal(0, 0.01, n) * (noise > 0)
    return np.stack([-np.logaddexp(0, odds), -np.logaddexp(0, -odds)], axis=1), gold
