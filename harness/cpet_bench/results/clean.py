"""What is published tells nothing of the machine's folders and names: paths keep their last part."""

from __future__ import annotations

import platform
import re
import socket
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

UNIX = re.compile(r"(?<![\w./…])(?:~|\.\.)?(?:/[^\s/:'\"<>|(){}\[\],;]+){2,}/?")
WINDOWS = re.compile(r"(?<![\w])[A-Za-z]:(?:[\\/]+[^\s\\/:'\"<>|,;]+)+[\\/]?|\\\\(?:[^\s\\/:'\"<>|,;]+\\)+[^\s\\/:'\"<>|,;]*")
PACKAGES = re.compile(r"[\\/](?:site|dist)-packages[\\/]")


def without_paths(text: str) -> str:
    """Paths that are absolute or climb (`../`) become `…/` and their last part, or what is below site-packages."""
    if "/" not in text and "\\" not in text:
        return text
    text = text.replace("file:///", "file:/")
    home = str(Path.home())  # first: it may hold spaces
    if len(home) > 1:
        text = text.replace(home + "/", "~/h/").replace(home + "\\", "~/h/")
    return WINDOWS.sub(_last, UNIX.sub(_last, text))


def _last(match: re.Match[str]) -> str:
    whole = match.group().rstrip("/\\")
    inside = PACKAGES.split(whole)
    rest = inside[-1].replace("\\", "/") if len(inside) > 1 else re.split(r"[\\/]", whole)[-1]
    return f"…/{rest}"


@cache
def _hosts() -> re.Pattern[str] | None:
    names = {name for name in (socket.gethostname(), platform.node()) if len(name) > 2 and name != "localhost"}
    if not names:
        return None
    return re.compile(rf"(?<![\w-])(?:{'|'.join(re.escape(n) for n in sorted(names, key=len, reverse=True))})(?![\w-])")


def without_host(text: str) -> str:
    """This machine's own name becomes HOST."""
    pattern = _hosts()
    return pattern.sub("HOST", text) if pattern else text


def clean(value: Any, hosts: bool = False, skip: Iterable[str] = ()) -> Any:
    """A copy of JSON's types without paths (and this machine's name, where `hosts`); keys in `skip` stay as they are."""
    if isinstance(value, str):
        text = without_paths(value)
        return without_host(text) if hosts else text
    if isinstance(value, dict):
        return {k: v if k in skip else clean(v, hosts) for k, v in value.items()}
    return [clean(v, hosts) for v in value] if isinstance(value, list) else value


def clean_record(record: dict[str, Any]) -> dict[str, Any]:
    """A record as it is published. Identity and prompt texts are never touched."""
    found = clean(record, skip=("id", "axes", "references", "settings", "reason", "provenance", "primary"))
    found["settings"] = clean(record["settings"], skip=("prompt",))
    found["reason"] = clean(record["reason"], hosts=True)
    found["provenance"] = clean(record["provenance"], hosts=True)
    return found
