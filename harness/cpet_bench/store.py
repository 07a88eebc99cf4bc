"""The store: finished artifacts, a folder per content key, on a local disk or any file system fsspec knows.

An artifact is there when its manifest is: it lists every file with size and SHA-256, carries a hash of itself, and is
written last. Nothing relies on renaming, locking or memory-mapping of the store, so object stores will do. Files of one
commit stand in a folder of their own, so that two runs committing one key cannot mix.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import psutil

from .devices import cache_root
from .errors import CpetError, StopError
from .failpoints import failpoint
from .keys import digest

SCHEMA = 2
_HEAD, _HASH = b'{"manifest": ', b',\n"sha256": "'


class Damaged(CpetError):
    """An artifact that is not there, or not as it was written; it has been dropped and must be made again."""

    def __init__(self, key: str, reason: str):
        self.key = key
        super().__init__(f"artifact {key}: {reason}")


@dataclass(frozen=True)
class Manifest:
    """What an artifact is: its files (path → bytes, sha256), the facts its step reported, and how it was made."""

    key: str
    kind: str
    folder: str
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    costs: dict[str, Any]
    made: dict[str, Any]
    created: float

    @property
    def bytes(self) -> int:
        return sum(f["bytes"] for f in self.files.values())


def default_root() -> str:
    """$CPET_BENCH_STORE, else `cpet-bench/store` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.environ.get("CPET_BENCH_STORE") or str(Path(cache, "cpet-bench", "store").expanduser())


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def render(body: dict[str, Any]) -> bytes:
    """A manifest as JSON with the SHA-256 of its own bytes, so that no bit of the file can change unnoticed."""
    text = json.dumps(body, indent=1).encode()
    return _HEAD + text + _HASH + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def parse(raw: bytes) -> dict[str, Any]:
    """What `render` wrote; ValueError where a byte of it is not as written."""
    text, _, rest = raw.rpartition(_HASH)
    text = text[len(_HEAD) :]
    if raw != _HEAD + text + _HASH + rest or rest != hashlib.sha256(text).hexdigest().encode() + b'"}\n':
        raise ValueError("the manifest is not as it was written")
    return json.loads(text)


