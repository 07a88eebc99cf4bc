"""Which cells come first, and which are left for later: the order of usefulness, `--budget` and `--sample`."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from .cells import Cell
from .errors import InputError
from .recording import references
from .schedule import ALONE

if TYPE_CHECKING:
    from .plan import Plan


def share(text: str, key: str = "--sample") -> float:
    """The share that `20%` or `0.2` names, above 0 and up to 1. InputError where it is none."""
    word = text.strip()
    try:
        value = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise InputError(f"{text!r} is no share; write one as 20% or 0.2.", key=key)
    return value


def references_of(cells: Iterable[Cell]) -> dict[str, set[str]]:
    """By cell, the cells of this matrix that its statistics are held against (dense, dense with PET, vanilla, ...)."""
    cells = list(cells)
    ids = {cell.id for cell in cells}
    return {cell.id: {r for r in references(cell, ids).values() if r} for cell in cells}


def useful(plan: Plan, missing: Collection[str], seconds: Mapping[str, float]) -> list[Cell]:
    """Cells in the order in which their results are of use: dense ones, what others are compared with, then the rest.

    Within each the cheap ones come first; what a step takes is shared among the cells that need it.
    """
    wanted = set(missing)
    needs = {cell.id: [k for k in plan.closure(plan.roles[cell.id].values()) if k in wanted] for cell in plan.cells}
    users = Counter(key for keys in needs.values() for key in keys)
    referred = set().union(*references_of(plan.cells).values())
    place = {cell.id: i for i, cell in enumerate(plan.cells)}

    def rank(cell: Cell) -> tuple:
        group = 0 if not cell.compression and cell.id in referred else 1 if cell.id in referred else 2
        return group, sum(seconds[k] / users[k] for k in needs[cell.id]), place[cell.id]

    return sorted(plan.cells, key=rank)


def first_use(plan: Plan, order: Iterable[Cell]) -> dict[str, int]:
    """By step, the place in `order` of the first cell that needs it."""
    place: dict[str, int] = {}
    for i, cell in enumerate(order):
        stack = list(plan.roles[cell.id].values())
        while stack:
            key = stack.pop()
            if key not in place:
                place[key] = i
                stack.extend(plan.steps[key].needs.values())
    return place


class Clock:
    """Seconds that a growing set of steps takes at least on some workers: their longest path, or their sum spread out."""

    def __init__(self, plan: Plan, missing: Collection[str], seconds: Mapping[str, float], machine: Mapping):
        self.workers = len(machine["devices"])
        alone = ALONE if self.workers > 1 and machine["device"] == "cpu" else ()
        self.seconds, self.taken = seconds, set()
        self.alone = {k for k in missing if plan.steps[k].kind in alone}
        self.ends: dict[str, float] = {}
        wanted = set(missing)
        for key, step in plan.steps.items():
            if key in wanted:
                self.ends[key] = seconds[key] + max((self.ends.get(n, 0.0) for n in step.needs.values()), default=0.0)
        self.sum = self.path = 0.0

    def _with(self, keys: Iterable[str]) -> tuple[float, float]:
        new = [k for k in set(keys) if k not in self.taken]
        work = sum(self.seconds[k] if k in self.alone else self.seconds[k] / self.workers for k in new)
        return self.sum + work, max([self.path, *(self.ends[k] for k in new)])

    def after(self, keys: Iterable[str]) -> float:
        """Seconds with `keys` added."""
        return max(self._with(keys))

    def take(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        self.sum, self.path = self._with(keys)
        self.taken.update(keys)


def within(plan: Plan, order: Iterable[Cell], missing: Collection[str], clock: Clock, budget: float) -> set[str]:
    """Ids of the cells that fit into `budget` seconds by the estimates; one that does not is passed over for cheaper ones."""
    wanted, found = set(missing), set()
    for cell in order:
        keys = [k for k in plan.closure(plan.roles[cell.id].values()) if k in wanted]
        if clock.after(keys) <= budget:
            clock.take(keys)
            found.add(cell.id)
    return found


_LOOKS = 400_000  # candidates that a sample may look at: seconds
_TUNED = ("restoring", "seed")  # axes that mean something only where something is tuned


def _names(cell: Cell) -> list[tuple[str, str]]:
    return [(axis, name) for axis, name in cell.axes.items() if cell.pet is not None or axis not in _TUNED]


def sample(cells: list[Cell], part: float, seed: int = 0) -> set[str]:
    """Ids of a balanced part of `cells`: each name of each axis has about the share of it that it has of all cells.

    What a chosen cell is compared with comes in with it and counts; the first one comes in whatever it brings. Of several
    draws the most even one is taken. The same cells, part and seed give the same choice, in any process.
    """
    target = max(1, round(part * len(cells)))
    if target >= len(cells):
        return {cell.id for cell in cells}
    place, refers = {cell.id: i for i, cell in enumerate(cells)}, references_of(cells)
    # In one order: what is summed over them depends on it, and sets of ids have another in each process.
    brings = {cell.id: sorted({cell.id, *refers[cell.id]}, key=place.get) for cell in cells}
    names = {cell.id: _names(cell) for cell in cells}
    whole = Counter(at for own in names.values() for at in own)
    tuned = sum(cell.pet is not None for cell in cells)
    wanted = {at: n / (tuned if at[0] in _TUNED else len(cells)) for at, n in whole.items()}
    looked = max(32, min(len(cells), _LOOKS // target))  # candidates looked at for each place
    rng = random.Random(seed)
    times = max(1, min(4, _LOOKS // (looked * target)))
    draws = [_draw(cells, target, brings, names, wanted, looked, rng) for _ in range(times)]
    return min(draws, key=lambda draw: draw[0])[1]


def _draw(
    cells: list[Cell],
    target: int,
    brings: Mapping[str, list[str]],
    names: Mapping[str, list[tuple[str, str]]],
    wanted: Mapping[tuple[str, str], float],
    looked: int,
    rng: random.Random,
) -> tuple[float, set[str]]:
    """One draw of about `target` cells: how far its names are from their shares (squared differences, summed), and ids."""
    is_tuned = {cell.id: cell.pet is not None for cell in cells}
    count: Counter = Counter()
    sizes = {True: 0, False: 0}  # cells chosen so far: tuned ones, all
    waiting = list(cells)
    rng.shuffle(waiting)
    found: set[str] = set()

    def lack(cell_id: str) -> float:
        """How much less than its share each of the cell's names has so far, summed."""
        return sum(wanted[at] * sizes[at[0] in _TUNED] - count[at] for at in names[cell_id])

    while waiting and len(found) < target:
        head = waiting[-looked:]
        best, gain = None, -math.inf
        for i, cell in enumerate(head):
            new = [other for other in brings[cell.id] if other not in found]
            if cell.id in found or (found and len(found) + len(new) > target):
                continue
            value = sum(map(lack, new)) / len(new)
            if value > gain:
                best, gain = i, value
        if best is None:
            del waiting[-looked:]
            continue
        at = len(waiting) - len(head) + best
        cell = waiting[at]
        waiting[at] = waiting[-1]
        waiting.pop()
        for new in set(brings[cell.id]) - found:
            found.add(new)
            count.update(names[new])
            sizes[False] += 1
            sizes[True] += is_tuned[new]
    return sum((count[at] - share * sizes[at[0] in _TUNED]) ** 2 for at, share in wanted.items()), found
