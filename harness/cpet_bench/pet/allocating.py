"""AdaLoRA while it trains (arXiv 2303.10512): its ranks are dealt out anew, and its singular vectors kept orthogonal.

PEFT has both, and calls neither: the first is the caller's to call, the second is added only to a loss that the model computes
itself, which is not the one trained here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import StepFailed
from .methods import _KEPT

_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")  # what PEFT's allocator remembers from step to step


def adalora(model: nn.Module) -> AdaLora | None:
    """What training has to do for the AdaLoRA module on `model`; None where there is none that is trained."""
    kept = model.__dict__.get(_KEPT, {})
    wrapper = kept.get("wrapper")
    config = getattr(wrapper, "peft_config", {}).get("default")
    if config is None or config.peft_type.value != "ADALORA" or config.inference_mode:
        return None
    return AdaLora(wrapper.base_model, config, fresh="saved" not in kept)


class AdaLora:
    """PEFT's allocator and penalty of one AdaLoRA module. A saved one that is trained on keeps the ranks it came with."""

    def __init__(self, tuner: nn.Module, config, fresh: bool):
        self.tuner, self.config = tuner, config
        self.factors = [p for n, p in tuner.model.named_parameters() if (".lora_A." in n or ".lora_B." in n) and p.numel()]
        self.allocates = fresh and config.init_r > config.target_r

    def check(self, early_stop: bool) -> None:
        """Raise StepFailed where the budget could not be reached."""
        if self.allocates and early_stop:
            raise StepFailed(
                f"AdaLoRA's ranks are dealt out until step {self.config.total_step}, and early_stop may end before that: leave "
                "early_stop out, or keep all ranks with target_r as large as init_r"
            )

    def penalty(self) -> torch.Tensor | None:
        """orth_reg_weight × mean over all P and Q of ‖P Pᵀ − I‖ (Frobenius), PEFT's form of the paper's; None where it is 0."""
        weight = self.config.orth_reg_weight
        if not weight or not self.factors:
            return None
        found = []
        for p in self.factors:
            gram = p @ p.T if p.shape[0] < p.shape[1] else p.T @ p
            found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=p.dtype, device=p.device)).to("cpu"))
        return weight * torch.stack(found).mean()

    def add_penalty(self, losses: dict[str, Any], scale: float) -> None:
        """Its gradient (times `scale`, as the loss's are), once a step, and its value to the step's losses."""
        found = self.penalty()
        if found is not None:
            (found * scale).backward()
            losses["penalty"] = float(found.detach())
            losses["loss"] += losses["penalty"]

    def after(self, step: int) -> None:
        """After the optimiser's step (counted from 1), while the gradients are still there."""
        if self.allocates:
            self.tuner.update_and_allocate(step)

    def ranks(self) -> dict[str, int] | None:
        """Ranks that are left: total over the layers, smallest and largest of a layer, layers; None where none is given up."""
        if not self.allocates or not self.config.rank_pattern:
            return None
        left = [sum(kept) for kept in self.config.rank_pattern.values()]
        return {"total": sum(left), "smallest": min(left), "largest": max(left), "layers": len(left)}

    def given_up(self) -> set[str]:
        """Names of the singular values of layers that no rank was left to: zero again, as they started, and rightly so."""
        pattern = self.config.rank_pattern if self.allocates else None
        return {name for name, kept in (pattern or {}).items() if not any(kept)}

    # -- a checkpoint --------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, torch.Tensor]:
        allocator = self.tuner.rankallocator
        return {f"{what}/{n}": t for what in _AVERAGES for n, t in getattr(allocator, what).items()} if self.allocates else {}

    @property
    def state(self) -> dict[str, Any]:
        return {"rank_pattern": self.config.rank_pattern}

    def restore(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` and `tensors` gave."""
        if not self.allocates:
            return
        self.config.rank_pattern = state["rank_pattern"]
        allocator, places = self.tuner.rankallocator, dict(self.tuner.model.named_parameters())
        for key, value in tensors.items():
            what, _, name = key.partition("/")
            value = value.to(places[name].device)
            getattr(allocator, what)[name] = value
            allocator.ipt[name] = torch.zeros_like(value)
