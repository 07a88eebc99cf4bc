"""The files of a run that are kept and shared, their manifest with hashes, and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError, StopError
from ..keys import digest
from ..store import sha256_file

MANIFEST = "manifest.json"
SINGLE, FOLDERS = ("run.json", "matrix.yaml"), ("records", "outcomes", "losses", "files")


def kept_files(folder: Path) -> dict[str, int]:
    """Name (relative, with `/`) → bytes of each file that makes up a run: no logs, events, plans, pages or links."""
    found = {}
    paths = [folder / name for name in SINGLE]
    for name in FOLDERS:
        paths.extend(sorted((folder / name).rglob("*")))
    for path in paths:
        if path.is_file() and not path.is_symlink() and not path.name.endswith(".new"):
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def write_manifest(folder: Path) -> None:
    """List every kept file with size and SHA-256, and hash the list. Written last: it is what makes a run whole."""
    from ..folders import write_json

    try:
        files = {name: {"bytes": size, "sha256": sha256_file(folder / name)} for name, size in kept_files(folder).items()}
    except OSError as error:
        raise StopError(f"Cannot read {folder}: {error.strerror or error}.") from error
    write_json(folder / MANIFEST, {"schema": 1, "files": files, "sha256": digest(files)})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files as the manifest lists them. InputError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_bytes())
        files = found["files"]
        if found["sha256"] != digest(files) or not all(isinstance(f["bytes"], int) and f["sha256"] for f in files.values()):
            raise ValueError
        return files
    except FileNotFoundError:
        raise InputError("this run has no manifest; the end of `cpet-bench run` writes it", file=path) from None
    except OSError as error:
        raise InputError(f"the manifest cannot be read: {error.strerror or error}", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError("the manifest is damaged", file=path) from None


def is_current(folder: Path) -> bool:
    """Whether the manifest lists just the files that are there, by their sizes (nothing is read)."""
    try:
        listed = read_manifest(folder)
    except InputError:
        return False
    return {name: f["bytes"] for name, f in listed.items()} == kept_files(folder)


def faults(folder: Path) -> list[tuple[str, str]]:
    """(file, what is wrong with it) for all that is not as the manifest says."""
    try:
        listed = read_manifest(folder)
    except InputError as error:
        return [(MANIFEST, error.message)]
    there, found = kept_files(folder), []
    for name, wanted in listed.items():
        path, parts = folder / name, PurePosixPath(name).parts
        if not parts or ".." in parts or parts[0] not in (*SINGLE, *FOLDERS):
            found.append((MANIFEST, f"it lists {name!r}, which is no part of a run"))
        elif path.is_symlink():
            found.append((name, "it is a link"))
        elif name not in there:
            found.append((name, "it is missing"))
        elif there[name] != wanted["bytes"]:
            found.append((name, f"it has {there[name]} bytes, {wanted['bytes']} were written"))
        else:
            try:
                if sha256_file(path) != wanted["sha256"]:
                    found.append((name, "its content changed since it was written (SHA-256)"))
            except OSError as error:
                found.append((name, f"it cannot be read: {error.strerror or error}"))
    found += [(name, "the manifest does not list it") for name in there if name not in listed]
    return found


def copy(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files of a run by their names. StopError where the disk will not."""
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name, follow_symlinks=False)
    except OSError as error:
        raise StopError(f"Cannot copy {source} to {target}: {error.strerror or error}.") from error


@contextmanager
def staged(target: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end; on an error nothing of it is left.

    `replace`: whether `target` may be there already. Raises InputError where it is and may not, StopError for the disk.
    """
    if target.exists() and not replace:
        raise InputError(f"{target} is there already.")
    fresh, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise StopError(f"Cannot write {target}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
