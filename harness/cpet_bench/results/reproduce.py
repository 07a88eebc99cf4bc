"""`reproduce`: run cells of a kept run again and compare them metric by metric. Loads no heavy library itself."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from ..errors import EXIT_DONE, EXIT_INTERRUPTED, InputError
from ..matrix import load_matrix
from ..records import read_outcomes, read_record
from ..runner import prepare, run_prepared
from ..settings import ProbeSettings
from . import recompute
from .validate import one_run, read_info

EXIT_NOT_REPRODUCED = 1
EQUAL_SHARE = 0.98
EQUAL_ELSEWHERE = 0.90  # on another make of processor or GPU, whose kernels add up in another order
WITHOUT_INTERVAL = 0.01  # relative difference allowed where no interval is known
SAME = ("device", "name", "dtype", "attention", "tf32", "threads")
KEY = ["task", "metric", "filter", "repeat", "document"]


@dataclass
class MetricCheck:
    """A metric: the kept value with its interval, the value now, and whether that lies within."""

    name: str
    kept: float | None
    low: float | None
    high: float | None
    now: float | None
    within: bool


@dataclass
class CellCheck:
    """A cell run again. documents, equal: right-or-wrong outcomes that both have, and the share of equal ones; required: the
    share that must be; logprob_max, logprob_mean: absolute differences of the labels' log-probabilities."""

    id: str
    reproduced: bool = False
    why: list[str] = field(default_factory=list)
    metrics: list[MetricCheck] = field(default_factory=list)
    documents: int = 0
    equal: float | None = None
    required: float = EQUAL_SHARE
    logprob_max: float | None = None
    logprob_mean: float | None = None
    changed: list[str] = field(default_factory=list)


@dataclass
class Report:
    """All cells that were run again. skipped: cells that were not done, so that there is nothing to compare."""

    run: str
    cells: list[CellCheck] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False
    tolerances: dict[str, float] = field(
        default_factory=lambda: {
            "equal_outcomes": EQUAL_SHARE,
            "equal_outcomes_elsewhere": EQUAL_ELSEWHERE,
            "without_interval": WITHOUT_INTERVAL,
        }
    )

    @property
    def exit_code(self) -> int:
        if self.interrupted:
            return EXIT_INTERRUPTED
        return EXIT_DONE if all(cell.reproduced for cell in self.cells) else EXIT_NOT_REPRODUCED

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


def reproduce(
    run: str | Path,
    *,
    cells: Sequence[str] = (),
    store: str | None = None,
    device: list[str] | None = None,
    allow_code: bool = False,
    keep: str | Path | None = None,
    listeners=(),
    on_signal=None,
) -> Report:
    """Run cells of a run's folder again, from the matrix kept in it, and compare them with the kept results.

    Args:
        cells: ids, or patterns of them (none: every cell that is done). store: default a fresh one, dropped afterwards.
        device: as of `run`. allow_code: whether a matrix may run code of its own. keep: a folder for the new run.

    Where the matrix leaves the number format to the machine (`dtype: auto`), it is the one that the records name.
    A cell is reproduced when at least 98 % of its right-or-wrong outcomes are equal, document by document (90 % on a processor
    or GPU of another name than the record's, which rounds otherwise), and every metric lies within the kept interval (where
    there is none: within 1 %). Speeds are not compared. Raises InputError for a run that
    lacks what it needs, StopError for disk, store and network.
    """
    folder = one_run(run)
    info = read_info(folder)
    records = {p.stem: read_record(p) for p in sorted((folder / "records").glob("*.json"))}
    chosen, report = _chosen(records, cells, info["cells"]), Report(str(run))
    report.skipped = [cell for cell in chosen if records[cell]["status"] != "done"]
    wanted = [cell for cell in chosen if cell not in report.skipped]
    if not wanted:
        raise InputError(f"none of these cells is done in {run}: there is nothing to compare with", given=", ".join(chosen))
    matrix = _formatted(_matrix(folder, info, allow_code), [records[cell] for cell in wanted])
    with tempfile.TemporaryDirectory(prefix="cpet-bench-") as fresh:
        runs = keep or Path(fresh, "runs")
        ready = prepare(matrix, store=store or str(Path(fresh, "store")), runs=runs, device=device, cells=wanted)
        lost = [cell for cell in wanted if cell not in ready.plan.roles]
        if lost:
            raise InputError("the kept matrix does not have these cells", file=folder / "matrix.yaml", given=", ".join(lost))
        result = run_prepared(ready, listeners, on_signal)
        report.interrupted = result.exit_code == EXIT_INTERRUPTED
        if not report.interrupted:
            report.cells = [compare(folder, records[cell], result.folder) for cell in wanted]
    return report


def _chosen(records: dict[str, Any], cells: Sequence[str], order: list[str]) -> list[str]:
    ids = [name for name in order if name in records] + [name for name in records if name not in order]
    if not cells:
        return [name for name in ids if records[name]["status"] == "done"]
    for pattern in cells:
        if not any(fnmatchcase(name, pattern) for name in ids):
            raise InputError(f"there is no cell {pattern!r} in this run", key="--cell", given=pattern, allowed=ids)
    return [name for name in ids if any(fnmatchcase(name, pattern) for pattern in cells)]


