"""The one training loop: any trainable parameters, choices or target texts, with or without distillation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .errors import StepFailed, Stopping
from .pet.allocating import adalora
from .restoring.layerwise import blocks_loss, blocks_seen
from .restoring.projection import named, projection_facts, projection_flops, projections
from .settings import DistillSettings, TrainSettings
from .training_cost import flops_of, peak_memory
from .training_losses import Shares, distill_terms, kl_loss, task_loss
from .training_masters import Masters
from .training_model import run, start_token
from .training_rows import Document, data_order, split, visits
from .training_scale import LossScale, loss_scale
from .training_state import Proof, fingerprint, kept_part, load_checkpoint, no_gradient, save_checkpoint, unreachable
from .training_stopping import EarlyStop

__all__ = ["data_order", "learning_rate", "train"]


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """The rate of step `step` (counted from 0) of `steps`: linear warm-up to `lr`, then its schedule.

    linear and cosine fall to 0 after the last step; noam falls with 1 / sqrt(step) (arXiv 1706.03762, 5.3).
    """
    warmup = min(settings.warmup, steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    past, rest = step - warmup, max(1, steps - warmup)
    if settings.schedule == "linear":
        return settings.lr * (1 - past / rest)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * past / rest))
    if settings.schedule == "noam":
        return settings.lr * math.sqrt(max(1, warmup) / (step + 1))
    return settings.lr


def train(
    model,
    pairs: list[dict],
    settings: TrainSettings,
    *,
    distill: DistillSettings | None = None,
    features: Path | None = None,
    teacher=None,
    origins: dict[str, list[int]] | None = None,
    scratch: Path,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
    extra_steps: int = 0,
    seed: int = 0,
) -> dict:
    """Train every parameter of `model` that requires a gradient, with AdamW; the others stay as they are.

    Where the teacher's states are of another width, the maps between them (restoring/projection.py) are trained along: they
    share the learning rate and the limit on the gradient's norm, and are gone afterwards.

    Args:
        pairs: training documents (`evaluation.pairs.read_pairs`).
        features, teacher: what distillation compares with: kept features, or a model run alongside.
        origins: with `layers: all` by part, which of the teacher's blocks each block came from, where some are gone.
        scratch: a checkpoint is kept here every `checkpoint_every` steps; a later call goes on from it, with the same result.
        should_stop: asked after each step.
        extra_steps: steps added to `settings.steps` (control `longer`).
        seed: of dropout, where the model or its modules have any.
    Returns: losses (a list of step, loss, task, distill, kl, lr, grad_norm, seconds; of an encoder-decoder model also
        distill_encoder and distill_decoder, of AdaLoRA penalty; with early stop validation, None where it was not due), steps
        (done), documents, tokens, padded_tokens, flops, seconds, trainable_parameters, peak_memory (bytes), micro_batch,
        unreachable; with early stop and batch_tokens early_stop and batches; loss_scale where the base computes in float16;
        unchanged (names) where 16-bit tensors came out as they were; where there were maps, projection (widths by part) and
        projection_parameters; where AdaLoRA gave up ranks, ranks.
    Raises:
        StepFailed: a loss or gradient is not finite, a tensor learned nothing, or memory does not suffice for one document.
        InputError: early stop holds out all the documents there are.
        Stopping: `should_stop()` said so; the checkpoint is written.
    """
    settings = settings.model_copy(update={"steps": settings.steps + extra_steps})
    # a layer to which AdaLoRA left no rank has factors without elements
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not trainable:
        raise StepFailed("nothing to train: no parameter requires a gradient")
    start_id = start_token(model)
    order, documents = visits(pairs, settings, start_id)
    look_up = _teacher(distill, features, teacher)
    own = sum(p.numel() for p in trainable.values())
    maps = projections(model, distill, look_up.widths, seed) if distill else {}
    if origins:
        look_up.origins = origins
    if maps:
        look_up.maps = maps
        trainable |= named(maps)

    masters = Masters(trainable)
    stepped = masters.stepped
    groups = [{"params": list(stepped.values()), "lr": settings.lr}]
    devices = {p.device.type for p in trainable.values()}
    fused = devices <= {"cpu"} or devices <= {"cuda"}
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay, fused=fused)
    path = Path(scratch, "training.safetensors")
    more = {"distill": distill.model_dump(mode="json") if distill else None, "seed": seed, "documents": len(pairs)}
    print_ = fingerprint(stepped, settings, more | ({"masters": sorted(masters.halves)} if masters.halves else {}))
    resumed = load_checkpoint(path, stepped, optimizer, print_)
    if resumed:
        state, start = resumed
        masters.spread()
    else:
        start = {name: p.detach().clone() for name, p in stepped.items()}
        state = {"fingerprint": print_, "step": 0, "losses": [], "unseen": None, "tokens": 0, "padded": 0, "seconds": 0.0}
        largest = max(map(len, order), default=1)
        state["micro"] = min(settings.micro_batch or largest, largest)
    scale = loss_scale(model, state.get("scale"))
    stopper = EarlyStop(pairs, settings, start_id, state.get("early_stop")) if settings.early_stop and order else None
    if stopper and resumed:
        stopper.best = kept_part(path, "best")
    ada = adalora(model)
    if ada:
        ada.check(early_stop=stopper is not None)
        if resumed:
            ada.restore(state["adalora"], kept_part(path, "adalora"))
    longest = max((len(r.ids) for d in documents.values() for r in d.rows), default=0)
    proof = Proof(model, stepped, unreachable(model, trainable, longest), state["unseen"])

    was_training = model.training
    model.train()  # layers that repack their weights for evaluation, and dropout, look at this
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            for number in range(state["step"], settings.steps):
                if stopper and stopper.done:
                    break
                began = time.perf_counter()
                rate = learning_rate(number, settings.steps, settings)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                docs = [documents[i] for i in order[number]]
                while True:
                    torch.manual_seed(seed * 1_000_003 + number)  # dropout: the same whether or not it was interrupted
                    losses, state["micro"] = _backward(model, docs, distill, look_up, state["micro"], masters, scale)
                    if ada:
                        ada.add_penalty(losses, scale.scale if scale else 1.0)
                    masters.gather()
                    if scale is None or not math.isfinite(losses["loss"]) or scale.unscale(stepped):
                        break
                    masters.zero_grad()
                proof.look(number + 1)
                norm = _clip(stepped, settings.clip)
                _finite(losses, norm, number + 1, proof)
                optimizer.step()
                masters.spread()
                if ada:
                    ada.after(number + 1)
                    state["adalora"] = ada.state
                masters.zero_grad()
                if stopper:
                    losses["validation"] = stopper.look(model, trainable, number + 1, state["micro"])
                    state["early_stop"] = stopper.state
                if scale:
                    state["scale"] = scale.state
                seconds = time.perf_counter() - began
                tokens = losses.pop("tokens")
                state["tokens"] += tokens[0]
                state["padded"] += tokens[1]
                state["seconds"] += seconds
                state["losses"].append(
                    {"step": number + 1, **losses, "lr": rate, "grad_norm": norm, "seconds": round(seconds, 4)}
                )
                state["step"], state["unseen"] = number + 1, sorted(proof.unseen)
                progress(number + 1, settings.steps, f"loss {losses['loss']:.3f}")
                stop = number + 1 < settings.steps and should_stop()
                if stop or (number + 1) % settings.checkpoint_every == 0:
                    more = {"best": stopper.best} if stopper else {}
                    more |= {"adalora": ada.tensors()} if ada else {}
                    save_checkpoint(path, stepped, start, optimizer, state, **more)
                if stop:
                    raise Stopping(f"stopped after step {number + 1} of {settings.steps}")
    finally:
        masters.zero_grad()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.train(was_training)
    done = state["step"]
    never = proof.finish(done, start, ada.given_up() if ada else ()) if done else []
    lost = masters.lost(start)
    if done and len(lost) == len(trainable):
        raise StepFailed(f"the steps were too small to change {lost[0]} or any other tensor in {masters.halves[lost[0]].dtype}")
    if stopper:
        stopper.restore(trainable)
    read = [documents[i] for step in order[:done] for i in step]
    facts = {
        "losses": state["losses"],
        "steps": done,
        "documents": len(read),
        "tokens": state["tokens"],
        "padded_tokens": state["padded"],
        "flops": flops_of(model, read) + projection_flops(maps, read),
        "seconds": state["seconds"],
        "trainable_parameters": own,
        **projection_facts(maps),
        "peak_memory": peak_memory(cuda),
        "micro_batch": state["micro"],
        "unreachable": never,
        **({"unchanged": lost} if done and lost else {}),
    }
    if stopper:
        facts["early_stop"] = stopper.facts(done)
    if settings.batch_tokens and done:
        sizes = [len(step) for step in order[:done]]
        facts["batches"] = {"tokens": settings.batch_tokens, "documents": [min(sizes), max(sizes)]}
    if scale:
        facts["loss_scale"] = scale.scale
    if ada and (ranks := ada.ranks()):
        facts["ranks"] = ranks
    return facts


def _teacher(distill: DistillSettings | None, features: Path | None, teacher):
    from .restoring.distill import Alongside, Kept

    if distill is None:
        return None
    if features is not None:
        return Kept(features, distill)
    if teacher is None:
        raise StepFailed("distillation needs the teacher's features, or a teacher to run alongside")
    return Alongside(teacher, distill)


def _backward(model, docs: list[Document], distill, look_up, micro: int, masters: Masters, scale) -> tuple[dict, int]:
    """Gradients of one step; after running out of memory again with half as many documents per pass."""
    while True:
        try:
            return _passes(model, docs, distill, look_up, micro, scale), micro
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            text = str(error).strip().splitlines()[0]
        masters.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if micro == 1:
            raise StepFailed(f"out of memory even with one document per pass: {text}")
        micro = max(1, micro // 2)


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


def _passes(model, docs: list[Document], distill: DistillSettings | None, look_up, micro: int, scale: LossScale | None) -> dict:
    shares = Shares.of(docs)
    total = {"loss": 0.0, "task": 0.0, "distill": None, "kl": None}
    real = padded = 0
    for group in split(docs, micro):
        with blocks_seen(model, active=distill is not None and distill.layers == "all") as seen:
            states = run(model, group, distill.hidden if distill else "last", want_layers=distill is not None)
        task = task_loss(model, group, states, shares)
        parts = {"task": task}
        if distill:
            wanted = look_up(group)
            terms = distill_terms(states, wanted, distill, shares, look_up.maps)
            parts["distill"] = sum(terms.values(), states.hidden.new_zeros((), dtype=torch.float32))
            if len(states.layers) > 1:
                for part, value in terms.items():
                    total[f"distill_{part}"] = total.get(f"distill_{part}", 0.0) + float(value.detach())
            if seen:
                parts["distill"] = parts["distill"] + blocks_loss(states, seen, wanted, distill, shares, look_up.origins)
            if distill.kl:
                parts["kl"] = kl_loss(model, states, wanted["kl_values"], wanted["kl_ids"], distill.kl, shares)
        loss = sum(parts.values())
        if not loss.requires_grad:
            raise no_gradient(model)
        (loss * scale.scale if scale else loss).backward()
        for name, value in parts.items():
            total[name] = (total[name] or 0.0) + float(value.detach())
        total["loss"] += float(loss.detach())
        real += int(states.mask.sum()) + sum(len(d.rows[0].encoder) for d in group)
        padded += states.mask.numel() + len(group) * max(len(d.rows[0].encoder) for d in group)
    total["tokens"] = (real, padded)
    return total


def _clip(trainable: dict[str, torch.nn.Parameter], limit: float | None) -> float:
    """Global norm of the gradients before they are clipped to `limit`."""
    return float(torch.nn.utils.clip_grad_norm_(trainable.values(), math.inf if limit is None else limit))


def _finite(losses: dict, norm: float, step: int, proof: Proof) -> None:
    if not math.isfinite(losses["loss"]):
        shown = {k: v for k, v in losses.items() if k != "tokens" and v is not None}

        raise StepFailed(f"the loss is not finite at step {step}: {shown}; a lower learning rate may help")
    if not math.isfinite(norm):
        bad = proof.not_finite()
        raise StepFailed(f"the gradient is not finite at step {step}: {', '.join(bad[:6]) or 'its norm overflows'}")
