"""Distillation between hidden states of two widths: through linear maps that are learned along and then thrown away.

CPET compares states of one width (arXiv 2307.07705, 3.3). A student of another width than its teacher is compared after a map
of its states to the teacher's width, as TinyBERT does (arXiv 1909.10351, equation 8).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import StepFailed
from ..models.arch import head
from ..settings import DistillSettings
from ..training_losses import part_weights
from ..training_rows import Document

NAME = "cpet_projection."


def state_width(model: nn.Module, hidden: str) -> int:
    """Numbers in a hidden state of `model` where distillation looks at it (`last` or `last_block_input`)."""
    return head(model)[0].shape[1] if hidden == "last" else model.config.hidden_size


def projections(model: nn.Module, settings: DistillSettings, widths: Mapping[str, int], seed: int) -> dict[str, nn.Parameter]:
    """By part whose teacher has states of another width: a map (teacher's width x student's), fp32, to be trained.

    Args:
        widths: of the teacher's states, by part.
        seed: of the maps. They start with orthonormal rows or columns, whichever are fewer, drawn on the CPU from a generator
            of their own: a state's length stays, or what is projected of it.
    Raises:
        StepFailed: the teacher has other parts than the student, or other widths where `projection: none` asks for the same.
    """
    own = state_width(model, settings.hidden)
    parts = ("encoder", "decoder") if model.config.is_encoder_decoder else ("last",)
    missing = [part for part in parts if part not in widths]
    if missing:
        kinds = ("an encoder-decoder model", "a decoder-only one")
        student, teacher = kinds if len(parts) > 1 else kinds[::-1]
        raise StepFailed(f"the student is {student} and its teacher {teacher}: their hidden states cannot be compared")
    generator, maps = torch.Generator().manual_seed(seed), {}
    for part in parts:
        if widths[part] == own or not part_weights(settings)[part]:
            continue
        if settings.projection == "none":
            raise StepFailed(
                f"the teacher's hidden states have {widths[part]} numbers and the student's {own}: projection: auto maps them"
            )
        weight = nn.init.orthogonal_(torch.empty(widths[part], own), generator=generator)
        maps[part] = nn.Parameter(weight.to(head(model)[0].device))
    return maps


def named(maps: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The maps by the names that a training's checkpoint and messages have for them."""
    return {NAME + part: weight for part, weight in maps.items()}


def projection_facts(maps: Mapping[str, nn.Parameter]) -> dict:
    """What a record says of them: widths (student's, teacher's) by part, and the parameters trained beside the cell's own."""
    if not maps:
        return {}
    sizes = {part: list(weight.shape[::-1]) for part, weight in maps.items()}
    return {"projection": sizes, "projection_parameters": sum(weight.numel() for weight in maps.values())}


def projection_flops(maps: Mapping[str, nn.Parameter], documents: list[Document]) -> int:
    """Operations of the maps on `documents`: 2 a weight and token forward, 4 backward."""
    total = 0
    for part, weight in maps.items():
        total += 6 * weight.numel() * sum(len(d.distilled.encoder if part == "encoder" else d.distilled.ids) for d in documents)
    return total
