"""PET methods of our own, beside PEFT's: what a matrix may say about each. Nothing here may load torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError

from ..errors import InputError
from ..settings import Natural, Positive, Settings


class NolaSettings(Settings):
    """NOLA (arXiv 2310.02556): LoRA whose factors are linear combinations of frozen random matrices.

    k: matrices per factor, and so coefficients: 2 k a layer. r, lora_alpha: as in LoRA, the scale is lora_alpha / r. The
    defaults are the paper's for GPT-2 (with a learning rate of 1e-2); for Llama-2 it has k 128 to 512, r 16, lora_alpha 4.
    target_modules: ends of layer names, a regular expression of whole names, or `all-linear`; None: what PEFT's LoRA takes.
    seed: of the random matrices; None: the cell's.
    """

    k: Positive = 256
    r: Positive = 8
    lora_alpha: float = Field(2.0, gt=0, le=1e6)
    target_modules: list[str] | str | None = None
    seed: Natural | None = None


OWN: dict[str, type[Settings]] = {"nola": NolaSettings}


def plain_name(method: str) -> str:
    """A method's name as PEFT writes its type, in lower case."""
    return method.lower().replace("-", "_")


def own_settings(method: str, fields: dict[str, Any]) -> Settings:
    """The settings object of one of our methods; InputError names the field that is wrong."""
    cls = OWN[method]
    for key in fields:
        if key not in cls.model_fields:
            message = f"{method} has no field {key!r}."
            raise InputError(message, key=f"pet.{key}", given=key, allowed=cls.model_fields)
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{method}: {first['msg']}", key=".".join(["pet", *map(str, first["loc"][:1])])) from error
