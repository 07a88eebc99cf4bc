"""Leases under clocks that jump, torn claims and a second process; and the failpoints that the tests of kills use."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpet_bench import failpoints, leases
from cpet_bench.errors import StopError
from cpet_bench.events import Events, read_events
from cpet_bench.leases import Leases
from cpet_bench.store import Store, parse, render


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("jump", [-3600.0, -30 * 86400.0, 3600.0])
def test_a_clock_that_is_set_does_not_matter(store, monkeypatch, jump):
    """The wall clock and the boot time that the system derives from it jump; who lives and who is silent does not change."""
    wall, steady = Clock(), Clock()
    one, two = Leases(store), Leases(store)
    one._process["host"] = "another-host"
    assert one.claim("k")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    monkeypatch.setattr(leases.psutil.Process, "create_time", lambda self: wall() + jump)
    monkeypatch.setattr(time, "monotonic", steady)
    assert not two.claim("k")
    steady.now += two.ttl - 1
    one.beat()
    assert not two.claim("k")
    steady.now += two.ttl - 1
    assert not two.claim("k")  # it moved since it was last looked at
    steady.now += 2
    assert two.claim("k")


def test_a_live_process_keeps_its_claim_when_the_clock_is_set_back(store):
    """A real process holds the claim; what psutil calls its start moves with the clock, what we keep does not."""
    code = (
        "import sys; from cpet_bench.leases import Leases; from cpet_bench.store import Store\n"
        f"print(Leases(Store({store.url!r})).claim('k'), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "True"
        mine = Leases(store)
        assert not mine.claim("k")
        (claim,) = mine.others("k")
        assert claim["pid"] == process.pid and claim["started"] == leases._started(process.pid)
        process.kill()
        process.wait()
        assert mine.claim("k")
    finally:
        process.kill()
        process.communicate()


def test_a_torn_claim_counts_until_it_does_not_move(store, monkeypatch):
    steady = Clock()
    monkeypatch.setattr(time, "monotonic", steady)
    one, two = Leases(store), Leases(store)
    assert one.claim("k")
    path = Path(one._path("k"))
    path.write_bytes(path.read_bytes()[:20])
    assert not two.claim("k")
    steady.now += two.ttl + 1
    assert two.claim("k")


def test_claims_of_other_keys_and_half_written_ones_are_no_claims(store):
    one, two = Leases(store), Leases(store)
    assert one.claim("kk")
    Path(two._path("k")).with_suffix(".json.1.new").write_text("{")
    assert two.claim("k") and not two.claim("kk")
    one.release_all()
    two.release_all()
    assert not [n for n in os.listdir(store._path("leases")) if n.endswith(".json")]


def test_a_store_that_turns_read_only_stops_with_one_message_and_lets_go(store, monkeypatch):
    mine = Leases(store)
    assert mine.claim("k")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(store.fs, "rm_file", refuse)
    with pytest.raises(StopError, match="cannot be written: Read-only file system"):
        mine.beat()
    mine.release_all()  # an end is reached all the same
    assert not mine.held


def test_no_bit_of_a_manifest_can_change():
    raw = render({"schema": 2, "key": "k", "facts": {"x": 0.30000000000000004, "e": 1e-05, "t": "é\n"}, "files": {}})
    assert json.loads(raw)["manifest"] == parse(raw)
    for at in range(len(raw)):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            with pytest.raises(ValueError):
                parse(bytes(changed))
        with pytest.raises(ValueError):
            parse(raw[:at])


def test_an_event_log_cut_off_goes_on_with_a_line_of_its_own(tmp_path):
    path = tmp_path / "events.jsonl"
    log = Events(path)
    log.emit("one", n=1)
    log.emit("two", n=2)
    log.close()
    path.write_bytes(path.read_bytes()[:-9])
    log = Events(path)
    log.emit("three", n=3)
    log.close()
    assert [e["event"] for e in read_events(path)] == ["one", "three"]


def test_failpoints(tmp_path, monkeypatch):
    failpoints.failpoint("x")  # unset: nothing
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    code = "import sys; from cpet_bench.failpoints import failpoint as f; "
    code += "f('y'); f('x', of='b'); f('x', of='a', path=sys.argv[1])"

    def run(point):
        env = {**os.environ, "CPET_BENCH_FAILPOINT": point}
        return subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True)

    assert run("x:3:kill").returncode == 0 and run("x@c:1:kill").returncode == 0
    assert run("z:1:kill,x:2:kill").returncode == -9 and path.read_bytes() == b"0123456789"
    once = tmp_path / "once"
    assert run(f"x@a:1:cut:{once}").returncode == -9 and path.read_bytes() == b"01234"
    assert run(f"x@a:1:cut:{once}").returncode == 0
    assert "No space left" in run("x:1:raise").stderr
