"""A model of some of another one's blocks, as an ordinary model that transformers loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import Unsupported
from .arch import block_linears, block_lists

# What a config calls the number of blocks of each stack.
_COUNTS = {
    "encoder": ("num_layers", "encoder_layers"),
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "": ("num_hidden_layers", "n_layer", "num_layers"),
}


def linears_in(model: nn.Module, block: str) -> str:
    """The linear layers of the block of this name, for a message: `model.layers.0 has self_attn.q_proj, ...`."""
    names = [name.removeprefix(f"{block}.") for name in block_linears(model) if name.startswith(f"{block}.")]
    return f"{block} has {', '.join(names[:8]) or 'no linear layer'}{', ...' if len(names) > 8 else ''}"


def keep_blocks(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """A new model, in evaluation mode, of `model`'s class and weights with these blocks alone, in order.

    Args:
        kept: by name of a list of blocks (`arch.block_lists`), the indices that stay; every list must be named.
    Raises:
        Unsupported: a config whose number of blocks is not known, or weights that depend on what goes.
    """
    given = model.config.to_dict()
    for name, indices in kept.items():
        total = len(model.get_submodule(name))
        both = model.config.is_encoder_decoder
        stack = "decoder" if both and "decoder" in name.split(".") else "encoder" if both else ""
        counts = [key for key in _COUNTS[stack] if given.get(key) == total]
        if not counts:
            raise Unsupported(f"the config of {type(model).__name__} does not say how many blocks {name} has")
        given |= dict.fromkeys(counts, len(indices))
        given |= {k: _of(v, indices) for k, v in given.items() if "layer" in k and isinstance(v, list) and len(v) == total}
    state = {}
    for key, tensor in model.state_dict().items():
        found = _renamed(key, kept)
        if found:
            state[found] = tensor
    with torch.random.fork_rng(devices=[]):
        cut = type(model)(type(model.config).from_dict(given))
    cut.to(dtype=model.dtype)
    try:
        cut.load_state_dict(state)
    except RuntimeError as error:
        raise Unsupported(
            f"the blocks of {type(model).__name__} cannot stand alone: {' '.join(str(error).split())[:300]}"
        ) from error
    cut.tie_weights()
    if [len(cut.get_submodule(name)) for name in block_lists(cut)] != [len(kept[name]) for name in block_lists(model)]:
        raise Unsupported(f"{type(model).__name__} does not take its number of blocks from its config alone")
    if model.can_generate():
        cut.generation_config = model.generation_config
    return cut.eval()


def _of(values: list[Any], indices: list[int]) -> list[Any]:
    return [values[i] for i in indices]


def _renamed(key: str, kept: dict[str, list[int]]) -> str | None:
    """The name in the new model of a tensor; None where its block is gone."""
    for name, indices in kept.items():
        if key.startswith(name + "."):
            number, _, rest = key[len(name) + 1 :].partition(".")
            return f"{name}.{indices.index(int(number))}.{rest}" if int(number) in indices else None
    return key
