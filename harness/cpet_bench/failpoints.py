"""Places where tests break this program on purpose: around everything that must survive a kill or a full disk.

`CPET_BENCH_FAILPOINT=NAME[@OF]:N:ACTION[:FILE]` acts at the N-th time this process passes NAME (about OF alone, as in
`store.manifest.before@tune`): `kill` sends it SIGKILL, `cut` halves first what was just written, `raise` raises the
OSError of a full disk. With FILE it happens once: where FILE is not there yet, which is then made. Several are separated
by commas. Unset, nothing happens.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

_WANTED = os.environ.get("CPET_BENCH_FAILPOINT", "")
_passed: dict[str, int] = {}


def failpoint(name: str, *, of: str = "", path: str | Path | None = None, since: int = 0) -> None:
    """Pass the place `name`. `path`: what was just written there, from byte `since` on."""
    for point in _WANTED.split(",") if _WANTED else ():
        _pass(point, name, of, path, since)


def _pass(point: str, name: str, of: str, path: str | Path | None, since: int) -> None:
    wanted, number, action, *file = point.split(":", 3)
    if wanted not in (name, f"{name}@{of}"):
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] != int(number):
        return
    if file:
        try:
            os.close(os.open(file[0], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if action == "raise":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path or name))
    if action == "cut" and path is not None:
        os.truncate(path, since + (os.path.getsize(path) - since) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
