"""Task YAML files read without lm-eval and without running anything: settings, the functions and data files they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..devices import cache_root
from ..errors import InputError
from ..keys import digest

FUNCTION = "!function"
_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_REMOTE = ("http://", "https://", "hf://", "s3://", "gs://")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Safe YAML, with `!function name` kept as {"!function": name}."""


_Loader.add_constructor(FUNCTION, lambda loader, node: {FUNCTION: loader.construct_scalar(node)})


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a task file with its `include`s merged in (the file's own win).

    Functions stay names: {"!function": "module.name"}. InputError for what is no YAML mapping, an unknown tag, a cycle.
    """
    path = path.resolve()
    if path in seen:
        raise InputError(f"task files include each other: {' → '.join(p.name for p in (*seen, path))}", file=path)
    try:
        found = yaml.load(path.read_bytes(), Loader=_Loader)  # a safe loader with one tag more
    except OSError as error:
        raise InputError(f"this task file cannot be read: {error.strerror or error}", file=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(f"no valid YAML: {problem}", file=path, line=mark.line + 1 if mark else None) from None
    if not isinstance(found, dict):
        raise InputError("a task file must be a mapping (task: NAME, ...)", file=path)
    includes = found.pop("include", [])
    merged: dict[str, Any] = {}
    for other in includes if isinstance(includes, list) else [includes]:
        inner = read_yaml(path.parent / str(other), (*seen, path))
        inner.pop("task_list", None)
        merged |= inner
    return merged | found


def yaml_files(folder: Path) -> list[Path]:
    """Every *.yaml below `folder`, in lm-eval's order."""
    return sorted((p for p in folder.glob("**/*.yaml") if not _IGNORED & set(p.parts)), key=lambda p: p.as_posix())


def functions(config: Any) -> list[str]:
    """The functions that a configuration names, anywhere in it."""
    if isinstance(config, dict):
        own = [str(config[FUNCTION])] if FUNCTION in config else []
        return own + [f for v in config.values() for f in functions(v)]
    return [f for v in config for f in functions(v)] if isinstance(config, list) else []


def foreign_metrics(config: Any, known: Iterable[str]) -> list[str]:
    """Metrics named in a configuration, anywhere in it, that are not `known` or are asked for from the `evaluate` library."""
    if isinstance(config, list):
        return [m for v in config for m in foreign_metrics(v, known)]
    if not isinstance(config, dict):
        return []
    found = [m for k, v in config.items() if k != "metric_list" for m in foreign_metrics(v, known)]
    for item in config.get("metric_list") or []:
        name = item.get("metric") if isinstance(item, dict) else None
        if isinstance(name, str) and (name not in known or item.get("hf_evaluate")):
            found.append(name)
    return found


def localise(config: dict[str, Any], folder: Path, file: Path) -> tuple[dict[str, Any], list[Path]]:
    """A copy of `config` whose relative data files lie below `folder`, the place of its YAML file; and those files.

    Looks at `dataset_kwargs.data_files`, `dataset_kwargs.data_dir` and a `dataset_path` that starts with `./` or `../`.
    InputError names a file that is missing.
    """
    config = json.loads(json.dumps(config, default=str))
    kwargs = config.get("dataset_kwargs") or {}
    found: list[Path] = []

    def local(text: str, key: str) -> str:
        if text.startswith(_REMOTE):
            return text
        at = folder / text
        matches = sorted(folder.glob(text)) if any(c in text for c in "*?[") and not Path(text).is_absolute() else [at]
        if not matches or not all(m.exists() for m in matches):
            raise InputError(f"there is no file {at}", file=file, key=key)
        for match in matches:
            found.extend(sorted(p for p in match.rglob("*") if p.is_file()) if match.is_dir() else [match])
        return str(at.resolve() if len(matches) == 1 and matches[0] == at else at)

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, str):
            return local(value, key)
        if isinstance(value, list):
            return [walk(v, key) for v in value]
        return {k: walk(v, f"{key}.{k}") for k, v in value.items()} if isinstance(value, dict) else value

    for name in ("data_files", "data_dir"):
        if kwargs.get(name):
            kwargs[name] = walk(kwargs[name], f"dataset_kwargs.{name}")
    where = config.get("dataset_path")
    if isinstance(where, str) and where.startswith(("./", "../")):
        config["dataset_path"] = local(where, "dataset_path")
    return config, found


def file_hash(path: Path) -> str:
    """SHA-256 of a file; of a large one it is kept by path, size and time, so that planning stays fast."""
    stat = path.stat()
    if stat.st_size < 8 << 20:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    note = cache_root() / "files" / f"{digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns])}.txt"
    try:
        return note.read_text()
    except OSError:
        pass
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found)
    except OSError:
        pass
    return found
