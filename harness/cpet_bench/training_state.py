"""What a training keeps while it runs: its checkpoint, and the proof that every trainable tensor learned."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch

from .errors import StepFailed
from .failpoints import failpoint
from .models.loading import survives_eval
from .settings import TrainSettings

_REPACKED = (
    "A model that was evaluated before may have lost its gradients (4-bit weights that the processor's kernel repacked at the "
    "first pass in evaluation mode): train on one loaded afresh"
)


def no_gradient(model: torch.nn.Module) -> StepFailed:
    """The error that nothing on `model` can be trained, with what is known of the reason."""
    why = ": what runs of the model does not use them" if survives_eval(model) else f". {_REPACKED}"
    return StepFailed(f"no gradient reached any of the trainable tensors{why}")


def fingerprint(trainable: dict[str, torch.nn.Parameter], settings: TrainSettings, more: dict) -> str:
    """Text that is the same only for the same training: settings that shape it, tensor names and shapes."""
    ours = settings.model_dump(mode="json", exclude={"checkpoint_every", "micro_batch"})
    return json.dumps([ours, more, {k: list(p.shape) for k, p in trainable.items()}], sort_keys=True)


def save_checkpoint(path: Path, trainable, start, optimizer, state: dict, **more: dict[str, torch.Tensor]) -> None:
    """One file with weights, start weights, optimiser state and (as metadata) `state`; whole or not there at all.

    more: further tensors to keep, by part and name (`kept_part` reads them).
    """
    from safetensors.torch import save_file

    tensors = {f"{part}/{name}": value for part, found in more.items() for name, value in found.items()}
    for name, p in trainable.items():
        tensors[f"weight/{name}"], tensors[f"start/{name}"] = p.detach(), start[name]
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    failpoint("checkpoint.before")
    save_file(tensors, partial, metadata={"state": json.dumps(state)})
    failpoint("checkpoint.written", path=partial)
    os.replace(partial, path)
    failpoint("checkpoint.after")


def load_checkpoint(path: Path, trainable, optimizer, wanted: str) -> tuple[dict, dict[str, torch.Tensor]] | None:
    """Put a checkpoint of this very training back, or None where there is none (or it is of another, or torn)."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
        tensors = load_file(path)
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
    if state["fingerprint"] != wanted:
        return None
    start = {}
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(tensors[f"weight/{name}"])
            start[name] = tensors[f"start/{name}"].to(p.device)
    groups = {name: {} for name in trainable}
    for key, value in tensors.items():
        what, _, rest = key.partition("/")
        if what == "optimizer":
            field, _, name = rest.partition("/")
            groups[name][field] = value.to(trainable[name].device)
    for name, p in trainable.items():
        if groups[name]:
            optimizer.state[p] = groups[name]
    return state, start


def kept_part(path: Path, part: str) -> dict[str, torch.Tensor]:
    """Further tensors of a checkpoint that `load_checkpoint` accepted, by name, on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        prefix = f"{part}/"
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


class Proof:
    """Watches that each trainable tensor gets finite gradients, non-zero at least once, and has moved at the end.

    exempt: tensors that this model and data cannot reach by construction; they are reported, not failed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        trainable: dict[str, torch.nn.Parameter],
        exempt: set[str],
        unseen: list[str] | None = None,
    ):
        self.model, self.trainable, self.exempt = model, trainable, exempt
        self.unseen = set(trainable) if unseen is None else set(unseen)

    def look(self, step: int) -> None:
        """After the backward passes of a step (counted from 1), before the gradients are clipped."""
        if step == 1 and all(p.grad is None for p in self.trainable.values()):
            raise no_gradient(self.model)
        names = [n for n in sorted(self.unseen) if self.trainable[n].grad is not None]
        if names:
            largest = torch.stack([self.trainable[n].grad.abs().amax().float().cpu() for n in names])
            self.unseen -= {n for n, value in zip(names, largest.tolist(), strict=True) if value != 0}

    def not_finite(self) -> list[str]:
        """Names of the tensors whose gradient is not finite now."""
        return [n for n, p in self.trainable.items() if p.grad is not None and not bool(p.grad.isfinite().all())]

    def finish(self, steps: int, start: dict[str, torch.Tensor], back: Collection[str] = ()) -> list[str]:
        """The exempt tensors (what reaches them is rounding, if anything); StepFailed where others learned nothing.

        back: tensors that the method itself may put back to where they started.

        A product that starts at zero (LoRA's B, recovery's U2) makes the other factor's first gradient exactly zero, so
        after a single step a tensor without gradient proves nothing, and only the whole is judged.
        """
        dead = sorted(self.unseen - self.exempt)
        if steps == 1:
            dead = [] if len(self.unseen) < len(self.trainable) else dead
        if dead:
            raise StepFailed(f"{len(dead)} trainable tensors never got a gradient other than zero: {_some(dead)}")
        if steps > 1:
            may = self.exempt.union(back)
            still = [n for n, p in self.trainable.items() if n not in may and torch.equal(p.detach(), start[n])]
            if still:
                raise StepFailed(f"{len(still)} trainable tensors did not change in {steps} steps: {_some(still)}")
        for name, p in self.trainable.items():
            if not bool(p.detach().isfinite().all()):
                raise StepFailed(f"{name} is not finite after training")
        return sorted(self.exempt)


def unreachable(model, trainable: dict[str, torch.nn.Parameter], decoder_tokens: int) -> set[str]:
    """Tensors that no gradient can reach: queries and keys of a decoder's self-attention that sees a single token.

    An encoder-decoder model that compares single-token choices runs its decoder on the start token alone, and a softmax over
    one position does not depend on its argument.
    """
    if not model.config.is_encoder_decoder or decoder_tokens > 1:
        return set()
    pattern = re.compile(r"decoder.*\b(SelfAttention|self_attn)[./](q|k|q_proj|k_proj)\b")
    return {name for name in trainable if pattern.search(name)}


def _some(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
