"""The losses of one step, as sums over a group of its documents, so that any split of a step gives the same total."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn import functional as F

from .settings import DistillSettings, KlSettings
from .training_model import States, distilled, logits, partial_logits, scored
from .training_rows import Document


@dataclass(frozen=True)
class Shares:
    """What the sums of one step are divided by. tokens: tokens distilled, by part of the model."""

    documents: int
    targets: int
    target_tokens: int
    tokens: dict[str, int]
    positions: int

    @staticmethod
    def of(documents: list[Document]) -> Shares:
        rows = [d.distilled for d in documents]
        targets = [d for d in documents if d.kind == "target"]
        read = sum(len(r.ids) for r in rows)
        return Shares(
            documents=len(documents),
            targets=len(targets),
            target_tokens=sum(len(d.distilled.tokens) for d in targets),
            tokens={"last": read, "decoder": read, "encoder": sum(len(r.encoder) for r in rows)},
            positions=sum(len(r.places) for r in rows),
        )


def task_loss(model, documents: list[Document], states: States, shares: Shares) -> torch.Tensor:
    """Cross-entropy among the choices, a mean over documents; for target texts over tokens. A scalar in fp32.

    For choices of one token each, the vocabulary's normaliser cancels, so the head is run on the choices' rows alone. Where a
    step has both kinds of document, each kind's mean counts by its share of the documents.
    """
    hidden = scored(states)
    loss = hidden.new_zeros((), dtype=torch.float32)
    singles: list[tuple[int, Document]] = []
    several: list[tuple[int, Document]] = []
    at = 0
    for d in documents:
        (singles if d.kind == "single" else several).append((at, d))
        at += sum(len(r.places) for r in d.rows)
    if singles:
        index = torch.tensor([i for i, _ in singles], device=hidden.device)
        loss = loss + _among_tokens(model, hidden[index], [d for _, d in singles]) / shares.documents
    for i, d in several:
        counts = [len(r.places) for r in d.rows]
        tokens = torch.tensor([t for r in d.rows for t in r.tokens], device=hidden.device)
        scores = logits(model, hidden[i : i + sum(counts)])
        logp = -F.cross_entropy(scores, tokens.to(scores.device), reduction="none")
        if d.kind == "several":
            sums = torch.stack([part.sum() for part in logp.split(counts)])
            loss = loss + (torch.logsumexp(sums, 0) - sums[d.answer]) / shares.documents
        else:
            loss = loss - logp.sum() / shares.target_tokens * (shares.targets / shares.documents)
    return loss


def _among_tokens(model, hidden: torch.Tensor, documents: list[Document]) -> torch.Tensor:
    """Sum over documents of the cross-entropy among each one's single-token choices; hidden is (documents x width)."""
    distinct = sorted({t for d in documents for t in d.choices})
    where = {t: i for i, t in enumerate(distinct)}
    widest = max(len(d.choices) for d in documents)
    columns = torch.tensor([[*(where[t] for t in d.choices), *[0] * (widest - len(d.choices))] for d in documents])
    absent = torch.tensor([[False] * len(d.choices) + [True] * (widest - len(d.choices)) for d in documents])
    answers = torch.tensor([d.answer for d in documents])
    scores = logits(model, hidden, torch.tensor(distinct))
    chosen = scores.gather(1, columns.to(scores.device)).masked_fill(absent.to(scores.device), float("-inf"))
    return F.cross_entropy(chosen, answers.to(scores.device), reduction="sum")


def part_weights(settings: DistillSettings) -> dict[str, float]:
    """Weight of each part's hidden states: `last` of decoder-only models, the encoder's and the decoder's of others."""
    return {"last": settings.weight, "encoder": settings.encoder_weight, "decoder": settings.decoder_weight}


def distill_weights(settings: DistillSettings, states: States) -> dict[str, float]:
    """The weights of the parts that `states` has."""
    return {part: part_weights(settings)[part] for part in states.layers}


def distill_terms(
    states: States,
    teacher: dict[str, torch.Tensor],
    settings: DistillSettings,
    shares: Shares,
    maps: Mapping[str, torch.Tensor] = MappingProxyType({}),
):
    """By part of the model, weight * MSE(student hidden, teacher hidden), over all real tokens of the right answers' rows.

    teacher: by part, (tokens x width), the documents one after the other as in `states`. CPET (arXiv 2307.07705) 3.3: one
    term on the last hidden state; its T5 code has two, 0.005 on the encoder's and 0.05 on the decoder's. Scalars in fp32.

    maps: by part, what takes the student's states to the teacher's width (teacher's x student's), where these differ.
    """
    found: dict[str, torch.Tensor] = {}
    for part, weight in distill_weights(settings, states).items():
        if weight:
            student = distilled(states, part).float()
            if part in maps:
                student = F.linear(student, maps[part].to(student.device))
            wanted = teacher[part].to(student.device, torch.float32)
            found[part] = weight * F.mse_loss(student, wanted, reduction="sum") / (shares.tokens[part] * student.shape[1])
    return found


def kl_loss(model, states: States, values: torch.Tensor, ids: torch.Tensor, settings: KlSettings, shares: Shares):
    """weight * T^2 * KL(teacher || student) at the scored positions, both renormalised over the teacher's top k tokens.

    values, ids: the teacher's k largest logits (fp32) and their tokens (int64), (positions x k). T^2 keeps the gradient's size
    independent of the temperature T (Hinton et al., arXiv 1503.02531, section 2).
    """
    student = partial_logits(model, scored(states, gold=True), ids)
    t = settings.temperature
    wanted = F.log_softmax(values.to(student.device, torch.float32) / t, -1)
    found = F.log_softmax(student / t, -1)
    return settings.weight * t * t * F.kl_div(found, wanted, log_target=True, reduction="sum") / shares.positions
