"""`merge`: one run out of several, each record with the provenance it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cells import cell_id
from ..errors import InputError
from ..folders import count, write_json
from ..matrix import AXES
from ..records import is_vanilla, read_record
from . import files
from .validate import one_run, read_info, validate

RANK = ("done", "unsupported", "failed", "pending")  # which of two results of a cell is kept
OF_MATRIX = ("model", "compression", "pet", "restoring", "task", "seed", "train", "select", "prompt", "probes", "allow_code")
SHOWN = 10


class Source:
    """A run to merge."""

    def __init__(self, path: str | Path):
        self.folder = one_run(path)
        self.info, self.label = read_info(self.folder), str(path)
        self.hashes = files.read_manifest(self.folder)
        self.records = {p.stem: read_record(p) for p in sorted((self.folder / "records").glob("*.json"))}

    def named(self, name: str) -> bool:
        return name in (self.label, self.info["name"]) or Path(name).resolve() == self.folder.resolve()

    def outcome(self, cell: str) -> str | None:
        return self.hashes.get(f"outcomes/{cell}.parquet", {}).get("sha256")

    def origins(self) -> list[dict[str, Any]]:
        """Where its records come from: itself, or the runs it was merged of."""
        if "sources" in self.info:
            return self.info["sources"]
        fields = {k: self.info[k] for k in ("name", "device", "versions", "created", "finished")}
        return [{**fields, "cells": list(self.records)}]


def merge(runs: list[str | Path], out: str | Path, prefer: str | None = None) -> dict[str, int]:
    """The union of runs of one matrix, written to the new folder `out`. Returns cells by status.

    The matrix may have grown from run to run, by entries of its axes: the widest is kept, which has all entries of the
    others, and their first seed. A cell that several runs have is taken from the one that has it done; where the results are
    the same from the first. Records stay whole, so that a speed stands beside the device it was measured on.

    Args:
        prefer: the run (by name or path) that wins where results differ.

    Raises InputError for runs of different matrices, damaged ones, and (without `prefer`) cells whose results differ.
    """
    if len(runs) < 2:
        raise InputError("Merging takes at least two runs.")
    for path in runs:
        found = validate(path).faults
        if found:
            listed = "; ".join(f"{f.file}: {f.what}" for f in found[:3])
            raise InputError(f"{path} has faults (cpet-bench validate lists all): {listed}")
    sources = [Source(path) for path in runs]
    if prefer is not None:
        first = [s for s in sources if s.named(prefer)]
        if len(first) != 1:
            what = "names none" if not first else "names several"
            raise InputError(f"{prefer!r} {what} of the runs", key="--prefer", given=prefer, allowed=[s.label for s in sources])
        sources = first + [s for s in sources if s is not first[0]]
    widest = sources[0]
    for other in sources[1:]:
        if not _differing(other, widest) and _differing(widest, other):
            widest = other
    for other in sources:
        if names := _differing(widest, other):
            where = ", ".join(names[:SHOWN])
            plural = "s" * (len(names) == 1)
            raise InputError(f"{widest.label} and {other.label} are runs of different matrices: {where} differ{plural}")
    chosen = _choose(sources, prefer is not None)
    return _write(sources, chosen, Path(out), widest)


def pathless(value: Any) -> Any:
    """Settings without the places of files, which differ from machine to machine."""
    if isinstance(value, dict):
        return {k: None if k in ("include", "jsonl") and isinstance(v, str) else pathless(v) for k, v in value.items()}
    if isinstance(value, str) and value.startswith(("local:", "gguf:")):
        return value.partition(":")[0]
    return [pathless(v) for v in value] if isinstance(value, list) else value


def _differing(wide: Source, other: Source) -> list[str]:
    """Keys of the two matrices that differ, but for entries of an axis that only `wide` has: it may have grown."""
    mine, theirs = pathless(wide.info["matrix"]), pathless(other.info["matrix"])
    found = []
    for part in OF_MATRIX:
        x, y = mine.get(part), theirs.get(part)
        axis = part in AXES
        if x == y or (part == "seed" and x[0] == y[0] and set(y) <= set(x)):  # at the first one rates are chosen
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            keys = y if axis else dict.fromkeys([*x, *y])
            found += [f"{part}.{k}" for k in keys if x.get(k, ...) != y.get(k, ...)]
        else:
            found.append(part)
    return found


def _choose(sources: list[Source], preferring: bool) -> dict[str, Source]:
    """Cell → the run it is taken from."""
    chosen: dict[str, Source] = {}
    conflicts: dict[str, tuple[Source, Source]] = {}
    for source in sources:
        for cell, record in source.records.items():
            if cell not in chosen:
                chosen[cell] = source
                continue
            before = chosen[cell].records[cell]
            if RANK.index(record["status"]) < RANK.index(before["status"]):
                chosen[cell] = source
            elif record["status"] == before["status"] == "done" and not _equal(cell, chosen[cell], source):
                conflicts[cell] = (chosen[cell], source)
    if conflicts and not preferring:
        lines = [f"  {cell}: {a.label} and {b.label}{_values(cell, a, b)}" for cell, (a, b) in list(conflicts.items())[:SHOWN]]
        more = f"\n  and {len(conflicts) - SHOWN} more" if len(conflicts) > SHOWN else ""
        cells = "1 cell has" if len(conflicts) == 1 else f"{len(conflicts)} cells have"
        raise InputError(f"{cells} different results; say which run wins with --prefer:\n" + "\n".join(lines) + more)
    return chosen


def _equal(cell: str, a: Source, b: Source) -> bool:
    """The same metrics; and the same outcomes, whose hash a copy keeps."""
    return a.records[cell]["metrics"] == b.records[cell]["metrics"] and a.outcome(cell) == b.outcome(cell)


def _values(cell: str, a: Source, b: Source) -> str:
    name = a.records[cell]["primary"]
    x, y = (s.records[cell]["metrics"].get(name, {}).get("value") for s in (a, b))
    return f" ({name} {x:.6g} and {y:.6g})" if x is not None and y is not None else ""


def _write(sources: list[Source], chosen: dict[str, Source], out: Path, widest: Source) -> dict[str, int]:
    matrix = widest.info["matrix"]
    order = sorted(chosen, key=lambda cell: _place(chosen[cell].records[cell]["axes"], matrix))
    _same_files(sources)
    with files.staged(out) as fresh:
        for source in [*reversed(sources), widest]:  # the last one's copy of a file that several have stays
            names = [n for n in source.hashes if n == "matrix.yaml" or n.startswith("files/")]
            files.copy(source.folder, fresh, names)
        for cell in order:
            source = chosen[cell]
            record = source.records[cell] | {"run": out.name}
            record["references"] = references(record, matrix, set(order))
            write_json(fresh / "records" / f"{cell}.json", record)
            if record["status"] == "done":
                names = [f"outcomes/{cell}.parquet", f"losses/{cell}.parquet"]
                files.copy(source.folder, fresh, [name for name in names if name in source.hashes])
        write_json(fresh / "run.json", _info(sources, chosen, order, out.name, widest))
        files.write_manifest(fresh)
    return count({cell: chosen[cell].records[cell]["status"] for cell in order})


def _same_files(sources: list[Source]) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        for name in (n for n in source.hashes if n.startswith("files/")):
            other = seen.setdefault(name, source)
            if other.hashes[name]["sha256"] != source.hashes[name]["sha256"]:
                raise InputError(f"{other.label} and {source.label} were run with different files: {name}")


def _info(sources: list[Source], chosen: dict[str, Source], order: list[str], name: str, widest: Source) -> dict[str, Any]:
    """run.json of the merged run; `sources` says where each record comes from."""
    first, origins = sources[0].info, []
    for source in sources:
        mine = {cell for cell in order if chosen[cell] is source}
        for origin in source.origins():
            cells = [cell for cell in order if cell in mine and cell in origin["cells"]]
            if cells:
                origins.append({**origin, "cells": cells})
    outside = {tuple(e["key"]): e for s in reversed(sources) for e in s.info["outside"]}
    return {
        "schema": 1,
        "name": name,
        "matrix": {**widest.info["matrix"], "only": []},
        "matrix_text": widest.info["matrix_text"],
        "outside": list(outside.values()),
        "created": min(s.info["created"] for s in sources),
        "finished": max(s.info["finished"] for s in sources),
        "seconds": round(sum(s.info["seconds"] for s in sources), 1),
        "cells": order,
        "device": first["device"],
        "versions": first["versions"],
        "sources": origins,
    }


def _place(axes: dict[str, Any], matrix: dict[str, Any]) -> list[int]:
    """Where the cell stands in the matrix's order (see cells.expand)."""
    names = {axis: list(map(str, matrix[axis])) for axis in AXES}
    return [names[axis].index(str(v)) if str(v) in names[axis] else 0 for axis, v in axes.items()]


def references(record: dict[str, Any], matrix: dict[str, Any], ids: set[str]) -> dict[str, str | None]:
    """What recording.references says of a cell, from its record and the matrix as run.json has it."""

    def name(axis: str, test, otherwise: str) -> str:
        return next((n for n, v in matrix[axis].items() if test(v)), otherwise)

    none = name("compression", lambda chain: not chain, "none")
    plain = name("restoring", is_vanilla, "vanilla")
    untuned = {"pet": name("pet", lambda pet: pet is None, "none"), "restoring": "none", "seed": matrix["seed"][0]}
    axes, settings = record["axes"], record["settings"]
    tuned, restoring = settings.get("pet") is not None, settings.get("restoring") or {}

    def at(**changed: Any) -> str | None:
        other = cell_id({**axes, **changed})
        return other if other in ids and other != record["id"] else None

    return {
        "dense": at(compression=none, **untuned),
        "untuned": at(**untuned),
        "dense_pet": at(compression=none, restoring=plain) if tuned else None,
        "vanilla": at(restoring=plain) if tuned and settings["compression"] else None,
        "control_of": at(restoring=restoring["of"]) if tuned and restoring.get("control") else None,
    }
