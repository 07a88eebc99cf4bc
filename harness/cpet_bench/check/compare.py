"""Which cells of a run are worse than they were in a baseline, with the chance of a false alarm held over all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EXIT_DONE, InputError
from ..stats import holm
from .pairs import Difference, Incomparable, difference, one_run

EXIT_REGRESSION, EXIT_NOTHING = 1, 3

FINE, WORSE, OPEN, NOT_COMPARED = "no regression shown", "regression", "inconclusive", "not compared"
MACHINE = ("device", "name", "dtype", "attention", "tf32", "threads", "cores")
CONDITIONS = ("device", "dtype", "batch", "prompt_tokens", "new_tokens", "unit")


@dataclass
class CellCheck:
    """One cell. difference, low, high: candidate − baseline, more is better; p-values after Holm, two-sided in size."""

    id: str
    verdict: str
    note: str = ""
    metric: str | None = None
    baseline: float | None = None
    candidate: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_not_worse: float | None = None
    p_worse: float | None = None
    documents: int | None = None
    method: str | None = None


@dataclass
class SpeedCheck:
    """Prefill or decode of one cell in tokens/s; ratio: candidate / baseline."""

    id: str
    what: str
    verdict: str
    note: str = ""
    baseline: float | None = None
    candidate: float | None = None
    ratio: float | None = None


@dataclass
class Report:
    """Everything a comparison found. family: the cells that the p-values are adjusted for."""

    margin: float
    alpha: float
    speed_margin: float
    cells: list[CellCheck] = field(default_factory=list)
    speed: list[SpeedCheck] = field(default_factory=list)
    only_baseline: list[str] = field(default_factory=list)
    only_candidate: list[str] = field(default_factory=list)
    family: int = 0

    @property
    def exit_code(self) -> int:
        """0 no regression, 1 a regression, 3 no cell could be compared."""
        if any(c.verdict == WORSE for c in [*self.cells, *self.speed]):
            return EXIT_REGRESSION
        return EXIT_DONE if any(c.verdict != NOT_COMPARED for c in self.cells) else EXIT_NOTHING

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "exit_code": self.exit_code}


def compare(
    candidate: str | Path,
    baseline: str | Path,
    *,
    margin: float = 0.02,
    metric: str | None = None,
    alpha: float = 0.05,
    speed_margin: float = 0.2,
) -> Report:
    """Compare two run folders cell by cell.

    Args:
        margin: the loss that still is none, in the metric's own unit (0.02 is two points of accuracy; for log-loss and
            perplexities nats per document, word or byte).
        metric: which (None: each cell's primary one). alpha: chance of a false verdict of either kind over all cells.
        speed_margin: the share of speed that may be lost.

    Returns a verdict for each cell that both have: `no regression shown` (worse by less than the margin is shown),
    `regression` (worse by more is shown, or it was done before and is no longer), `inconclusive` (its interval crosses the
    margin), `not compared`. The family Holm's method adjusts for are all cells that both have and the baseline has done.
    Speeds are compared on the same device only; `regression` where even the fastest repeat lies below the slowest before.

    Raises InputError for folders without one run, numbers out of range, a metric that no cell has.
    """
    for name, value, most in (("--margin", margin, None), ("--alpha", alpha, 1.0), ("--speed-margin", speed_margin, 1.0)):
        if not 0 < value < (most or float("inf")):
            raise InputError(f"{value:g} must lie above 0" + (f" and below {most:g}" if most else ""), key=name)
    new, old = one_run(candidate), one_run(baseline)
    report = Report(margin, alpha, speed_margin)
    report.only_baseline = [i for i in old if i not in new]
    report.only_candidate = [i for i in new if i not in old]
    shared = [i for i in old if i in new]
    if metric is not None:
        known = {m for i in shared for m in old[i]["metrics"]}
        if known and metric not in known:
            raise InputError(f"no cell has a metric {metric!r}", key="--metric", given=metric, allowed=known)
    family = [i for i in shared if old[i]["status"] == "done"]
    report.family = len(family)
    found = {i: _difference(candidate, baseline, new[i], old[i], metric, margin, alpha) for i in family}
    tested = {i: f for i, f in found.items() if isinstance(f, tuple)}
    ones = dict.fromkeys(family, 1.0)
    worse = _adjusted(ones | {i: d.p_worse for i, (_, d) in tested.items()})
    fine = _adjusted(ones | {i: d.p_not_worse for i, (_, d) in tested.items()})
    for i in shared:
        if i not in found:
            report.cells.append(CellCheck(i, NOT_COMPARED, f"the baseline's is {old[i]['status']}"))
        elif i not in tested:
            report.cells.append(found[i])
        else:
            name, d = tested[i]
            report.cells.append(_verdict(new[i], old[i], name, d, fine[i], worse[i], alpha))
        report.speed.extend(_speeds(new[i], old[i], speed_margin))
    return report


def _adjusted(p_values: dict[str, float]) -> dict[str, float]:
    """After Holm; doubled first, so that both directions together keep alpha."""
    adjusted = holm([min(1.0, 2 * p) for p in p_values.values()])
    return {name: float(p) for name, p in zip(p_values, adjusted, strict=True)}


def _difference(candidate, baseline, new: dict, old: dict, metric: str | None, margin: float, alpha: float):
    """(metric, Difference) of a cell, or the CellCheck that says why there is none."""
    cell = old["id"]
    if new["status"] in ("failed", "unsupported"):
        why = (new["reason"] or {}).get("message", "")
        return CellCheck(cell, WORSE, f"was done, is {new['status']}: {why}")
    if new["status"] != "done":
        return CellCheck(cell, NOT_COMPARED, f"the candidate's is {new['status']}")
    name = metric or old["primary"]
    for side, record in (("baseline", old), ("candidate", new)):
        if name not in record["metrics"]:
            return CellCheck(cell, NOT_COMPARED, f"the {side}'s has no metric {name}")
    entry = old["metrics"][name]
    keys = {r["provenance"]["keys"].get("metrics") for r in (new, old)}
    if len(keys) == 1 and None not in keys:
        return name, Difference(0.0, 0.0, 0.0, 0.0, 1.0, entry["n"], 0, "the same result of the store")
    if entry["higher_is_better"] is None:
        return CellCheck(cell, NOT_COMPARED, f"whether more {name} is better is not known", name)
    try:
        return name, difference((Path(candidate), cell), (Path(baseline), cell), name, entry, margin, 1 - alpha)
    except (Incomparable, InputError) as error:
        return CellCheck(cell, NOT_COMPARED, str(error), name)


def _verdict(new: dict, old: dict, name: str, d: Difference, fine: float, worse: float, alpha: float) -> CellCheck:
    verdict = WORSE if worse <= alpha else FINE if fine <= alpha else OPEN
    notes = [f"{d.unpaired} documents in one run only"] if d.unpaired else []
    changed = [k for k, v in old["settings"].items() if new["settings"].get(k) != v]
    notes += [f"other settings of {', '.join(changed)}"] if changed else []
    values = (record["metrics"][name]["value"] for record in (old, new))
    return CellCheck(old["id"], verdict, "; ".join(notes), name, *values, d.value, d.low, d.high, fine, worse, d.n, d.method)


def _speeds(new: dict, old: dict, margin: float) -> list[SpeedCheck]:
    found = []
    for what in ("prefill", "decode"):
        a, b = old["probes"].get(what), new["probes"].get(what)
        if a is None or b is None:
            continue
        machines = [r["provenance"]["device"] for r in (old, new)]
        differs = [k for k in MACHINE if machines[0].get(k) != machines[1].get(k)]
        differs += [k for k in CONDITIONS if a.get(k) != b.get(k) and k not in differs]
        if differs:
            found.append(SpeedCheck(old["id"], what, NOT_COMPARED, f"measured with another {', '.join(differs)}"))
            continue
        ratio, verdict, note = b["value"] / a["value"], FINE, ""
        if ratio < 1 - margin:
            apart = b.get("high", b["value"]) < a.get("low", a["value"])
            verdict, note = (WORSE, "") if apart else (OPEN, "slower, but the repeats overlap")
        found.append(SpeedCheck(old["id"], what, verdict, note, a["value"], b["value"], ratio))
    return found
