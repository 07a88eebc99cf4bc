"""Float32 masters of trained tensors that the model holds in 16 bits (arXiv 1710.03740, section 3.1).

Most PET modules are float32 beside a 16-bit model. Those that replace one of its own parameters (LN-tuning's norms, LoRA's
`bias` and `modules_to_save`), and adaption prompts, have its format, in which a weight near 1 does not change by less than
1/256 (bfloat16).
"""

from __future__ import annotations

import torch

_HALF = (torch.bfloat16, torch.float16)


class Masters:
    """What the optimiser sees: `stepped`, the trainable tensors by name, each 16-bit one as a float32 parameter of its own."""

    def __init__(self, trainable: dict[str, torch.nn.Parameter]):
        self.halves = {name: p for name, p in trainable.items() if p.dtype in _HALF}
        masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in self.halves.items()}
        self.stepped = {name: masters.get(name, p) for name, p in trainable.items()}

    def gather(self) -> None:
        """After the backward passes: move the model's gradients to the masters."""
        for name, p in self.halves.items():
            if p.grad is not None:
                self.stepped[name].grad, p.grad = p.grad.float(), None

    def spread(self) -> None:
        """After the optimiser's step, or a checkpoint was put back: round the masters into the model."""
        with torch.no_grad():
            for name, p in self.halves.items():
                p.copy_(self.stepped[name])

    def lost(self, start: dict[str, torch.Tensor]) -> list[str]:
        """Names of the tensors whose steps were too small to change anything in the model, from their masters at the start."""
        return sorted(name for name, p in self.halves.items() if torch.equal(p, start[name].to(p.dtype)))

    def zero_grad(self) -> None:
        """Drop all gradients, the model's own too."""
        for tensors in (self.stepped, self.halves):
            for p in tensors.values():
                p.grad = None
