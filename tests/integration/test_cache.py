"""`cpet-bench cache`: every fault is found, by `verify` and at use; quota, pins, least recently used first."""

import os
import random
import shutil
from pathlib import Path

import pytest

from conftest import SMOKE
from cpet_bench.events import read_events
from cpet_bench.leases import Leases
from cpet_bench.steps import KINDS
from cpet_bench.store import Store

USED = set(KINDS) - {"trial", "select", "rate"}  # the smoke run has its rates given; test_select_run has those


@pytest.fixture
def copied(smoke, cli):
    """The store and the results of the undisturbed smoke run, to be damaged."""
    shutil.copytree(smoke.cli.folder / "store", cli.folder / "store")
    shutil.copytree(smoke.cli.folder / "runs", cli.folder / "runs")
    return Store(cli.env["CPET_BENCH_STORE"])


def manifests(store: Store) -> dict:
    found = Store(store.url)
    return {key: found.manifest(key) for key in found.keys() if found.manifest(key)}


def damage(path: Path, rng: random.Random) -> str:
    """Flip a bit of a file, or cut its tail off; returns what was done."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        at = rng.randrange(len(data))
        data = data[:at]
        what = f"cut to {at} bytes"
    else:
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        what = f"bit {bit} of byte {at} flipped"
    path.unlink()
    path.write_bytes(data)
    return f"{path.name}: {what}"


def test_verify_finds_a_hundred_of_a_hundred_faults(copied):
    rng, root = random.Random(1), Path(copied.root, "objects")
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size)
    there = manifests(copied)
    kind = {path: there[path.relative_to(root).parts[1]].kind for path in files}
    kinds = set(kind.values())
    one_of_each = [rng.choice([path for path in files if kind[path] == name]) for name in sorted(kinds)]
    for number, path in enumerate([*one_of_each, *rng.choices(files, k=100 - len(kinds))]):
        key = path.relative_to(root).parts[1]
        whole = path.read_bytes()
        what = damage(path, rng)
        assert Store(copied.url).faults(key), (number, what)
        path.write_bytes(whole)
        assert not Store(copied.url).faults(key)
    assert kinds == USED


def test_verify_on_the_command_line(copied, cli):
    rng, root = random.Random(2), Path(copied.root, "objects")
    assert cli("cache", "verify").returncode == 0
    keys = rng.sample(sorted(copied.keys()), 6)
    for key in keys:
        files = sorted(p for p in (root / key[:2] / key).rglob("*") if p.is_file() and p.stat().st_size)
        damage(rng.choice(files), rng)
    unfinished = root / "ab" / ("ab" * 16) / "123456789abc"  # a commit that was killed before its manifest
    unfinished.mkdir(parents=True)
    (unfinished / "part").write_bytes(b"x" * 1000)
    done = cli("cache", "verify")
    assert done.returncode == 1 and f"{len(manifests(copied)) + 6} artifacts looked at, 6 damaged; 1 unfinished" in done.stdout
    assert all(f"{key}: " in done.stdout for key in keys)
    assert cli("cache", "verify").returncode == 0 and not manifests(copied).keys() & set(keys)
    held = Leases(copied)
    assert held.claim("ab" * 16)  # someone computes it now: it is left alone
    assert "half done" not in cli("cache", "prune").stdout and unfinished.exists()
    held.release_all()
    assert "half done" in cli("cache", "prune").stdout and not unfinished.parent.exists()


@pytest.mark.slow
def test_use_finds_the_damage_of_each_kind_and_makes_it_again(copied, cli, smoke):
    """An artifact of each kind is damaged and what was made of it taken away: the run finds it, says so and mends it."""
    before, hurt, gone = manifests(copied), {}, set()
    cell = "tiny--wanda24--lora--cpet-eora--smoke_sentiment--s0"
    keys = smoke.records[cell]["provenance"]["keys"]
    chain, stack = [], list(keys.values())
    while stack:
        key = stack.pop()
        if key not in chain:
            chain.append(key)
            stack.extend(before[key].made["identity"]["needs"].values())
    for key in chain:
        hurt.setdefault(before[key].kind, key)
    assert set(hurt) == USED
    rng = random.Random(3)
    for kind, key in hurt.items():
        folder = Path(copied._object(key), before[key].folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        damage(rng.choice(files) if files else folder.parent / "manifest.json", rng)
        for user, manifest in before.items():
            if key in manifest.made["identity"]["needs"].values() and user not in hurt.values():
                gone.add(user)
        assert kind != "probe" or not files  # a probe is its manifest
    for key in gone:
        copied.drop(key)
    shutil.rmtree(cli.folder / "runs")
    words = ("--no-page", "--only", "compression=wanda24", "--only", "restoring=cpet-eora")
    done = cli("run", SMOKE, *words)
    assert done.returncode == 0, done.stderr
    events = read_events(cli.folder / "runs/smoke/events.jsonl")
    reported = {e["key"] for e in events if e["event"] == "damaged"}
    assert set(hurt.values()) <= reported, {k: v for k, v in hurt.items() if v not in reported}
    now = manifests(copied)
    assert all(now[key].folder != before[key].folder for key in hurt.values())
    assert cli.records()[cell]["metrics"] == smoke.records[cell]["metrics"]
    verified = cli("cache", "verify")
    assert verified.returncode == 0, verified.stdout


def test_prune_keeps_pins_and_drops_the_least_recently_used_first(copied, cli):
    before = manifests(copied)
    total = sum(m.bytes for m in before.values())
    by_size = sorted(before, key=lambda k: before[k].bytes)
    pinned, old, young = by_size[-1], by_size[-2], by_size[-3]
    times = {pinned: 1000, old: 2000, young: 3000}
    for key in before:
        os.utime(copied._object(key) + "/manifest.json", (t := times.get(key, 10_000), t))
    wrong = cli("cache", "pin", "zz")
    assert wrong.returncode == 2 and "begins with 'zz'" in wrong.stderr and "Allowed: " in wrong.stderr
    assert cli("cache", "pin", pinned[:12]).returncode == 0
    listed = cli("cache", "ls").stdout
    assert f"{pinned} " in listed and [x for x in listed.splitlines() if x.startswith(pinned)][0].endswith("pinned")
    done = cli("cache", "prune", "--quota", str(total - 1))
    assert done.returncode == 0 and f"dropped {old}" in done.stdout and f"dropped {young}" not in done.stdout
    assert f"{total / 2**20:,.1f} MiB before, {(total - before[old].bytes) / 2**20:,.1f} MiB after" in done.stdout
    assert cli("cache", "prune", "--quota", "0").returncode == 0
    assert list(manifests(copied)) == [pinned]
    assert cli("cache", "unpin", pinned).returncode == 0 and cli("cache", "prune", "--quota", "0").returncode == 0
    assert not manifests(copied)
    wrong = cli("cache", "prune", "--quota", "much")
    assert wrong.returncode == 2 and "no size" in wrong.stderr
    wrong = cli("cache", "pin", "zz")
    assert wrong.returncode == 2 and "store is empty" in wrong.stderr


def test_a_pruned_store_recomputes_what_is_needed_and_no_more(copied, cli, smoke):
    before = manifests(copied)
    kept = [k for k, m in before.items() if m.kind in ("model", "requests")]
    assert cli("cache", "pin", *kept).returncode == 0
    assert cli("cache", "prune", "--quota", "0").returncode == 0 and set(manifests(copied)) == set(kept)
    again = cli("run", SMOKE, "--no-page")  # every record is there
    assert again.returncode == 0 and "everything is in the store" in again.stderr and set(manifests(copied)) == set(kept)
    cell = "tiny--none--none--none--smoke_sentiment--s0"
    (cli.folder / f"runs/smoke/records/{cell}.json").unlink()
    done = cli("run", SMOKE, "--no-page", "--quota", "1")
    assert done.returncode == 0 and "dropped from the store for the quota" in done.stderr, done.stderr
    made = [e["kind"] for e in read_events(cli.folder / "runs/smoke/events.jsonl")[-40:] if e["event"] == "done"][-3:]
    assert sorted(made) == ["metrics", "probe", "responses"]
    assert set(manifests(copied)) == set(kept)  # the quota of the run: pins alone are left
    assert cli.records()[cell]["metrics"] == smoke.records[cell]["metrics"]
