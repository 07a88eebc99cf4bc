"""SIGKILL of the runner, the worker and both, at any moment and around every kind of commit: nothing is lost or half taken."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from conftest import SMOKE, Cli
from cpet_bench.events import read_events
from cpet_bench.store import Store

VOLATILE = {"seconds", "cpu_seconds", "estimated_seconds", "peak_memory", "created", "commit", "steps_seconds"}


def stable(record: dict) -> dict:
    """A record without what two undisturbed runs differ in as well: times, memory, the speeds measured."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in VOLATILE}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return {k: strip(v) for k, v in record.items() if k not in ("probes", "costs")} | {"probes": sorted(record["probes"])}


class Trial:
    """Runs of the smoke matrix on one store, killed again and again."""

    def __init__(self, cli: Cli, *words: str):
        self.cli, self.words = cli, words
        self.made: dict[str, str] = {}  # key → folder of its commit, of everything that was whole at a kill
        self.process: subprocess.Popen | None = None

    def start(self, failpoints: str = "") -> None:
        env = {**self.cli.env, "CPET_BENCH_FAILPOINT": failpoints}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": (self.cli.folder / "stderr").open("a")}
        command = self.cli.command("run", SMOKE, "--no-page", *self.words)
        self.process = subprocess.Popen(command, env=env, cwd=self.cli.folder, **quiet)

    def worker(self) -> psutil.Process | None:
        try:
            found = psutil.Process(self.process.pid).children()
            return next((p for p in found if "cpet_bench.worker" in p.cmdline()), None)
        except psutil.Error:
            return None

    def kill(self, *who: str) -> None:
        worker = self.worker()
        if "runner" in who:
            self.process.kill()
        if "worker" in who and worker:
            worker.kill()
        if "runner" in who:
            self.process.wait()
            if worker:
                worker.wait(20)  # its input closed: it does not outlive the runner
            self.look()

    def look(self) -> None:
        """What was whole stays what it is."""
        store = Store(self.cli.env["CPET_BENCH_STORE"])
        now = {m.key: m.folder for m in map(store.manifest, store.keys()) if m}
        assert self.made.items() <= now.items(), "a finished step was computed again"
        self.made = now

    def events(self) -> list[dict]:
        return read_events(self.cli.folder / "runs/smoke/events.jsonl")

    def wait(self, test, seconds: float = 240) -> bool:
        """Until `test()`; False when the run ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if test():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.02)
        raise AssertionError("it never came to that: " + (self.cli.folder / "stderr").read_text()[-2000:])

    def finish(self, wanted: dict[str, dict]) -> None:
        """To the end, undisturbed: nothing lost, nothing computed twice, nothing half done taken for whole."""
        done = self.cli("run", SMOKE, "--no-page", *self.words, timeout=600)
        assert done.returncode == 0, done.stderr
        self.look()
        records = self.cli.records()
        assert {name: stable(r) for name, r in records.items()} == {name: stable(wanted[name]) for name in records}
        finished = [e["key"] for e in self.events() if e["event"] == "done"]
        assert len(finished) == len(set(finished))
        verified = self.cli("cache", "verify")
        assert verified.returncode == 0 and f"{len(self.made)} artifacts looked at, 0 damaged" in verified.stdout
        valid = self.cli("validate", "runs/smoke")
        assert valid.returncode == 0, valid.stdout + valid.stderr
        store = Path(self.cli.env["CPET_BENCH_STORE"])
        assert not list((store / "scratch").glob("*/out-*/*")), "unfinished work was left behind"

    def again(self) -> None:
        """Begin anew on an empty store."""
        for name in ("store", "runs"):
            shutil.rmtree(self.cli.folder / name, ignore_errors=True)
        self.made = {}


def test_three_kills(smoke, cli):
    """The worker amid a manifest, the runner amid a record, then both while a training runs."""
    trial = Trial(cli, "--only", "compression=none", "--only", "restoring=none,vanilla")
    first = cli.folder / "first"
    trial.start(f"store.manifest.written@responses:1:cut:{first},record.written:1:cut")
    trial.process.wait(200)
    assert trial.process.returncode == -signal.SIGKILL and first.exists()
    trial.look()
    assert [e["code"] for e in trial.events() if e["event"] == "worker-died"] == [-signal.SIGKILL]
    assert not cli.records() and list((cli.folder / "runs/smoke/records").iterdir())  # half a record is there, and is none
    trial.start()
    assert trial.wait(lambda: any(e["event"] == "start" and e["kind"] == "tune" for e in trial.events()))
    trial.kill("runner", "worker")
    trial.finish(smoke.records)
    assert len(cli.records()) == 2


# What is killed in the worker: around the commit of each kind of step, in the order in which the smoke matrix comes to them.
COMMITS = ("before:1:kill", "written:1:cut", "after:1:kill")
WORKER = ("checkpoint.written:2:cut", "checkpoint.after:1:kill", "responses.before:1:kill", "responses.written:1:cut")
RUNNER = (
    *("lease.before:2:kill", "lease.written:3:cut", "lease.after:2:kill", "events.before:6:kill", "events.written:7:cut"),
    *("history.written:2:cut", "outcomes.before:1:kill", "outcomes.written:1:cut", "record.before:1:kill"),
    *("record.written:1:cut", "record.after:1:kill", "run.written:1:cut", "plan.written:1:cut", "manifest.before:1:kill"),
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills(smoke, cli, tmp_path):
    """Every kind of commit and every kind of step, then moments drawn over an undisturbed run's time."""
    trial, rng, hits, kinds = Trial(cli), random.Random(0), 0, set()
    order = list(dict.fromkeys(e["kind"] for e in smoke.cli.events() if e["event"] == "done"))
    took = next(e["seconds"] for e in reversed(smoke.cli.events()) if e["event"] == "end")
    points = [("worker", f"store.manifest.{COMMITS[i % 3].replace(':', f'@{kind}:', 1)}") for i, kind in enumerate(order)]
    points += [("worker", f"store.files.written@{kind}:1:cut") for kind in ("tune", "metrics")]
    points += [("worker", point) for point in WORKER] + [("runner", point) for point in RUNNER]
    for who, point in points:
        once = tmp_path / point.replace(":", "-")
        for _ in range(2):  # where the store has all that would pass this point, on an empty one
            trial.start(f"{point}:{once}")
            hit = trial.wait(once.exists)
            if hit or once.exists():
                break
            trial.finish(smoke.records)
            trial.again()
        assert once.exists(), point
        hits += 1
        kinds.add(point.partition("@")[2].partition(":")[0])
        if who == "runner":
            trial.process.wait(60)
            assert trial.process.returncode == -signal.SIGKILL
            trial.look()
        else:
            time.sleep(rng.uniform(0, 0.5))
            hits += trial.process.poll() is None
            trial.kill("runner")
    assert set(order) <= kinds
    trial.finish(smoke.records)
    for who in [("runner",), ("worker",), ("runner", "worker")] * 4:
        if trial.process.poll() is not None:
            if rng.random() < 0.5:
                trial.again()
            trial.start()
        end = time.monotonic() + rng.uniform(0.3, took)
        if trial.wait(lambda end=end: time.monotonic() > end, took + 60):
            trial.kill(*who)
            hits += 1
        else:
            trial.finish(smoke.records)
            trial.again()
    if trial.process.poll() is None:
        trial.process.wait(600)
    assert hits >= 30, hits
    trial.finish(smoke.records)
    assert len(cli.records()) == len(smoke.records)


def test_a_worker_does_not_outlive_its_runner(cli):
    trial = Trial(cli, "--only", "compression=none", "--only", "restoring=none")
    trial.start()
    assert trial.wait(trial.worker)
    worker = trial.worker()
    os.kill(trial.process.pid, signal.SIGKILL)
    worker.wait(20)
    trial.process.wait()