class Store:
    """Artifacts by key. `root` is a path or an fsspec URL; `scratch` a local folder for what is unfinished."""

    def __init__(self, root: str | None = None, scratch: Path | None = None):
        self.url = root or default_root()
        self.fs, self.root = fsspec.core.url_to_fs(self.url)
        self.local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        base = Path(self.root) if self.local else cache_root() / "remote" / digest(self.url)
        self.scratch_root = scratch or base / "scratch"
        self.mirror = None if self.local else base / "mirror"
        self._verified: set[tuple[str, str]] = set()
        self._manifests: dict[str, Manifest] = {}
        self.broken: set[str] = set()  # keys whose manifest was met and is not as it was written

    # -- reading -------------------------------------------------------------------------------------------------
    def _path(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def _object(self, key: str) -> str:
        return self._path("objects", key[:2], key)

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of `key`, or None where nothing whole is there. Sizes and hashes are not looked at here."""
        if key in self._manifests:
            return self._manifests[key]
        try:
            path = self._object(key) + "/manifest.json"
            raw = Path(path).read_bytes() if self.local else self.fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StopError(f"The store at {self.url} cannot be read: {error}.") from error
        try:
            body = parse(raw)
            if body.pop("schema") != SCHEMA:
                return None
            found = Manifest(**body)
        except (ValueError, KeyError, TypeError):
            self.broken.add(key)
            return None
        self._manifests[key] = found
        return found

    def has(self, key: str) -> bool:
        return self.manifest(key) is not None

    def keys(self) -> Iterator[str]:
        """Keys of everything that has a folder in the store, whole or not."""
        try:
            for folder in sorted(self.fs.ls(self._path("objects"), detail=False)):
                for path in sorted(self.fs.ls(folder, detail=False)):
                    yield path.rstrip("/").rsplit("/", 1)[-1]
        except FileNotFoundError:
            return

    def faults(self, key: str) -> list[str]:
        """What is wrong with the artifact's files (missing, other size, other hash); empty where all is well."""
        manifest = self.manifest(key)
        if manifest is None:
            return ["manifest.json: its content changed" if key in self.broken else "manifest.json: missing"]
        found = []
        for name, wanted in manifest.files.items():
            path = f"{self._object(key)}/{manifest.folder}/{name}"
            try:
                if self.fs.size(path) != wanted["bytes"]:
                    found.append(f"{name}: {self.fs.size(path)} bytes, {wanted['bytes']} written")
                    continue
                with self.fs.open(path, "rb") as f:
                    if hashlib.file_digest(f, "sha256").hexdigest() != wanted["sha256"]:
                        found.append(f"{name}: its content changed")
            except FileNotFoundError:
                found.append(f"{name}: missing")
            except OSError as error:
                if not self.local:  # the network, most likely: it says nothing about the file
                    raise StopError(f"The store at {self.url} cannot be read: {error}.") from error
                found.append(f"{name}: cannot be read ({error.strerror or error})")
        return found

    def materialise(self, key: str, verify: bool = True) -> Path:
        """A local folder with the artifact's files, checked against their hashes once per process.

        Raises Damaged where the key is absent or its files are not as written; it is dropped, to be made again."""
        self._manifests.pop(key, None)  # another process may have dropped or remade it since
        manifest = self.manifest(key)
        if manifest is None:
            raise Damaged(key, "not in the store")
        if "path" in manifest.facts and not Path(manifest.facts["path"]).exists():
            self.drop(key)
            raise Damaged(key, f"{manifest.facts['path']} is gone")
        if verify and (key, manifest.folder) not in self._verified:
            faults = self.faults(key)
            if faults:
                self.drop(key)
                raise Damaged(key, "; ".join(faults))
            self._verified.add((key, manifest.folder))
        self._touch(key)
        if self.local:
            folder = Path(self._object(key), manifest.folder)
            return Path(manifest.facts["path"]) if "path" in manifest.facts else folder
        folder = self.mirror / key / manifest.folder
        for name, wanted in manifest.files.items():
            target = folder / name
            if not target.exists() or target.stat().st_size != wanted["bytes"]:
                target.parent.mkdir(parents=True, exist_ok=True)
                self.fs.get_file(f"{self._object(key)}/{manifest.folder}/{name}", str(target))
        return Path(manifest.facts["path"]) if "path" in manifest.facts else folder

    # -- writing -------------------------------------------------------------------------------------------------
    def scratch(self, key: str) -> Path:
        """The local folder where `key`'s unfinished work is kept (checkpoints, responses so far)."""
        folder = self.scratch_root / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error
        return folder

    def out(self, key: str) -> Path:
        """A new empty folder in `key`'s scratch for the files of one attempt; what dead attempts left there is removed.

        Each attempt has its own: a run that slept through its lease must not write into what another one commits."""
        folder = self.scratch(key)
        for old in folder.glob("out-*"):
            pid = old.name.split("-")[1]
            if not (pid.isdigit() and psutil.pid_exists(int(pid))):
                shutil.rmtree(old, ignore_errors=True)
        try:
            (out := folder / f"out-{os.getpid()}-{uuid.uuid4().hex[:8]}").mkdir()
        except OSError as error:
            raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error
        return out

    def commit(self, key: str, kind: str, out: Path, *, facts: dict, costs: dict, made: dict) -> Manifest:
        """Keep the files of `out` under `key`; the manifest is written last. StopError where the disk will not."""
        folder = uuid.uuid4().hex[:12]
        files = {}
        try:
            failpoint("store.files.before", of=kind)
            for path in sorted(p for p in out.rglob("*") if p.is_file() and not p.is_symlink()):
                name = path.relative_to(out).as_posix()
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                self._put(path, f"{self._object(key)}/{folder}/{name}")
                failpoint("store.files.written", of=kind, path=f"{self._object(key)}/{folder}/{name}")
        except OSError as error:
            with suppress(OSError):  # what is half there would only fill the disk
                self.fs.rm(f"{self._object(key)}/{folder}", recursive=True)
            raise StopError(f"The store at {self.url} cannot be written: {error.strerror or error}.") from error
        body = {
            "schema": SCHEMA,
            "key": key,
            "kind": kind,
            "folder": folder,
            "files": files,
            "facts": facts,
            "costs": costs,
            "made": made,
            "created": time.time(),
        }
        body = json.loads(json.dumps(body, allow_nan=False, default=str))
        self._write(self._object(key) + "/manifest.json", render(body), "store.manifest", kind)
        shutil.rmtree(self.scratch_root / key, ignore_errors=True)
        body.pop("schema")
        self.broken.discard(key)
        self._manifests[key] = Manifest(**body)
        self._verified.add((key, folder))
        return self._manifests[key]

    def _put(self, path: Path, target: str) -> None:
        if not self.local:
            self._with_folder(target, lambda: self.fs.put_file(str(path), target))
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)  # saves a copy where the disk can; the manifest is what makes it whole
        except OSError:
            shutil.copyfile(path, target)
        with open(target, "rb") as f:
            os.fsync(f.fileno())

    def _with_folder(self, target: str, write) -> None:
        """Object stores have no folders; file systems (sftp, smb, ...) want them made first."""
        try:
            write()
        except FileNotFoundError:
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            write()

    def _write(self, target: str, data: bytes, what: str = "store.other", of: str = "") -> None:
        """Write a small file whole (object stores do, a local disk by renaming). StopError where the disk will not."""
        fresh = f"{target}.{os.getpid()}.new"
        try:
            failpoint(f"{what}.before", of=of)
            if self.local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                with open(fresh, "wb") as f:
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                failpoint(f"{what}.written", of=of, path=fresh)
                os.replace(fresh, target)
            else:
                self._with_folder(target, lambda: self.fs.pipe_file(target, data))
        except OSError as error:
            with suppress(OSError):
                os.unlink(fresh)
            raise StopError(f"The store at {self.url} cannot be written: {error.strerror or error}.") from error
        failpoint(f"{what}.after", of=of)

    # -- keeping house -------------------------------------------------------------------------------------------
    def drop(self, key: str) -> None:
        """Remove an artifact: the manifest first, so that a half-removed one is never taken for whole."""
        self._manifests.pop(key, None)
        self.broken.discard(key)
        try:
            path = self._object(key)
            if self.fs.exists(path + "/manifest.json"):
                self.fs.rm_file(path + "/manifest.json")
            if self.fs.exists(path):
                self.fs.rm(path, recursive=True)
        except OSError as error:
            raise StopError(f"The store at {self.url} cannot be written: {error.strerror or error}.") from error
        if self.mirror:
            shutil.rmtree(self.mirror / key, ignore_errors=True)

    def leftovers(self, key: str) -> list[str]:
        """Paths in `key`'s folder that its manifest does not name: what commits that were killed left there."""
        manifest = self.manifest(key)
        named = {"manifest.json", manifest.folder} if manifest else set()
        try:
            return [p for p in self.fs.ls(self._object(key), detail=False) if p.rstrip("/").rsplit("/", 1)[-1] not in named]
        except FileNotFoundError:
            return []

    def sweep(self, key: str) -> None:
        """Remove `key`'s leftovers."""
        for path in self.leftovers(key):
            with suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)
        if self.local and not self.has(key):
            with suppress(OSError):
                os.rmdir(self._object(key))

    def tidy(self) -> None:
        """Remove scratch of artifacts that are whole: of runs that were killed between the two."""
        for folder in self.scratch_root.glob("*"):
            if self.has(folder.name):
                shutil.rmtree(folder, ignore_errors=True)

    def _touch(self, key: str) -> None:
        if self.local:
            try:
                os.utime(self._object(key) + "/manifest.json")
            except OSError:
                pass  # a read-only store still reads; only the order of pruning suffers

    def used(self, key: str) -> float:
        """When the artifact was last used, in seconds since the epoch."""
        try:
            info = self.fs.info(self._object(key) + "/manifest.json")
        except FileNotFoundError:
            return 0.0
        when = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
        return when.timestamp() if hasattr(when, "timestamp") else float(when)

    def pin(self, key: str, pinned: bool = True) -> None:
        """Keep an artifact from `prune`, or let it go again."""
        path = self._path("pins", key)
        if pinned:
            self._write(path, b"")
        elif self.fs.exists(path):
            try:
                self.fs.rm_file(path)
            except OSError as error:
                raise StopError(f"The store at {self.url} cannot be written: {error.strerror or error}.") from error

    def pins(self) -> set[str]:
        try:
            return {n for p in self.fs.ls(self._path("pins"), detail=False) if "." not in (n := p.rsplit("/", 1)[-1])}
        except FileNotFoundError:
            return set()

    def prune(self, quota: int) -> list[Manifest]:
        """Drop least recently used, unpinned artifacts until at most `quota` bytes are left; returns those dropped."""
        found = [m for m in map(self.manifest, self.keys()) if m is not None]
        total, pins, dropped = sum(m.bytes for m in found), self.pins(), []
        for manifest in sorted(found, key=lambda m: self.used(m.key)):
            if total <= quota:
                break
            if manifest.key not in pins:
                self.drop(manifest.key)
                total -= manifest.bytes
                dropped.append(manifest)
        return dropped
