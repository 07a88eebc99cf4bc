"""What of a model folder is our own, and transformers alone does not read. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKED_METHOD = "cpet_packed"  # quant_method of weights that are packed as integers (models/packed.py)
ROUTERS_FILE = "cpet_routers.safetensors"  # beside the weights (models/routers.py)
WIDTHS_KEY = "cpet_widths"  # of config.json (models/widths.py)

PACKED, ROUTED, UNEVEN = "weights packed as integers", "experts picked by routers", "blocks of several widths"


def beyond_transformers(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Why transformers alone fails on a model folder or computes another model; None for the usual. config: its config.json."""
    if (config.get("quantization_config") or {}).get("quant_method") == PACKED_METHOD:
        return PACKED
    if Path(folder, ROUTERS_FILE).is_file():
        return ROUTED
    return UNEVEN if config.get(WIDTHS_KEY) else None
