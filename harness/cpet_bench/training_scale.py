"""Loss scaling for base models that compute in float16, whose smallest number would swallow most gradients."""

from __future__ import annotations

import math

import torch

from .errors import StepFailed

START, GROWTH = 2.0**16, 200  # the scale to begin with; finite steps after which it doubles


class LossScale:
    """A factor on the loss before the backward pass, taken off the gradients after it (arXiv 1710.03740, section 3.2).

    A power of two, so that it changes nothing but what under- or overflows. As torch.amp.GradScaler, it halves where a gradient
    overflows and doubles after a while; but such a step is done again and not left out, so that steps stay comparable.
    """

    def __init__(self, state: dict | None = None):
        self.state = state or {"scale": START, "finite": 0}

    @property
    def scale(self) -> float:
        return self.state["scale"]

    def unscale(self, trainable: dict[str, torch.nn.Parameter]) -> bool:
        """Take the factor off the gradients; False where they overflowed and the step is to be done with half the scale.

        StepFailed where there is no scale left to halve.
        """
        grads = [p.grad for p in trainable.values() if p.grad is not None]
        finite = all(math.isfinite(float(g.abs().amax())) for g in grads)
        if not finite:
            if self.scale <= 1:
                raise StepFailed(
                    "gradients overflow float16 at any scale of the loss; use device: {dtype: bfloat16} or float32"
                )
            self.state |= {"scale": self.scale / 2, "finite": 0}
            return False
        for grad in grads:
            grad.div_(self.scale)
        self.state["finite"] += 1
        if self.state["finite"] == GROWTH:
            self.state |= {"scale": self.scale * 2, "finite": 0}
        return True


def loss_scale(model, state: dict | None = None) -> LossScale | None:
    """What training this model needs; None where nothing of it computes in float16."""
    if not any(p.dtype == torch.float16 for p in model.parameters()):
        return None
    return LossScale(state)
