"""Which step runs next on which worker: pure bookkeeping, so that it can be tested without running anything."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping

from .steps import Step

ALONE = ("probe",)  # kinds that measure speed: on a processor that workers share, nothing else may compute meanwhile
SLACK = 0.3  # by simulation: estimates are off, so a path must be begun long before it would decide the end
Item = tuple[float, int, str]


class Schedule:
    """Steps still to be done, given those that are. A step whose need failed fails with it.

    Everything is O(log n) a step, but for `redo`, which is rare.

    Args:
        seconds: estimate of each step.
        first: place of each step in the order of usefulness (default: that of `steps`); small comes first.
        workers: how many ask. With several, a step that the end of the whole waits for goes before a useful one.
        alone: kinds of step that run while no other step does.
    """

    def __init__(
        self,
        steps: Mapping[str, Step],
        wanted: Collection[str],
        done: Collection[str],
        seconds: Mapping[str, float],
        *,
        first: Mapping[str, int] | None = None,
        workers: int = 1,
        alone: Collection[str] = (),
    ):
        self.steps, self.seconds, self.workers = steps, seconds, workers
        self.alone = frozenset(alone) if workers > 1 else frozenset()
        self.done = set(done)
        self.left = {k for k in wanted if k not in self.done}
        self.running: set[str] = set()
        self._lone = False  # one that must be alone is running
        self.failed: dict[str, str] = {}  # step → the step it failed for (itself, or a need)
        self.parked: set[str] = set()
        self.users: dict[str, list[str]] = defaultdict(list)
        self.waits: dict[str, set[str]] = {}
        for key in self.left:
            needs = {n for n in steps[key].needs.values() if n not in self.done}
            self.waits[key] = needs
            for need in needs:
                self.users[need].append(key)
        self.rank = self._ranks()
        self.work = sum(self._seconds(k) for k in self.left)  # of steps not started yet
        place = first or {}
        self.order = {key: (place.get(key, 0), i) for i, key in enumerate(steps)}
        self._useful: list = []
        self._critical: list[Item] = []
        self._alone: list = []
        self._by_model: dict[str, list] = defaultdict(list)
        for key in self.left:
            if not self.waits[key]:
                self._push(key)

    def _seconds(self, key: str) -> float:
        return self.seconds.get(key, 1.0)

    def _ranks(self) -> dict[str, float]:
        """Longest path in seconds from a step's start to the end of everything after it."""
        rank: dict[str, float] = {}
        for key in reversed([k for k in self.steps if k in self.left]):
            after = max((rank.get(u, 0.0) for u in self.users[key]), default=0.0)
            rank[key] = self._seconds(key) + after
        return rank

    def _push(self, key: str) -> None:
        item = (self.order[key], key)
        if self.steps[key].kind in self.alone:
            heapq.heappush(self._alone, item)
            return
        heapq.heappush(self._useful, item)
        heapq.heappush(self._critical, (-self.rank[key], self.order[key], key))
        model = self.steps[key].needs.get("model")
        if model:
            heapq.heappush(self._by_model[model], item)

    def _top(self, heap: list) -> str | None:
        while heap:
            key = heap[0][-1]
            if key in self.left and key not in self.running and key not in self.parked and not self.waits[key]:
                return key
            heapq.heappop(heap)
        return None

    def next(self, held: Collection[str] = ()) -> str | None:
        """The step a worker that holds the models `held` should run now; None while there is none.

        First what the end of everything may wait for: a step whose path is a fair part of all that is left, spread over
        the workers. Else a step whose model the worker holds, or a more useful one that needs none, else any; of those the most
        useful. A step that must run alone comes when nothing else is ready.
        """
        if self._lone:
            return None
        if self.workers > 1:
            urgent = self._top(self._critical)
            if urgent and self.rank[urgent] >= SLACK * self.work / self.workers:
                return self._of_same_rank(urgent, held)
        key = self._top(self._useful)
        for model in held:
            mine = self._top(self._by_model[model])
            if mine:  # one that needs no model costs no loading either: choosing a rate must not wait for all trials
                free = self.steps[key].needs.get("model") is None and self.order[key] < self.order[mine]
                return key if free else mine
        if key is None and not self.running:
            key = self._top(self._alone)
        return key

    def _of_same_rank(self, urgent: str, held: Collection[str]) -> str:
        """A step about as urgent as `urgent` whose model is held, if there is one: loading takes time, too."""
        if self.steps[urgent].needs.get("model") in held:
            return urgent
        for model in held:
            key = self._top(self._by_model[model])
            if key and self.rank[key] >= 0.95 * self.rank[urgent]:
                return key
        return urgent

    def park(self, key: str) -> None:
        """Another run computes this ready step: it is not given out until `unpark`."""
        self.parked.add(key)

    def unpark(self, key: str) -> None:
        self.parked.discard(key)
        if key in self.left and key not in self.running and not self.waits[key]:
            self._push(key)

    def start(self, key: str) -> None:
        self.running.add(key)
        self.work -= self._seconds(key)
        self._lone = self.steps[key].kind in self.alone

    def _stops(self, key: str) -> bool:
        """`key` runs no longer; whether it did."""
        if key not in self.running:
            return False
        self.running.discard(key)
        self._lone = False  # if it was not the lone one, there is none
        return True

    def back(self, key: str) -> None:
        """A running step did not finish (its worker died): it is ready again."""
        if self._stops(key):
            self.work += self._seconds(key)
        self._push(key)

    def finish(self, key: str) -> None:
        """`key` is done: by a worker of this run, or found done by another one."""
        if not self._stops(key) and key in self.left:
            self.work -= self._seconds(key)
        self.parked.discard(key)
        self.left.discard(key)
        self.done.add(key)
        for user in self.users[key]:
            if user in self.waits:
                self.waits[user].discard(key)
                if not self.waits[user] and user in self.left:
                    self._push(user)

    def redo(self, need: str, user: str) -> None:
        """`need`, thought done, turned out damaged when `user` wanted it: it is made again first."""
        if self._stops(user):
            self.work += self._seconds(user)
        self.done.discard(need)
        if need not in self.left:
            self.left.add(need)
            self.work += self._seconds(need)
        self.waits[need] = {n for n in self.steps[need].needs.values() if n not in self.done}
        for key in self.left:
            if need in self.steps[key].needs.values():
                self.waits[key].add(need)
                self.users[need].append(key)
        for inner in self.waits[need]:
            self.users[inner].append(need)
        self.rank[need] = self.rank.get(user, 0.0) + self._seconds(need)
        if not self.waits[need]:
            self._push(need)

    def fail(self, key: str) -> list[str]:
        """`key` failed: it and everything after it will not run. Returns those, `key` first."""
        if self._stops(key):
            self.work += self._seconds(key)
        lost, stack = [], [key]
        while stack:
            k = stack.pop()
            if k in self.left:
                self.left.discard(k)
                self.work -= self._seconds(k)
                self.failed[k] = key
                lost.append(k)
                stack.extend(self.users[k])
        return lost

    @property
    def finished(self) -> bool:
        return not self.left
