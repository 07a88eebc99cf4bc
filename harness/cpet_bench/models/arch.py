"""Facts about a model's architecture: its linear layers, what they really compute, its body and its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ADAPTER_PARTS = ("lora_", "cpet_recovery", "modules_to_save", "ia3_", "oft_", "vera_", "ada_")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of any class: dense, transformers' Conv1D, bitsandbytes', GPTQ's, packed ones."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    has = hasattr(module, "in_features") and hasattr(module, "out_features")
    return has and (hasattr(module, "weight") or hasattr(module, "qweight")) and not hasattr(module, "base_layer")


def block_lists(model: nn.Module) -> list[str]:
    """Names of the lists of blocks: `model.layers`, or the encoder's and the decoder's."""
    found = []
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not nested and "cpet_recovery" not in name:
            found.append(name)
    return found


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of the encoder's and decoder's blocks by name; never the head, the embeddings or an adapter's own."""
    found = {}
    for blocks in block_lists(model):
        wrappers: list[str] = []  # PEFT's: of what they hold only the layer itself counts, whatever a method calls its own
        for name, module in model.get_submodule(blocks).named_modules():
            if any(name.startswith(w) and not f"{name}.".startswith(f"{w}base_layer.") for w in wrappers):
                continue
            if "base_layer" in module._modules:
                wrappers.append(f"{name}.")
                continue
            if any(part.startswith(_ADAPTER_PARTS) for part in name.split(".")):
                continue
            if is_linear(module):
                found[f"{blocks}.{name}"] = module
    return found


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer of any class, PEFT's wrappers included."""
    base = getattr(module, "base_layer", module)
    if hasattr(base, "in_features"):
        return int(base.in_features), int(base.out_features)
    return int(base.weight.shape[0]), int(base.nf)  # transformers' Conv1D keeps its weight as in x out


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight as the layer really computes it, (out x in) in fp32: dequantised, masked, transposed where it must be."""
    from transformers.pytorch_utils import Conv1D

    base = getattr(module, "base_layer", module)
    kind = type(base).__name__
    if kind == "Linear4bit":
        import bitsandbytes.functional as F

        state = base.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):  # repacked at the first pass in evaluation mode; misread below
            return _by_unit_vectors(base)
        weight = F.dequantize_4bit(base.weight.data, state)
        return weight.reshape(base.out_features, base.in_features).float()
    if kind == "Linear8bitLt":
        weight, scale = base.weight.data, getattr(base.weight, "SCB", None)
        scale = base.state.SCB if scale is None else scale
        if scale is None:  # not quantised yet
            return weight.float()
        return weight.float() * scale.float().view(-1, 1) / 127.0
    if isinstance(base, Conv1D):
        return base.weight.detach().t().float()
    if kind == "PackedLinear":
        return base.dequantised(torch.float32)
    if isinstance(base, nn.Linear):
        return base.weight.detach().float()
    if hasattr(base, "dequantize_weight"):  # GPTQModel's linears give in x out
        return base.dequantize_weight().t().float()
    return _by_unit_vectors(base)


def _by_unit_vectors(module: nn.Module) -> torch.Tensor:
    held = next(module.buffers(), None)
    device = next(module.parameters()).device if held is None else held.device
    with torch.no_grad():
        out = module(torch.eye(module.in_features, device=device)).float()
    bias = getattr(module, "bias", None)
    return (out if bias is None else out - bias.float()).t().contiguous()


def body(model: nn.Module) -> nn.Module:
    """The module that gives the (normed) last hidden state: everything but the head."""
    return model.base_model if not hasattr(model, "get_decoder") or model.config.is_encoder_decoder else model.get_decoder()


def head(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """(weight V x d, bias or None, factor on the hidden state or None) of the head, for products with some rows of it."""
    layer, config = model.get_output_embeddings(), model.config
    scale = None
    # T5 keeps its embeddings tied in any version; only the first one scales.
    if getattr(config, "scale_decoder_outputs", config.model_type == "umt5" and config.tie_word_embeddings):
        scale = config.d_model**-0.5
    elif config.model_type.startswith("cohere"):
        scale = config.logit_scale
    elif config.model_type.startswith("granite"):
        scale = 1.0 / config.logits_scaling
    return layer.weight, getattr(layer, "bias", None), scale


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as stored, each storage once, with the constants that quantised weights carry."""
    seen: dict[int, int] = {}

    def add(tensor: Any) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()

    for tensor in [*model.parameters(), *model.buffers()]:
        add(tensor.data)
        add(getattr(tensor, "SCB", None))
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            add(state.absmax)
            add(state.code)
            add(getattr(state, "offset", None))
            state = getattr(state, "state2", None)
    return sum(seen.values())
