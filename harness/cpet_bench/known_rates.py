"""Rates that an earlier run chose, taken from its records: more seeds need no trials again, on any machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError
from .keys import version
from .plan import Plan
from .records import read_record, run_folders
from .store import Store


def known_rates(plan: Plan, folders: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Key of a `rate` step → its facts, for each choice of the plan that a record in `folders` states.

    A record states a choice of this plan where the choice has the same key in both: the same candidates, data, settings,
    code and versions of packages. What it was computed on may differ.

    Raises InputError where a folder holds no run, a record is damaged or names a candidate there is not, and for a folder
    none of whose choices is one of this plan.
    """
    steps = {step.needs["select"]: step for step in plan.steps.values() if step.kind == "rate"}
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        stated = list(_stated(folder))
        mine = [(path, record) for path, record in stated if record["provenance"]["keys"].get("tune") in steps]
        if not mine:
            raise InputError(_none_fits(folder, plan, bool(steps), stated), key="--rates")
        for path, record in mine:
            key = record["provenance"]["keys"]["tune"]
            selection = record["training"]["selection"]
            chosen = selection.get("chosen")
            if chosen not in plan.steps[key].settings["grid"]:
                message = f"it states a choice that is none of the candidates: {chosen}"
                raise InputError(message, file=path, key="training.selection.chosen")
            origin = {"run": record["run"], "cell": record["id"], "created": record["provenance"]["created"]}
            found.setdefault(steps[key].key, {"selection": {**selection, "taken_from": origin}})
    return found


def keep(store: Store, plan: Plan, known: dict[str, dict[str, Any]]) -> None:
    """Put facts of `rate` steps into the store, as if the steps had run."""
    for key, facts in known.items():
        if store.has(key):
            continue
        step = plan.steps[key]
        with tempfile.TemporaryDirectory() as empty:
            origin = facts["selection"]["taken_from"]
            made = {"identity": step.identity(), "label": step.label, "machine": None, "taken_from": origin}
            costs = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_memory": 0, "work": step.work}
            store.commit(key, step.kind, Path(empty), facts=facts, costs=costs, made=made)


def _stated(folder: str | Path):
    """(path, record) of each cell that is the one its rate was chosen at."""
    for run in run_folders(folder):
        for path in sorted((run / "records").glob("*.json")):
            record = read_record(path)
            if record["status"] == "done" and isinstance((record["training"] or {}).get("selection"), dict):
                yield path, record


def _none_fits(folder: str | Path, plan: Plan, asked: bool, stated: list[tuple[Path, dict[str, Any]]]) -> str:
    if not asked:
        return "no rate of these cells was chosen at another seed, so there is none to take (see select: in the matrix)"
    if not stated:
        return f"no record in {folder} states a rate that was chosen"
    mine = {cell.first.id for cell in plan.cells if cell.select}
    same = next((record for _, record in stated if record["id"] in mine), None)
    if same is None:
        return f"no record in {folder} is of a cell whose rate is wanted here, such as {min(mine)}"
    theirs = same["provenance"]["versions"]
    others = {name: found for name, found in theirs.items() if name != "python" and version(name) != found}
    differ = [f"{name} {found} there and {version(name)} here" for name, found in others.items()]
    why = f" ({', '.join(differ)})" if differ else "; `cpet-bench plan` shows the settings of this one"
    return f"the choices in {folder} were made with other settings, data, code or packages: {same['id']} has another key{why}"
