"""PEFT's prompt-learning methods (prompt, prefix and P-tuning) on the model object itself.

PEFT puts the virtual tokens into its wrapper's forward. Training and scoring run the blocks of the bare model, so here it is
the model's trunk that gets them: whoever runs it gives and gets the documents' own tokens, positions and masks, and the
virtual tokens stand in front of them (arXiv 2104.08691, 2103.10385, 2303.02861) or in the keys and values (arXiv
2101.00190; a cartridge, 2506.06266, is such a prefix with its first token frozen). A cache that holds tokens has the virtual
ones among them already. Prompts and their encoders stay PEFT's.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import nn

from ..errors import InputError, Unsupported
from ..models.arch import block_linears, body, features

_KEPT = "_cpet_prompts"  # attribute of the model: the trunks whose forward was replaced
PREFIX = ("PREFIX_TUNING", "CARTRIDGE")
MULTITASK = ("MULTITASK_PROMPT_TUNING",)
IN_FRONT = ("PROMPT_TUNING", "P_TUNING", *MULTITASK)


def prepare(model: nn.Module, config) -> None:
    """Fill in what PEFT would choose too widely; Unsupported for what cannot be run this way, InputError without a number."""
    kind = config.peft_type.value
    if kind not in (*PREFIX, *IN_FRONT):
        raise Unsupported(f"PEFT's {kind} needs more than virtual tokens: its forward is not run here")
    count = config.num_virtual_tokens
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(
            f"{type(config).__name__} needs a number of virtual tokens of at least 1.",
            key="pet.num_virtual_tokens",
            given=str(count),
        )
    if kind in IN_FRONT and config.token_dim is None:  # PEFT takes the blocks' width; some OPT models' embeddings are narrower
        config.token_dim = model.get_input_embeddings().weight.shape[1]
    if not model.config.is_encoder_decoder:
        return
    if kind in MULTITASK:
        raise Unsupported("PEFT's MULTITASK_PROMPT_TUNING passes an encoder-decoder model no decoder input")
    if kind in PREFIX:
        if config.num_layers is None:  # PEFT takes the encoder's number, and the prefix is the decoder's
            config.num_layers = len(_key_widths(model)) or None
        return
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 1  # PEFT runs the encoder's virtual tokens alone, and would save twice as many


def install(model: nn.Module, wrapper: nn.Module, name: str, text: str | None = None) -> None:
    """Make the trunk (the encoder of an encoder-decoder model) run with the virtual tokens of PEFT's `wrapper`.

    text: what the keys and values of a prefix start from; see `text_start.start`.
    """
    from .text_start import start

    if hasattr(model, "cpet_prompt"):
        raise Unsupported("a model takes the virtual tokens of one module at a time")
    config = wrapper.peft_config[name]
    if config.peft_type.value in PREFIX:
        _check_prefix(model, config)
    if text is not None:
        start(model, wrapper, name, text)
    model.cpet_prompt = wrapper.prompt_encoder[name]
    before = config.peft_type.value in IN_FRONT
    replaced = model.__dict__[_KEPT] = {"count": config.num_virtual_tokens, "in_front": before, "trunks": []}
    if not model.config.is_encoder_decoder:
        trunk = body(model)
        run = _with_prefix if config.peft_type.value in PREFIX else _with_prompt
        _replace(replaced, trunk, run(trunk, trunk.forward, wrapper, config.num_virtual_tokens))
        return
    encoder, decoder = model.get_encoder(), model.get_decoder()
    if config.peft_type.value in PREFIX:
        _replace(replaced, decoder, _with_prefix(decoder, decoder.forward, wrapper, config.num_virtual_tokens))
        return
    _replace(replaced, encoder, _with_prompt(encoder, encoder.forward, wrapper, config.num_virtual_tokens, cut=False))
    _replace(replaced, decoder, _seeing_all(decoder.forward, config.num_virtual_tokens))


def _replace(replaced: dict[str, Any], trunk: nn.Module, forward) -> None:
    trunk.forward = forward
    replaced["trunks"].append(trunk)


def detach(model: nn.Module) -> None:
    """Take the virtual tokens off again."""
    replaced = model.__dict__.pop(_KEPT, None)
    if replaced is None:
        return
    for trunk in replaced["trunks"]:
        del trunk.forward
    del model.cpet_prompt


def set_trainable(model: nn.Module, trainable: bool) -> None:
    """Whether what PEFT would train of the virtual tokens gets gradients; the first ones of a cartridge never do."""
    for name, p in model.cpet_prompt.named_parameters():
        p.requires_grad_(trainable and name != "frozen_embedding")


def virtual_tokens(model: nn.Module) -> int:
    """How many positions virtual tokens take in front of every sequence."""
    return model.__dict__.get(_KEPT, {}).get("count", 0)


def in_front(model: nn.Module) -> dict[str, int]:
    """Virtual tokens that run through the blocks of each part of the model with every row; a prefix's do not."""
    found = {"decoder": 0, "encoder": 0}
    if model.__dict__.get(_KEPT, {}).get("in_front"):
        found["encoder" if model.config.is_encoder_decoder else "decoder"] = virtual_tokens(model)
    return found


