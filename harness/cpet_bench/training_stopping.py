"""Early stop: the task loss on training documents that are held out, and the best weights so far."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import torch

from .errors import StepFailed
from .settings import TrainSettings
from .training_losses import Shares, task_loss
from .training_model import run
from .training_rows import document, split, trained_on


class EarlyStop:
    """Looks at the held-out loss every so many steps, remembers the best weights, and says when to stop.

    state: what a checkpoint keeps beside the best weights: the best step and loss, and the looks since.
    """

    def __init__(self, pairs: list[dict], settings: TrainSettings, start: int | None, state: dict[str, Any] | None = None):
        self.settings, self.steps = settings.early_stop, settings.steps
        first = trained_on(len(pairs), settings)
        held = range(first, first + self.settings.documents)
        self.documents = [document(i, pairs[i], settings.max_tokens, start) for i in held]
        self.state = state or {"best_step": 0, "best_loss": None, "since": 0, "looks": 0, "tokens": 0}
        self.best: dict[str, torch.Tensor] = {}

    @property
    def done(self) -> bool:
        """Whether as many looks as `patience` says brought no new best."""
        return self.state["since"] >= self.settings.patience

    def look(self, model, trainable: dict[str, torch.nn.Parameter], step: int, micro: int) -> float | None:
        """The held-out loss after `step` steps where it is due, else None."""
        if step % self.settings.every and step < self.steps:
            return None
        loss, tokens = self._loss(model, micro)
        if not math.isfinite(loss):
            raise StepFailed(f"the loss on held-out documents is not finite at step {step}; a lower learning rate may help")
        state = self.state
        state["looks"], state["tokens"] = state["looks"] + 1, state["tokens"] + tokens
        if state["best_loss"] is None or loss < state["best_loss"]:
            state |= {"best_step": step, "best_loss": loss, "since": 0}
            self.best = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
        else:
            state["since"] += 1
        return loss

    def _loss(self, model, micro: int) -> tuple[float, int]:
        shares, total, tokens = Shares.of(self.documents), 0.0, 0
        with torch.no_grad(), without_dropout(model):
            for group in split(self.documents, micro):
                states = run(model, group, want_layers=False)
                total += float(task_loss(model, group, states, shares))
                tokens += int(states.mask.sum()) + sum(len(d.rows[0].encoder) for d in group)
        return total, tokens

    def restore(self, trainable: dict[str, torch.nn.Parameter]) -> None:
        """Put the best weights back."""
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(self.best[name])

    def facts(self, steps: int) -> dict[str, Any]:
        """For the record: settings, best step and loss, looks taken and tokens read for them, and whether it stopped early."""
        found = {k: self.state[k] for k in ("best_step", "best_loss", "looks", "tokens")}
        return {**self.settings.model_dump(), **found, "stopped": steps < self.steps}


@contextmanager
def without_dropout(model):
    """`model` in evaluation mode, but for quantised layers: bitsandbytes' then repack their weights and lose gradients."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        for module, _ in modes:
            if not type(module).__module__.startswith(("bitsandbytes", "gptqmodel")):
                module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
