"""Content keys: the name under which a step's result is kept, from everything that shapes it and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from pydantic import BaseModel


def plain(value: Any) -> Any:
    """`value` as JSON's own types: models become dicts, tuples lists, keys strings."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json", by_alias=True))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def canonical(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. `nan` and infinities are refused by ValueError."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """32 hex digits of the SHA-256 of the canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Fixed:
    """A value as JSON's own types with its digest, so that what many steps share is hashed once."""

    value: dict[str, Any]
    digest: str


def fixed(value: Any) -> Fixed:
    found = plain(value)
    return Fixed(found, digest(found))


@cache
def version(package: str) -> str:
    """Installed version without its local part (`2.13.0+cpu` is `2.13.0`), or `absent`."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return "absent"


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: version(name) for name in sorted(set(packages))}
