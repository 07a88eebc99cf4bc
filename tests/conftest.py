"""What several test modules share: the command line in a process of its own, and small matrices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

import shared_run

if "PYTEST_XDIST_WORKER" in os.environ:  # several torch processes with all cores' threads each wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).parents[1]
SMOKE = REPO / "matrices/smoke.yaml"


class Cli:
    """`cpet-bench` in a folder of its own: runs/ and the store lie below it."""

    def __init__(self, folder: Path, **env: str):
        self.folder = folder
        self.env = {**os.environ, "CPET_BENCH_STORE": str(folder / "store"), "HF_HUB_OFFLINE": "1", **env}

    def command(self, *words: str | Path) -> list[str]:
        return [sys.executable, "-m", "cpet_bench.cli.main", *map(str, words)]

    def start(self, *words: str | Path, **more) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more}
        return subprocess.Popen(self.command(*words), env=self.env, cwd=self.folder, **pipes)

    def __call__(self, *words: str | Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*words),
            capture_output=True,
            text=True,
            env={**self.env, **env},
            cwd=self.folder,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    def records(self, run: str = "smoke") -> dict[str, dict]:
        return {p.stem: json.loads(p.read_text()) for p in sorted((self.folder / "runs" / run / "records").glob("*.json"))}

    def events(self, run: str = "smoke") -> list[dict]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "events.jsonl").read_text().splitlines()]

    def matrix(self, text: str, name: str = "matrix.yaml") -> Path:
        """A matrix file that extends the smoke matrix, unless it says what it extends."""
        path = self.folder / name
        path.write_text(text if "extends:" in text else f"extends: {SMOKE}\n{text}")
        return path


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Cli], dict]) -> tuple[Cli, dict]:
    """A folder in which `make` ran, once for all test processes: each has a copy of it, and what `make` returned."""
    common = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    first, said = common / f"{name}-first", common / f"{name}.json"
    with FileLock(common / f"{name}.lock"):
        if not said.exists():
            first.mkdir()
            said.write_text(json.dumps(make(Cli(first))))
    own = factory.mktemp(name)
    return Cli(shutil.copytree(first, own, dirs_exist_ok=True, symlinks=True)), json.loads(said.read_text())


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> SimpleNamespace:
    """One undisturbed run of the smoke matrix, for everything that only reads it (or copies what it changes)."""

    def make(cli: Cli) -> dict:
        done = cli("run", SMOKE)
        return {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}

    own, said = once(tmp_path_factory, "smoke", make)
    return SimpleNamespace(cli=own, done=SimpleNamespace(**said), folder=own.folder / "runs/smoke", records=own.records())


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> SimpleNamespace:
    """One real run of three cells, and its halves, computed from the same store."""

    def make(cli: Cli) -> dict:
        matrix = cli.matrix(shared_run.TEXT)
        done = cli("run", matrix)
        assert done.returncode == 0, done.stderr
        for name, only in (("half-a", "compression=none"), ("half-b", "compression=wanda24")):
            assert cli("run", matrix, "--only", only, "--name", name, "--no-page").returncode == 0
        return {}

    cli, _ = once(tmp_path_factory, "shared", make)
    runs = cli.folder / "runs"
    return SimpleNamespace(cli=cli, run=runs / "shared", a=runs / "half-a", b=runs / "half-b", records=cli.records("shared"))


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the run that a test may damage."""
    return shutil.copytree(made.run, tmp_path / "shared")
