"""A rank above what a layer's weight can have is refused before anything is trained."""

from __future__ import annotations

import copy

from torch import nn

from ..models.arch import block_linears, features
from .layer_limits import OFT_FIELDS, refuse_oft
from .rank_limits import FIELD, LIMITS, refuse_ranks


def check_ranks(model: nn.Module, config) -> None:
    """InputError where PEFT's configuration gives a layer of `model` more than its weight can have (see `rank_limits`).

    So are OFT's blocks that do not fill a layer, see `layer_limits.refuse_oft`.
    """
    method = config.peft_type.value.lower()
    if method not in LIMITS and method != "oft":
        return
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils import constants
    from peft.utils.other import get_pattern_key

    layers, config = block_linears(model), copy.copy(config)
    config.target_parameters = getattr(config, "target_parameters", None)  # asked for of every method
    if config.target_modules is None:
        usual = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method.upper()}_TARGET_MODULES_MAPPING")
        config.target_modules = usual.get(model.config.model_type) or []
    elif isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = list(layers)
    found = [name for name in layers if check_target_module_exists(config, name)]
    if method == "oft":
        refuse_oft({key: getattr(config, key) for key in OFT_FIELDS}, ((n, features(layers[n])[0]) for n in found))
        return
    ranks = {} if method == "adalora" else getattr(config, "rank_pattern", None) or {}
    r = getattr(config, FIELD.get(method, "r"))
    if r is None:  # SuperTuning without its LoRA part
        return
    refuse_ranks(method, ((n, ranks.get(get_pattern_key(ranks.keys(), n), r), features(layers[n])) for n in found))
