"""Loading model folders, and which number format a device is fast in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..errors import InputError, Unsupported
from .formats import PACKED_METHOD

_code = {"allowed": False}


COMPRESSED_TENSORS = "compressed-tensors"  # the format of llm-compressor and vLLM


def allow_code(allowed: bool) -> None:
    """Whether models may run Python code of their own in this process: what the matrix's `allow_code` says."""
    _code["allowed"] = allowed


def code_allowed() -> bool:
    return _code["allowed"]


def _trust(config: dict[str, Any]) -> bool:
    """transformers' `trust_remote_code` for a model; InputError where it needs code that the matrix does not allow."""
    if not config.get("auto_map"):
        return False
    from transformers import CONFIG_MAPPING

    if not code_allowed() and config.get("model_type") not in CONFIG_MAPPING:
        raise InputError("this model runs Python code of its own (auto_map in its config), which needs allow_code: true")
    return code_allowed()


def load_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with the quantization_config that early auto-gptq checkpoints keep in another file."""
    try:
        config = json.loads(Path(folder, "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{folder} is no model folder: it has no config.json.") from None
    apart = Path(folder, "quantize_config.json")
    if "quantization_config" not in config and apart.is_file():
        config["quantization_config"] = {"quant_method": "gptq", **json.loads(apart.read_text())}
    return config


def load_model(
    folder: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "auto",
    device_map: Any = None,
):
    """The model of a folder in evaluation mode, its weights frozen. Safetensors only.

    Causal or encoder-decoder as its config says. dtype: of weights that are not quantised, and of the computation.
    device: torch's name, or several joined by `+`, over which accelerate spreads the layers.
    Raises Unsupported where this model or platform has no such attention, InputError for code that is not allowed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from .routers import attach_routers
    from .widths import narrowed

    config = load_config(folder)
    auto = narrowed(AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM, config)
    quantised = config.get("quantization_config")
    more: dict[str, Any] = {}
    if attention != "auto":
        more["attn_implementation"] = attention
    if device_map is not None:
        more["device_map"] = device_map
    elif quantised or "+" in device:
        more |= placement(device)
    method = str((quantised or {}).get("quant_method", ""))
    _prepare(method)
    if method == "gptq":
        from . import gptq

        more["config"] = gptq.configuration(folder, quantised, _trust(config))
    if method == COMPRESSED_TENSORS:
        from transformers import AutoConfig

        if any(group.get("input_activations") for group in (quantised.get("config_groups") or {}).values()):
            raise Unsupported(
                "this model of compressed-tensors also rounds what its layers read, and that has no gradient there: take one "
                "whose weights alone are quantised"
            )
        # Else they stay packed, without a weight, until the whole model is run, and blocks, PET and recovery come before that.
        more["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=_trust(config))
        more["config"].quantization_config = {**quantised, "dequantize": True}
    try:
        model = auto.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=_trust(config), **more
        )
    except (ImportError, ValueError) as error:
        if attention != "auto" and "attention" in str(error).lower():
            raise Unsupported(f"attention {attention} cannot be used here: {' '.join(str(error).split())[:300]}") from error
        raise
    if method == "gptq":
        gptq.uncompiled(model)
    if "device_map" not in more:
        model = model.to(device)
    attach_routers(model, folder)
    model.requires_grad_(False)
    return model.eval()


def _prepare(method: str) -> None:
    """What loading a checkpoint quantised by `method` takes, or Unsupported with what to install."""
    import importlib.util

    if method == PACKED_METHOD:
        from . import packed  # noqa: F401  (makes the format known to transformers)
    if method == COMPRESSED_TENSORS and importlib.util.find_spec("compressed_tensors") is None:
        install = "pip install -c constraints.txt '.[compressed-tensors]'"
        raise Unsupported(f"this model is quantised by compressed-tensors, which is not installed ({install})")
    if method.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        raise Unsupported("this model is quantised by bitsandbytes, which is not installed (pip install bitsandbytes)")


def placement(device: str) -> dict[str, Any]:
    """transformers' arguments that put a model on `device`, or spread it over several GPUs joined by `+`, each equally full."""
    names = device.split("+")
    if len(names) == 1:
        return {"device_map": {"": device}}
    import torch

    own = {int(name.partition(":")[2]): int(0.9 * torch.cuda.mem_get_info(name)[0]) for name in names}
    return {"device_map": "balanced", "max_memory": {i: own.get(i, 0) for i in range(torch.cuda.device_count())}}


def load_tokenizer(folder: Path):
    """The tokenizer of a model folder; padding falls back to the end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=_trust(load_config(folder)))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def survives_eval(model) -> bool:
    """Whether a model that ran a forward pass in evaluation mode can still be trained.

    bitsandbytes' 4-bit layers on a CPU repack their weights then, and the repacked path has no gradient (measured: LoRA on a
    model evaluated before got no gradient on any of its tensors).
    """
    return not any(type(m).__name__ == "Linear4bit" and m.weight.device.type == "cpu" for m in model.modules())


def pick_dtype(setting: str, device: str) -> str:
    """`auto` as a number format: bfloat16 where the device is fast in it, found by a matmul test of at most a second."""
    import torch

    if setting != "auto":
        return setting
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    times = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(512, 576).to(getattr(torch, name))
        b = torch.randn(1536, 576).to(getattr(torch, name))
        torch.nn.functional.linear(a, b)
        best = float("inf")
        end = time.perf_counter() + 0.4
        while time.perf_counter() < end:
            started = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = min(best, time.perf_counter() - started)
        times[name] = best
    return "bfloat16" if times["bfloat16"] < 0.8 * times["float32"] else "float32"
