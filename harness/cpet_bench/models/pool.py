"""Resident models of one worker: loaded once, lent for evaluation or training, and checked when they come back."""

from __future__ import annotations

import gc
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import StepFailed
from .loading import load_model, survives_eval

CANARY = (3, 1, 4, 1, 5, 9, 2, 6)


class ModelPool:
    """At most `capacity` models, the least recently lent goes first.

    A model comes back as it was: the logits of a fixed input are compared bit for bit with those of the fresh model, and
    on a difference, or for kinds known not to survive (4-bit weights that a forward pass repacks), it is loaded afresh.
    One that was lent for `eval` and computes something else afterwards may have done so while it was evaluated: that is a
    StepFailed, and no result.
    """

    def __init__(self, capacity: int = 2):
        self.capacity = capacity
        self._models: dict[tuple, dict[str, Any]] = {}
        self.loads = 0
        self.reloads: list[str] = []
        self.load_seconds: dict[str, float] = {}

    def _load(self, key: str, folder: Path, machine: dict[str, Any]) -> Any:
        started = time.perf_counter()
        device = "+".join(machine.get("owns") or [machine["device"]])
        model = load_model(folder, device=device, dtype=machine["dtype"], attention=machine["attention"])
        self.loads += 1
        self.load_seconds[key] = time.perf_counter() - started
        return model

    def _drop(self, at: tuple) -> None:
        self._models.pop(at, None)
        gc.collect()

    def clear(self) -> None:
        """Forget every model (after running out of memory)."""
        self._models.clear()
        gc.collect()

    def held(self) -> list[str]:
        """Keys of the models resident now."""
        return [at[0] for at in self._models]

    @contextmanager
    def lend(self, key: str, folder: Path, machine: dict[str, Any], purpose: str):
        at = (key, machine["device"], machine["dtype"], machine["attention"])
        entry = self._models.pop(at, None)
        if entry and purpose == "train" and entry["evaluated"] and not survives_eval(entry["model"]):
            self.reloads.append(key)
            entry = None
        if entry is None:
            while len(self._models) >= self.capacity:
                self._drop(next(iter(self._models)))
            gc.collect()
            entry = {"model": self._load(key, folder, machine), "canary": None, "evaluated": False}
        model = entry["model"]
        fragile = not survives_eval(model)
        if entry["canary"] is None and not (fragile and purpose == "train"):
            entry["canary"], entry["evaluated"] = canary(model), True
        broken = True
        try:
            yield model
            broken = False
        finally:
            if not broken and entry["canary"] is not None and not (fragile and purpose == "train"):
                now = canary(model)
                broken = not same(now, entry["canary"])
                if broken:
                    self.reloads.append(key)
                if purpose == "eval" and differs(now, entry["canary"]):
                    raise StepFailed("the model was changed while it was evaluated, so what it said is not to be trusted")
            if not broken and not (fragile and purpose == "train"):
                self._models[at] = entry
            del model, entry
            gc.collect()


def canary(model) -> Any:
    """Logits (float32, on the CPU) of eight fixed tokens, in evaluation mode."""
    import torch

    model.eval()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[i % vocabulary for i in CANARY]], device=model.device)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    with torch.inference_mode():
        return model(input_ids=ids, **more).logits.float().cpu()


def differs(a, b) -> bool:
    """Whether logits differ by more than the order of additions can explain."""
    return a.shape != b.shape or not float((a - b).abs().max()) <= 0.02 * float(b.abs().max())


def same(a, b) -> bool:
    import torch

    return a.shape == b.shape and bool(torch.equal(a, b))
