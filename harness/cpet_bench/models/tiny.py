"""Tiny models made on the spot with random weights: for trying the whole way without a download. No findings come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError
from ..settings import ModelSettings

DEFAULTS: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "positions": 512, "seed": 0}
ARCHITECTURES = ("gpt2", "llama", "opt", "t5")
WORDS = (
    "the a an is was it this that of and to in on with for not very but film movie book story plot acting food service "
    "good bad great awful fine poor positive negative happy sad love hate best worst excellent terrible boring brilliant "
    "Review Sentiment Text Label Question Answer yes no true false i you he she they we had has have be as at by from so"
)


class TinySource:
    """`tiny:llama` (or gpt2, opt, t5) with options hidden, layers, heads, intermediate, positions, seed."""

    def check(self, settings: ModelSettings, base: Path) -> None:
        arch = settings.source.partition(":")[2]
        if arch not in ARCHITECTURES:
            raise InputError(f"there is no tiny model {arch!r}", key="source", given=arch, allowed=ARCHITECTURES)
        for name, value in settings.options.items():
            if name not in DEFAULTS:
                raise InputError(f"a tiny model has no option {name!r}", key=f"options.{name}", given=name, allowed=DEFAULTS)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not (0 if name == "seed" else 1) <= value <= 65536:
                raise InputError(f"{value!r} is no whole number from 1 to 65536", key=f"options.{name}")
        options = {**DEFAULTS, **settings.options}
        if options["hidden"] % (2 * options["heads"]):
            message = f"heads ({options['heads']}) must divide half of hidden ({options['hidden']})"
            raise InputError(message, key="options.heads")
        for name in ("revision", "file", "sha256"):
            if getattr(settings, name):
                raise InputError(f"a source tiny: takes no {name}", key=name)

    def identity(self, settings: ModelSettings, base: Path) -> dict[str, Any]:
        self.check(settings, base)
        return {"source": settings.source, "options": {**DEFAULTS, **settings.options}}

    def fetch(self, settings: ModelSettings, base: Path, out: Path, progress) -> dict[str, Any]:
        from .sources import facts

        make(settings.source.partition(":")[2], {**DEFAULTS, **settings.options}, out)
        progress(1, 1, "made")
        return facts(out)


def make(arch: str, options: dict[str, Any], out: Path) -> None:
    """Write a model folder: weights drawn from `seed` with the global generator left as it was, and a tokenizer."""
    import torch
    import transformers as tr

    tokenizer = make_tokenizer()
    vocabulary, o = len(tokenizer), options
    pad = tokenizer.pad_token_id
    if arch == "llama":
        config = tr.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=o["hidden"],
            intermediate_size=o["intermediate"],
            num_hidden_layers=o["layers"],
            num_attention_heads=o["heads"],
            num_key_value_heads=max(1, o["heads"] // 2),
            max_position_embeddings=o["positions"],
            tie_word_embeddings=True,
        )
    elif arch == "gpt2":
        config = tr.GPT2Config(
            vocab_size=vocabulary,
            n_embd=o["hidden"],
            n_layer=o["layers"],
            n_head=o["heads"],
            n_inner=o["intermediate"],
            n_positions=o["positions"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    elif arch == "opt":
        config = tr.OPTConfig(
            vocab_size=vocabulary,
            hidden_size=o["hidden"],
            word_embed_proj_dim=o["hidden"],
            ffn_dim=o["intermediate"],
            num_hidden_layers=o["layers"],
            num_attention_heads=o["heads"],
            max_position_embeddings=o["positions"],
            dropout=0.0,
        )
    else:
        config = tr.T5Config(
            vocab_size=vocabulary,
            d_model=o["hidden"],
            d_kv=o["hidden"] // o["heads"],
            d_ff=o["intermediate"],
            num_layers=o["layers"],
            num_heads=o["heads"],
            dropout_rate=0.0,
            decoder_start_token_id=pad,
        )
    config.pad_token_id, config.eos_token_id, config.bos_token_id = pad, tokenizer.eos_token_id, tokenizer.bos_token_id
    auto = tr.AutoModelForSeq2SeqLM if arch == "t5" else tr.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(o["seed"])
        model = auto.from_config(config)
        if arch != "t5":  # library defaults leave tiny models with next to no signal
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)


def make_tokenizer():
    """Byte-level BPE: all bytes, and merges for a few common words, with and without a space before them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        min_frequency=1,
    )
    inner.train_from_iterator([" ".join([WORDS] * 3), *WORDS.split()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
