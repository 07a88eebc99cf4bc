"""What a model says about a batch's continuations: each shared start is run once, and the head on scored positions alone."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import Unsupported
from ..models.arch import body
from ..training_model import logits, padded
from .batching import Batch, Ids, Piece

LOGITS = 2**26  # at most so many are held at once


@dataclass
class Past:
    """Sequences run so far: their keys and values, and 1 where a token is real (rows x tokens)."""

    cache: Any
    mask: torch.Tensor

    def select(self, rows: torch.Tensor) -> Past:
        """Those of `rows`, as often as they are named; what follows on them leaves this one as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(rows)
        return Past(cache, self.mask[rows])


class Scorer:
    """Runs batches on one model and keeps the start that the last one shared with the next."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.trunk = body(model)
        self.device = model.get_input_embeddings().weight.device
        self._start: tuple[Ids, Past] | None = None

    def score(self, batch: Batch) -> list[tuple[Piece, float, bool]]:
        """(piece, log-probability of its continuation, whether greedy decoding gives it) for all of a batch's pieces.

        Log-softmax over the whole vocabulary in fp32, summed in fp64.
        """
        wanted = [(i, piece, position) for i, row in enumerate(batch.rows) for piece, position in row.scored]
        tokens = [t for _, piece, _ in wanted for t in piece.continuation]
        places = [(i, position + k) for i, piece, position in wanted for k in range(len(piece.continuation))]
        hidden, at = self._encoder_decoder(batch, places) if batch.rows[0].encoder else self._decoder(batch, places)
        found, best = self._chosen(hidden, at, tokens)
        result, done = [], 0
        for _, piece, _ in wanted:
            end = done + len(piece.continuation)
            result.append((piece, sum(found[done:end]), all(best[done:end])))
            done = end
        return result

    def forget(self) -> None:
        """Give back the memory of the shared start."""
        self._start = None

    def _chosen(self, hidden: torch.Tensor, at: list[int], tokens: list[int]) -> tuple[list[float], list[bool]]:
        """Log-probability of each token at its row of `hidden` (positions x width), and whether it is the likeliest there."""
        where = torch.tensor(at, device=hidden.device)
        token = torch.tensor(tokens, device=hidden.device)
        found = torch.empty(len(at), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(at), dtype=torch.bool, device=hidden.device)
        size = max(1, LOGITS // self.model.get_output_embeddings().weight.shape[0])
        for first in range(0, len(hidden), size):
            out = logits(self.model, hidden[first : first + size]).to(hidden.device)
            mine = ((where >= first) & (where < first + size)).nonzero()[:, 0]
            row, word = where[mine] - first, token[mine]
            found[mine] = out[row, word] - out.logsumexp(-1)[row]
            best[mine] = out.argmax(-1)[row] == word
        return found.double().tolist(), best.tolist()

    def _decoder(self, batch: Batch, places: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
        """Hidden states of the distinct scored positions, and for each place (row, position) which of them is its own."""
        rows, prefix = batch.rows, batch.prefix
        past = self._prefix(batch.start) if prefix else None
        if not batch.groups:
            hidden, _ = self._extend(past, [0] * len(rows), [r.ids[prefix:] for r in rows])
            return _gather([hidden], [(0, i, p - prefix) for i, p in places])
        owner = [g for g, members in enumerate(batch.groups) for _ in members]
        context = [rows[members[0]].context for members in batch.groups]
        starts = [rows[members[0]].ids[prefix:length] for members, length in zip(batch.groups, context, strict=True)]
        first, past = self._extend(past, [0] * len(starts), starts, keep=True)
        second, _ = self._extend(past, owner, [r.ids[context[g] :] for r, g in zip(rows, owner, strict=True)])
        found = []
        for i, p in places:
            length = context[owner[i]]
            found.append((0, owner[i], p - prefix) if p < length else (1, i, p - length))
        return _gather([first, second], found)

    def _prefix(self, start: Ids) -> Past:
        if self._start is None or self._start[0] != start:
            self._start = None
            self._start = (start, self._extend(None, [0], [start], keep=True)[1])
        return self._start[1]

    def _extend(self, past: Past | None, owner: list[int], sequences: list[Ids], keep: bool = False):
        """(hidden states, Past or None) of `sequences`, each after the row of `past` that `owner` says."""
        ids, mask = padded(sequences, self.device)
        if past is None and not keep:
            return self.trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state, None
        if past is None:
            from transformers import DynamicCache

            past = Past(DynamicCache(config=self.model.config), mask[:, :0])
        else:
            past = past.select(torch.tensor(owner, device=self.device))
        whole = torch.cat([past.mask, mask], 1)
        # Padding repeats the last position: a learned table of positions has no entry beyond the longest sequence.
        positions = past.mask.sum(1, keepdim=True) + mask.cumsum(1) - 1
        out = self.trunk(
            input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=past.cache, use_cache=True
        )
        return out.last_hidden_state, Past(past.cache, whole) if keep else None

    def _encoder_decoder(self, batch: Batch, places: list[tuple[int, int]]) -> tuple[torch.Tensor, list[int]]:
        texts = list(dict.fromkeys(r.encoder for r in batch.rows))
        ids, mask = padded(texts, self.device)
        text = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        number = {t: i for i, t in enumerate(texts)}
        owner = torch.tensor([number[r.encoder] for r in batch.rows], device=self.device)
        answers, answer_mask = padded([r.ids for r in batch.rows], self.device)
        hidden = self.model.get_decoder()(
            input_ids=answers,
            attention_mask=answer_mask,
            encoder_hidden_states=text[owner],
            encoder_attention_mask=mask[owner],
            use_cache=False,
        ).last_hidden_state
        return _gather([hidden], [(0, i, p) for i, p in places])


def _gather(hidden: list[torch.Tensor], places: list[tuple[int, int, int]]) -> tuple[torch.Tensor, list[int]]:
    """Distinct places (which tensor, row, position) out of `hidden` (each rows x positions x width), and each one's number."""
    distinct = sorted(set(places))
    number = {place: i for i, place in enumerate(distinct)}
    parts = []
    for which, states in enumerate(hidden):
        at = [row * states.shape[1] + position for w, row, position in distinct if w == which]
        parts.append(states.flatten(0, 1)[torch.tensor(at, dtype=torch.long, device=states.device)])
    return torch.cat(parts), [number[place] for place in places]


def can_branch(model: nn.Module) -> bool:
    """Whether sequences can go on from another one's keys and values: decoder-only, told positions, attention to all tokens."""
    if model.config.is_encoder_decoder:
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer

    takes = inspect.signature(body(model).forward).parameters
    if not {"attention_mask", "position_ids", "past_key_values"} <= takes.keys():
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def check_head(model: nn.Module) -> None:
    """Raise Unsupported where the head is more than a product with the hidden state, as far as this package knows it."""
    ids = torch.tensor([[1, 2, 3]], device=model.get_input_embeddings().weight.device)
    seen: list[torch.Tensor] = []
    trunk = model.get_decoder() if model.config.is_encoder_decoder else body(model)
    hook = trunk.register_forward_hook(lambda _module, _args, out: seen.append(out.last_hidden_state))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    try:
        theirs = model(input_ids=ids, **more).logits[0].float()
    finally:
        hook.remove()
    ours = logits(model, seen[0][0]).to(theirs.device)
    rounding = 1e-4 if seen[0].dtype == torch.float32 else 0.02
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > rounding * theirs.abs().max():
        raise Unsupported(f"the head of {type(model).__name__} computes its logits in a way that scoring does not know")
