"""Which records were measured on the same machine: only their speeds can be compared."""

from __future__ import annotations

from typing import Any

FIELDS = ("name", "device", "dtype", "attention", "tf32", "threads", "cores")


def machine(record: dict[str, Any]) -> tuple:
    """What a speed depends on besides the cell."""
    device = (record.get("provenance") or {}).get("device") or {}
    return tuple(device.get(name) for name in FIELDS)


def labels(records: list[dict[str, Any]]) -> list[str]:
    """A name of each record's machine that tells it from the others': the device, and what else differs. In records' order."""
    found = [machine(record) for record in records]
    differing = [i for i in range(1, len(FIELDS)) if len({m[i] for m in found}) > 1]

    def label(one: tuple) -> str:
        more = [_word(FIELDS[i], one[i]) for i in differing if one[i] is not None]
        return ", ".join([str(one[0] or one[1] or "unknown"), *more])

    return [label(one) for one in found]


def _word(field: str, value: Any) -> str:
    if field in ("threads", "cores"):
        return f"{value} {field}"
    return f"{field} {value}" if field in ("attention", "tf32") else str(value)
