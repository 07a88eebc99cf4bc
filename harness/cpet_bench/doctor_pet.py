"""`doctor --pet`: which PET methods work on which layers, by trying; nothing heavy is loaded here, and findings are kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .devices import facts
from .doctor import tries
from .errors import InputError
from .pet import capability
from .pet.capability import CLASSES, PARTS
from .pet.catalogue import pet_methods
from .pet.own import plain_name

MODULE = "cpet_bench.doctor_pet_tries"


def examine(
    methods: Sequence[str] = (),
    classes: Sequence[str] = (),
    *,
    fresh: bool = False,
    told: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """The report: {"ok", "device", "versions", "platform", "classes", "cells"}; `ok` is whether any cell works.

    A cell is a PET method, a restoring (`vanilla`, `inherit`, `recover`, `distill`) and a class of layer, with its state, the
    reason (the exception) and whether it was known before. States: `ok`, `unsupported`, or `failed` where the process of the
    try was ended or silent for too long, which is not kept and tried again the next time.

    Args:
        methods, classes: those to try; all where none is named. fresh: try again what is kept.
        told: called with the class, and how many of how many of its cells are done.
    Raises: InputError for a method or class that there is not.
    """
    known = pet_methods()
    methods = [plain_name(m) for m in methods] or list(known)
    for given, allowed, key in ((methods, known, "--pet"), (classes, CLASSES, "--layer")):
        for word in given:
            if word not in allowed:
                what = "PET method" if key == "--pet" else "class of layer"
                raise InputError(f"There is no {what} {word!r}.", key=key, given=word, allowed=allowed)
    classes = list(classes) or list(CLASSES)
    device = next((d for d in facts()["devices"] if d != "cpu"), "cpu")
    kind = device.partition(":")[0]
    found = {} if fresh else capability.kept(kind)
    before = set(found)
    # a method of which anything is missing is tried whole: the other parts rest on what is tuned alone
    missing = {c: [m for m in methods if any(capability.name(c, m, p) not in found for p in PARTS)] for c in classes}

    def one(layer: str) -> dict[str, dict[str, Any]]:
        cells = [(method, part) for method in missing[layer] for part in PARTS]
        return _class(layer, cells, device, told) if cells else {}

    with ThreadPoolExecutor(2 if kind == "cpu" else 1) as pool:
        for layer, new in zip(classes, pool.map(one, classes), strict=True):
            capability.keep(kind, {key: row for key, row in new.items() if row["state"] != "failed"})
            found |= new
            before -= {capability.name(layer, m, p) for m in missing[layer] for p in PARTS}
    cells = [
        {"method": m, "restoring": p, "layer": c, **found[key], "cached": key in before}
        for m in methods
        for c in classes
        for p in PARTS
        for key in [capability.name(c, m, p)]
    ]
    return {
        "ok": any(cell["state"] == "ok" for cell in cells),
        **capability.stamp(kind),
        "device": device,
        "classes": {c: CLASSES[c].shown for c in classes},
        "cells": cells,
    }


def _class(layer: str, cells: list[tuple[str, str]], device: str, told) -> dict[str, dict[str, Any]]:
    """Findings for the cells of one class: tuned in one process, loaded again in another."""
    done = 0

    def each(row: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        told(layer, done, len(cells))

    with tempfile.TemporaryDirectory(prefix="cpet-doctor-") as temporary:
        folder = Path(temporary)
        (folder / "wanted.json").write_text(json.dumps({"device": device, "cells": cells}))
        tuned = _by_name(tries(f"tune {layer}", folder, module=MODULE, each=each))
        loaded = _by_name(tries(f"load {layer}", folder, module=MODULE))
    found = {}
    for method, part in cells:
        row = _of(tuned, method, part)
        if row["state"] == "ok":
            again = _of(loaded, method, part)
            row = {**(row if again["state"] == "ok" else again), "seconds": row["seconds"] + again["seconds"]}
        row = {"state": row["state"], "reason": row["reason"], "seconds": round(row["seconds"], 2)}
        found[capability.name(layer, method, part)] = row
    return found


def _by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def _of(rows: dict[str, dict[str, Any]], method: str, part: str) -> dict[str, Any]:
    """The row of a cell; where its process was given up before, the row that says so."""
    return rows.get(f"{method} {part}") or rows.get("(all others)") or rows["(all)"]
