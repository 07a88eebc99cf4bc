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

from .errors import StopError
from .store import Store


class Leases:
    """Claims of one run on keys of a store."""

    def __init__(self, store: Store, ttl: float = 30.0):
        self.store, self.ttl = store, ttl
        self.owner = uuid.uuid4().hex
        self.count = 0
        self.held: set[str] = set()
        self._seen: dict[str, tuple[int | None, float]] = {}
        self._process = {"host": _host(), "pid": os.getpid(), "started": _started(os.getpid())}

    def _path(self, key: str) -> str:
        return self.store._path("leases", f"{key}.{self.owner}.json")

    def _write(self, key: str) -> None:
        claim = {"owner": self.owner, "count": self.count, **self._process}
        self.store._write(self._path(key), json.dumps(claim).encode(), "lease")

    def _live(self, path: str) -> dict | None:
        try:
            claim = json.loads(self.store.fs.cat_file(path))
        except FileNotFoundError:
            return None
        except ValueError:  # torn by a kill, or being written: judged by whether it moves
            claim = {"owner": path.rsplit(".", 2)[-2], "count": None}
        if claim.get("host") == self._process["host"] and _started(claim["pid"]) != claim["started"]:
            self._forget(path)
            return None
        now = time.monotonic()
        count, since = self._seen.get(path, (None, None))
        if since is None or count != claim["count"]:
            self._seen[path] = (claim["count"], now)
            return claim
        if now - since > self.ttl:
            self._forget(path)
            return None
        return claim

    def _forget(self, path: str) -> None:
        self._seen.pop(path, None)
        try:
            self.store.fs.rm_file(path)
        except OSError:
            pass  # it is gone, or cannot be removed: then it is judged dead, as it no longer moves

    def others(self, key: str) -> list[dict]:
        """Live claims of other runs on `key`."""
        self.store.fs.invalidate_cache()
        try:
            paths = self.store.fs.ls(self.store._path("leases"), detail=False)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StopError(f"The store at {self.store.url} cannot be read: {error.strerror or error}.") from error
        names = {p: p.rsplit("/", 1)[-1] for p in paths}
        theirs = (p for p, n in names.items() if n.startswith(key + ".") and n.endswith(".json") and self.owner not in n)
        return [claim for claim in map(self._live, theirs) if claim]

    def claim(self, key: str) -> bool:
        """True when this run may compute `key`; False while another live run does."""
        if self.others(key):
            return False
        self._write(key)
        if any(c["owner"] < self.owner for c in self.others(key)):  # both claimed at once: the smaller name has it
            self._forget(self._path(key))
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
        self._forget(self._path(key))

    def release_all(self) -> None:
        for key in list(self.held):
            self.release(key)


def _host() -> str:
    """Where a process number means the same: this machine, and in a container this container."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> float | None:
    """When a process began, in a count that setting the clock does not change (ticks since boot, where there is /proc)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return float(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        return None if os.path.exists("/proc/self/stat") else psutil.Process(pid).create_time()
    except psutil.Error:
        return None