def _matrix(folder: Path, info: dict[str, Any], allow_code: bool):
    """The matrix kept with the run, without probes."""
    path = folder / "matrix.yaml"
    if not path.is_file():
        raise InputError("this run keeps no matrix to run again", file=path)
    for entry in info["outside"]:
        place = folder / entry["place"].removeprefix("local:").removeprefix("gguf:")
        if "path" not in entry and not place.exists():
            what = ".".join(entry["key"])
            raise InputError(f"{what} was not kept with this run ({entry['why']}); put it at {place}", file=path, key=what)
    matrix = load_matrix(path)
    if matrix.allow_code and not allow_code:
        raise InputError("this run's matrix says allow_code: true: it runs code of its own. Read it, then add --allow-code.")
    return matrix.model_copy(update={"probes": ProbeSettings(throughput=None, memory=False)})


def _formatted(matrix, records: list[dict[str, Any]]):
    """The matrix with the number format its cells were computed in, where it left the choice to the machine's speed."""
    kept = {record["provenance"]["device"].get("dtype") for record in records} - {None}
    if matrix.device.dtype != "auto" or len(kept) != 1:
        return matrix
    return matrix.model_copy(update={"device": matrix.device.model_copy(update={"dtype": kept.pop()})})


def compare(folder: Path, old: dict[str, Any], again: Path) -> CellCheck:
    """One cell: its kept record and outcomes in `folder` against those of the run `again`."""
    cell = old["id"]
    new = read_record(again / "records" / f"{cell}.json")
    check = CellCheck(cell, changed=_changed(old, new))
    here, there = (record["provenance"]["device"] for record in (new, old))
    if any(here.get(k) != there.get(k) for k in ("device", "name")):
        check.required = EQUAL_ELSEWHERE
    if new["status"] != "done":
        check.why.append(f"it is {new['status']} now: {(new['reason'] or {}).get('message', '')}")
        return check
    mine, theirs = read_outcomes(folder, cell), read_outcomes(again, cell)
    for table, where in ((mine, "kept"), (theirs, "new")):
        if missing := recompute.COLUMNS - set(table.columns):
            raise InputError(f"the {where} outcomes of {cell} have no column {', '.join(sorted(missing))}")
    for name, entry in old["metrics"].items():
        check.metrics.append(_metric(name, entry, new["metrics"].get(name)))
    check.why += [f"{m.name} is {_word(m.now)}, kept {_word(m.kept)}" for m in check.metrics if not m.within]
    both = mine.merge(theirs, on=KEY, how="outer", suffixes=("_kept", "_now"), indicator=True)
    alone = both[both["_merge"] != "both"][["task", "document"]].drop_duplicates()
    if len(alone):
        check.why.append(f"{len(alone)} documents were scored in one of the runs only")
    _outcomes(check, both)
    _logprobs(check, both[both["_merge"] == "both"])
    check.reproduced = not check.why
    return check


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What of the machine and the libraries is not as it was, as `what old → new`."""
    a, b = old["provenance"], new["provenance"]
    pairs = [(k, a["device"].get(k), b["device"].get(k)) for k in SAME]
    pairs += [(k, a["versions"].get(k), b["versions"].get(k)) for k in dict.fromkeys([*a["versions"], *b["versions"]])]
    return [f"{name} {x} → {y}" for name, x, y in pairs if x != y]


def _metric(name: str, kept: dict[str, Any], now: dict[str, Any] | None) -> MetricCheck:
    low, high, a, b = kept["low"], kept["high"], kept["value"], now["value"] if now else None
    if a is None or b is None:
        within = now is not None and a is b
    elif low is not None and high is not None:
        within = low <= b <= high or a == b
    else:
        within = math.isclose(a, b, rel_tol=WITHOUT_INTERVAL, abs_tol=1e-9)
    return MetricCheck(name, a, low, high, b, within)


def _outcomes(check: CellCheck, both: pandas.DataFrame) -> None:
    """The share of equal outcomes, over those that are right or wrong; one that a run lacks counts as another one."""
    kept, now = both["value_kept"].to_numpy(float), both["value_now"].to_numpy(float)
    names = both["metric"] + "," + both["filter"]
    binary = {n for n in set(names) if _binary(kept[names == n]) and _binary(now[names == n])}
    chosen = names.isin(binary).to_numpy()
    if not chosen.any():
        return
    check.documents = len(both[chosen][["task", "document"]].drop_duplicates())
    check.equal = float((kept[chosen] == now[chosen]).mean())
    if check.equal < check.required:
        check.why.append(f"{check.equal:.1%} of the outcomes are equal, at least {check.required:.0%} must be")


def _binary(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite)) and bool(np.isin(finite, (0.0, 1.0)).all())


def _logprobs(check: CellCheck, both: pandas.DataFrame) -> None:
    rows = both.drop_duplicates(["task", "document"])
    pairs = zip(rows["logprobs_kept"], rows["logprobs_now"], strict=True)
    found = [np.abs(np.subtract(x, y)) for x, y in pairs if x is not None and y is not None and len(x) == len(y)]
    if found:
        every = np.concatenate(found)
        check.logprob_max, check.logprob_mean = float(every.max()), float(every.mean())


def _word(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
