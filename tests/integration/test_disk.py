"""Disks that fill or turn read-only, for real: small file systems in memory, mounted by the test (which root alone can)."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from conftest import SMOKE, Cli
from cpet_bench.store import Store

WORDS = ("--no-page", "--only", "compression=none", "--only", "restoring=none,vanilla")


def mount(*words: str | Path) -> bool:
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


@pytest.fixture
def disks(tmp_path):
    """Two folders, `store` and `runs`, each a file system of its own."""
    folders = [tmp_path / "store", tmp_path / "runs"]
    mounted = []
    for folder in folders:
        folder.mkdir()
        if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", folder):
            for done in mounted:
                subprocess.run(["umount", "-l", str(done)])
            pytest.skip("mounting a file system in memory needs root and a kernel that lets it")
        mounted.append(folder)
    yield folders
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def read_only(folder: Path, seconds: float = 20) -> bool:
    """Remount (this mount alone, as files that are removed but open do not hinder); refused while a file is being written."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if mount("-o", "remount,bind,ro", folder):
            return True
        time.sleep(0.005)
    return False


def made(store: Path) -> dict[str, str]:
    opened = Store(str(store))
    return {m.key: m.folder for m in map(opened.manifest, opened.keys()) if m}


def stopped(done, *words: str) -> None:
    """One clear message and exit 5."""
    assert done.returncode == 5, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("cpet-bench: ")]
    assert len(messages) == 1 and any(word in messages[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_full_and_read_only_disks(smoke, tmp_path, disks):
    store, runs = disks
    cli = Cli(tmp_path)
    assert mount("-o", "remount,ro", store)
    stopped(cli("run", SMOKE, *WORDS), "Read-only file system")
    assert mount("-o", "remount,rw,size=1100k", store)
    (store / "ballast").write_bytes(b"x" * 650_000)  # the model still fits, its weights are written once; not all the rest
    stopped(cli("run", SMOKE, *WORDS), "No space left on device")
    before = made(store)
    (store / "ballast").unlink()
    assert mount("-o", "remount,size=64m", store)

    # The store turns read-only while a run works on it.
    process = cli.start("run", SMOKE, *WORDS, "--json")
    for line in process.stdout:
        row = json.loads(line)
        if row["event"] == "done":
            assert read_only(store) and process.poll() is None
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 5 and err.count("cpet-bench: ") == 1 and "Read-only file system" in err, err
    assert "Traceback" not in err
    now = made(store)
    assert before.items() <= now.items() and len(now) > len(before)
    assert mount("-o", "remount,bind,rw", store)

    # The folder of results is full, then read-only.
    (runs / "ballast").write_bytes(b"x" * 10_000)
    assert mount("-o", "remount,size=128k", runs)
    with (runs / "ballast").open("ab", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    stopped(cli("run", SMOKE, *WORDS), "No space left on device")
    assert mount("-o", "remount,ro", runs)
    stopped(cli("run", SMOKE, *WORDS), "Read-only file system")
    assert mount("-o", "remount,rw,size=64m", runs)
    (runs / "ballast").unlink()

    done = cli("run", SMOKE, *WORDS)
    assert done.returncode == 0, done.stderr
    assert now.items() <= made(store).items()  # nothing that was finished was lost or made again
    records = cli.records()
    assert len(records) == 2
    for name, record in records.items():
        assert record["metrics"] == smoke.records[name]["metrics"]
    assert cli("cache", "verify").returncode == 0 and cli("validate", "runs/smoke").returncode == 0
