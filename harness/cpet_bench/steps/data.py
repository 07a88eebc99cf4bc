"""Steps on text alone: training pairs, requests, and lm-eval's metrics over kept responses."""

from __future__ import annotations

from pathlib import Path

from ..settings import PromptSettings, TrainData
from .context import Context


def _prompt(ctx: Context) -> PromptSettings:
    return PromptSettings.model_validate(ctx.settings["prompt"])


def _spec(ctx: Context) -> dict:
    from ..evaluation.tasks import placed

    spec = ctx.settings["spec"]
    return spec and placed(spec, ctx.params.get("task_folder"))


def run_pairs(ctx: Context) -> dict:
    """Training examples out of an lm-eval task, a JSONL file or a `datasets` set."""
    from ..evaluation.pairs import build_pairs

    s, data = ctx.settings, None
    if s["train_data"]:
        data = TrainData.model_validate(s["train_data"])
        if data.jsonl:
            data = data.model_copy(update={"jsonl": str(Path(ctx.params["base"], data.jsonl))})
    return build_pairs(
        _spec(ctx), data, _prompt(ctx), ctx.tokenizer(), ctx.out, s["documents"], s["max_tokens"], split=s["split"]
    )


def run_requests(ctx: Context) -> dict:
    """What lm-eval asks, once per task, prompt and tokenizer."""
    from ..evaluation.requests import build_requests

    return build_requests(_spec(ctx), _prompt(ctx), ctx.tokenizer(), ctx.out, limit=ctx.settings["limit"])


def run_metrics(ctx: Context) -> dict:
    """lm-eval's metrics over the kept responses, with intervals and the outcomes by document."""
    return {"metrics": metrics_of(ctx, ctx.inputs["responses"], ctx.out)}


def metrics_of(ctx: Context, responses: Path, out: Path) -> dict:
    """lm-eval's metrics of the responses to a step's requests; the outcomes by document go into `out`."""
    from ..evaluation.metrics import measure

    limit = ctx.settings["limit"]
    return measure(_spec(ctx), _prompt(ctx), ctx.inputs["requests"], responses, out, ctx.tokenizer(), limit=limit)
