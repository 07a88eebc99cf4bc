"""`publish`: a run copied to where results are shared, without logs and without anything about the machine's folders."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..folders import write_json
from ..records import read_record
from ..yamlpos import parse
from . import files
from .clean import clean, clean_record, without_paths
from .standalone import dump, put
from .validate import one_run, read_info, validate

INDEX = "index.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
SHOWN = 10


@dataclass
class Published:
    """Where a run was published; fresh: whether anything had to be written."""

    folder: Path
    statuses: dict[str, int]
    fresh: bool


def publish(
    run: str | Path, to: str | Path = "results", *, name: str | None = None, partial: bool = False, force: bool = False
) -> Published:
    """Copy a run's records, outcomes, losses, run.json, matrix and small files to `to`/`name`, with a page; update the index.

    Args:
        partial: whether cells may be pending. force: whether a published run with other results may be replaced.

    Raises InputError for a run with faults, pending cells, or results that differ from what is published under the name.
    """
    folder, to = one_run(run), Path(to)
    report = validate(folder)
    if report.faults:
        listed = "\n".join(f"  {f.file}: {f.what}" for f in report.faults[:SHOWN])
        more = f"\n  and {len(report.faults) - SHOWN} more" if len(report.faults) > SHOWN else ""
        raise InputError(f"{run} is not published: cpet-bench validate finds faults in it:\n{listed}{more}")
    if report.statuses.get("pending") and not partial:
        raise InputError(f"{report.statuses['pending']} of {report.cells} cells are pending; publish them with --partial")
    info = read_info(folder)
    name = name or info["name"]
    if not NAME.fullmatch(name):
        raise InputError(f"a run cannot be named {name!r}: letters, digits and _ . + - only", key="--name")
    records = {p.stem: clean_record(read_record(p)) | {"run": name} for p in sorted((folder / "records").glob("*.json"))}
    target = to / name
    if target.resolve() == folder.resolve():
        raise InputError(f"{run} is where it would be published", key="--to")
    hashes = files.read_manifest(folder)
    if target.exists():
        lost = _differing(target, records, hashes)
        if lost is None:
            return Published(target, report.statuses, fresh=False)
        if lost and not force:
            cells = "\n".join(f"  {cell}" for cell in lost[:SHOWN])
            raise InputError(f"{target} has other results of {len(lost)} cells; --force replaces them:\n{cells}")
    with files.staged(target, replace=True) as fresh:
        files.copy(folder, fresh, [n for n in hashes if n.startswith(("outcomes/", "losses/", "files/"))])
        for cell, record in records.items():
            write_json(fresh / "records" / f"{cell}.json", record)
        info = _info(info, name)
        (fresh / "matrix.yaml").write_text(info["matrix_text"], encoding="utf-8")
        write_json(fresh / "run.json", info)
        files.write_manifest(fresh)
        from cpet_leaderboard import build

        build([fresh], fresh / "leaderboard.html")
    write_json(to / INDEX, index(to))
    return Published(target, report.statuses, fresh=True)


def _differing(target: Path, records: dict[str, Any], hashes: dict[str, Any]) -> list[str] | None:
    """Published cells that the new run lacks or has other results of; None where the whole is the same."""
    try:
        old_hashes = files.read_manifest(target)
        old = {p.stem: read_record(p) for p in sorted((target / "records").glob("*.json"))}
    except InputError:
        return [str(target)]  # damaged: nothing tells that it is the same

    def results(record: dict[str, Any], of: dict[str, Any]) -> tuple:
        outcome = of.get(f"outcomes/{record['id']}.parquet", {}).get("sha256")
        return record["status"], record["metrics"], record["probes"], outcome

    lost = [
        cell
        for cell, record in old.items()
        if record["status"] != "pending"
        and (cell not in records or results(records[cell], hashes) != results(record, old_hashes))
    ]
    return None if records == old else lost


def _info(info: dict[str, Any], name: str) -> dict[str, Any]:
    """run.json as it is published: what lay outside is named by where it would lie in the run's folder."""
    data = parse(info["matrix_text"], Path("matrix.yaml")).data
    outside = []
    for entry in info["outside"]:
        put(data, entry["key"], entry["place"])
        outside.append({k: v for k, v in entry.items() if k != "path"})
    text = without_paths(info["matrix_text"])
    if outside or parse(text, Path("matrix.yaml")).data != data:
        text = dump(data)
    found = clean(info, hosts=False, skip=("matrix", "matrix_text", "outside", "device", "sources"))
    return {
        **found,
        "name": name,
        "matrix": clean(info["matrix"], skip=("prompt",)),
        "matrix_text": text,
        "outside": outside,
        "device": clean(info["device"], hosts=True),
        **({"sources": clean(info["sources"], hosts=True)} if "sources" in info else {}),
        "published": {"from": info["name"], "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
    }


def index(to: Path) -> dict[str, Any]:
    """What is published in a folder, by name: date, devices, cells by status, versions. Damaged runs are named as such."""
    runs = []
    for folder in sorted(p.parent for p in to.glob("*/run.json")):
        if folder.name.startswith("."):
            continue
        try:
            info = read_info(folder)
            records = [read_record(p) for p in sorted((folder / "records").glob("*.json"))]
        except InputError as error:
            runs.append({"name": folder.name, "damaged": without_paths(error.message)})
            continue
        devices = [r["provenance"]["device"].get("name") for r in records]
        row = {"name": folder.name, "date": info.get("published", {}).get("date", info["finished"])}
        row |= {"matrix": info["matrix"].get("name"), "devices": [d for d in dict.fromkeys(devices) if d]}
        row |= {"cells": dict(Counter(r["status"] for r in records)), "versions": info["versions"]}
        runs.append(row)
    return {"schema": 1, "runs": runs}


def read_index(to: Path) -> dict[str, Any]:
    """The index of a folder of published runs; an empty one where there is none."""
    try:
        return json.loads((to / INDEX).read_text())
    except (OSError, ValueError):
        return {"schema": 1, "runs": []}
