"""Numbers as the page writes them. `None` is a dash; minus signs are real ones."""

from __future__ import annotations

import math
import re

NONE = "–"
MB = 1e6  # bytes in the page's MB


def exists(value: object) -> bool:
    """Whether this is a number that can be shown and sorted."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metric(value: float | None, signed: bool = False) -> str:
    """A metric: three decimals, fewer for large ones (perplexities)."""
    if not exists(value):
        return NONE
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return text.replace("-", "−")


def figure(value: float | None, unit: float = 1.0) -> str:
    """`value / unit` in three significant digits, whole numbers from 100 on, thousands parted by commas."""
    if not exists(value):
        return NONE
    value = value / unit
    size = abs(value)
    if value == int(value) or size >= 100:
        return f"{value:,.0f}".replace("-", "−")
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def natural(text: str) -> list:
    """A sort key that counts `lora-r8` before `lora-r16`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"([0-9]+)", text) if part]
