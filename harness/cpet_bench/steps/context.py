"""What a step's function is called with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..models.pool import ModelPool


@dataclass
class Context:
    """One step on one worker.

    settings, params: the step's. inputs, facts: by role, the local folder of each artifact needed and what its step
    reported. out: where the artifact's files go. scratch: a folder that outlives a kill. machine: device, dtype, attention.
    progress(done, total, text) shows how far it is; should_stop() is true once the run is to end soon.
    """

    kind: str
    settings: dict[str, Any]
    params: dict[str, Any]
    inputs: dict[str, Path]
    facts: dict[str, dict[str, Any]]
    keys: dict[str, str]
    out: Path
    scratch: Path
    machine: dict[str, Any]
    pool: ModelPool
    progress: Callable[[int, int, str], None]
    should_stop: Callable[[], bool]

    @contextmanager
    def model(self, role: str = "model", purpose: str = "eval"):
        """The resident model of input `role`, lent for `eval` or `train` and taken back as it was."""
        with self.pool.lend(self.keys[role], self.inputs[role], self.machine, purpose) as model:
            yield model

    def tokenizer(self, role: str = "tokenizer"):
        from ..models.loading import load_tokenizer

        return load_tokenizer(self.inputs[role])
