"""The interval of a cell's gap to D, paired by document: from the outcomes kept beside the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpet_bench.errors import InputError
from cpet_bench.records import outcomes_table


class Outcomes:
    """Right or wrong by document, of the cells of runs; each D is read once."""

    def __init__(self):
        self.dense: dict[tuple[Path, str, str], dict[str, Any] | None] = {}

    def gap(self, folder: Path, record: dict[str, Any], dense: dict[str, Any], level: float = 0.95) -> tuple | None:
        """(low, high) of the primary metric minus D's, by Tango's score interval (1998).

        None where outcomes are not there, are not 0 or 1, or are not of the same documents or not what the records say.
        """
        from cpet_bench.stats import tango_interval  # scipy: only where there are outcomes

        name = record["primary"]
        at = (folder, dense["id"], name)
        if at not in self.dense:
            self.dense[at] = _rights(folder, dense, name)
        theirs = self.dense[at]
        ours = _rights(folder, record, name) if theirs else None
        if not ours or not all(a.equals(b) for a, b in zip(ours["documents"], theirs["documents"], strict=True)):
            return None
        difference = ours["values"] - theirs["values"]
        return tango_interval(int((difference > 0).sum()), int((difference < 0).sum()), len(difference), level)


def _rights(folder: Path, record: dict[str, Any], name: str) -> dict[str, Any] | None:
    from pyarrow.compute import field

    found = record["metrics"].get(name)
    if not found or found["value"] is None:
        return None
    try:
        table = outcomes_table(folder, record["id"])
    except InputError:
        return None
    task, _, metric = name.partition(",")[0].rpartition("/")
    wanted = (field("metric") == metric) & (field("filter") == found["filter"])
    table = table.filter(wanted & (field("task") == task) if task else wanted)
    values = table["value"].to_numpy()
    zero_one = len(values) and bool(((values == 0) | (values == 1)).all())
    if not zero_one or abs(float(values.mean()) - found["value"]) > 1e-9:
        return None
    return {"documents": [table[name].combine_chunks() for name in ("task", "document", "repeat")], "values": values}
