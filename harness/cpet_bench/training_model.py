"""One pass of a model over padded rows: hidden states, scored positions and partial logits, for both kinds of model."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from .models.arch import body, head
from .training_rows import Document, Row


@dataclass
class States:
    """What one pass gave. hidden: what the head reads (rows x positions x width). mask: its real tokens.

    layers: by part (`last` of a decoder-only model, else `encoder` and `decoder`) the states that are distilled and their mask.
    """

    rows: list[Row]
    hidden: torch.Tensor
    mask: torch.Tensor
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def start_token(model: nn.Module) -> int | None:
    """The decoder's first token of an encoder-decoder model; None for a decoder-only one."""
    if not model.config.is_encoder_decoder:
        return None
    start = model.config.decoder_start_token_id
    return model.config.pad_token_id if start is None else start


def padded(sequences: list[tuple[int, ...]], device, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (int64) padded on the right to the longest, and 1 where a token is real."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*s, *[pad] * (longest - len(s))] for s in sequences], dtype=torch.long)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences], dtype=torch.long)
    return ids.to(device), mask.to(device)


def run(model: nn.Module, documents: list[Document], hidden: str = "last", want_layers: bool = True) -> States:
    """Hidden states of all rows of `documents`; the head is not run.

    hidden: `last` distils what the head reads, `last_block_input` what enters the last block.
    """
    rows = [row for d in documents for row in d.rows]
    device = model.get_input_embeddings().weight.device
    ids, mask = padded([r.ids for r in rows], device)
    if not model.config.is_encoder_decoder:
        trunk = body(model)
        with _entering(trunk, active=want_layers and hidden == "last_block_input") as seen:
            out = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        layers = {"last": (seen[0] if seen else out, mask)} if want_layers else {}
        return States(rows, out, mask, layers)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    texts, text_mask = padded([d.rows[0].encoder for d in documents], device)
    below = want_layers and hidden == "last_block_input"
    with _entering(encoder, active=below) as seen_encoder, _entering(decoder, active=below) as seen_decoder:
        text = encoder(input_ids=texts, attention_mask=text_mask).last_hidden_state
        owner = torch.tensor([i for i, d in enumerate(documents) for _ in d.rows], device=device)
        out = decoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=text.index_select(0, owner),
            encoder_attention_mask=text_mask.index_select(0, owner),
            use_cache=False,
        ).last_hidden_state
    layers = {}
    if want_layers:
        layers["encoder"] = (seen_encoder[0] if below else text, text_mask)
        layers["decoder"] = (seen_decoder[0] if below else out, mask)
    return States(rows, out, mask, layers)


def distilled(states: States, part: str) -> torch.Tensor:
    """States of the real tokens of the rows that are distilled, one document after the other: (tokens x width)."""
    hidden, mask = states.layers[part]
    hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]  # virtual tokens stand before the real ones
    if part != "encoder":
        keep = torch.tensor([r.gold for r in states.rows], device=mask.device)
        mask = mask * keep[:, None]
    return hidden[mask.bool()]


def scored(states: States, gold: bool = False) -> torch.Tensor:
    """What the head reads at the scored positions of all rows (`gold`: of the right answers' rows), (positions x width)."""
    at = [(i, p) for i, r in enumerate(states.rows) if r.gold or not gold for p in r.places]
    index = torch.tensor(at, device=states.hidden.device)
    return states.hidden[index[:, 0], index[:, 1]]


def logits(model: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Logits in fp32 for `hidden` (positions x width): of `tokens` (int64, 1-d) alone, or of the whole vocabulary."""
    weight, bias, scale = head(model)
    if tokens is not None:
        tokens = tokens.to(weight.device)
        weight, bias = weight[tokens], None if bias is None else bias[tokens]
    hidden = hidden.to(weight.device)
    if tokens is not None or weight.dtype == torch.float32:
        out = F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
    else:
        out = F.linear(hidden.to(weight.dtype), weight, bias).float()
    return _finished(model, out, scale)


def partial_logits(model: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in fp32 for `hidden` (positions x width) of other tokens at each position: `tokens` (positions x k)."""
    weight, bias, scale = head(model)
    tokens = tokens.to(weight.device, torch.long)
    out = torch.einsum("pd,pkd->pk", hidden.to(weight.device).float(), weight[tokens].float())
    if bias is not None:
        out = out + bias[tokens].float()
    return _finished(model, out, scale)


def _finished(model: nn.Module, out: torch.Tensor, scale: float | None) -> torch.Tensor:
    out = out if scale is None else out * scale
    cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2
    return out if not cap else cap * torch.tanh(out / cap)


def last_block(trunk: nn.Module) -> nn.Module:
    """The last of a transformer body's blocks."""
    lists = [m for m in trunk.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(trunk).__name__} has no list of blocks")
    return max(lists, key=len)[-1]


@contextmanager
def _entering(trunk: nn.Module, active: bool):
    """A list that gets the hidden states entering the last block, while `active`."""
    seen: list[torch.Tensor] = []
    if not active:
        yield seen
        return

    def hook(module, args, kwargs):
        del seen[:]
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = last_block(trunk).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
