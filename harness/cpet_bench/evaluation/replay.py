"""A model for lm-eval that answers with kept responses."""

from __future__ import annotations

import json
import math
from typing import Any

from lm_eval.api.model import LM

from ..errors import StepFailed
from .encoding import Encoder


class Replay(LM):
    """Answers lm-eval's requests with kept responses, in their order, and makes sure that each is the one that was asked."""

    def __init__(self, asked: list[dict[str, Any]], answers: list[dict[str, Any]], encoder: Encoder):
        super().__init__()
        if [row["index"] for row in asked] != [row["index"] for row in answers]:
            raise StepFailed(f"{len(answers)} responses do not answer the {len(asked)} requests one by one")
        self.encoder = encoder
        self.kept: dict[str, list[tuple[dict, dict]]] = {}
        for row, answer in zip(asked, answers, strict=True):
            self.kept.setdefault(row["request_type"], []).append((row, answer))

    def _replay(self, kind: str, requests: list, *fields: str) -> list[dict[str, Any]]:
        kept = self.kept.get(kind, [])
        if len(kept) != len(requests):
            raise StepFailed(f"lm-eval asks {len(requests)} {kind} requests, {len(kept)} were kept")
        for request, (row, answer) in zip(requests, kept, strict=True):
            same = request.args[0] == (row["continuation"] if kind == "loglikelihood_rolling" else row["context"])
            if kind == "loglikelihood":
                same = same and request.args[1] == row["continuation"]
            elif kind == "generate_until":
                same = same and json.dumps(request.args[1], sort_keys=True) == row["gen_kwargs"]
            where = f"request {row['index']} ({row['task']}, document {row['doc_id']})"
            if not same or request.doc_id != row["doc_id"]:
                raise StepFailed(f"{where} is not the one that was kept")
            if any(answer[field] is None for field in fields):
                raise StepFailed(f"{where} has no response")
            if "logprob" in fields and math.isnan(answer["logprob"]):
                raise StepFailed(f"{where}: the model's log-probability is no number")
        return [answer for _, answer in kept]

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        return [(a["logprob"], bool(a["greedy"])) for a in self._replay("loglikelihood", requests, "logprob", "greedy")]

    def loglikelihood_rolling(self, requests) -> list[float]:
        return [a["logprob"] for a in self._replay("loglikelihood_rolling", requests, "logprob")]

    def generate_until(self, requests) -> list[str]:
        return [a["text"] for a in self._replay("generate_until", requests, "text")]

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        return self.encoder.chat(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return str(self.encoder.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.encoder.tokenizer.chat_template if chat_template else None
