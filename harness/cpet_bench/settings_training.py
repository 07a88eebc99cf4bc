"""The settings of the training loop. docs/training.md says what each does."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from .settings_base import Grown, Natural, Positive, Rate, Settings, named, switched

Beta = Annotated[float, Field(ge=0, lt=1)]


class EarlyStopSettings(Settings):
    """Stop once the task loss on held-out training documents no longer falls; the best weights are what is kept.

    every: steps between two looks (the last step is looked at as well). patience: looks without a new best before it stops.
    documents: how many are held out, the last of the training documents in hash order; the reported split is never read.
    """

    every: Positive = 10
    patience: Positive = 3
    documents: Positive = 100


class TrainSettings(Grown):
    """The one training loop. Defaults are the prototype's recipe for LoRA on a 135 M model.

    documents: training documents used (the first in hash order); batch: documents per optimiser step;
    micro_batch: documents per forward pass (None: as many as `batch`, fewer after running out of memory).
    order_seed: seed of the data order, shared by all seeds of the matrix.
    batch_tokens: instead of `batch`, as many documents of like length per step as fit into so many padded tokens.
    """

    later: ClassVar = ("batch_tokens", "early_stop")

    steps: Natural = 40
    batch: Positive = 16
    micro_batch: Positive | None = None
    documents: Positive = 1000
    lr: Rate = 1e-3
    weight_decay: float = Field(1e-2, ge=0, le=10)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    warmup: Natural = 8
    schedule: Literal["linear", "cosine", "noam", "constant"] = "linear"
    clip: float | None = Field(1.0, gt=0, le=1e6)
    max_tokens: Positive = 512
    order_seed: Natural = 0
    checkpoint_every: Positive = 10
    gradient_checkpointing: bool = False
    batch_tokens: Positive | None = None
    early_stop: switched(EarlyStopSettings) = None

    @property
    def work(self) -> int:
        """Documents that are trained on, about: a step by tokens counts as documents of 128."""
        return self.steps * (max(1, self.batch_tokens // 128) if self.batch_tokens else self.batch)


class TrainOverride(Grown):
    """Any part of TrainSettings; what is not named stays as the matrix's shared `train` has it. `early_stop: false` ends it."""

    later: ClassVar = TrainSettings.later

    steps: named(Natural) = None
    batch: named(Positive) = None
    micro_batch: Positive | None = None
    documents: named(Positive) = None
    lr: named(Rate) = None
    weight_decay: named(Annotated[float, Field(ge=0, le=10)]) = None
    betas: named(tuple[Beta, Beta]) = None
    warmup: named(Natural) = None
    schedule: named(Literal["linear", "cosine", "noam", "constant"]) = None
    clip: float | None = Field(None, gt=0, le=1e6)
    max_tokens: named(Positive) = None
    order_seed: named(Natural) = None
    checkpoint_every: named(Positive) = None
    gradient_checkpointing: named(bool) = None
    batch_tokens: Positive | None = None
    early_stop: switched(EarlyStopSettings) = None

    @property
    def changes(self) -> dict[str, Any]:
        """What is named, by the fields of TrainSettings."""
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}
