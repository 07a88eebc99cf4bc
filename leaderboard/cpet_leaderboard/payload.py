"""What the page's script needs of each cell, small: equal parts are kept once, and losses are thinned."""

from __future__ import annotations

import json
from typing import Any

from cpet_bench.loss_curves import thinned

from .view import Entry

POINTS = 120  # of a loss curve
CURVES = ("loss", "task", "distill", "distill_encoder", "distill_decoder", "kl", "validation")
ENDS = ("value", "low", "high")
SHARE_FROM = 48  # characters from which a part is worth keeping in the pool


class Pool:
    """Parts that many cells have in common; a cell then holds {"$": place} instead."""

    def __init__(self):
        self.parts: list[Any] = []
        self.places: dict[str, int] = {}

    def put(self, part: Any) -> Any:
        if not isinstance(part, (dict, list)):
            return part
        text = json.dumps(part, sort_keys=True, default=str)
        if len(text) < SHARE_FROM:
            return part
        if text not in self.places:
            self.places[text] = len(self.parts)
            self.parts.append(part)
        return {"$": self.places[text]}

    def each(self, parts: dict[str, Any] | None) -> dict[str, Any] | None:
        """A mapping whose values are put one by one."""
        return parts and {k: self.put(v) for k, v in parts.items()}


def figures(found: dict[str, dict[str, Any]] | None, pool: Pool) -> dict[str, list]:
    """Each figure as [value, low, high, the rest]: the rest is much the same in all cells."""
    return {
        name: [*(f.get(k) for k in ENDS), pool.put({k: v for k, v in f.items() if k not in ENDS})]
        for name, f in (found or {}).items()
    }


def losses(rows: list[dict[str, Any]] | None, most: int = POINTS) -> dict[str, list] | None:
    """Loss curves as columns, four significant digits, about `most` steps, those looked at on held-out documents, the last."""
    if not rows:
        return None
    kept = thinned(rows, most)

    def short(value):
        return None if value is None else float(f"{value:.4g}")

    curves = {name: [short(r.get(name)) for r in kept] for name in CURVES}
    used = {name: values for name, values in curves.items() if any(v is not None for v in values)}
    if used.get("task") == used.get("loss"):
        used.pop("task", None)  # nothing was distilled
    return {"step": [r.get("step", i) for i, r in enumerate(kept)], **used}


def cell(entry: Entry, pool: Pool, rows: dict[str, int], most: int = POINTS) -> dict[str, Any]:
    """One cell for the script. `rows` gives the row of each id of its run, for the references."""
    record = entry.record
    training = record.get("training")
    provenance = record.get("provenance") or {}
    return {
        "id": record["id"],
        "run": entry.run,
        "machine": entry.machine,
        "matrix": record.get("matrix"),
        "axes": record["axes"],
        "status": record["status"],
        "reason": record.get("reason"),
        "primary": record.get("primary"),
        "metrics": figures(record.get("metrics"), pool),
        "probes": figures(record.get("probes"), pool),
        "gap": [entry.gap(), *(entry.gap_ends or (None, None))],
        "compression": pool.put(record.get("compression")),
        "training": training and {k: v for k, v in training.items() if k != "losses"},
        "losses": losses(training.get("losses"), most) if training else None,
        "costs": record.get("costs"),
        "simulated": record.get("simulated") or [],
        "references": {k: [v, rows.get(v)] for k, v in (record.get("references") or {}).items() if v},
        "settings": pool.each(record.get("settings")),
        "provenance": pool.each(provenance),
    }


def script_json(body: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), default=str)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
