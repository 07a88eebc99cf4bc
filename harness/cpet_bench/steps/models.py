"""Steps that make models: fetching one, and compressing it."""

from __future__ import annotations

from pathlib import Path

from .. import registry
from ..settings import ModelSettings
from .context import Context


def run_model(ctx: Context) -> dict:
    """Fetch a model; an ordinary model folder, or a reference to the one that already is on this machine."""
    settings = ModelSettings.model_validate(ctx.params["model"])
    source = registry.get("source", settings.source.partition(":")[0])()
    return source.fetch(settings, Path(ctx.params["base"]), ctx.out, ctx.progress)


def run_compress(ctx: Context) -> dict:
    """One compression backend on the model before it."""
    from ..compression.calibration import check_text
    from ..compression.notes import carry_note
    from ..evaluation.pairs import calibration_ids
    from ..models.routers import carry_routers

    backend = registry.get("compression", ctx.settings["backend"])
    settings = backend.Settings.model_validate(ctx.settings["settings"])
    examples = None
    if "examples" in ctx.inputs:
        c = settings.calibration
        examples = calibration_ids(ctx.inputs["examples"], c.documents, c.max_tokens, c.seed)
        check_text(backend, settings, examples)
    more = {"scratch": ctx.scratch, "should_stop": ctx.should_stop} if getattr(backend, "resumes", False) else {}
    ctx.pool.clear()
    facts = backend.compress(
        ctx.inputs["source"],
        ctx.out,
        settings,
        examples=examples,
        device="+".join(ctx.machine["owns"]),
        dtype=ctx.machine["dtype"],
        progress=ctx.progress,
        **more,
    )
    carry_note(ctx.inputs["source"], ctx.out, ctx.settings["backend"])
    carried = carry_routers(ctx.inputs["source"], ctx.out)
    if carried and "bytes" in facts:
        facts["bytes"] += carried
    return facts
