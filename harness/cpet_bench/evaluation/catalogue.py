"""Which tasks there are, by name: ours and lm-eval's own. Imports neither torch nor lm-eval.

lm-eval's table takes some ten seconds to read (15,000 files), so it is filled once per lm-eval version in a subprocess and
kept as JSON in the cache folder.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..devices import kept_index
from ..keys import version

_SCRIPT = """
import json, logging
from pathlib import Path
logging.disable(logging.CRITICAL)
import lm_eval.tasks as tasks
root = Path(tasks.__file__).parent
def names(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        own = [value[k] for k in ("task", "group") if isinstance(value.get(k), str)]
        return own + (names(value["task"]) if isinstance(value.get("task"), list) else [])
    return [n for v in value for n in names(v)] if isinstance(value, list) else []
table = {}
for name, entry in tasks.TaskManager().task_index.items():
    path = entry.yaml_path and Path(entry.yaml_path).relative_to(root.resolve()).as_posix()
    kind = entry.kind.name.lower()
    members = sorted(entry.tags) if kind == "tag" else names(entry.cfg.get("task")) if kind == "group" else []
    table[name] = [kind, path, members]
print(json.dumps(table))
"""


def our_folder() -> Path:
    """The folder of the tasks that come with this package."""
    return Path(find_spec("cpet_tasks").origin).parent


def lm_eval_folder() -> Path:
    """The folder of lm-eval's own task files."""
    return Path(find_spec("lm_eval").origin).parent / "tasks"


@cache
def metric_names() -> tuple[str, ...]:
    """The metrics that lm-eval itself has, out of its source: importing it takes seconds."""
    text = (lm_eval_folder().parent / "api" / "metrics.py").read_text()
    return tuple(sorted(set(re.findall(r"@register_metric\(\s*metric=[\"']([^\"']+)", text))))


@cache
def lm_eval_tasks() -> dict[str, list[Any]]:
    """Name → [kind (task, py_task, group or tag), path in lm-eval's folder or None, names of the members].

    Raises StopError where lm-eval cannot be asked.
    """
    return kept_index(f"lm_eval-{version('lm-eval')}", _SCRIPT, "lm-eval's list of tasks")


def closure(table: dict[str, list[Any]], name: str) -> list[str]:
    """`name` and everything that it has as members, directly or not, as far as the table knows them; sorted."""
    found: set[str] = set()
    stack = [name]
    while stack:
        at = stack.pop()
        if at in table and at not in found:
            found.add(at)
            stack.extend(table[at][2])
    return sorted(found)
