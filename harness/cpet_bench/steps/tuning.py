"""Steps that train, and what training needs: the teacher's features, input moments, the compensated start."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from .. import loss_curves
from ..errors import StepFailed, Unsupported
from ..pet.own import plain_name
from ..plan_select import TWO_WEIGHTS
from ..settings import DistillSettings, PetSettings, RecoverSettings, TrainSettings
from .context import Context


@contextmanager
def attach_parts(
    model,
    pet: dict | None,
    recovery: RecoverSettings | None,
    control: dict | None,
    *,
    seed: int,
    init: Path | None = None,
    kept: Path | None = None,
):
    """`model` with freshly initialised parts of a cell on it, and taken off again at the end. kept: see `control_ranks`."""
    from ..pet import methods
    from ..restoring import recover

    settings = PetSettings(**pet) if pet else None
    ranks = None
    if control and control["control"] != "wider":
        settings = from_random(settings)
        ranks = control_ranks(model, settings, control, kept)
    deployed = methods.attach(model, settings, targets=ranks, seed=seed) if settings else model
    try:
        if recovery:
            recover.attach_recovery(deployed, recovery, seed=seed, init=init)
        yield deployed
    finally:
        if recovery:
            recover.detach_recovery(deployed)
        if settings:
            methods.detach(deployed)


@contextmanager
def attach_wider(model, pet: dict, control: dict, scratch: Path):
    """`model` with an untrained PET module on it whose ranks are extended as those of a `wider` control are."""
    from ..pet import methods
    from ..restoring.fairness import wider

    with attach_parts(model, pet, None, None, seed=0) as fresh:
        methods.save(fresh, scratch / "fresh")
    wider(scratch / "fresh", target_parameters(model, control), scratch / "wider")
    deployed = methods.attach_saved(model, scratch / "wider", trainable=False)
    try:
        yield deployed
    finally:
        methods.detach(deployed)


def from_random(pet: PetSettings) -> PetSettings:
    """`pet` with a random start where its own is taken out of the base weights, which may be packed integers here."""
    from ..pet.rewriting import rewrites

    if not rewrites(pet.fields):
        return pet
    return PetSettings(method=pet.method, **(pet.fields | {"init_lora_weights": True}))


def control_ranks(model, pet: PetSettings, control: dict, kept: Path | None = None) -> dict[str, int]:
    """LoRA ranks on the layers recovery sits on, with as many trainable parameters as the cell `of` has (within 1 %).

    kept: the adapter that cell inherits, where the fields of its PET module do not say its size.
    What the fields of `pet` train beside LoRA's factors (DoRA's magnitudes, biases, `modules_to_save`) counts with them.
    """
    from ..models.arch import block_linears, features
    from ..pet import methods
    from ..restoring.fairness import matched_ranks, near, trainable_count

    shapes = {name: features(module) for name, module in block_linears(model).items()}
    target = target_parameters(model, control, kept)
    ranks, beside = matched_ranks(shapes, target), 0
    for _ in range(2):  # what stands beside may grow with the ranks
        count = trainable_count(methods.attach(model, pet, targets=ranks, seed=0))
        methods.detach(model)
        more = count - sum(r * sum(shapes[name]) for name, r in ranks.items())
        if more == beside:
            break
        beside = more
        if beside >= target:
            raise StepFailed(
                f"the fields of `pet` make it train {beside} parameters beside LoRA's factors, which leaves none of {target}"
            )
        ranks = matched_ranks(shapes, target - beside)
    near(beside + sum(r * sum(shapes[name]) for name, r in ranks.items()), target, len(shapes))
    return ranks


def target_parameters(model, control: dict, kept: Path | None = None) -> int:
    """Trainable parameters of the cell a control is matched to: its PET module's and its recovery modules'."""
    from ..models.arch import block_linears, features
    from ..pet import methods
    from ..restoring.fairness import trainable_count

    if kept:
        other = methods.attach_saved(model, kept, trainable=True)
    else:
        other = methods.attach(model, PetSettings(**control["pet"]), seed=0)
    count = trainable_count(other)
    methods.detach(other)
    if control["recover"]:
        r = control["recover"]["r"]
        count += sum(r * (a + b) for a, b in map(features, block_linears(model).values()))
    return count


def run_tune(ctx: Context) -> dict:
    """Train the parts of one cell on its model; with no steps, put them together and save them."""
    s = ctx.settings
    recovery = RecoverSettings(r=s["recover"]["r"], act=s["recover"]["act"]) if "recover" in s else None
    if recovery:
        recovery = recovery.model_copy(update={"alpha": s["recover"]["scale"] * recovery.r})
    with ctx.model(purpose="train") as model, _known_limits(ctx, model):
        origins = _origins(ctx, model)
        start, cut = _start(ctx, model)
        if start is not None:
            return _train_from(ctx, model, start, recovery, origins) | cut
        parts = {"seed": s["seed"], "init": ctx.inputs.get("init"), "kept": inherited_by_other(ctx, model)}
        with attach_parts(model, s["pet"], recovery, s.get("control"), **parts) as deployed:
            return _train_and_save(ctx, deployed, recovery, origins)


@contextmanager
def _known_limits(ctx: Context, model):
    """A failure of what `doctor --pet` found to be unsupported here is Unsupported, and no failure of this cell alone.

    Asked only after a failure: other fields than those that were tried may well work.
    """
    from ..pet import capability
    from ..worker import describe

    try:
        yield
    except (StepFailed, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        s = ctx.settings
        parts = [part for part in capability.PARTS if part in s or part in ctx.inputs]
        why = None
        if not s.get("control") and describe(error)["type"] != "OutOfMemory":
            why = capability.refused(model, s["pet"]["method"], parts)
        if why is None:
            raise
        raise Unsupported(f"{type(error).__name__}: {error} ({why})") from error


def _start(ctx: Context, model) -> tuple[Path | None, dict]:
    """The adapter folder training starts from: D's or one the user has, cut as the model was, and extended for `wider`.

    And facts, where it was cut: `inherited_cut` (see `inheriting.cut_adapter`).
    """
    from ..pet.given import check_given
    from ..restoring.fairness import wider

    if "inherit" in ctx.inputs:
        folder = ctx.inputs["inherit"] / "adapter"
    elif "inherit" in ctx.settings:
        folder = _user_adapter(ctx)
    else:
        return None, {}
    with _inheriting(ctx):
        if "inherit" in ctx.settings:
            check_given(folder, PetSettings(**ctx.settings["pet"]), model)
        folder, cut = _cut(ctx, model, folder, own="inherit" not in ctx.inputs)
    facts = {"inherited_cut": cut} if cut else {}
    control = ctx.settings.get("control")
    if control and control["control"] == "wider":
        extended = ctx.scratch / "wider"
        shutil.rmtree(extended, ignore_errors=True)
        wider(folder, target_parameters(model, control), extended, seed=ctx.settings["seed"])
        return extended, facts
    return folder, facts


def inherited_by_other(ctx: Context, model) -> Path | None:
    """The adapter that the cell a control is matched to starts from, cut as the model was; None where it needs no look."""
    from ..models.sources import fetch_adapter

    if "of" in ctx.inputs:
        folder = ctx.inputs["of"] / "adapter"
    elif "of" in ctx.params:
        folder = fetch_adapter(ctx.params["of"], Path(ctx.params["base"]), ctx.settings["control"]["sized"])
    else:
        return None
    return _cut(ctx, model, folder, own="of" in ctx.params)[0]


def _cut(ctx: Context, model, folder: Path, own: bool = False) -> tuple[Path, dict]:
    """The adapter of `folder`, trained on the dense model, as it fits the step's model, and facts of what was cut (or none).

    own: it is the user's.
    """
    from ..restoring.cuts import read_cuts
    from ..restoring.inheriting import start_of

    cuts = read_cuts(model, ctx.inputs["model"], ctx.params.get("compressions", 0))
    if not cuts:
        return folder, {}
    out = ctx.scratch / "cut/adapter"
    shutil.rmtree(out, ignore_errors=True)
    return start_of(folder, model, cuts, out, ctx.inputs.get("dense"), own=own)


@contextmanager
def _inheriting(ctx: Context):
    """A StepFailed inside names the user's adapter, where it was one, and what to give instead."""
    try:
        yield
    except StepFailed as error:
        if "inherit" not in ctx.params:
            raise
        raise StepFailed(
            f"inherit from {ctx.params['inherit']}: {error}. Name an adapter that was trained on this model, or write "
            "inherit: true, and one is trained here"
        ) from error


