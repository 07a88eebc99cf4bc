"""`cpet-bench cache ls|verify|prune|pin|unpin`."""

from __future__ import annotations

import argparse
import datetime
import re

from ..errors import InputError
from ..leases import Leases
from ..store import Manifest, Store

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["ls", "verify", "prune", "pin", "unpin"])
    parser.add_argument("keys", nargs="*", metavar="KEY", help="beginnings of keys, for verify, pin and unpin")
    parser.add_argument("--quota", default="20G", help="for prune: bytes to keep at most, as in 500M or 20G (default 20G)")
    parser.add_argument("--store", help="the store (default: the user's cache)")


def run(args: argparse.Namespace) -> int:
    store = Store(args.store)
    if args.action == "ls":
        return listing(store)
    if args.action == "verify":
        return verify(store, args.keys)
    if args.action == "prune":
        return prune(store, size(args.quota))
    for key in matching(store, args.keys):
        store.pin(key, args.action == "pin")
        print(f"{key} {args.action}ned")
    return 0


def size(text: str) -> int:
    """Bytes of `500M`, `20G`, `1000`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"{text!r} is no size; write one as 500M or 20G.", key="--quota")
    return int(float(found[1]) * UNITS[found[2].upper()])


def matching(store: Store, beginnings: list[str]) -> list[str]:
    keys = list(store.keys())
    if not beginnings:
        raise InputError("Name at least one key (see cpet-bench cache ls).")
    found = []
    for text in beginnings:
        hits = [k for k in keys if k.startswith(text)]
        if not hits:
            message = f"No artifact has a key that begins with {text[:80]!r}." if keys else "The store is empty."
            raise InputError(message, given=text, allowed=keys or None)
        found.extend(hits)
    return found


def human(number: float) -> str:
    return f"{number / 2**20:,.1f} MiB"


def named(manifest: Manifest) -> str:
    return f"{manifest.key}  {human(manifest.bytes):>12}  {manifest.made.get('label', manifest.kind)}"


def listing(store: Store) -> int:
    pins, total = store.pins(), 0
    for key in store.keys():
        manifest = store.manifest(key)
        if manifest is None:
            print(f"{key}  {'damaged' if key in store.broken else 'unfinished'}")
            continue
        total += manifest.bytes
        used = datetime.datetime.fromtimestamp(store.used(key)).isoformat(" ", "minutes")
        pin = " pinned" if key in pins else ""
        print(f"{key}  {human(manifest.bytes):>12}  {used}  {manifest.made.get('label', manifest.kind)}{pin}")
    print(f"{human(total)} in {store.url}")
    return 0


def verify(store: Store, beginnings: list[str]) -> int:
    keys = matching(store, beginnings) if beginnings else list(store.keys())
    leases, bad, unfinished = Leases(store), 0, 0
    for key in keys:
        if not store.has(key) and key not in store.broken:
            unfinished += 1  # a commit that was killed, or is going on; nothing takes it for whole
            continue
        faults = store.faults(key)
        if faults and not leases.others(key):
            bad += 1
            print(f"{key}: {'; '.join(faults)}; dropped, the next run makes it again")
            store.drop(key)
    print(f"{len(keys) - unfinished} artifacts looked at, {bad} damaged" + (f"; {unfinished} unfinished" if unfinished else ""))
    return 1 if bad else 0


def prune(store: Store, quota: int) -> int:
    before = sum(m.bytes for m in map(store.manifest, store.keys()) if m)
    swept = sweep(store)
    dropped = store.prune(quota)
    for manifest in dropped:
        print(f"dropped {named(manifest)}")
    if swept:
        print(f"dropped {human(swept)} that killed runs left half done")
    print(f"{human(before)} before, {human(before - sum(m.bytes for m in dropped))} after")
    return 0


def sweep(store: Store) -> int:
    """Remove what killed commits left, but for keys that a live run computes now; returns the bytes."""
    leases, size = Leases(store), 0
    store.tidy()
    for key in store.keys():
        left = store.leftovers(key)
        if left and not leases.others(key):
            size += sum(store.fs.du(path) for path in left)
            store.sweep(key)
    return size
