"""Models packed by GPTQ (arXiv 2210.17323), in the format of auto-gptq and GPTQModel: reading them, and their layers."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from ..errors import Unsupported

INSTALL = "pip install -c constraints.txt '.[gptq]'"
# The one kernel of GPTQModel that computes in any number format, for any bits and with a gradient for what is before it: it
# dequantises, then multiplies. The others take float16 or bfloat16 alone, and those for the CPU give no gradient.
KERNEL = "gptq_torch"


def require() -> None:
    """Unsupported, with what to install, where a library that GPTQ needs is missing."""
    missing = [name for name in ("gptqmodel", "optimum") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(f"GPTQ needs {' and '.join(missing)}, which is not installed ({INSTALL})")
    for name in ("optimum", "gptqmodel"):  # else a line for each layer
        logging.getLogger(name).setLevel(logging.WARNING)


def configuration(folder: Path, quantised: dict[str, Any], trust: bool):
    """The model's config object with the kernel that its packed layers are to compute with.

    quantised: `quantization_config` of its config.json. Raises Unsupported where the libraries are missing.
    """
    require()
    from gptqmodel.nn_modules.qlinear import torch as kernel
    from transformers import AutoConfig

    # GPT-2 draws `c_proj.weight` anew when it is read; here that is not a tensor but what stands in for one
    stand_in = getattr(kernel, "_LinearWeightMetadata", None)
    if stand_in is not None:
        stand_in._is_hf_initialized = True
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    config.quantization_config = {**quantised, "backend": KERNEL}
    return config


def packed_linears(model) -> dict[str, Any]:
    """The layers of a model that GPTQModel packs, by name."""
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseQuantLinear)}


def uncompiled(model) -> None:
    """Take torch.compile off the packed layers' dequantising.

    GPTQModel puts it there by itself. It would compile anew for each shape and mode, needs a C++ compiler on a CPU, and gives
    other last bits, so that a model would not compute the same before and after it was trained on.
    """
    for layer in packed_linears(model).values():
        layer.__dict__.pop("dequantize_weight", None)
