"""Linear layers whose weights are kept as packed integers (2 to 8 bits) and dequantised for each product.

A folder of such a model says `"quant_method": "cpet_packed"` in its config; with this module imported, transformers loads it
like any other quantised checkpoint. No fused kernel is used: a pass dequantises a layer, multiplies, and forgets the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .formats import PACKED_METHOD

METHOD = PACKED_METHOD


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers 0..2^bits - 1 (rows x columns, uint8) as a stream of bits: uint8, rows x bits x columns / 8.

    Column p * columns / 8 + j is the p-th value, of eight, in the j-th bytes of the `bits` planes.
    """
    parts = values.view(values.shape[0], 8, -1).unbind(1)
    planes = torch.zeros(values.shape[0], bits, values.shape[1] // 8, dtype=torch.uint8, device=values.device)
    for p, part in enumerate(parts):
        plane, shift = divmod(p * bits, 8)
        planes[:, plane] |= part << shift
        if shift + bits > 8:
            planes[:, plane + 1] |= part >> (8 - shift)
    return planes


def unpack(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: uint8, rows x columns."""
    if bits == 8:
        return planes.flatten(1)
    parts, mask = [], 2**bits - 1
    for p in range(8):
        plane, shift = divmod(p * bits, 8)
        part = planes[:, plane] >> shift
        if shift + bits > 8:
            part |= planes[:, plane + 1] << (8 - shift)
        parts.append(part & mask)
    return torch.cat(parts, dim=1)


class _Product(torch.autograd.Function):
    """x WT + b. W is dequantised again for the gradient, so that training keeps no dense weights either."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x = grad @ ctx.layer.dequantised(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


class PackedLinear(nn.Linear):
    """y = x WT + b, W = (q - zero) scale, q integers of `bits` bits, a scale and a zero point per row and group of inputs.

    Buffers: packed (out x bits x in / 8, uint8), scales (out x groups, float16) and, unless symmetric (the zero point is
    then 2^(bits-1)), zeros (out x groups, uint8). An nn.Linear, so that PEFT knows it; `weight` is dequantised whenever it is
    asked for, and cannot be assigned.
    """

    def __init__(self, n_in: int, n_out: int, *, bits: int, group: int, sym: bool, bias: bool = False, device=None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = n_in, n_out
        self.bits, self.group, self.sym = bits, group, sym
        shape = (n_out, n_in // group)
        # not named qweight: PEFT's wrappers would give that out as `weight`, and T5 casts hidden states to its number format
        self.register_buffer("packed", torch.zeros(n_out, bits, n_in // 8, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.ones(shape, dtype=torch.float16, device=device))
        if not sym:
            self.register_buffer("zeros", torch.zeros(shape, dtype=torch.uint8, device=device))
        # empty: it follows the model from one number format to another, which is that of `weight` then
        self.register_buffer("like", torch.empty(0, device=device), persistent=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(n_out, device=device)) if bias else None)

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """W (out x in); products in float32, then rounded to `dtype`."""
        q = unpack(self.packed, self.bits)
        if self.sym:
            q = (q - 2 ** (self.bits - 1)).view(torch.int8)  # wraps round below 0, which is what int8 reads there
            q = q.view(*self.scales.shape, self.group)
        else:
            q = q.view(*self.scales.shape, self.group).to(torch.int16) - self.zeros[..., None]
        weight = q * self.scales[..., None].float()
        return weight.view(self.out_features, self.in_features).to(dtype)

    @property
    def weight(self) -> torch.Tensor:
        return self.dequantised(self.like.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.bias, self)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # another format to compute in; what is stored stays exact
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, group={self.group}, sym={self.sym}"


def packed_bytes(n_in: int, n_out: int, bits: int, group: int, sym: bool) -> int:
    """Bytes of a layer's integers, scales and zero points."""
    return n_out * n_in * bits // 8 + n_out * (n_in // group) * (2 if sym else 3)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Make `layer` the submodule `name` of `model`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What the config of a packed model says about all of its packed layers. group -1: the whole row."""

    def __init__(self, bits: int, group: int, sym: bool, quant_method: str = METHOD):
        self.quant_method, self.bits, self.group, self.sym = quant_method, bits, group, sym


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """transformers' side of it: puts empty packed layers in place of the blocks' own before weights are read."""

    def _process_model_before_weight_loading(self, model, **more: Any) -> None:
        from .arch import block_linears, features

        c = self.quantization_config
        for name, module in block_linears(model).items():
            has_bias = module.bias is not None
            n_in, n_out = features(module)
            how = {"bits": c.bits, "group": n_in if c.group == -1 else c.group, "sym": c.sym}
            layer = PackedLinear(n_in, n_out, **how, bias=has_bias, device="meta")
            put(model, name, layer)

    def _process_model_after_weight_loading(self, model, **more: Any):
        for module in model.modules():
            if isinstance(module, PackedLinear):  # transformers reads layers it holds in float32 (T5's wo) as such
                module.scales = module.scales.half()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
