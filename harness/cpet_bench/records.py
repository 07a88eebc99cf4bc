"""Records read back: checked against their schema, brought to its newest version, as dicts or as a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from .errors import InputError

if TYPE_CHECKING:
    import pandas

MIGRATIONS: list[Callable[[dict[str, Any]], dict[str, Any]]] = []
"""What brings a record of schema 1, 2, ... to the next one, in that order."""


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())


class Metric(Closed):
    """A metric with its interval; value null where it is no finite number, low and high where no interval is honest."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    n: int = Field(description="documents")
    higher_is_better: bool | None
    interval: str | None = Field(description="how the interval was found")
    filter: str
    weights: dict[str, float] | None = Field(None, description="of a group's aggregate: each task's weight")


class Probe(BaseModel):
    """Something measured of a deployment, with how beside it (batch, lengths, device, ...)."""

    model_config = ConfigDict(extra="allow")
    value: float
    unit: str


class Reason(Closed):
    """Why a cell is failed or unsupported: the exception, the step it came from, the end of that step's log."""

    type: str
    message: str
    step: str
    log: str


class References(Closed):
    """Ids of cells of the same run that this one is compared with."""

    dense: str | None
    untuned: str | None = None
    dense_pet: str | None
    vanilla: str | None
    control_of: str | None


class Provenance(Closed):
    versions: dict[str, str]
    device: dict[str, Any]
    commit: str | None
    created: str
    keys: dict[str, str] = Field(description="role → key of the step in the store")


class Costs(Closed):
    """Over all steps the cell needs, shared ones included."""

    seconds: float
    estimated_seconds: float
    flops: float = Field(description="of the cell's own training")
    peak_memory: int = Field(description="bytes")
    steps: dict[str, float] = Field(description="kind of step → seconds")


class Record(Closed):
    """What is known about one cell."""

    schema_: int = Field(alias="schema")
    id: str
    matrix: str
    run: str
    axes: dict[str, Any]
    settings: dict[str, Any]
    references: References
    provenance: Provenance
    status: Literal["done", "failed", "unsupported", "pending"]
    reason: Reason | None
    metrics: dict[str, Metric]
    primary: str | None
    probes: dict[str, Probe]
    compression: dict[str, Any] | None
    training: dict[str, Any] | None
    costs: Costs
    simulated: list[str] = Field(description="what is simulated and not measured, such as speed")


def record_schema() -> dict[str, Any]:
    """The JSON Schema of a record, newest version."""
    body = Record.model_json_schema(by_alias=True)
    body["properties"]["schema"] = {"const": len(MIGRATIONS) + 1, "description": "version of this schema"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body, "title": "cpet-bench record"}


def read_record(path: Path) -> dict[str, Any]:
    """A record of the newest version. InputError names a file that is damaged, of a later version, or not a record."""
    try:
        found = from_json(path.read_bytes(), allow_inf_nan=False)
    except OSError as error:
        raise InputError(f"this record cannot be read: {error.strerror or error}", file=path) from None
    except ValueError as error:
        raise InputError(f"this record is damaged: {error}", file=path) from None
    version = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(version, int) or version < 1:
        raise InputError("this is no record: it has no schema version", file=path, key="schema")
    newest = len(MIGRATIONS) + 1
    if version > newest:
        raise InputError(f"this record is of schema {version}, later than this program's {newest}", file=path, key="schema")
    for migrate in MIGRATIONS[version - 1 :]:
        found = migrate(found)
    try:
        Record.model_validate(found | {"schema": newest})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"this record is damaged: {first['msg']}", file=path, key=".".join(map(str, first["loc"]))) from None
    return found | {"schema": newest}


def run_folders(path: str | Path) -> list[Path]:
    """`path` itself where it is a run's folder, else the run folders in it by name. InputError where there are none."""
    path = Path(path)
    if not path.is_dir():
        near = sorted(p.name for p in path.parent.iterdir() if p.is_dir()) if path.parent.is_dir() else None
        raise InputError(f"there is no folder {path}", given=path.name, allowed=near)
    if (path / "records").is_dir():
        return [path]
    found = sorted(p.parent for p in path.glob("[!.]*/records") if p.is_dir())
    if not found:
        raise InputError(f"{path} holds no run (a folder with records/)")
    return found


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run folder, or of all run folders in a folder; in the order of the matrix, runs by name.

    Raises InputError for a folder without runs, and for a record that is damaged, naming its file.
    """
    found = []
    for run in run_folders(folder):
        order = {name: i for i, name in enumerate(_cells(run))}
        paths = sorted((run / "records").glob("*.json"), key=lambda p: (order.get(p.stem, len(order)), p.stem))
        found.extend(map(read_record, paths))
    return found


def _cells(run: Path) -> list[str]:
    """Cells of a run in its matrix's order, as far as its run.json tells."""
    try:
        cells = json.loads((run / "run.json").read_text())["cells"]
        return cells if isinstance(cells, list) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def load_records(path: str | Path) -> pandas.DataFrame:
    """The records below `path` (as of read_records) as a table, one row a cell.

    Columns: id, run, matrix, status, reason (its message), primary, axes.AXIS; of each metric NAME, NAME.low, NAME.high;
    probes.NAME (and .low, .high where measured), training.trainable_parameters, training.lr, costs.seconds,
    costs.flops, costs.peak_memory, simulated.
    """
    import pandas

    return pandas.DataFrame([_row(record) for record in read_records(path)])


def _row(record: dict[str, Any]) -> dict[str, Any]:
    row = {name: record[name] for name in ("id", "run", "matrix", "status")}
    row |= {"reason": (record["reason"] or {}).get("message"), "primary": record["primary"]}
    row |= {f"axes.{name}": value for name, value in record["axes"].items()}
    for name, metric in record["metrics"].items():
        row |= {name: metric["value"], f"{name}.low": metric["low"], f"{name}.high": metric["high"]}
    for name, probe in record["probes"].items():
        row[f"probes.{name}"] = probe["value"]
        row |= {f"probes.{name}.{end}": probe[end] for end in ("low", "high") if end in probe}
    training = record["training"] or {}
    row |= {f"training.{name}": training[name] for name in ("trainable_parameters", "lr") if name in training}
    row |= {f"costs.{name}": record["costs"][name] for name in ("seconds", "flops", "peak_memory")}
    return row | {"simulated": ", ".join(record["simulated"])}


def is_vanilla(restoring: dict[str, Any] | None) -> bool:
    """Whether a record's restoring setting is none: modules trained from random weights, with no teacher and as no control."""
    return not any((restoring or {}).get(part) is not None for part in ("inherit", "recover", "distill", "control"))


def outcomes_path(folder: str | Path, cell_id: str) -> Path:
    """Where the outcomes of a cell lie in a run's folder. InputError where they do not."""
    path = Path(folder) / "outcomes" / f"{cell_id}.parquet"
    if not path.is_file():
        there = [p.stem for p in path.parent.glob("*.parquet")]
        raise InputError(f"there are no outcomes of cell {cell_id!r} in {folder}", given=cell_id, allowed=there)
    return path


def read_outcomes(folder: str | Path, cell_id: str) -> pandas.DataFrame:
    """The outcomes of a cell by document (see evaluation.metrics). InputError where there are none or they are damaged."""
    return outcomes_table(folder, cell_id).to_pandas()


def outcomes_table(folder: str | Path, cell_id: str):
    """read_outcomes as a pyarrow table, which loads faster."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = outcomes_path(folder, cell_id)
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"these outcomes are damaged: {str(error).splitlines()[0]}", file=path) from None
