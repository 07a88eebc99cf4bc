"""Answers that a model writes itself, cut and stopped as lm-eval's HFLM does it for one request at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import StepFailed
from .batching import REACH, Ids

MAX_NEW = 256  # HFLM's, for tasks that do not say
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass
class Prompts:
    """Prompts that are answered together.

    limits: longest answer in tokens, per prompt. stops: texts that end an answer. options: keywords of `generate`.
    """

    requests: list[int]
    ids: list[Ids]
    limits: list[int]
    stops: list[str]
    options: dict[str, Any]

    @property
    def tokens(self) -> int:
        """At most so many are run."""
        return sum(map(len, self.ids)) + sum(self.limits)

    @property
    def shape(self) -> list:
        return [self.requests, [len(ids) for ids in self.ids]]

    def halves(self) -> list[Prompts]:
        """Two batches of half the prompts."""
        middle = len(self.requests) // 2
        return [
            Prompts(self.requests[part], self.ids[part], self.limits[part], self.stops, self.options)
            for part in (slice(middle), slice(middle, None))
        ]


def batches(rows: list[dict], tokenizer, max_length: int, tokens: int, seq2seq: bool, prefix_token: int) -> list[Prompts]:
    """Generation requests in batches of one kind, longest first: prompts fit `tokens`, with their answers REACH times that.

    Raises:
        StepFailed: a task asks for longer answers than the model has room for, or for an option that is not there.
    """
    eos = "" if tokenizer.eos_token_id is None else tokenizer.decode(tokenizer.eos_token_id, skip_special_tokens=False)
    kinds: dict[str, list[dict]] = {}
    for row in rows:
        kinds.setdefault(row["gen_kwargs"], []).append(row)
    found = []
    for text, members in sorted(kinds.items()):
        stops, new, total, options = settings(json.loads(text), eos)
        room = max_length if seq2seq else max_length - new
        if room <= 0:
            raise StepFailed(f"answers of {new} tokens leave no room for a prompt in the model's {max_length}")
        prompts = [(row["index"], tuple(row["context_ids"] or [prefix_token])[-room:]) for row in members]
        prompts.sort(key=lambda p: (-len(p[1]), p[0]))
        batch = Prompts([], [], [], stops, options)
        for index, ids in prompts:
            # HFLM limits prompt and answer together; of an encoder-decoder model it counts the answer's first token besides.
            whole = len(ids) + new if total is None else total
            limit = max(1, whole - (1 if seq2seq else len(ids)))
            count, width, answer_width = len(batch.ids) + 1, len((batch.ids or [ids])[0]), max([limit, *batch.limits])
            if count == 1 or width * count > tokens or (width + answer_width) * count > REACH * tokens:
                batch = Prompts([], [], [], stops, options)
                found.append(batch)
            batch.requests.append(index)
            batch.ids.append(ids)
            batch.limits.append(limit)
    return found


def settings(given: dict[str, Any], eos: str) -> tuple[list[str], int, int | None, dict[str, Any]]:
    """(stop texts, tokens of an answer, tokens of prompt and answer or None, keywords of `generate`) of a task's gen_kwargs.

    As lm-eval reads them: greedy unless there is a temperature or `do_sample`. Keywords are those of transformers'
    GenerationConfig alone, since `generate` takes others that load code.
    """
    from transformers import GenerationConfig

    options = dict(given)
    until = options.pop("until", None)
    until = [until] if isinstance(until, str) else list(until or [])
    stops = [s for s in dict.fromkeys([*until, eos]) if s]
    lengths = [options.pop(name, None) for name in _LENGTHS]
    new = int(next((n for n in lengths if n is not None), MAX_NEW))
    total = options.pop("max_length", None)
    temperature = float(options.pop("temperature", None) or 0.0)
    sample = options.pop("do_sample", None)
    options["do_sample"] = temperature > 0.0 if sample is None else bool(sample)
    if options["do_sample"] and temperature > 0.0:
        options["temperature"] = temperature
    unknown = sorted(options.keys() - vars(GenerationConfig()).keys())
    if unknown:
        raise StepFailed(f"the task's gen_kwargs have {', '.join(unknown)}, which transformers' GenerationConfig does not know")
    return stops, new, total, options


def answer(model: nn.Module, tokenizer, batch: Prompts, seed: int) -> tuple[list[str], int]:
    """Texts, one a prompt, cut at the first stop text, and how many tokens were run. Sampling draws from `seed` alone."""
    seq2seq = model.config.is_encoder_decoder
    device = model.get_input_embeddings().weight.device
    width, pad = max(map(len, batch.ids)), tokenizer.pad_token_id
    gaps = [width - len(ids) for ids in batch.ids]
    left, right = ([0] * len(gaps), gaps) if seq2seq else (gaps, [0] * len(gaps))
    ids = [[*[pad] * a, *ids, *[pad] * b] for a, ids, b in zip(left, batch.ids, right, strict=True)]
    mask = [[*[0] * a, *[1] * (width - a - b), *[0] * b] for a, b in zip(left, right, strict=True)]
    start = 1 if seq2seq else width
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(_seed(seed, batch))
        out = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max(batch.limits),
            stopping_criteria=_criteria(tokenizer, batch.stops, start),
            pad_token_id=pad,
            use_cache=True,
            **batch.options,
        )
    texts, new = [], 0
    for made, limit in zip(out[:, start:].tolist(), batch.limits, strict=True):
        new += sum(token != pad for token in made[:limit])
        text = tokenizer.decode(made[:limit], skip_special_tokens=True)
        for stop in batch.stops:
            text = text.split(stop)[0]
        texts.append(text)
    return texts, sum(map(len, batch.ids)) + new


def _seed(seed: int, batch: Prompts) -> int:
    """Of a batch's own, so that it does not matter which batches were answered before, in this process or in another."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, batch.requests]).encode()).digest()[:7], "big")


def _criteria(tokenizer, stops: list[str], start: int):
    """Ends each row where one of `stops` stands in its last tokens: HFLM's look-back of two more than the text's own."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stops(StoppingCriteria):
        back = max(len(tokenizer.encode(s, add_special_tokens=False)) for s in stops) + 2 if stops else 0

        def __call__(self, input_ids, scores, **kwargs):
            last = tokenizer.batch_decode(input_ids[:, start:][:, -self.back :])
            return torch.tensor([any(s in text for s in stops) for text in last], device=input_ids.device)

    return StoppingCriteriaList([Stops()] if stops else [])