def portable(settings: dict[str, Any]) -> dict[str, Any]:
    """PEFT's settings without a start that needs files of this machine: the saved tokens are loaded over it."""
    if settings.get("prompt_tuning_init") in (None, "RANDOM", "SAMPLE_VOCAB"):
        return settings
    gone = ("tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_text", "prompt_tuning_init_state_dict_path")
    return settings | {"prompt_tuning_init": "RANDOM"} | {key: None for key in gone if key in settings}


def _key_widths(model: nn.Module) -> dict[str, int]:
    """Width of the keys of each block that a prefix goes to, as far as the layer's name tells it."""
    found = {}
    for name, module in block_linears(model).items():
        *path, last = name.split(".")
        if model.config.is_encoder_decoder and ("decoder" not in path or path[-1] not in ("SelfAttention", "self_attn")):
            continue
        if last in ("k", "k_proj", "c_attn"):
            found[name] = features(module)[1] // (3 if last == "c_attn" else 1)  # GPT-2 has queries, keys, values in one
    return found


def _check_prefix(model: nn.Module, config) -> None:
    """PEFT gives each block's cache keys of one shape, and a misfit would show as torch's error in the first pass."""
    widths = _key_widths(model)
    wrong = next((name for name, width in widths.items() if width != config.token_dim), None)
    if wrong:
        raise Unsupported(
            f"its prefix has keys of width {config.token_dim} for every block, and {wrong} makes {widths[wrong]}; where all "
            "blocks have one width, `token_dim` (heads x head width) and `num_attention_heads` of `pet:` may say it"
        )
    if widths and len(widths) != config.num_layers:
        raise Unsupported(f"its prefix is for {config.num_layers} blocks, and the model has {len(widths)}")


def _tokens(wrapper, rows: int):
    """What PEFT makes of its weights for so many rows: embeddings (rows x tokens x width), or a cache."""
    if wrapper.active_peft_config.peft_type.value not in MULTITASK:
        return wrapper.get_prompt(batch_size=rows)
    device = wrapper.prompt_encoder[wrapper.active_adapter].embedding.weight.device
    return wrapper.get_prompt(rows, task_ids=torch.zeros(rows, dtype=torch.long, device=device))  # a cell has one task


def _length(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _extended(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """A mask (rows x positions) with the virtual tokens in front, which are always seen."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise Unsupported("a model that is given masks of its own kind cannot have virtual tokens in front")
    return torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)


def _shifted(given: dict[str, Any], count: int) -> None:
    """Masks and positions as the trunk must see them: with the virtual tokens before."""
    if given.get("attention_mask") is not None:
        given["attention_mask"] = _extended(given["attention_mask"], count)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + count


def _with_prompt(trunk: nn.Module, forward, wrapper, count: int, cut: bool = True):
    """The trunk's forward with virtual tokens before the first of the document's; they are cut off its output (`cut`)."""

    @wraps(forward)
    def run(input_ids=None, attention_mask=None, **given):
        given |= {"attention_mask": attention_mask}
        _shifted(given, count)
        if _length(given.get("past_key_values")):
            return forward(input_ids=input_ids, **given)
        embeddings = given.pop("inputs_embeds", None)
        if embeddings is None:
            embeddings = trunk.get_input_embeddings()(input_ids)
        prompt = _tokens(wrapper, len(embeddings))[:, :count].to(embeddings.device, embeddings.dtype)
        if given.get("position_ids") is not None:
            first = torch.arange(count, device=embeddings.device).expand(len(embeddings), -1)
            given["position_ids"] = torch.cat([first, given["position_ids"]], dim=1)
        out = forward(inputs_embeds=torch.cat([prompt, embeddings], dim=1), **given)
        if cut:
            out.last_hidden_state = out.last_hidden_state[:, count:]
        return out

    return run


def _with_prefix(trunk: nn.Module, forward, wrapper, count: int):
    """The trunk's forward after keys and values of the virtual tokens, put into the cache that is given or a new one."""

    @wraps(forward)
    def run(input_ids=None, attention_mask=None, **given):
        given |= {"attention_mask": attention_mask}
        _shifted(given, count)
        cache = given.get("past_key_values")
        if not _length(cache):
            if trunk.training and getattr(trunk, "gradient_checkpointing", False):
                raise Unsupported("prefix tuning and gradient checkpointing exclude each other: both use the cache")
            rows = len(input_ids if input_ids is not None else given["inputs_embeds"])
            prefix = _tokens(wrapper, rows)
            if cache is None:
                given["past_key_values"] = prefix
            else:
                # An encoder-decoder model's cache has another one inside for what its decoder read itself.
                into, source = (getattr(c, "self_attention_cache", c) for c in (cache, prefix))
                for number, layer in enumerate(source.layers):
                    into.update(layer.keys, layer.values, number)
        return forward(input_ids=input_ids, **given)

    return run


def _seeing_all(forward, count: int):
    """A decoder's forward that also attends to what its encoder gives at the virtual tokens."""

    @wraps(forward)
    def run(*args, encoder_hidden_states=None, encoder_attention_mask=None, **given):
        both = encoder_hidden_states is not None and encoder_attention_mask is not None
        if both and encoder_attention_mask.shape[1] + count == encoder_hidden_states.shape[1]:
            encoder_attention_mask = _extended(encoder_attention_mask, count)
        given |= {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        return forward(*args, **given)

    return run
