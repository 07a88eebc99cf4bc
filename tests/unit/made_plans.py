"""Plans of made-up matrices, built by the real planner; nothing is loaded or run."""

from __future__ import annotations

import random
from pathlib import Path

from cpet_bench.cells import expand
from cpet_bench.matrix import load_matrix
from cpet_bench.plan import Plan, Planner

SMOKE_TASK = Path(__file__).parents[2] / "matrices/smoke_task"
MACHINE = {
    "devices": ["cpu"],
    "device": "cpu",
    "name": "made up",
    "dtype": "float32",
    "attention": "auto",
    "tf32": False,
    "threads": 1,
    "tokens_per_batch": 2048,
    "deterministic": True,
}
# Median seconds of a step and the spread (sigma of the logarithm) of real ones around it, as for a 1 B model on a GPU.
SECONDS = {
    "model": (60, 0.5),
    "compress": (240, 0.7),
    "pairs": (5, 0.3),
    "requests": (5, 0.3),
    "teacher": (120, 0.3),
    "moments": (90, 0.3),
    "compensation": (60, 0.3),
    "tune": (400, 0.4),
    "responses": (180, 0.4),
    "metrics": (4, 0.3),
    "probe": (30, 0.2),
}

RESTORINGS = """
  vanilla: {}
  inherit: {inherit: true}
  cpet: {inherit: true, recover: {r: 4}, distill: true}
  cpet-eora: {inherit: true, recover: {r: 4, act: identity, init: eora, calibration: {documents: 16}}, distill: true}
"""


def text(models: int = 3, compressions: int = 6, pets: int = 2, tasks: int = 1, seeds: int = 2, include=SMOKE_TASK) -> str:
    """YAML of a matrix of these sizes: none and wanda patterns, none and LoRA ranks, four restorings."""
    rows = ["name: made", "model:"]
    rows += [f"  m{i}: {{source: 'tiny:llama', options: {{seed: {i}}}}}" for i in range(models)]
    rows += ["compression:", "  none: none"]
    rows += [f"  w{i}: {{backend: wanda, sparsity: 0.{i + 10}}}" for i in range(1, compressions)]
    rows += ["pet:", "  none: none"]
    rows += [f"  lora{i}: {{method: lora, r: {i}, target_modules: [q_proj]}}" for i in range(1, pets + 1)]
    rows += [f"restoring:{RESTORINGS}", "task:"]
    rows += [f"  t{i}: {{name: smoke_sentiment, include: '{include}', limit: {i + 50}}}" for i in range(tasks)]
    rows += [f"seed: {list(range(seeds))}", "exclude: [{compression: none, restoring: [inherit, 'cpet*']}]", ""]
    return "\n".join(rows)


def plan(folder: Path, devices: list[str] | None = None, **sizes) -> Plan:
    path = folder / "made.yaml"
    path.write_text(text(**sizes))
    matrix = load_matrix(path)
    return Planner(matrix, MACHINE | {"devices": devices or ["cpu"]}).build(expand(matrix))


def times(plan: Plan, seed: int) -> tuple[dict[str, float], dict[str, float]]:
    """By step: what it is estimated to take (the median of its kind), and what it takes, drawn around that."""
    rng = random.Random(seed)
    estimates = {key: float(SECONDS[step.kind][0]) for key, step in plan.steps.items()}
    return estimates, {key: estimates[key] * rng.lognormvariate(0, SECONDS[step.kind][1]) for key, step in plan.steps.items()}
