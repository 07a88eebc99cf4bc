"""A rank above what a layer's weight can have is refused before anything is trained."""

from __future__ import annotations

import copy

from torch import nn

from ..errors import InputError
from ..models.arch import block_linears, features


def refuse_rank(name: str, r: int, n_in: int, n_out: int) -> None:
    """InputError where a weight of out x in has no rank as high as `r`."""
    largest = min(n_in, n_out)
    if r > largest:
        raise InputError(
            f"{name} has {n_in} inputs and {n_out} outputs, so a rank of {r} is more than its weight can have: "
            f"give at most {largest}, or leave this layer out of target_modules.",
            key="pet.r",
        )


def check_ranks(model: nn.Module, config) -> None:
    """The same for every layer of `model` that a PEFT configuration of LoRA or AdaLoRA is about."""
    kind = config.peft_type.value
    if kind not in ("LORA", "ADALORA"):
        return
    from peft import utils
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    layers, config = block_linears(model), copy.copy(config)
    if config.target_modules is None:
        usual = getattr(utils, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING")
        config.target_modules = usual.get(model.config.model_type) or []
    elif config.target_modules == "all-linear":
        config.target_modules = list(layers)
    for name, module in layers.items():
        if check_target_module_exists(config, name):
            ranks = getattr(config, "rank_pattern", None) or {}
            r = config.init_r if kind == "ADALORA" else ranks.get(get_pattern_key(ranks.keys(), name), config.r)
            refuse_rank(name, int(r), *features(module))
