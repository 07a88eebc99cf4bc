"""Leases: which live run computes a key, on a store several runs share, without file locks.

A claim is a small file that its owner rewrites with a growing count. Whoever looks at it judges it dead when the count
has not moved for `ttl` seconds of the looker's own monotonic clock (clocks of two machines need not agree, and may be set
back), or at once when it names a process of this host that is gone. Two runs may in the worst case compute a key twice;
they can never mix, because each commit has a folder of its own.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid

import psutil

from .store import Store


class Leases:
    """Claims of one run on keys of a store."""

    def __init__(self, store: Store, ttl: float = 30.0):
        self.store, self.ttl = store, ttl
        self.owner = uuid.uuid4().hex
        self.count = 0
        self.held: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}
        self._process = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}

    def _folder(self, key: str) -> str:
        return self.store._path("leases", key)

    def _write(self, key: str) -> None:
        claim = {"owner": self.owner, "count": self.count, **self._process}
        self.store._write(f"{self._folder(key)}/{self.owner}.json", json.dumps(claim).encode())

    def _live(self, path: str) -> dict | None:
        try:
            claim = json.loads(self.store.fs.cat_file(path))
        except (FileNotFoundError, ValueError):
            return None
        if claim["host"] == self._process["host"] and not self._alive(claim):
            self._forget(path)
            return None
        count, since = self._seen.get(path, (None, 0.0))
        now = time.monotonic()
        if count != claim["count"]:
            self._seen[path] = (claim["count"], now)
            return claim
        if now - since > self.ttl:
            self._forget(path)
            return None
        return claim

    @staticmethod
    def _alive(claim: dict) -> bool:
        try:
            return abs(psutil.Process(claim["pid"]).create_time() - claim["started"]) < 2
        except psutil.Error:
            return False

    def _forget(self, path: str) -> None:
        try:
            self.store.fs.rm_file(path)
        except FileNotFoundError:
            pass

    def others(self, key: str) -> list[dict]:
        """Live claims of other runs on `key`."""
        self.store.fs.invalidate_cache()
        try:
            paths = self.store.fs.ls(self._folder(key), detail=False)
        except FileNotFoundError:
            return []
        claims = (self._live(p) for p in paths if self.owner not in p)
        return [c for c in claims if c]

    def claim(self, key: str) -> bool:
        """True when this run may compute `key`; False while another live run does."""
        if self.others(key):
            return False
        self._write(key)
        if any(c["owner"] < self.owner for c in self.others(key)):  # both claimed at once: the smaller name has it
            self._forget(f"{self._folder(key)}/{self.owner}.json")
            return False
        self.held.add(key)
        return True

    def beat(self) -> None:
        """Show that this run lives; call it every few seconds."""
        self.count += 1
        for key in self.held:
            self._write(key)

    def release(self, key: str) -> None:
        self.held.discard(key)
        self._forget(f"{self._folder(key)}/{self.owner}.json")

    def release_all(self) -> None:
        for key in list(self.held):
            self.release(key)
