"""Steps that run a deployment: responses to requests, and the probes of speed and memory."""

from __future__ import annotations

from pathlib import Path

from ..settings import ProbeSettings, RecoverSettings
from .context import Context


def run_responses(ctx: Context) -> dict:
    """Answer the requests with a base model and the adapter tuned on it, if there is one."""
    return answer(ctx, [ctx.inputs["adapter"]] if "adapter" in ctx.inputs else [], ctx.out, ctx.scratch)


def answer(ctx: Context, adapters: list[Path], out: Path, scratch: Path) -> dict:
    """Answer the requests of a step with its model and `adapters`, into `out`."""
    from ..deployment import deploy
    from ..evaluation.scorer import respond

    with ctx.model() as model, deploy(model, adapters) as deployed:
        facts = respond(
            deployed,
            ctx.tokenizer("model"),
            ctx.inputs["requests"],
            out,
            tokens_per_batch=ctx.settings["tokens_per_batch"],
            scratch=scratch,
            progress=ctx.progress,
            should_stop=ctx.should_stop,
        )
        return facts | {"attention": getattr(model.config, "_attn_implementation", None)}


def run_probe(ctx: Context) -> dict:
    """Speed and memory of a structure: the modules a cell attaches, with untrained weights (values do not change speed)."""
    from ..models.loading import load_tokenizer
    from ..probes import memory, throughput
    from ..worker import reset_peak
    from .tuning import attach_parts, attach_wider, inherited_by_other

    settings = ProbeSettings.model_validate(ctx.settings["probes"])
    found = {}
    ctx.pool.clear()
    reset_peak(ctx.machine["owns"])
    with ctx.model() as model:
        pet, recover = ctx.settings["pet"], ctx.settings.get("recover")
        recovery = RecoverSettings(r=recover["r"], act=recover["act"]) if recover else None
        control = ctx.settings.get("control")
        if control and control["control"] == "wider":
            parts = attach_wider(model, pet, control, ctx.scratch)
        else:
            parts = attach_parts(model, pet, recovery, control, seed=0, kept=inherited_by_other(ctx, model))
        with parts as deployed:
            deployed.eval()
            if settings.throughput:
                ctx.progress(0, 1, "speed")
                tokenizer = load_tokenizer(ctx.inputs["model"])
                found |= throughput.measure(deployed, tokenizer, settings.throughput, ctx.machine["owns"])
            if settings.memory:
                found |= memory.measure(deployed, ctx.pool.load_seconds.get(ctx.keys["model"]))
    return {"probes": found}
