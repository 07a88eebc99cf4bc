"""A tiny Qwen2 beside those that the program makes by itself."""

import torch

from cpet_bench.models import tiny
from cpet_bench.models.loading import load_tokenizer


def make_qwen2(llama, out):
    """Qwen2 with fewer keys than queries and biases on them, and the tokenizer of a tiny llama (made in `llama` if need be)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    if not (llama / "config.json").is_file():
        tiny.make("llama", tiny.DEFAULTS, llama)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(llama)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **shape, **heads)).save_pretrained(out)
    tokenizer.save_pretrained(out)