def _user_adapter(ctx: Context) -> Path:
    from ..models.sources import fetch_adapter

    return fetch_adapter(ctx.params["inherit"], Path(ctx.params["base"]), ctx.settings["inherit"])


def _train_from(ctx: Context, model, start: Path, recovery: RecoverSettings | None, origins: dict | None) -> dict:
    from ..pet import methods
    from ..restoring import recover

    with _inheriting(ctx):
        deployed = methods.attach_saved(model, start, trainable=True)
    try:
        if recovery:
            recover.attach_recovery(deployed, recovery, seed=ctx.settings["seed"], init=ctx.inputs.get("init"))
        return _train_and_save(ctx, deployed, recovery, origins)
    finally:
        if recovery:
            recover.detach_recovery(deployed)
        methods.detach(deployed)


def _train_and_save(ctx: Context, model, recovery: RecoverSettings | None, origins: dict | None) -> dict:
    from ..evaluation.pairs import read_pairs
    from ..pet import methods
    from ..restoring import recover
    from ..restoring.fairness import trainable_count
    from ..training import train

    s = ctx.settings
    selection = ctx.facts.get("rate", {}).get("selection")  # of a rate that was chosen at another seed
    chosen = selection["chosen"] if selection else {}
    rate = {"lr": chosen["lr"]} if chosen else {}
    settings = TrainSettings.model_validate({**s["train"], **rate, "checkpoint_every": ctx.params["checkpoint_every"]})
    weight = {"weight": chosen["weight"]} if "weight" in chosen else {}
    distill = DistillSettings.model_validate(s["distill"] | weight) if "distill" in s else None
    if ctx.params.get("tried") == "weight" and model.config.is_encoder_decoder:
        raise StepFailed(TWO_WEIGHTS)
    extra = (s.get("control") or {}).get("extra_steps", 0)
    count = trainable_count(model)
    facts: dict[str, Any] = {"steps": 0, "documents": 0, "tokens": 0, "flops": 0, "losses": [], "seconds": 0.0}
    if settings.steps + extra:
        with _taught_by(ctx, distill, origins) as teacher:
            facts = train(
                model,
                read_pairs(ctx.inputs["pairs"]),
                settings,
                distill=distill,
                **teacher,
                scratch=ctx.scratch,
                progress=ctx.progress,
                should_stop=ctx.should_stop,
                extra_steps=extra,
                seed=s["seed"],
            )
    methods.save(model, ctx.out / "adapter")
    # the controls of a method are LoRA; PEFT's name, however the matrix spells it
    name = "lora" if s.get("control") else plain_name(s["pet"]["method"])
    parts = {name: count}
    if recovery:
        recover.save_recovery(model, ctx.out / "recovery", recovery)
        parts["recovery"] = recover.recovery_parameters(model)
        parts[name] -= parts["recovery"]
    losses = facts.pop("losses", [])
    loss_curves.write(losses, ctx.out / "losses.parquet")
    facts |= {"trainable_parameters": count, "by_part": parts, "lr": settings.lr}
    (ctx.out / "training.json").write_text(json.dumps(facts, indent=1, default=str))
    facts["losses"] = loss_curves.thinned(losses, 200)
    if "inherit" in ctx.facts:
        source = ctx.facts["inherit"]
        facts["inherited"] = {k: source.get(k) for k in ("steps", "tokens", "flops", "seconds", "trainable_parameters")}
    if selection:
        facts["selection"] = selection
    return facts


