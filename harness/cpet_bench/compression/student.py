"""A distilled student: every n-th block of the model, trained on unlabelled text to say and compute what the model does.

The loss is weight * T^2 * KL(teacher || student) over the whole vocabulary (Hinton et al., arXiv 1503.02531, section 2), and
an MSE between what each block kept gives and what the block it came from gives in the teacher (DistilBERT, arXiv 1910.01108,
starts a student like this; Patient KD, arXiv 1908.09355, matches hidden states).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..errors import StepFailed, Stopping
from ..settings import CalibrationSettings, Natural, Positive, Rate, Settings, TrainSettings
from .masks import load_plain, refuse_packed, save
from .sizes import F32, ModelSize, whole
from .structured import Importance

if TYPE_CHECKING:
    import torch

MICRO = 1024  # padded tokens of one pass: the logits of the whole vocabulary are kept for each, twice
CHECKPOINT = 25  # steps
MEASURED = 64  # held-out documents on which the divergence is measured


class StudentSettings(Settings):
    """`depth` (the share of blocks that stays) or `blocks` (how many; of each stack of an encoder-decoder model), `width` (the
    share of those blocks' parameters that stays: neurons and heads go as `structured` chooses by `importance`), or both.

    calibration: the text it is trained on. batch_tokens: text of one step. kl, hidden: weights of the two terms of the loss;
    temperature: of the first. lr rises over `warmup` steps and falls linearly to 0. seed: of the order of documents.
    """

    depth: float | None = Field(None, gt=0, lt=1)
    blocks: Positive | None = None
    width: float | None = Field(None, gt=0, lt=1)
    importance: Importance | None = Field(None, description="with width; element1 where it is not given")
    calibration: CalibrationSettings = CalibrationSettings(documents=1000)
    steps: Positive = 100
    batch_tokens: Positive = 2048
    lr: Rate = 3e-4
    warmup: Natural = 10
    weight_decay: float = Field(1e-2, ge=0, le=10)
    clip: float = Field(1.0, gt=0, le=1e6)
    kl: float = Field(1.0, gt=0, le=1e6)
    temperature: float = Field(2.0, gt=0, le=1e6)
    hidden: float = Field(1.0, ge=0, le=1e6)
    seed: Natural = 0

    @model_validator(mode="after")
    def _fits(self):
        if self.depth is not None and self.blocks is not None:
            raise ValueError("give either depth (such as 0.5) or blocks (such as 12)")
        if self.depth is None and self.blocks is None and self.width is None:
            raise ValueError("give depth (such as 0.5), blocks (such as 12) or width (such as 0.8)")
        if self.importance and self.width is None:
            raise ValueError("importance belongs to width")
        return self


class Student:
    """A really smaller model: fewer or narrower blocks, and all that is left of them trained."""

    name = "student"
    version = 1
    packages = ("torch", "transformers")
    calibrated = True
    resumes = True
    narrows = True  # with width, layers lose inputs and outputs
    tries = ({"depth": 0.5, "steps": 2}, {"width": 0.8, "steps": 2})  # settings that `doctor` tries
    Settings = StudentSettings

    @staticmethod
    def min_tokens(settings) -> int:
        return min(settings.batch_tokens, 2048)  # one step's: with fewer, a step would read the same document twice

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return {"depth": settings.depth, "blocks": settings.blocks, "width": settings.width}

    @staticmethod
    def work(settings) -> float:
        return settings.steps * settings.batch_tokens / 1000

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        if refuse_packed(before):
            return "a student is trained, which packed weights cannot be; put it first"
        zeros = [name for name in before if name in ("magnitude", "wanda", "sparsegpt")]
        if zeros:
            return f"training the student would fill the zeros of {zeros[-1]}; put the student first"
        if "moefy" in before:
            return "the routers were made for all blocks, as they were; put the student first"
        return None

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of the teacher; of the student, its gradients, AdamW's moments and its start; and of one pass."""
        share = settings.blocks / size.depth if settings.blocks else settings.depth or 1.0
        if settings.blocks and size.pairs:  # so many of each stack
            share *= 2
        student = size.total - size.blocks + size.blocks * min(1.0, share) * (settings.width or 1.0)
        passing = MICRO * (8 * size.vocabulary + size.depth * (10 * size.width + 4 * size.widest))
        return int(whole(size) + F32 * (5 * student + passing))

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: StudentSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
        scratch: Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Cut, train and save the student.

        Facts: kept_blocks (by list of blocks, indices in the source), blocks (before and after), groups_left (with width:
        neurons and key heads by narrowed part; which ones is in cpet_compression.json), parameters (of the student),
        teacher_parameters, training (see `distill`; with kl_start and kl_end, the divergence per token from the teacher at
        temperature 1 on held-out documents, before and after), bytes. Nothing is simulated.
        """
        from ..models.arch import block_lists
        from ..models.blocks import keep_blocks
        from ..models.passes import held_out

        examples = [e for e in examples or [] if e]
        if not examples:
            raise StepFailed("a student needs text to be trained on, and there is none")
        teacher, _ = load_plain(source, device, "float32")
        lists = {name: len(teacher.get_submodule(name)) for name in block_lists(teacher)}
        kept = {name: spread(total, settings) for name, total in lists.items()}
        student = keep_blocks(teacher, kept).to(device.split("+")[0])
        flags = held_out(examples)
        text = [e for e, out_ in zip(examples, flags, strict=True) if not out_]
        narrower, groups = narrow(student, settings, text, progress) if settings.width else ({}, {})
        held = [e for e, out_ in zip(examples, flags, strict=True) if out_][:MEASURED]
        before = divergence(teacher, student, held or text[:MEASURED])
        facts = distill(teacher, student, kept, text, settings, scratch, progress, should_stop)
        after = divergence(teacher, student, held or text[:MEASURED])
        facts |= {"kl_start": before, "kl_end": after, "measured_on": "held-out documents" if held else "training documents"}
        note = {"backend": "student", **settings.model_dump(mode="json")} | {"kept_blocks": kept, "blocks": lists}
        note |= {"kept": narrower, "groups": groups} if narrower else {}
        parameters, of_teacher = (sum(p.numel() for p in m.parameters()) for m in (student, teacher))
        del teacher
        return {
            "kept_blocks": kept,
            "blocks": {name: [total, len(kept[name])] for name, total in lists.items()},
            **({"groups_left": {part: len(groups) for part, groups in narrower.items()}} if narrower else {}),
            "parameters": parameters,
            "teacher_parameters": of_teacher,
            "calibration_documents": len(examples),
            "held_out_documents": sum(flags),
            "training": facts,
            "bytes": save(student, source, out, note),
        }


def spread(total: int, settings: StudentSettings) -> list[int]:
    """Indices of the blocks that stay: evenly over `total`, the first and the last among them (6 of 12: 0 2 4 7 9 11)."""
    from ..errors import Unsupported

    if settings.blocks is None and settings.depth is None:
        return list(range(total))
    n = settings.blocks or max(1, round(settings.depth * total))
    if n >= total:
        given = f"blocks: {settings.blocks}" if settings.blocks else f"depth: {settings.depth}"
        raise Unsupported(f"the model has {total} blocks, so {given} leaves nothing out; at most {total - 1} can stay")
    return [round(i * (total - 1) / (n - 1)) for i in range(n)] if n > 1 else [0]


def narrow(student, settings: StudentSettings, text: list[list[int]], progress) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Prune neurons and heads of `student` in place, as `structured` does. Returns by part the groups kept, and how many there
    were."""
    from ..models.widths import note_widths
    from . import structured

    how = structured.StructuredSettings(ratio=1 - settings.width, importance=settings.importance or "element1")
    few = [tokens[: how.calibration.max_tokens] for tokens in text[: how.calibration.documents]]
    parts, _ = structured.choose_parts(student, how)
    widths = structured.widths_for(student, parts, structured.block_parameters(student), how)
    kept = structured.prune(student, parts, widths, how, few, progress)
    note_widths(student)
    return kept, {part.label: part.groups for part in parts}


# -- the loss ----------------------------------------------------------------------------------------------------------
def look(model, documents: list[list[int]], blocks: dict[str, list[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (tokens x vocabulary, fp32) at the real positions, and what each of `blocks` gives there (tokens x width)."""
    from ..models.passes import text_inputs

    given, real = text_inputs(model, documents)
    seen: list[torch.Tensor] = []

    def keep(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[real.to(hidden.device)].float())

    modules = [model.get_submodule(f"{name}.{i}") for name, indices in blocks.items() for i in indices]
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        logits = model(**given).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits[real.to(logits.device)].float(), seen


def losses(teacher: tuple, student: tuple, settings: StudentSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens of T^2 KL(teacher || student), and over tokens and blocks of the hidden states' mean squared error.

    Each token's squared error is divided by the mean square of the teacher's state there: states grow through the blocks, and
    those of a few tokens are larger than all others' by orders of magnitude; so every block and token counts alike.
    """
    import torch
    from torch.nn import functional as F

    t, device = settings.temperature, student[0].device
    wanted = F.log_softmax(teacher[0].to(device) / t, -1)
    kl = t * t * F.kl_div(F.log_softmax(student[0] / t, -1), wanted, log_target=True, reduction="sum")
    hidden = torch.zeros((), device=device)
    for mine, theirs in zip(student[1], teacher[1], strict=True):
        theirs = theirs.to(mine.device)
        size = theirs.square().mean(-1).clamp_min(1e-12)
        hidden = hidden + ((mine - theirs).square().mean(-1) / size).sum().to(device)
    return kl, hidden


def divergence(teacher, student, documents: list[list[int]]) -> float:
    """KL(teacher || student) of the next token at temperature 1, a mean over the tokens of `documents`."""
    import torch

    plain = StudentSettings(depth=0.5, temperature=1.0)
    total = 0.0
    with torch.no_grad():
        for group in passes(documents):
            total += float(losses(look(teacher, group, {}), look(student, group, {}), plain)[0])
    return total / sum(map(len, documents))


# -- the training ------------------------------------------------------------------------------------------------------
def passes(documents: list[list[int]]) -> list[list[list[int]]]:
    """Documents of like length together, at most MICRO padded tokens a pass."""
    groups: list[list[list[int]]] = []
    for tokens in sorted(documents, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > MICRO:
            groups.append([])
        groups[-1].append(tokens)
    return groups


def order(lengths: list[int], steps: int, batch_tokens: int, seed: int) -> list[list[int]]:
    """Documents of each step: as many as come to `batch_tokens`, from passes over all of them that are shuffled by `seed`."""
    generator, queue, found = random.Random(seed), [], []
    for _ in range(steps):
        batch: list[int] = []
        while sum(lengths[i] for i in batch) < batch_tokens:
            if not queue:
                queue = list(range(len(lengths)))
                generator.shuffle(queue)
            batch.append(queue.pop())
        found.append(batch)
    return found


def distill(
    teacher,
    student,
    kept: dict[str, list[int]],
    text: list[list[int]],
    settings: StudentSettings,
    scratch: Path | None,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Train all of `student` with AdamW, in fp32; teacher and student see the same batches.

    scratch: a folder for the checkpoint (every 25 steps, and when stopped); a later call goes on from it, with the same result.

    Returns: steps, documents, tokens, padded_tokens, seconds, flops (by formula), peak_memory (bytes), and losses: of each step
        (of at most 200) step, loss, kl, hidden, lr, grad_norm.
    Raises: StepFailed: a loss or gradient is not finite, or a tensor learned nothing. Stopping: `should_stop()` said so.
    """
    import torch

    from ..training import learning_rate
    from ..training_cost import peak_memory
    from ..training_state import Proof, fingerprint, load_checkpoint, save_checkpoint

    student.requires_grad_(True)
    trainable = dict(student.named_parameters())
    more = {"betas": (0.9, 0.999), "weight_decay": settings.weight_decay}
    optimizer = torch.optim.AdamW(trainable.values(), lr=settings.lr, fused=True, **more)
    rates = TrainSettings(lr=settings.lr, warmup=settings.warmup, steps=settings.steps)
    plan = order([len(t) for t in text], settings.steps, settings.batch_tokens, settings.seed)
    name = hashlib.sha256(json.dumps([text, kept]).encode()).hexdigest()
    mark = fingerprint(trainable, settings, {"text": name})
    path = Path(scratch, "student.safetensors") if scratch else None
    resumed = load_checkpoint(path, trainable, optimizer, mark) if path else None
    if resumed:
        state, start = resumed
    else:
        start = {n: p.detach().clone() for n, p in trainable.items()}
        state = {"fingerprint": mark, "step": 0, "losses": [], "unseen": None, "tokens": 0, "padded": 0, "seconds": 0.0}
    # A softmax over keys does not depend on their common bias: what gradient it gets is rounding.
    proof = Proof(student, trainable, {n for n in trainable if n.endswith("k_proj.bias")}, state["unseen"])
    cuda = sorted({p.device.index or 0 for p in trainable.values() if p.device.type == "cuda"})
    student.train()
    with torch.random.fork_rng(devices=cuda):
        for number in range(state["step"], settings.steps):
            began = time.perf_counter()
            torch.manual_seed(settings.seed * 1_000_003 + number)  # dropout: the same whether or not it was interrupted
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(number, settings.steps, rates)
            documents = [text[i] for i in plan[number]]
            total, padded = _backward(teacher, student, documents, kept, settings)
            proof.look(number + 1)
            norm = float(torch.nn.utils.clip_grad_norm_(trainable.values(), settings.clip))
            loss = settings.kl * total["kl"] + settings.hidden * total["hidden"]
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise StepFailed(f"loss {loss} or gradient {norm} is not finite at step {number + 1}; a lower lr may help")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state["tokens"] += sum(map(len, documents))
            state["padded"] += padded
            state["seconds"] += time.perf_counter() - began
            rate = optimizer.param_groups[0]["lr"]
            state["losses"].append({"step": number + 1, "loss": loss, **total, "lr": rate, "grad_norm": norm})
            state["step"], state["unseen"] = number + 1, sorted(proof.unseen)
            progress(number + 1, settings.steps, f"loss {loss:.3f}")
            stop = number + 1 < settings.steps and should_stop()
            if path and (stop or (number + 1) % CHECKPOINT == 0):
                save_checkpoint(path, trainable, start, optimizer, state)
            if stop:
                raise Stopping(f"stopped after step {number + 1} of {settings.steps}")
    student.eval().requires_grad_(False)
    proof.finish(settings.steps, start)
    thin = -(-settings.steps // 200)
    return {
        "steps": settings.steps,
        "documents": sum(map(len, plan)),
        "tokens": state["tokens"],
        "padded_tokens": state["padded"],
        "seconds": round(state["seconds"], 3),
        "flops": state["tokens"] * (6 * _products(student) + 2 * _products(teacher)),
        "losses": [*state["losses"][::thin][:-1], state["losses"][-1]],
        "peak_memory": peak_memory(cuda),
    }


def _backward(teacher, student, documents: list[list[int]], kept: dict[str, list[int]], settings: StudentSettings):
    """Gradients of one step. Returns each term of the loss, a mean over tokens, and how many tokens were run with padding."""
    import torch

    theirs = kept if settings.hidden else {}
    mine = {name: list(range(len(indices))) for name, indices in theirs.items()}
    tokens, padded, total = sum(map(len, documents)), 0, {"kl": 0.0, "hidden": 0.0}
    for group in passes(documents):
        with torch.no_grad():
            wanted = look(teacher, group, theirs)
        kl, hidden = losses(wanted, look(student, group, mine), settings)
        hidden = hidden / max(1, len(wanted[1]))
        ((settings.kl * kl + settings.hidden * hidden) / tokens).backward()
        total["kl"] += float(kl.detach()) / tokens
        total["hidden"] += float(hidden.detach()) / tokens
        padded += len(group) * len(group[0])
    return total, padded


def _products(model) -> int:
    """Weights that one token is multiplied by: the blocks' linear layers' and the head's (attention's products left out)."""
    from ..models.arch import block_linears, features, head

    linear = sum(a * b for a, b in map(features, block_linears(model).values()))
    return linear + head(model)[0].numel()
