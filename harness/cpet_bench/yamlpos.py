"""YAML read safely, with the line of every value: plain data, no tags, no code, bounded in size, depth and aliases.

Scalars are read as YAML 1.2's core schema reads them, so that `2:4`, `no` and `2026-11-24` stay text and `1e-3` is a number;
but for octal, hexadecimal, infinite and undefined numbers, which stay text: no setting has a use for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError

BYTES, NODES, DEPTH = 2 << 20, 200_000, 60
Path_ = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)


@dataclass
class Document:
    """data: what the file says. places: path of keys and indexes → (file, line counted from 1)."""

    data: Any
    places: dict[Path_, tuple[Path, int]] = field(default_factory=dict)

    def locate(self, path: Path_) -> tuple[Path | None, int | None]:
        """File and line of `path`, or of the nearest thing around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None, None


def read(path: Path) -> Document:
    """Read a YAML file. InputError (file, line) for whatever is wrong with it."""
    try:
        if path.stat().st_size > BYTES:
            raise InputError(f"the file has {path.stat().st_size} bytes; at most {BYTES} are read", file=path)
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror or error}", file=path) from None
    except (UnicodeDecodeError, ValueError):
        raise InputError("it is not UTF-8 text", file=path) from None
    return parse(text, path)


def parse(text: str, path: Path) -> Document:
    """The same for a text; `path` is what errors name."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(path, iter(yaml.parse(text, Loader=loader))).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"no valid YAML: {problem}", file=path, line=mark.line + 1 if mark else None) from None


def scalar(event: yaml.ScalarEvent) -> Any:
    """The value of a scalar: quoted and block ones are text."""
    text = event.value
    if event.style or not event.implicit[0]:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) <= 40 else text
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


class _Builder:
    """Builds data from events with a stack of its own, so that no nesting can exhaust Python's."""

    def __init__(self, path: Path, events: Iterator[yaml.Event]):
        self.path, self.events = path, events
        self.places: dict[Path_, tuple[Path, int]] = {(): (path, 1)}
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.nodes = 0

    def fail(self, message: str, event: yaml.Event, path: Path_ = ()) -> InputError:
        key = ".".join(map(str, path)) or None
        return InputError(message, file=self.path, line=event.start_mark.line + 1, key=key)

    def document(self) -> Document:
        found, seen = None, False
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if seen:
                    raise self.fail("one document is expected, and a second one begins here", event)
                seen = True
            elif isinstance(event, yaml.NodeEvent):
                found = self.node(event)
        return Document(found, self.places)

    def node(self, first: yaml.Event) -> Any:
        """The value that begins with event `first`. Containers under construction stand on `stack`."""
        stack: list[_Open] = []
        event = first
        while True:
            path = self.path_of(stack)
            if isinstance(event, (yaml.SequenceEndEvent, yaml.MappingEndEvent)):
                done = stack.pop()
                value, path = self.close(done), done.path
                if done.anchor:
                    self.anchors[done.anchor] = (value, self.nodes - done.before)
            else:
                self.count(event, path)
                tag = getattr(event, "tag", None)
                if tag and tag != "!":
                    raise self.fail(f"tags such as {tag} are not read", event, path)
                self.places.setdefault(path, (self.path, event.start_mark.line + 1))
                if isinstance(event, (yaml.SequenceStartEvent, yaml.MappingStartEvent)):
                    if len(stack) >= DEPTH:
                        raise self.fail(f"nested deeper than {DEPTH} levels", event)
                    if stack and stack[-1].wants_key:
                        raise self.fail("a key must be text", event, path)
                    is_map = isinstance(event, yaml.MappingStartEvent)
                    stack.append(_Open(path, event.anchor, self.nodes, {} if is_map else []))
                    event = next(self.events)
                    continue
                value = self.alias(event, path) if isinstance(event, yaml.AliasEvent) else scalar(event)
                if getattr(event, "anchor", None) and isinstance(event, yaml.ScalarEvent):
                    self.anchors[event.anchor] = (value, 1)
            if not stack:
                return value
            self.put(stack[-1], value, event)
            event = next(self.events)

    def path_of(self, stack: list[_Open]) -> Path_:
        if not stack:
            return ()
        top = stack[-1]
        if isinstance(top.value, list):
            return (*top.path, len(top.value))
        return top.path if top.wants_key else (*top.path, top.key)

    def count(self, event: yaml.Event, path: Path_, more: int = 1) -> None:
        self.nodes += more
        if self.nodes > NODES:
            raise self.fail(f"more than {NODES} values, aliases followed", event, path)

    def alias(self, event: yaml.AliasEvent, path: Path_) -> Any:
        if event.anchor not in self.anchors:
            raise self.fail(f"there is no anchor &{event.anchor} before this (or it holds itself)", event, path)
        value, size = self.anchors[event.anchor]
        self.count(event, path, size)
        return value

    def put(self, top: _Open, value: Any, event: yaml.Event) -> None:
        if isinstance(top.value, list):
            top.value.append(value)
        elif top.wants_key:
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise self.fail(f"a key must be text, not {value!r}", event, top.path)
            if value != "<<" and str(value) in top.value:
                raise self.fail("this key stands here twice", event, (*top.path, str(value)))
            top.key, top.wants_key = str(value), False
            self.places[(*top.path, top.key)] = (self.path, event.start_mark.line + 1)
        elif top.key == "<<":
            for base in value if isinstance(value, list) else [value]:
                if not isinstance(base, dict):
                    raise self.fail("`<<` merges mappings only", event, top.path)
                top.merged.append(base)
            top.wants_key = True
        else:
            top.value[top.key] = value
            top.wants_key = True

    def close(self, done: _Open) -> Any:
        if isinstance(done.value, dict):
            for base in done.merged:
                for key, value in base.items():
                    done.value.setdefault(key, value)
        return done.value


class _Open:
    """A container that is being read."""

    def __init__(self, path: Path_, anchor: str | None, before: int, value: dict | list):
        self.path, self.anchor, self.before, self.value = path, anchor, before, value
        self.key: str = ""
        self.wants_key = isinstance(value, dict)
        self.merged: list[dict] = []
