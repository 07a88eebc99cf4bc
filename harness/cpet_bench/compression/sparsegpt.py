"""SparseGPT (arXiv 2301.00774): pruning by optimal brain surgery, column by column; what stays makes up for what goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from ..errors import StepFailed
from ..settings import CalibrationSettings
from .blockwise import change_blocks
from .masks import PatternSettings, Zeros, check_widths, fits, inputs_of, keep_mask, refuse_packed, weight_out_in
from .sizes import F32, ModelSize, streamed

if TYPE_CHECKING:
    import torch

    from .streaming import Whole


class SparseGptSettings(PatternSettings):
    """As Wanda's. damp: added to H's diagonal, as a share of its mean. block: columns whose mask is chosen at once."""

    calibration: CalibrationSettings = CalibrationSettings()
    damp: float = Field(0.01, gt=0, le=1)
    block: int = Field(128, ge=1, le=65536)

    @model_validator(mode="after")
    def _whole_groups(self):
        if self.nm and self.block % self.nm[1]:
            m = self.nm[1]
            raise ValueError(f"block {self.block} cuts a group of {self.pattern}; {max(1, self.block // m) * m} would not")
        return self


class SparseGpt:
    """Blocks in order: each sees what the blocks before it give after their pruning (as the authors' code does)."""

    name = "sparsegpt"
    version = 1
    packages = ("torch", "transformers")
    calibrated = True
    min_tokens = 128  # with fewer, the Hessian of one block of 128 columns is singular: damping decides, and not the text
    tries = ({"pattern": "2:4"}, {"sparsity": 0.5})  # settings that `doctor` tries
    Settings = SparseGptSettings

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return {}

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed(before)

    fits = staticmethod(fits)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of going block by block, with a block's Hessians, and the widest one three times over in fp64."""
        hessians = 3 * size.width**2 + 8 * size.widest**2
        return streamed(size, settings.calibration) + F32 * (3 * size.layer + hessians)

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: SparseGptSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Prune and save. Facts: sparsity, calibration documents and tokens, streamed, bytes; the speed stays the
        dense kernels'."""
        from .streaming import open_plain

        if not examples:
            raise StepFailed("SparseGPT needs calibration documents, and there are none")
        opened = open_plain(source, out, device)
        check_widths(inputs_of(opened.layers), settings)
        facts = prune(opened, examples, settings, progress)
        facts |= {"calibration_documents": len(examples), "calibration_tokens": sum(map(len, examples))}
        note = {"backend": "sparsegpt", **settings.model_dump(mode="json"), **facts}
        return {**facts, **opened.facts, "bytes": opened.save(note), "simulated": ["size", "speed"]}


def prune(opened: Whole, examples: list[list[int]], settings: SparseGptSettings, progress) -> dict[str, Any]:
    """Prune the blocks' layers. Returns the zeros' shares."""
    zeros = Zeros(settings)

    def products(found: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        return x.t() @ x if found is None else found.addmm_(x.t(), x)

    tokens = sum(map(len, examples))

    def surgery(group: dict[str, Any], found: torch.Tensor) -> None:
        factor = inverse_factor(found.mul_(2 / tokens), settings.damp, next(iter(group)))
        for module in group.values():
            weight = weight_out_in(module)
            weight.copy_(pruned(weight.float(), factor, settings))
        zeros.count(group)

    change_blocks(opened, examples, products, surgery, progress)
    return zeros.facts()


def inverse_factor(h: torch.Tensor, damp: float, name: str = "a layer") -> torch.Tensor:
    """Upper triangular U (fp32) with UT U = (H + damp * mean(diag H) I)^-1, decomposed in fp64.

    U's row j is, up to the factor 1 / U_jj, row j of the inverse of H without the columns before j: all that one sweep needs.

    Raises:
        StepFailed: H is zero, or not finite.
    """
    import torch

    h = h.to(torch.float64, copy=True)
    mean = float(h.diagonal().mean())
    if not 0 < mean < float("inf"):
        raise StepFailed(f"the inputs of {name} are {'all zero' if mean == 0 else 'not finite'} on the calibration documents")
    h.diagonal().add_(damp * mean)
    lower, failed = torch.linalg.cholesky_ex(h)
    del h
    if int(failed):
        raise StepFailed(f"the input moments of {name} cannot be inverted with damp {damp}; a larger damp would do")
    inverse = torch.cholesky_inverse(lower)
    del lower  # each of these is twice the size of H
    return torch.linalg.cholesky(inverse, upper=True).float()


def pruned(weight: torch.Tensor, factor: torch.Tensor, settings: SparseGptSettings) -> torch.Tensor:
    """`weight` (out x in, fp32) pruned, the weights right of each one that goes changed to make up for it.

    factor: of `inverse_factor`. The mask is chosen when a block of columns (for n:m, a group) is reached: the weights of least
    w^2 / U_jj^2 go. The error w / U_jj of each is passed on to the columns after it along row j of U.
    """
    import torch

    weight = weight.t().clone(memory_format=torch.contiguous_format).t()  # its columns lie whole in memory
    columns = weight.shape[1]
    step = settings.nm[1] if settings.nm else settings.block
    for start in range(0, columns, settings.block):
        end = min(start + settings.block, columns)
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if (j - start) % step == 0:
                reach = slice(j, min(j + step, end))
                keep = keep_mask((weight[:, reach] / factor.diagonal()[reach]).square(), settings, per_row=False)
            column = weight[:, j].clone()
            weight[:, j] *= keep[:, (j - start) % step]
            error = (column - weight[:, j]) / factor[j, j]
            if j + 1 < end:
                weight[:, j + 1 : end] -= torch.outer(error, factor[j, j + 1 : end])
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight
