"""Why a step will run: what changed since the plan of the run's last time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .steps import Step


def flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists as (dotted path, value)."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from flat(inner, f"{at}.{i}")
    else:
        yield at, value


def short(value: Any) -> str:
    text = "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def reason(step: Step, before: dict[str, Any] | None) -> str:
    """One line: never run, kept result gone, or each setting that changed; inputs that changed are named by role."""
    if before is None or f"{step.kind} {step.label}" not in before["labels"]:
        return "not run before"
    old = before["steps"][before["labels"][f"{step.kind} {step.label}"]]
    new = step.identity()
    if old["settings"] == new["settings"] and old["needs"] == new["needs"] and old["versions"] == new["versions"]:
        if old["version"] == new["version"]:
            return "its result is no longer in the store"
        return f"the code of {step.kind} changed (version {old['version']} → {new['version']})"
    changes = []
    for part in ("settings", "versions"):
        a, b = dict(flat(old[part])), dict(flat(new[part]))
        for name in sorted({*a, *b}):
            if a.get(name) != b.get(name):
                changes.append(f"{part}.{name} changed {short(a.get(name))} → {short(b.get(name))}")
    roles = [r for r in sorted({*old["needs"], *new["needs"]}) if old["needs"].get(r) != new["needs"].get(r)]
    if roles:
        changes.append(f"its {', '.join(roles)} changed")
    return "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
