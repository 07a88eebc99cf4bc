"""PET methods of our own, beside PEFT's: what a matrix may say about each. Nothing here may load torch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

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


class FullSettings(Settings):
    """Full fine-tuning: every weight of the blocks and the norms after them, but not the embeddings and the head.

    zeros: `keep` leaves the exact zeros of a pruned layer (one with at least 1 % of them) zero; `train` trains them too.
    """

    zeros: Literal["keep", "train"] = "keep"


class BitfitSettings(Settings):
    """BitFit (arXiv 2106.10199): biases alone.

    where: `existing` is those that the linear layers and the norms have; `all` gives one, starting from zero, to each linear
    layer of the blocks that has none as well.
    """

    where: Literal["existing", "all"] = "existing"


# Fields of ours beside PEFT's own, by method: PEFT has this start as a function to be called (initialize_kv_prefix_from_text).
BESIDE = {"prefix_tuning": ("init_text",), "cartridge": ("init_text",)}

OWN: dict[str, type[Settings]] = {"nola": NolaSettings, "full": FullSettings, "bitfit": BitfitSettings}

# By the module of this package that puts a method on a model, keeps it, merges it and takes it off (functions of the same
# names in each; what is on a model is its attribute `cpet_MODULE`): the files of a saved one.
MODULES = {"nola": "nola", "full": "whole", "bitfit": "whole"}
FILES = {name: (f"{name}.json", f"{name}.safetensors") for name in dict.fromkeys(MODULES.values())}


def implementation(name: str) -> ModuleType:
    """One of these modules, by its name; it loads torch."""
    return import_module(f".{name}", __package__)


def saved_in(folder: Path) -> str | None:
    """The module whose files lie in `folder`; None where it is PEFT's format, or nothing."""
    return next((name for name, files in FILES.items() if Path(folder, files[0]).is_file()), None)


def put_on(model: Any) -> list[str]:
    """The modules of which something is on `model`."""
    return [name for name in FILES if hasattr(model, f"cpet_{name}")]


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
