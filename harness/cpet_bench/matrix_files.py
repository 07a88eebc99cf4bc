"""A matrix file with what it extends: later files win, mappings are merged, paths stay relative to where they stand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import InputError, nearest
from .yamlpos import Document, Path_, read

DEPTH = 16


def there(path: Path) -> Path:
    """`path`, if a file is there. InputError names files beside it that are spelt like it, or some that are in a folder."""
    if os.path.isdir(path):
        inside = [str(path / name) for name in _names(path)]
        such = f", such as {', '.join(inside[:3])}" if inside else "; there is none in it"
        raise InputError(f"{path} is a folder; a matrix is a YAML file{such}.")
    if not os.path.isfile(path):
        # The endings are all alike, so that only what stands before them tells names apart.
        stems = {Path(name).stem: name for name in _names(path.parent)}
        near = [str(path.with_name(stems[stem])) for stem in nearest(path.stem, stems)]
        raise InputError(f"There is no matrix {path}." + (f" Did you mean {', '.join(near)}?" if near else ""))
    return path


def _names(folder: Path) -> list[str]:
    """Names of the YAML files in a folder; none where it cannot be read."""
    try:
        return sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def merged(path: Path, seen: tuple[Path, ...] = ()) -> Document:
    """The document of `path` over those it extends (`extends: FILE` or a list, relative to it; the last wins).

    InputError for a file that is missing, or files that extend each other.
    """
    at = path.resolve()
    seen, own = (*seen, at), read(path)
    extends = own.data.get("extends") if isinstance(own.data, dict) else None
    if extends is None:
        return own
    result = Document({}, {})
    for i, name in enumerate(extends if isinstance(extends, list) else [extends]):
        place = own.locate(("extends", i) if isinstance(extends, list) else ("extends",))
        if not isinstance(name, str) or "\0" in name:
            raise InputError("it names a file, or a list of files", file=place[0], line=place[1], key="extends")
        other = path.parent / name
        if not other.is_file():
            raise InputError(f"there is no file {other}", file=place[0], line=place[1], key="extends")
        if other.resolve() in seen:
            chain = " → ".join(p.name for p in (*seen[seen.index(other.resolve()) :], other))
            raise InputError(f"these files extend each other: {chain}", file=place[0], line=place[1], key="extends")
        if len(seen) >= DEPTH:
            raise InputError(f"files extend each other {DEPTH} deep", file=place[0], line=place[1], key="extends")
        base = merged(other, seen)
        if not isinstance(base.data, dict):
            raise InputError(f"{other} is no matrix", file=place[0], line=place[1], key="extends")
        result = _over(result, _moved(base, other.parent, path.parent))
    return _over(result, own)


def _over(base: Document, own: Document) -> Document:
    """Mappings merge key by key; anything else of `own` takes the place of base's."""
    places = dict(base.places)

    def merge(a: Any, b: Any, path: Path_) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return {**a, **{k: merge(a[k], v, (*path, k)) if k in a else v for k, v in b.items()}}
        for at in [p for p in places if p[: len(path)] == path]:
            del places[at]
        return b

    data = merge(base.data, own.data, ())
    return Document(data, places | own.places)


def _moved(document: Document, there: Path, here: Path) -> Document:
    """The document's relative paths as seen from `here`."""
    data = document.data
    if os.path.abspath(there) == os.path.abspath(here):
        return document

    def moved(text: str) -> str:
        return text if os.path.isabs(text) else os.path.relpath(there / text, here)

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        if isinstance(value, str):
            scheme, colon, rest = value.partition(":")
            if key in ("source", "from") and colon and scheme in ("local", "gguf"):
                return f"{scheme}:{moved(rest)}"
            if key == "jsonl":
                return moved(value)
        return value

    moved_data = {k: walk(v, k) for k, v in data.items()}
    for task in (moved_data.get("task") or {}).values() if isinstance(moved_data.get("task"), dict) else []:
        if isinstance(task, dict) and isinstance(task.get("include"), str):
            task["include"] = moved(task["include"])
    return Document(moved_data, document.places)
