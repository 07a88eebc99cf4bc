import json
import os
import random

import pytest

from cpet_bench.errors import StopError
from cpet_bench.leases import Leases
from cpet_bench.store import Damaged, Store


def commit(store, key, tmp_path, **files):
    out = tmp_path / f"out-{key}"
    out.mkdir()
    for name, text in files.items():
        (out / name).write_text(text)
    return store.commit(key, "model", out, facts={"n": 1}, costs={"seconds": 1.0}, made={})


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    url = str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}/store"
    return Store(url, scratch=tmp_path / "scratch")


def test_what_is_committed_comes_back(store, tmp_path):
    commit(store, "a" * 32, tmp_path, one="1", two="22")
    fresh = Store(store.url, scratch=tmp_path / "scratch")
    assert fresh.manifest("a" * 32).facts == {"n": 1}
    folder = fresh.materialise("a" * 32)
    assert (folder / "one").read_text() == "1" and (folder / "two").read_text() == "22"
    assert list(fresh.keys()) == ["a" * 32]


def test_nothing_is_there_before_the_manifest(store, tmp_path):
    commit(store, "a" * 32, tmp_path, one="1")
    store.fs.rm_file(store._object("a" * 32) + "/manifest.json")
    fresh = Store(store.url, scratch=tmp_path / "scratch")
    assert not fresh.has("a" * 32)
    with pytest.raises(Damaged):
        fresh.materialise("a" * 32)


def test_every_random_fault_is_found(tmp_path):
    store = Store(str(tmp_path / "store"))
    rng = random.Random(0)
    for i in range(100):
        key = f"{i:032x}"
        commit(store, key, tmp_path, data="x" * rng.randint(1, 3000), more="y")
        files = [p for p in (tmp_path / "store" / "objects" / key[:2] / key).rglob("*") if p.is_file()]
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        if rng.random() < 0.5 and len(data) > 1:
            data = data[: rng.randrange(len(data))]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        os.unlink(path)  # the file may be linked to its original
        path.write_bytes(data)
        fresh = Store(str(tmp_path / "store"))
        assert fresh.faults(key), (i, path)
        with pytest.raises(Damaged):
            fresh.materialise(key)
        assert not fresh.has(key)


def test_prune_drops_the_least_recently_used_and_keeps_pins(tmp_path):
    store = Store(str(tmp_path / "store"))
    for i, key in enumerate("abc"):
        commit(store, key * 32, tmp_path, data="x" * 100)
        os.utime(store._object(key * 32) + "/manifest.json", (i + 1, i + 1))
    store.pin("a" * 32)
    assert [m.key for m in store.prune(200)] == ["b" * 32]
    assert store.has("a" * 32) and store.has("c" * 32)
    store.pin("a" * 32, False)
    assert [m.key for m in store.prune(100)] == ["a" * 32]


def test_a_store_that_cannot_be_written_stops_with_one_message(tmp_path):
    (tmp_path / "store").write_text("a file stands where the store should be")
    with pytest.raises(StopError, match="cannot be written|Cannot write"):
        commit(Store(str(tmp_path / "store"), scratch=tmp_path / "s"), "a" * 32, tmp_path, one="1")


def test_one_claim_at_a_time(store):
    one, two = Leases(store), Leases(store)
    assert one.claim("k") and not two.claim("k")
    one.release("k")
    assert two.claim("k")


def test_a_silent_owner_elsewhere_loses_its_claim(store):
    one, two = Leases(store), Leases(store, ttl=0.05)
    one._process["host"] = "another-host"
    assert one.claim("k")
    assert not two.claim("k")
    one.beat()
    assert not two.claim("k")
    import time

    time.sleep(0.1)
    assert two.claim("k")


def test_a_dead_process_of_this_host_loses_its_claim_at_once(store):
    one, two = Leases(store), Leases(store)
    one._process["started"] -= 1000.0  # another process had this number before
    assert one.claim("k")
    assert two.claim("k")


def test_manifest_is_json_a_person_can_read(tmp_path):
    store = Store(str(tmp_path / "store"))
    commit(store, "a" * 32, tmp_path, one="1")
    body = json.loads((tmp_path / "store/objects/aa" / ("a" * 32) / "manifest.json").read_text())["manifest"]
    assert body["files"]["one"]["bytes"] == 1 and len(body["files"]["one"]["sha256"]) == 64
