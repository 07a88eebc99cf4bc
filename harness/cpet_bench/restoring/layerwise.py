"""Layer-wise distillation: what every block gives, compared with what the teacher's block gives that it came from.

Beyond CPET, which compares the last hidden states alone (arXiv 2307.07705, 3.3); as Patient KD (arXiv 1908.09355) and TinyBERT
(arXiv 1909.10351) do it, with each token's error divided by the mean square of the teacher's state, since states grow through
the blocks and those of a few tokens are larger than all others' by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import StepFailed
from ..models.arch import block_lists
from ..settings import DistillSettings
from ..training_losses import Shares, part_weights
from ..training_model import States, distilled


def stacks(model: nn.Module) -> dict[str, str]:
    """The name of the list of blocks by part: `last` of a decoder-only model, else `encoder` and `decoder`."""
    names = block_lists(model)
    if not model.config.is_encoder_decoder:
        return {"last": names[0]}
    return {"decoder" if "decoder" in name.split(".") else "encoder": name for name in names}


@contextmanager
def blocks_seen(model: nn.Module, active: bool = True) -> Iterator[dict[str, list[torch.Tensor]]]:
    """By part, what each block gives (rows x positions x width) in the pass made inside; nothing while not `active`."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for part, name in stacks(model).items() if active else ():
        seen[part] = []

        def keep(module, args, output, part=part):
            seen[part].append(output[0] if isinstance(output, tuple) else output)

        hooks += [block.register_forward_hook(keep) for block in model.get_submodule(name)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def block_states(states: States, seen: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By `PART/BLOCK`, what each block gave for the real tokens of the rows that are distilled, (tokens x width)."""
    found = {}
    for part, outputs in seen.items():
        for number, hidden in enumerate(outputs):
            mask = states.layers[part][1]
            hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]  # virtual tokens stand before the real ones
            found[f"{part}/{number}"] = distilled(States(states.rows, hidden, mask, {part: (hidden, mask)}), part)
    return found


def blocks_loss(
    states: States,
    seen: Mapping[str, list[torch.Tensor]],
    teacher: Mapping[str, torch.Tensor],
    settings: DistillSettings,
    shares: Shares,
    origins: Mapping[str, list[int]],
) -> torch.Tensor:
    """sum over parts of weight * mean over blocks and tokens of |student - teacher|^2 / |teacher|^2. A scalar in fp32.

    teacher: by `PART/BLOCK`, (tokens x width), as `block_states` of the teacher. origins: by part, for each block of the
    student the teacher's that it came from; a part that is not named has the teacher's blocks, all of them.
    Raises StepFailed where the teacher has other blocks.
    """
    total = states.hidden.new_zeros((), dtype=torch.float32)
    weights = part_weights(settings)
    mine = block_states(states, seen)
    for part, outputs in seen.items():
        theirs = origins.get(part)
        count = sum(name.startswith(f"{part}/") for name in teacher)
        fits = len(outputs) == count if theirs is None else len(outputs) == len(theirs) and max(theirs) < count
        if not fits:
            raise StepFailed(f"layers: all compares block by block, and of {len(outputs)} blocks here the teacher has {count}")
        for number in range(len(outputs) if weights[part] else 0):
            student = mine[f"{part}/{number}"].float()
            wanted = teacher[f"{part}/{number if theirs is None else theirs[number]}"].to(student.device, torch.float32)
            if student.shape != wanted.shape:
                raise StepFailed(f"blocks give {student.shape[1]} numbers a token, and the teacher's {wanted.shape[1]}")
            error = (student - wanted).square().mean(-1) / wanted.square().mean(-1).clamp_min(1e-12)
            total = total + weights[part] * error.sum().to(total.device) / (shares.tokens[part] * len(outputs))
    return total
