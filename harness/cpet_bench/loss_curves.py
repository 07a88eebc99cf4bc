"""Loss curves: every step's in `losses/CELL.parquet` beside a record, a thinned copy in the record. Loads no heavy library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "lr")  # what every curve has; task, distill, kl, validation, grad_norm, seconds where there are any


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One row a step. A training of no steps has no file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if rows:
        pq.write_table(pa.Table.from_pylist(rows), path)


def thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """About `most` of the rows, evenly, and as many more that were looked at on held-out documents; always the last one."""
    looked = [i for i, row in enumerate(rows) if row.get("validation") is not None]
    kept = {*range(0, len(rows), max(1, -(-len(rows) // most))), *looked[:: max(1, -(-len(looked) // most))]}
    if looked:
        kept.add(min(looked, key=lambda i: rows[i]["validation"]))
    return [row for i, row in enumerate(rows) if i in kept or i == len(rows) - 1]


def fault(path: Path, record: dict[str, Any]) -> str | None:
    """What is wrong with a kept curve, or None: it can be read and has a row for each step that its record counts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        return f"these losses are damaged: {str(error).splitlines()[0]}"
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        return f"the losses have no column {', '.join(missing)}"
    steps = (record["training"] or {}).get("steps")
    if table["step"].to_pylist() != list(range(1, (steps or 0) + 1)):
        return f"the losses are of {table.num_rows} steps, the record is of {steps}"
    return None
