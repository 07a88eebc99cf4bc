"""Steps that choose a learning rate: a candidate trained and scored on validation documents, and the best of them."""

from __future__ import annotations

import shutil
from typing import Any

from ..errors import StepFailed
from .context import Context
from .data import metrics_of
from .scoring import answer
from .tuning import run_tune


def run_trial(ctx: Context) -> dict:
    """Train one candidate, and score it on the documents that decide. One that does not train is a result: it cannot win."""
    try:
        facts = run_tune(ctx)
    except StepFailed as error:
        for made in ctx.out.iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        return {"failed": str(error)}
    return facts | {"metrics": _score(ctx)}


def _score(ctx: Context) -> dict[str, dict[str, Any]]:
    responses, outcomes = ctx.scratch / "responses", ctx.scratch / "outcomes"
    for folder in (responses, outcomes):
        folder.mkdir(parents=True, exist_ok=True)
    answer(ctx, [ctx.out], responses, ctx.scratch / "scoring")
    return metrics_of(ctx, responses, outcomes)


def run_select(ctx: Context) -> dict:
    """The candidate with the best primary metric: its files as they are, and what the others came to."""
    grid = ctx.settings["grid"]
    trials = [ctx.facts[f"trial{i}"] for i in range(len(grid))]
    best, name = choice(grid, trials)
    shutil.copytree(ctx.inputs[f"trial{best}"], ctx.out, dirs_exist_ok=True)
    rows = []
    for candidate, facts in zip(grid, trials, strict=True):
        found = {"failed": facts["failed"]} if "failed" in facts else {name: facts["metrics"][name]["value"]}
        rows.append(candidate | found)
    selection = {
        "chosen": grid[best],
        "metric": name,
        "on": ctx.settings["on"],
        "documents": trials[best]["metrics"][name]["n"],
        "candidates": rows,
        "steps": sum(facts.get("steps", 0) for facts in trials),
        "at_the_edge": _at_the_edge(grid, best),
    }
    return {k: v for k, v in trials[best].items() if k != "metrics"} | {"selection": selection}


def run_rate(ctx: Context) -> dict:
    """What was chosen, without the winner's weights: all that other seeds take of it."""
    return {"selection": ctx.facts["select"]["selection"]}


def choice(grid: list[dict[str, float]], trials: list[dict[str, Any]]) -> tuple[int, str]:
    """Number of the best candidate and the metric that decided; ties go to the least log-loss, then to the smallest rate.

    Raises StepFailed where no candidate could be trained.
    """
    from ..recording import primary

    scored = [i for i, facts in enumerate(trials) if "failed" not in facts]
    if not scored:
        raise StepFailed(f"none of the {len(grid)} candidates could be trained; the first one: {trials[0]['failed']}")
    name = primary(trials[scored[0]]["metrics"])

    def rank(i: int) -> tuple:
        metrics = trials[i]["metrics"]
        found = metrics[name]
        sign = 1 if found["higher_is_better"] else -1
        loss = metrics.get("log_loss", {}).get("value") or 0.0
        return sign * found["value"], -loss, -grid[i]["lr"]

    return max(scored, key=rank), name


def _at_the_edge(grid: list[dict[str, float]], best: int) -> bool:
    """Whether what was chosen is the smallest or largest that was tried, of anything, so that a better one may lie outside."""
    tried = {name: [candidate[name] for candidate in grid] for name in grid[best]}
    return any(grid[best][name] in (min(t), max(t)) for name, t in tried.items() if len(set(t)) > 1)
