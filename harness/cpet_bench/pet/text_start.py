"""Virtual keys and values that start from those of a text.

Keys and values drawn at random cost a model what it knows, and take long to be trained back; those of real words leave it
what it is (arXiv 2101.00190, 7.5; arXiv 2506.06266 for cartridges).
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError, Unsupported
from ..models.arch import body


def start(model: nn.Module, wrapper: nn.Module, name: str, text: str) -> None:
    """Set the prefix of PEFT's `wrapper` to the keys and values that `model` itself gives the first tokens of `text`.

    As PEFT's `initialize_kv_prefix_from_text`, without a chat template around the text; one that is too short is repeated, as
    PEFT's prompt tuning repeats its own. The tokens are those of the tokenizer beside the model, its start token with them.

    Raises:
        InputError: the text gives no tokens. Unsupported: an encoder-decoder model, whose decoder reads no such text.
    """
    from peft import initialize_kv_prefix_from_past_key_values

    from ..models.loading import load_tokenizer

    if model.config.is_encoder_decoder:
        raise Unsupported("a prefix starts from a text (init_text) in decoder-only models alone")
    count = wrapper.peft_config[name].num_virtual_tokens
    words = load_tokenizer(Path(model.name_or_path))(text)["input_ids"]
    if not words:
        raise InputError("The text that the virtual tokens start from gives no tokens.", key="pet.init_text", given=text)
    ids = torch.tensor([(words * -(-count // len(words)))[:count]], device=model.get_input_embeddings().weight.device)
    with torch.no_grad(), _still(model):
        cache = body(model)(input_ids=ids, use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(wrapper, adapter_name=name, past_key_values=cache)


@contextmanager
def _still(model: nn.Module):
    """No dropout; but bitsandbytes' 4-bit layers as in training, for they repack their weights otherwise (`survives_eval`)."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = type(module).__name__ == "Linear4bit"
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