def _origins(ctx: Context, model) -> dict[str, list[int]] | None:
    """By part of the model, the blocks that its own came from, where compression took some and `layers: all` asks for them.

    Read before anything sits on its layers, whose shapes are held against what the compression notes.
    """
    from ..restoring.cuts import read_cuts
    from ..restoring.layerwise import stacks

    distill = ctx.settings.get("distill")
    if not distill or distill.get("layers", "last") == "last" or distill.get("teacher") == "compressed":
        return None
    cuts = read_cuts(model, ctx.inputs["model"], ctx.params["compressions"])
    return {part: sorted(cuts.blocks[name]) for part, name in stacks(model).items()} if cuts and cuts.renames else None


@contextmanager
def _taught_by(ctx: Context, distill: DistillSettings | None, origins: dict | None):
    """Arguments of `train` that say what distillation compares with: kept features, or the teacher run alongside."""
    from ..deployment import deploy
    from ..restoring import distill as distillation

    features = ctx.inputs.get("features")
    if distill is None or distill.layers == "last":
        yield {"features": features}
        return
    if not distillation.alongside(features):
        yield {"features": features, "origins": origins}
        return
    with ctx.model("teacher") as other:
        folder = ctx.inputs["teacher_adapter"] / "adapter"
        if distill.teacher == "compressed":
            folder, _ = _cut(ctx, other, folder)
        with deploy(other, [folder.parent]) as teacher:
            yield {"teacher": teacher, "origins": origins}


