"""From run folders to the page: read, arrange, render, write."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cpet_bench import __version__
from cpet_bench.errors import InputError, StopError
from cpet_bench.machines import labels
from cpet_bench.records import read_records, run_folders

from . import charts, paired, payload, view

WINDOW = 300  # rows of a table that are laid out before "show all" is pressed, where a script runs
MANY = 1000  # cells from which loss curves are kept coarser


def build(runs: list[Path], out: Path) -> Path:
    """Write the page of one or more run folders (or folders of them) to `out` and return it.

    The same records give the same bytes. Raises InputError where a run is missing or has no records, StopError where
    `out` cannot be written.
    """
    found = read_runs([Path(r) for r in runs])
    text = render(found)
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; name the file of the page.", key="--output")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(out.name + ".new")
        fresh.write_text(text, encoding="utf-8", newline="\n")
        os.replace(fresh, out)
    except OSError as error:
        raise StopError(f"Cannot write {out}: {error.strerror or error}.") from error
    return out


def read_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """Each run as {name, info, records}: info is its run.json ({} where it is not there yet)."""
    if not folders:
        raise InputError("Name at least one run.")
    found: list[dict[str, Any]] = []
    names: Counter[str] = Counter()
    for folder in dict.fromkeys(inner.resolve() for path in folders for inner in run_folders(path)):
        records = read_records(folder)
        if not records:
            raise InputError(f"{folder} has no records yet.", given=str(folder))
        name = str(records[0]["run"])
        names[name] += 1
        name += f" ({names[name]})" if names[name] > 1 else ""
        found.append({"name": name, "info": _info(folder), "records": records, "folder": folder})
    return found


def _info(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "run.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"This is no run.json: {error}.", file=folder / "run.json") from error


def entries_of(runs: list[dict[str, Any]]) -> list[view.Entry]:
    """Every cell, with the record of the D it is compared with and the interval of its gap to it."""
    found, outcomes = [], paired.Outcomes()
    for run in runs:
        by_id = {r["id"]: r for r in run["records"]}
        for record in run["records"]:
            entry = view.Entry(record, run["name"])
            dense = by_id.get(record["references"]["dense_pet"])
            if dense and dense["status"] == "done":
                entry.dense_pet = dense
                if entry.gap() is not None:
                    entry.gap_ends = outcomes.gap(run["folder"], record, dense)
            found.append(entry)
    named = labels([e.record for e in found])
    for entry, label in zip(found, named, strict=True):
        entry.machine = label if len(set(named)) > 1 else ""
    return found


def render(runs: list[dict[str, Any]]) -> str:
    """The page as text."""
    entries = entries_of(runs)
    tables = view.tables(entries)
    context = {
        "title": ", ".join(run["name"] for run in runs),
        "version": __version__,
        "counts": [(s, n) for s in view.STATUSES if (n := sum(e.record["status"] == s for e in entries))],
        "tables": tables,
        "filters": _filters(entries),
        "runs": runs,
        "total": len(entries),
        "facts": _facts(entries),
        "seeds": sorted({e.axis("seed") for e in entries if "seed" in e.record["axes"]}),
        "data": Markup(payload.script_json(_data(tables))),
        "view": view,
        "window": WINDOW,
        "charts": charts,
    }
    loader = PackageLoader("cpet_leaderboard")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    for name in ("css", "js"):
        source = loader.get_source(env, f"page.{name}")[0].replace("\r\n", "\n")
        context[name] = Markup(source)
        context[f"{name}_hash"] = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return env.get_template("page.html").render(context)


def _data(tables: list[view.Table]) -> dict[str, Any]:
    pool = payload.Pool()
    entries = [e for t in tables for e in t.entries]
    rows: dict[str, dict[str, int]] = {}
    for e in entries:
        rows.setdefault(e.run, {})[e.record["id"]] = e.row
    most = payload.POINTS if len(entries) <= MANY else payload.POINTS // 3
    cells = [payload.cell(e, pool, rows[e.run], most) for e in entries]
    return {"tables": [{"ranks": t.ranks} for t in tables], "cells": cells, "pool": pool.parts}


def _filters(entries: list[view.Entry]) -> list[dict[str, Any]]:
    """Axes with more than one value, and the status, each with its values in their order of appearance."""
    found = []
    for name in view.axis_names(entries):
        values = list(dict.fromkeys(e.axis(name) for e in entries))
        if len(values) > 1:
            found.append({"name": name, "label": {"pet": "PET"}.get(name, name), "values": values})
    statuses = [s for s in view.STATUSES if any(e.record["status"] == s for e in entries)]
    if len(statuses) > 1:
        found.append({"name": "status", "label": "status", "values": statuses})
    return found


def _facts(entries: list[view.Entry]) -> dict[str, Any]:
    """Devices, versions and commits the records were made with (each distinct one), and how intervals were made."""
    devices, versions, commits, how, levels, simulated = [], [], [], [], [], []
    for e in entries:
        origin = e.record.get("provenance") or {}
        device = origin.get("device") or {}
        cores = f"{device['cores']} cores" if device.get("cores") else None
        parts = [device.get("name"), device.get("device"), cores, device.get("dtype"), device.get("system")]
        devices.append(", ".join(str(p) for p in parts if p))
        versions.append(", ".join(f"{k} {v}" for k, v in (origin.get("versions") or {}).items() if v))
        commits.append(origin.get("commit"))
        for m in (e.record.get("metrics") or {}).values():
            how.append(m.get("interval"))
            levels.append(m.get("level"))
        simulated.extend(e.record.get("simulated") or [])

    def distinct(found):
        return [x for x in dict.fromkeys(found) if x]

    return {
        "devices": distinct(devices),
        "versions": distinct(versions),
        "commits": distinct(commits),
        "how": distinct(how),
        "levels": distinct(levels) or [0.95],
        "simulated": sorted(set(simulated)),
        "at_the_edge": any(view.at_the_edge(e) for e in entries),
    }
