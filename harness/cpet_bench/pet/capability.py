"""What `doctor --pet` found out: which PET method works on which class of linear layer, alone and with what is restored.

Kept in the user's cache for the versions, platform and device it was found with. Nothing here loads torch.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

from ..devices import cache_root
from ..keys import digest, versions
from .own import plain_name

PARTS = ("vanilla", "inherit", "recover", "distill")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "optimum", "cpet-bench")


class Class_(NamedTuple):
    """A class of linear layer: what it is called, the tiny architecture it is tried in, and what compresses that."""

    shown: str
    arch: str
    backend: str | None = None
    settings: dict[str, Any] = {}


CLASSES: dict[str, Class_] = {
    "linear": Class_("nn.Linear", "llama"),
    "conv1d": Class_("Conv1D (GPT-2)", "gpt2"),
    "t5": Class_("nn.Linear (T5)", "t5"),
    "int8": Class_("Linear8bitLt", "llama", "bitsandbytes", {"type": "int8"}),
    "nf4": Class_("Linear4bit", "llama", "bitsandbytes", {"type": "nf4"}),
    "packed": Class_("PackedLinear", "llama", "rtn", {"bits": 4, "group": 32}),
    "gptq": Class_("GPTQ linear", "llama", "gptq", {"bits": 4, "group": 32}),
}
_BY_LAYER = {"Conv1D": "conv1d", "Linear8bitLt": "int8", "Linear4bit": "nf4", "PackedLinear": "packed", "Linear": "linear"}


def name(layer: str, method: str, part: str) -> str:
    return f"{layer} {method} {part}"


def stamp(device: str) -> dict[str, Any]:
    """What the findings depend on; `device` is its kind, `cpu` or `cuda`."""
    from ..steps import KINDS

    machine = [platform.system(), platform.machine(), platform.python_version()]
    return {"versions": versions(PACKAGES), "platform": machine, "device": device, "source": KINDS["tune"].source_hash()}


def _path(device: str) -> Path:
    return cache_root() / "indexes" / f"capability-{digest(stamp(device))}.json"


def kept(device: str) -> dict[str, dict[str, Any]]:
    """Findings by `name(layer, method, part)`: {"state", "reason", "seconds"}; empty where nothing was tried yet."""
    try:
        return json.loads(_path(device).read_text())
    except (OSError, ValueError):
        return {}


def keep(device: str, found: dict[str, dict[str, Any]]) -> None:
    """Add findings to those that are kept."""
    path = _path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(kept(device) | found, indent=1, sort_keys=True))
        os.replace(fresh, path)
    except OSError:
        pass  # only tried again the next time


def layers_of(model) -> list[str]:
    """The classes of layer in the blocks of `model`, as CLASSES names them."""
    from ..models.arch import block_linears

    found = set()
    for module in block_linears(model).values():
        layer = _BY_LAYER.get(type(module).__name__, "gptq" if hasattr(module, "qweight") else "linear")
        found.add("t5" if layer == "linear" and model.config.is_encoder_decoder else layer)
    return sorted(found)


def refused(model, method: str, parts: list[str]) -> str | None:
    """Why the probe found that `method` cannot be tuned on this model with `parts`; None where it did not, or never tried."""
    found, method = kept(model.device.type), plain_name(method)
    for layer in layers_of(model):
        for part in ("vanilla", *parts):
            row = found.get(name(layer, method, part))
            if row and row["state"] == "unsupported":
                return f"doctor --pet found {method} ({part}) unsupported on {CLASSES[layer].shown}: {row['reason']}"
    return None