def run_teacher(ctx: Context) -> dict:
    """Hidden states of M + D (or C + D, or another model's) over the documents training visits, computed once and kept.

    Raises StepFailed where the teacher is another model and reads other tokens than the student.
    """
    from ..deployment import deploy
    from ..evaluation.pairs import read_pairs
    from ..models.loading import load_tokenizer
    from ..restoring.distill import same_tokens, teacher_features
    from ..restoring.teachers import other_tokens

    s = ctx.settings
    if "tokenizer" in ctx.inputs and not same_tokens(ctx.tokenizer(), load_tokenizer(ctx.inputs["model"])):
        raise StepFailed(other_tokens(**ctx.params["names"]))
    kl = {"top_k": s["top_k"]} if s["top_k"] else None
    distill = DistillSettings.model_validate({"hidden": s["hidden"], "kl": kl, "layers": s.get("layers", "last")})
    train = TrainSettings.model_validate(s["order"])
    with ctx.model() as model:
        folder, _ = _cut(ctx, model, ctx.inputs["adapter"] / "adapter")
        with deploy(model, [folder.parent]) as teacher:
            return teacher_features(teacher, read_pairs(ctx.inputs["pairs"]), distill, train, ctx.out, ctx.progress)


def run_moments(ctx: Context) -> dict:
    """Mean of x xT of every linear layer's input, over calibration documents passed through the model: the compressed one, or
    the dense one where layers of that lost inputs."""
    from ..evaluation.pairs import calibration_ids
    from ..restoring.compensate import input_moments

    s = ctx.settings
    examples = calibration_ids(ctx.inputs["pairs"], s["documents"], s["max_tokens"], s["seed"])
    with ctx.model() as model:
        return input_moments(model, examples, ctx.out, ctx.progress)


def run_compensation(ctx: Context) -> dict:
    """The recovery that reproduces the compression's error best at rank r."""
    from ..evaluation.pairs import calibration_ids
    from ..restoring.compensate import compensation
    from ..restoring.cuts import read_cuts
    from ..restoring.sequential import sequential_compensation

    s = ctx.settings
    with ctx.model() as model:
        cuts = read_cuts(model, ctx.inputs["model"], ctx.params.get("compressions", 0))
        if not s.get("sequential"):
            moments = ctx.inputs.get("moments")
            return compensation(ctx.inputs["dense"], model, moments, s["r"], s["method"], ctx.out, ctx.progress, cuts)
        examples = calibration_ids(ctx.inputs["pairs"], s["documents"], s["max_tokens"], s["seed"])
        same = ctx.keys["dense"] == ctx.keys["model"]
        with nullcontext(model) if same else ctx.model("dense") as dense:
            return sequential_compensation(dense, ctx.inputs["dense"], model, examples, s["r"], ctx.out, ctx.progress, cuts)
