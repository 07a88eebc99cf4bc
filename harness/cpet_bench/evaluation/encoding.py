"""Text to token ids as lm-eval's HFLM does it, for requests and training examples alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Encoder:
    """A tokenizer with HFLM's rules about contexts, continuations and special tokens.

    seq2seq: whether context and continuation are encoded apart (encoder-decoder models). None looks at the config.json of
    the folder the tokenizer was loaded from.
    """

    def __init__(self, tokenizer, seq2seq: bool | None = None):
        self.tokenizer = tokenizer
        self.seq2seq = is_seq2seq(tokenizer) if seq2seq is None else seq2seq
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix_token: int = bos if bos is not None else eos
        self.eos_token: int | None = eos
        self._prefix_text = tokenizer.decode(self.prefix_token) if self.prefix_token is not None else None
        self._kept: tuple[str, list[int]] | None = None

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids; special None leaves special tokens to the tokenizer unless the text starts with its first one."""
        if special is None and self._prefix_text and text.startswith(self._prefix_text):
            special = False
        more = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer.encode(text, **more)

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt to generate from."""
        bos = getattr(self.tokenizer, "bos_token", None)
        if not self.seq2seq and bos and text.startswith(bos):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(text)["input_ids"]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(context ids, continuation ids). Spaces at the context's end go to the continuation, so that words stay whole."""
        if context == "":
            ids = self.encode(continuation, special=False)
            return ([self.prefix_token], ids) if ids[0] != self.prefix_token else (ids[:1], ids[1:])
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
            if context == "":
                return self.pair(context, continuation)
        if self._kept is None or self._kept[0] != context:  # the choices of a document share it
            self._kept = (context, self.encode(context))
        ids = self._kept[1]
        if self.seq2seq:
            return ids, self.encode(continuation, special=False)
        return ids, self.encode(context + continuation)[len(ids) :]

    def chat(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template writes it; without the system text where it allows none."""
        import jinja2

        more: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(history, **more)
        except jinja2.exceptions.TemplateError:
            without = [m for m in history if m["role"] != "system"]
            return self.tokenizer.apply_chat_template(without, **more)


def is_seq2seq(tokenizer) -> bool:
    """Whether the model beside the tokenizer's files is an encoder-decoder."""
    try:
        config = json.loads(Path(tokenizer.name_or_path, "config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(config.get("is_encoder_decoder"))
