"""Two runs of one matrix at once on one store: each step is computed once, a dead run's steps are taken over."""

import json
import signal
import threading
import time

import pytest

from conftest import SMOKE, Cli
from cpet_bench.store import Store

WORDS = ("--no-page", "--json", "--only", "compression=none", "--only", "restoring=none,vanilla")


class Run:
    """A run whose events are collected as they come."""

    def __init__(self, cli: Cli, name: str, *words: str):
        self.name, self.events = name, []
        self.process = cli.start("run", SMOKE, "--runs", name, *WORDS, *words)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def seen(self, event: str, **fields) -> list[dict]:
        return [e for e in list(self.events) if e["event"] == event and fields.items() <= e.items()]

    def wait(self, test, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not test():
            assert time.monotonic() < end and self.process.poll() is None, (self.name, self.events[-3:], self.process.stderr)
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(300)
        self.reader.join()
        self.process.stderr.close()
        return code


def test_two_runs_share_their_work_and_a_dead_one_loses_none(smoke, cli):
    """The first is killed while it trains and the second waits for it; a third joins on the second's heels."""
    one = Run(cli, "one")
    one.wait(lambda: one.seen("start"))
    two = Run(cli, "two")
    two.wait(lambda: two.seen("waiting"))  # for what the first computes
    one.wait(lambda: one.seen("start", kind="tune"))
    store = Store(cli.env["CPET_BENCH_STORE"])
    one.process.send_signal(signal.SIGKILL)
    assert one.end() == -signal.SIGKILL
    made = {m.key: m.folder for m in map(store.manifest, store.keys()) if m}
    assert {e["key"] for e in one.seen("done")} <= made.keys()
    three = Run(cli, "three")
    assert two.end() == 0 and three.end() == 0
    done = [e["key"] for run in (one, two, three) for e in run.seen("done")]
    total = {m.key: m.folder for m in map(Store(store.url).manifest, store.keys()) if m}
    assert len(done) == len(set(done)) and made.items() <= total.items()
    assert len(total) == two.seen("run")[0]["steps"]
    # all but what the first had committed without having said so
    assert set(done) <= total.keys() and len(total) - len(done) <= 1
    assert two.seen("found")  # what another run made
    for name in ("two", "three"):
        paths = sorted((cli.folder / name / "smoke/records").glob("*.json"))
        records = {p.stem: json.loads(p.read_text()) for p in paths}
        assert len(records) == 2
        for key, record in records.items():
            assert record["metrics"] == smoke.records[key]["metrics"]


@pytest.mark.slow
def test_a_store_that_is_no_local_folder(smoke, cli):
    """Through a file system of fsspec's that is none of the local kind (every read and write goes through it): one run
    makes all, a second one in another process finds all."""
    url = f"dir::file://{cli.folder}/far"
    cli.env |= {"CPET_BENCH_CACHE": str(cli.folder / "cache")}
    words = ("--store", url, "--no-page", "--only", "compression=none", "--only", "restoring=none")
    done = cli("run", SMOKE, *words)
    assert done.returncode == 0, done.stderr
    (record,) = cli.records().values()
    assert record["metrics"] == smoke.records[record["id"]]["metrics"]
    again = cli("run", SMOKE, *words, "--runs", "again")
    assert again.returncode == 0 and "everything is in the store" in again.stderr
    assert "5 artifacts looked at, 0 damaged" in cli("cache", "verify", "--store", url).stdout
    assert not (cli.folder / "store").exists() and not Store(url).local
