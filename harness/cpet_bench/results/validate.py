"""`validate`: everything about a run's folder that is not as it should be, all of it listed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import loss_curves
from ..cells import cell_id
from ..errors import InputError
from ..folders import BESIDE
from ..records import read_outcomes, read_record, run_folders
from . import files, recompute

EXIT_FAULTS = 1


class RunInfo(BaseModel):
    """run.json, as far as others rely on it."""

    model_config = ConfigDict(extra="allow")
    schema_: int = Field(alias="schema", ge=1, le=1)
    name: str
    matrix: dict[str, Any]
    matrix_text: str
    created: str
    finished: str
    seconds: float
    cells: list[str]
    device: dict[str, Any]
    versions: dict[str, str]
    outside: list[dict[str, Any]]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong; `file` is relative to the run's folder."""

    file: str
    what: str


@dataclass
class Report:
    """What was looked at and found. unchecked: metrics that the outcomes alone do not give (id/metric)."""

    run: str
    cells: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return EXIT_FAULTS if self.faults else 0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


def one_run(path: str | Path) -> Path:
    """`path`, where it is the folder of one run. InputError where it is none, or holds several."""
    found = run_folders(path)
    if found[0] != Path(path):
        raise InputError(f"{path} holds several runs; name one", allowed=[str(f) for f in found])
    return Path(path)


def read_info(folder: Path) -> dict[str, Any]:
    """run.json, checked. InputError names the file, and the key that is wrong."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_bytes())
        RunInfo.model_validate(found)
        return found
    except FileNotFoundError:
        raise InputError("this run has no run.json; the end of `cpet-bench run` writes it", file=path) from None
    except OSError as error:
        raise InputError(f"it cannot be read: {error.strerror or error}", file=path) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or None
        raise InputError(f"this run.json is damaged, or of another version: {first['msg']}", file=path, key=key) from None
    except ValueError as error:
        raise InputError(f"this run.json is damaged: {error}", file=path) from None


def validate(path: str | Path) -> Report:
    """Check a run's folder: run.json, every record and its outcomes, ids, references, hashes.

    Raises InputError where `path` is no run's folder; everything else that is wrong is a fault of the report.
    """
    folder = one_run(path)
    report = Report(str(path))
    for name, what in files.faults(folder):
        report.faults.append(Fault(name, what))
    records = _records(folder, report)
    report.cells = len(records)
    report.statuses = dict(Counter(record["status"] for record in records.values()))
    _cells(folder, records, report)
    for name, record in records.items():
        for role, other in record["references"].items():
            if other is not None and other not in records:
                report.faults.append(Fault(f"records/{name}.json", f"its reference {role} is no cell of the run: {other}"))
        _results(folder, name, record, report)
    for name in BESIDE:
        for orphan in sorted({p.stem for p in (folder / name).glob("*.parquet")} - set(records)):
            report.faults.append(Fault(f"{name}/{orphan}.parquet", "there is no record of this cell"))
    return report


def _records(folder: Path, report: Report) -> dict[str, dict[str, Any]]:
    """Records that can be read, by the name of their file."""
    found: dict[str, dict[str, Any]] = {}
    ids: dict[str, str] = {}
    for path in sorted((folder / "records").glob("*.json")):
        name = f"records/{path.name}"
        try:
            record = read_record(path)
        except InputError as error:
            report.faults.append(Fault(name, f"{error.key}: {error.message}" if error.key else error.message))
            continue
        own = record["id"]
        if own in ids:
            report.faults.append(Fault(name, f"the cell {own} has another record, {ids[own]}"))
        ids[own] = path.name
        if own != path.stem:
            report.faults.append(Fault(name, f"its id is {own}, which is not the file's name"))
        if own != cell_id(record["axes"]):
            report.faults.append(Fault(name, f"its id is {own}, its axes give {cell_id(record['axes'])}"))
        found[path.stem] = record
    if not found and not report.faults:
        report.faults.append(Fault("records", "there are no records"))
    return found


def _cells(folder: Path, records: dict[str, Any], report: Report) -> None:
    """run.json and whether it names the cells that there are."""
    try:
        info = read_info(folder)
    except InputError as error:
        report.faults.append(Fault("run.json", f"{error.key}: {error.message}" if error.key else error.message))
        return
    listed = Counter(info["cells"])
    twice = [name for name, n in listed.items() if n > 1]
    if twice:
        report.faults.append(Fault("run.json", f"it names cells twice: {', '.join(twice)}"))
    damaged = {p.stem for p in (folder / "records").glob("*.json")} - set(records)
    for name in [n for n in listed if n not in records and n not in damaged]:
        report.faults.append(Fault(f"records/{name}.json", "run.json names this cell, and it has no record"))
    for name in [n for n in records if n not in listed]:
        report.faults.append(Fault(f"records/{name}.json", "run.json does not name this cell"))


def _results(folder: Path, name: str, record: dict[str, Any], report: Report) -> None:
    """A record's parts against its status, and its metrics against its outcomes."""
    file, status = f"records/{name}.json", record["status"]
    outcomes, losses = (folder / kind / f"{name}.parquet" for kind in BESIDE)

    def fault(what: str, where: str = file) -> None:
        report.faults.append(Fault(where, what))

    if status != "done":
        if record["metrics"] or record["primary"] or record["probes"]:
            fault(f"it is {status} and has results")
        if status in ("failed", "unsupported") and record["reason"] is None:
            fault(f"it is {status} and gives no reason")
        if outcomes.exists():
            fault(f"outcomes of a cell that is {status}", f"outcomes/{name}.parquet")
        if losses.exists():
            fault(f"losses of a cell that is {status}", f"losses/{name}.parquet")
        return
    if record["reason"] is not None:
        fault("it is done and gives a reason for failing")
    if record["primary"] not in record["metrics"]:
        fault(f"its primary metric {record['primary']!r} is none of its metrics")
    for metric, entry in record["metrics"].items():
        low, value, high = entry["low"], entry["value"], entry["high"]
        if None not in (low, value, high) and not low - 1e-12 <= value <= high + 1e-12:
            fault(f"{metric} lies outside its own interval")
    wrong_losses = loss_curves.fault(losses, record) if losses.exists() else None  # runs of before kept none
    if wrong_losses:
        fault(wrong_losses, f"losses/{name}.parquet")
    try:
        table = read_outcomes(folder, name)
    except InputError as error:
        fault(error.message, f"outcomes/{name}.parquet")
        return
    wrong, unchecked = recompute.faults(record, table)
    for what in wrong:
        fault(what, f"outcomes/{name}.parquet" if what.startswith(("the outcomes", "log_loss of")) else file)
    report.unchecked.extend(f"{name}/{metric}" for metric in unchecked)
