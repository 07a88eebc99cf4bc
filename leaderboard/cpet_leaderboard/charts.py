"""Geometry of the drawings: scales, ticks, the interval bars of the table and the scatter charts. The template draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .text import exists, figure

BAR = (108, 14)  # width and height of an interval bar
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 14, 40
PLAIN = 400  # points from which a chart has neither whiskers nor texts: they would only hide each other
COLOURS, SHAPES = 8, 8  # how many the style sheet tells apart
WIDE = 50  # ratio of the largest to the smallest value from which a scale is logarithmic


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def domain(values: Iterable[float | None]) -> tuple[float, float]:
    """The range to draw: a margin of 6 % around the values, within [0, 1] where they all are."""
    found = [v for v in values if exists(v)]
    if not found:
        return 0.0, 1.0
    low, high = min(found), max(found)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
    inside = low >= 0 and high <= 1
    low, high = low - margin, high + margin
    return (max(0.0, low), min(1.0, high)) if inside else (low, high)


def wide(values: Iterable[float | None]) -> bool:
    """Whether positive values span so much that only a logarithmic scale shows the small ones apart."""
    found = [v for v in values if exists(v)]
    return bool(found) and min(found) > 0 and max(found) / min(found) >= WIDE


def powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; the powers alone where those are enough."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    within = [v for v in found if low <= v <= high]
    tens = [v for v in within if math.log10(v).is_integer()]
    return tens if len(tens) > 3 else within


def log_domain(values: Iterable[float | None]) -> tuple[float, float]:
    """As `domain`, of the values' decimal logarithms."""
    low, high = min(logs := [math.log10(v) for v in values if exists(v)]), max(logs)
    margin = (high - low) * 0.06
    return low - margin, high + margin


def pixel(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where `value` of [low, high] lies between `start` and `end`; a tenth of a pixel."""
    share = (value - low) / (high - low) if high > low else 0.5
    return round(start + min(1.0, max(0.0, share)) * (end - start), 1)


def bar(
    value: float,
    low: float | None,
    high: float | None,
    reference: float | None,
    span: tuple[float, float],
    log: bool = False,
) -> dict:
    """Places in the bar of a value, its interval and the value of the dense model with PET; `log`: span is of logarithms."""

    def at(v):
        return pixel(math.log10(v) if log else v, *span, 4, BAR[0] - 4) if exists(v) and (v > 0 or not log) else None

    ends = (at(low), at(high)) if exists(low) and exists(high) else None
    return {"x": at(value), "ends": ends, "reference": at(reference)}


@dataclass
class Chart:
    """A scatter chart in drawing units, ready for the template."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[dict[str, Any]] = field(default_factory=list)
    line: float | None = None  # height of the dense model with PET, where there is exactly one
    hollow: bool = False  # whether any point is simulated
    plain: bool = False  # whether intervals were left out


def scatter(points: Sequence[dict[str, Any]], title: str, x_label: str, y_label: str, reference: float | None) -> Chart | None:
    """Chart of points {x, y, low, high, colour, shape, simulated, row, text}; None for fewer than two.

    x starts at 0, unless it spans so much that its scale is logarithmic (`wide`), as y's is, too.
    """
    shown = [p for p in points if exists(p["x"]) and exists(p["y"])]
    if len(shown) < 2:
        return None
    xs = [p["x"] for p in shown]
    far = wide(xs)
    x_low, x_high = log_domain(xs) if far else (0.0, max(xs) * 1.06 or 1.0)
    values = [v for p in shown for v in (p["y"], p["low"], p["high"])] + [reference]
    log = wide(values)
    y_low, y_high = log_domain(values) if log else domain(values)

    def across(v):
        return pixel(math.log10(v) if far else v, x_low, x_high, LEFT, WIDTH - RIGHT)

    def up(v):
        return pixel(math.log10(v) if log else v, y_low, y_high, HEIGHT - BOTTOM, TOP)

    levels = powers(10**y_low, 10**y_high) if log else ticks(y_low, y_high)
    step = levels[1] - levels[0] if len(levels) > 1 else 0.01
    digits = 0 if log and levels[0] >= 1 else max(0, -math.floor(math.log10(step) + 1e-9))
    chart = Chart(
        title,
        x_label,
        y_label,
        [(across(v), figure(v)) for v in (powers(10**x_low, 10**x_high) if far else ticks(x_low, x_high))],
        [(up(v), f"{v:,.{digits}f}".replace("-", "−")) for v in levels],
        line=up(reference) if exists(reference) else None,
        hollow=any(p["simulated"] for p in shown),
        plain=len(shown) > PLAIN,
    )
    for p in shown:
        ends = (up(p["low"]), up(p["high"])) if not chart.plain and exists(p["low"]) and exists(p["high"]) else None
        place = {"x": across(p["x"]), "y": up(p["y"]), "ends": ends}
        chart.points.append({**{k: p[k] for k in ("colour", "shape", "simulated", "row", "text")}, **place})
    return chart
