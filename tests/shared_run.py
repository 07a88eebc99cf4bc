"""A real run of three cells to hand on, its parts, and how tests damage a copy of it."""

import json

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cpet_bench.results import files

DENSE, TUNED = "tiny--none--none--none--smoke_sentiment--s0", "tiny--none--lora--vanilla--smoke_sentiment--s0"
PRUNED = "tiny--wanda24--none--none--smoke_sentiment--s0"
TEXT = """\
# what we share
name: shared
probes: {throughput: false}
include:
  - {compression: none, restoring: [none, vanilla]}
  - {compression: wanda24, restoring: none}
"""


def change(path, edit) -> None:
    body = json.loads(path.read_text())
    edit(body)
    path.write_text(json.dumps(body))


def rewrite(path, edit) -> None:
    """Outcomes with other rows: edit(list of rows) → list of rows."""
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(edit(table.to_pylist()), schema=table.schema), path)


def record(folder, cell=DENSE):
    return folder / "records" / f"{cell}.json"


def outcomes(folder, cell=DENSE):
    return folder / "outcomes" / f"{cell}.parquet"


def losses(folder, cell=TUNED):
    return folder / "losses" / f"{cell}.parquet"


def flipped(rows, times=3):
    """The first documents' accuracy the other way round."""
    left = times
    for row in rows:
        if row["metric"] == "acc" and left:
            row["value"], left = 1.0 - row["value"], left - 1
    return rows


def another_machine(folder):
    """The run as another machine might have it: three answers differ."""
    rewrite(outcomes(folder, TUNED), flipped)
    values = pc.filter(*(lambda t: (t["value"], pc.equal(t["metric"], "acc")))(pq.read_table(outcomes(folder, TUNED))))

    def edit(body):
        body["metrics"]["acc"]["value"] = pc.mean(values).as_py()
        body["provenance"]["device"]["name"] = "Another CPU"

    change(record(folder, TUNED), edit)
    files.write_manifest(folder)
