"""The matrix of a run as it is kept with it: one file without `extends`, with the small files it names beside it."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, StopError
from ..evaluation.task_files import _Loader, read_yaml
from ..evaluation.tasks import _table, placed
from ..yamlpos import parse, scalar

LIMIT = 8 << 20  # bytes; what is larger is named, not kept
APART = 3  # levels between a task's folder and the folder around all its files

Key = tuple[str, ...]


@dataclass
class Item:
    """Something on this machine that a matrix names. files: path → name below `place`; why: why it is not kept."""

    key: Key
    scheme: str
    path: Path
    place: str
    files: dict[Path, str] = field(default_factory=dict)
    inner: str = ""  # where below `place` the named thing itself lies
    why: str | None = None


def keep(matrix, steps: Iterable, folder: Path) -> dict[str, Any]:
    """Write `folder`/matrix.yaml and what it names into `folder`/files.

    Returns for run.json: matrix_text, and `outside`, a list of what stayed where it is: key, path, place (where it would
    lie in the run's folder), bytes, why. Raises StopError where the disk will not.
    """
    data = copy.deepcopy(matrix.document.data)
    data.pop("extends", None)
    outside, moved = [], {}
    try:
        shutil.rmtree(folder / "files", ignore_errors=True)
        for item in items(data, matrix.path.parent, list(steps)):
            size = sum(p.stat().st_size for p in item.files if p.is_file())
            if item.why is None and size > LIMIT:
                item.why = f"it has {size / 1e6:.0f} MB; up to {LIMIT / 1e6:.0f} MB are kept"
            place = "/".join(p for p in (item.place, item.inner) if p)
            if item.why is None:
                for path, name in item.files.items():
                    target = folder / item.place / name if name else folder / item.place
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
                moved[item.key] = put(data, item.key, item.scheme + place)
            else:
                where = item.scheme + str(item.path.resolve())
                moved[item.key] = put(data, item.key, where)
                entry = {"key": list(item.key), "path": where, "place": item.scheme + place, "bytes": size, "why": item.why}
                outside.append(entry)
        text = as_written(matrix, data, moved) or dump(data)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "matrix.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise StopError(f"Cannot keep the matrix in {folder}: {error.strerror or error}.") from error
    return {"matrix_text": text, "outside": outside}


def as_written(matrix, data: Any, moved: dict[Key, tuple[str, str]]) -> str | None:
    """The matrix file itself with the `moved` values (old, new) put in, comments and all, where that says just `data`."""
    try:
        lines = matrix.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for key, (old, new) in moved.items():
            file, line = matrix.locate(*key)
            if file == matrix.path and line and line <= len(lines):
                before, found, after = lines[line - 1].rpartition(old)
                lines[line - 1] = before + new + after if found else lines[line - 1]
        text = "".join(lines)
        return text if parse(text, matrix.path).data == data else None
    except (OSError, UnicodeDecodeError, InputError):
        return None


def put(data: dict[str, Any], key: Iterable[str], value: str) -> tuple[str, str]:
    """Set what `key` leads to; returns (old, new)."""
    *way, last = key
    for name in way:
        data = data[name]
    old, data[last] = data[last], value
    return old, value


# -- what a matrix names ---------------------------------------------------------------------------------------------
def items(data: dict[str, Any], base: Path, steps: list) -> Iterator[Item]:
    """Local models, adapters, training data and task folders that a matrix names; `base` is what its paths start at."""
    for name, value in _mapping(data.get("model")):
        key = ("model", name) if isinstance(value, str) else ("model", name, "source")
        source = value if isinstance(value, str) else value.get("source") if isinstance(value, dict) else None
        yield from _local(key, source, base, f"files/model/{name}")
    for name, value in _mapping(data.get("restoring")):
        inherit = value.get("inherit") if isinstance(value, dict) else None
        if isinstance(inherit, dict):
            yield from _local(("restoring", name, "inherit", "from"), inherit.get("from"), base, f"files/adapter/{name}")
    for name, value in _mapping(data.get("task")):
        if not isinstance(value, dict):
            continue
        own = value.get("train_data")
        if isinstance(own, dict) and isinstance(own.get("jsonl"), str):
            path = base / own["jsonl"]
            yield _file(Item(("task", name, "train_data", "jsonl"), "", path, f"files/data/{name}.jsonl"))
        if isinstance(value.get("include"), str):
            yield _task(Item(("task", name, "include"), "", base / value["include"], f"files/task/{name}"), steps)


def _mapping(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _local(key: Key, source: Any, base: Path, place: str) -> Iterator[Item]:
    scheme, colon, rest = source.partition(":") if isinstance(source, str) else ("", "", "")
    if not colon or scheme not in ("local", "gguf"):
        return
    path = base / rest
    if scheme == "gguf":
        yield _file(Item(key, "gguf:", path, f"{place}.gguf"))
        return
    item = Item(key, "local:", path, place)
    item.files = {p: p.relative_to(path).as_posix() for p in sorted(path.rglob("*")) if p.is_file()}
    item.why = None if item.files else "it is not there"
    yield item


def _file(item: Item) -> Item:
    if item.path.is_file():
        item.files = {item.path: ""}
    else:
        item.why = "it is not there"
    return item


def _task(item: Item, steps: list) -> Item:
    """The YAML, data and code files of the planned tasks in a user's folder; of a task that is not planned none."""
    folder = item.path.resolve()
    mine = [step for step in steps if step.params.get("task_folder") == str(folder)]
    specs = [placed(step.settings["spec"], str(folder)) for step in mine]
    if not specs:
        return item
    table, found = _table(folder), set()
    for name in {name for spec in specs for name in spec["tasks"]}:
        found |= _chain(table[name]["file"])
        if _absolute(read_yaml(table[name]["file"])):
            item.why = f"the task {name} names its data by an absolute path"
    found |= {Path(name) for spec in specs for name in spec["files"]}
    root = Path(os.path.commonpath([folder, *(p.parent for p in found)]))
    if len(folder.relative_to(root).parts) > APART:
        item.why = item.why or "its files lie far apart"
    item.files = {p: p.relative_to(root).as_posix() for p in sorted(found)}
    item.inner = "" if root == folder else folder.relative_to(root).as_posix()
    return item


def _chain(file: Path) -> set[Path]:
    """A task file and all that it includes."""
    file = file.resolve()
    includes = yaml.load(file.read_bytes(), Loader=_Loader).get("include") or []  # a safe loader
    found = {file}
    for other in includes if isinstance(includes, list) else [includes]:
        found |= _chain(file.parent / str(other))
    return found


def _absolute(config: dict[str, Any]) -> bool:
    kwargs = config.get("dataset_kwargs") or {}

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from texts(inner)

    named = [kwargs.get("data_files"), kwargs.get("data_dir"), config.get("dataset_path")]
    return any(os.path.isabs(t) for v in named for t in texts(v))


# -- writing YAML that yamlpos reads back ------------------------------------------------------------------------------
class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.Dumper, value: str) -> yaml.Node:
    event = yaml.ScalarEvent(None, None, (True, False), value)
    quoted = not isinstance(scalar(event), str) or "\n" in value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style='"' if quoted else None)


_Dumper.add_representer(str, _text)


def dump(data: Any) -> str:
    """`data` as YAML which yamlpos reads as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
