"""Prefill and decode speed of a deployment, really measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from ..settings import ThroughputSettings


def _seconds(call, devices: Sequence[str]) -> float:
    """Seconds `call` takes: by CUDA events on a GPU, by the clock elsewhere (and where a model lies on several GPUs)."""
    import torch

    if len(devices) == 1 and devices[0].startswith("cuda"):
        with torch.cuda.device(devices[0]):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000.0

    def wait() -> None:
        for device in devices:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def measure(model, tokenizer, settings: ThroughputSettings, devices: Sequence[str]) -> dict[str, Any]:
    """`prefill` and `decode` in tokens/s: median over `repeats` after `warmup`, with the lowest and highest.

    prefill: batch x prompt_tokens through the model, cache filled, head on the last position. decode: new_tokens greedy steps
    of the batch from that cache. Encoder-decoder models: the prompt goes through the encoder, decoding starts at its start.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.prompt_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=generator).to(model.device)
    state: dict[str, Any] = {}

    def prefill() -> None:
        if model.config.is_encoder_decoder:
            state["encoded"] = model.get_encoder()(input_ids=ids)
            state["cache"], state["next"] = None, ids[:, :1] * 0 + (model.config.decoder_start_token_id or 0)
            return
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(settings.new_tokens):
            if model.config.is_encoder_decoder:
                more = {"encoder_outputs": state["encoded"], "decoder_input_ids": state["next"]}
            else:
                more = {"input_ids": state["next"]}
            out = model(**more, past_key_values=state["cache"], use_cache=True)
            state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    with torch.inference_mode():
        for i in range(settings.warmup + settings.repeats):
            for name, call in (("prefill", prefill), ("decode", decode)):
                seconds = _seconds(call, devices)
                if i >= settings.warmup:
                    times[name].append(seconds)
    tokens = {"prefill": settings.batch * settings.prompt_tokens, "decode": settings.batch * settings.new_tokens}
    return {name: summary(found, tokens[name], model, settings, devices) for name, found in times.items()}


def summary(seconds: list[float], tokens: int, model, settings: ThroughputSettings, devices: Sequence[str]) -> dict[str, Any]:
    speeds = sorted(tokens / s for s in seconds)
    return {
        "value": median(speeds),
        "low": speeds[0],
        "high": speeds[-1],
        "unit": "tokens/s",
        "statistic": "median, lowest, highest",
        **settings.model_dump(mode="json"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": "+".join(devices),
    }
