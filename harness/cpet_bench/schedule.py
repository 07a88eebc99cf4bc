"""Which step runs next on which worker: pure bookkeeping, so that it can be tested without running anything."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping

from .steps import Step


class Schedule:
    """Steps still to be done, given those that are. A step whose need failed fails with it.

    The next step for a worker is one whose model that worker holds, if there is one; among those the one with the
    longest path of estimated seconds after it, so that what others wait for comes first.
    """

    def __init__(self, steps: Mapping[str, Step], wanted: Collection[str], done: Collection[str], seconds: Mapping[str, float]):
        self.steps = steps
        self.done = set(done)
        self.left = {k for k in wanted if k not in self.done}
        self.running: set[str] = set()
        self.failed: dict[str, str] = {}  # step → the step it failed for (itself, or a need)
        self.users: dict[str, list[str]] = defaultdict(list)
        self.waits = {}
        for key in self.left:
            needs = {n for n in steps[key].needs.values() if n not in self.done}
            self.waits[key] = needs
            for need in needs:
                self.users[need].append(key)
        self.rank = self._ranks(seconds)
        self.order = {key: i for i, key in enumerate(steps)}
        self._ready: list[tuple[float, int, str]] = []
        self._by_model: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
        for key in self.left:
            if not self.waits[key]:
                self._push(key)

    def _ranks(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """Longest path in seconds from a step's start to the end of everything after it."""
        rank: dict[str, float] = {}
        for key in reversed([k for k in self.steps if k in self.left]):
            after = max((rank.get(u, 0.0) for u in self.users[key]), default=0.0)
            rank[key] = seconds.get(key, 1.0) + after
        return rank

    def _push(self, key: str) -> None:
        item = (-self.rank[key], self.order[key], key)
        heapq.heappush(self._ready, item)
        model = self.steps[key].needs.get("model")
        if model:
            heapq.heappush(self._by_model[model], item)

    def _pop(self, heap: list) -> str | None:
        while heap:
            key = heap[0][2]
            if key in self.left and key not in self.running and not self.waits[key]:
                return key
            heapq.heappop(heap)
        return None

    def next(self, held: Collection[str] = (), skip: Collection[str] = ()) -> str | None:
        """The step a worker that holds the models `held` should run now; None while there is none. `skip` are leased."""
        if skip:
            return self._next_slow(held, set(skip))
        for model in held:
            key = self._pop(self._by_model[model])
            if key:
                return key
        return self._pop(self._ready)

    def _next_slow(self, held: Collection[str], skip: set[str]) -> str | None:
        ready = [k for k in self.left if k not in self.running and k not in skip and not self.waits[k]]
        ready.sort(key=lambda k: (self.steps[k].needs.get("model") not in held, -self.rank[k], self.order[k]))
        return ready[0] if ready else None

    def start(self, key: str) -> None:
        self.running.add(key)

    def back(self, key: str) -> None:
        """A running step did not finish (its worker died): it is ready again."""
        self.running.discard(key)
        self._push(key)

    def finish(self, key: str) -> None:
        self.running.discard(key)
        self.left.discard(key)
        self.done.add(key)
        for user in self.users[key]:
            if user in self.waits:
                self.waits[user].discard(key)
                if not self.waits[user] and user in self.left:
                    self._push(user)

    def redo(self, need: str, user: str) -> None:
        """`need`, thought done, turned out damaged when `user` wanted it: it is made again first."""
        self.running.discard(user)
        self.done.discard(need)
        self.left.add(need)
        self.waits[need] = {n for n in self.steps[need].needs.values() if n not in self.done}
        for key in self.left:
            if need in self.steps[key].needs.values():
                self.waits[key].add(need)
                self.users[need].append(key)
        for inner in self.waits[need]:
            self.users[inner].append(need)
        self.rank[need] = self.rank.get(user, 0.0) + 1.0
        if not self.waits[need]:
            self._push(need)

    def fail(self, key: str) -> list[str]:
        """`key` failed: it and everything after it will not run. Returns those, `key` first."""
        self.running.discard(key)
        lost, stack = [], [key]
        while stack:
            k = stack.pop()
            if k in self.left:
                self.left.discard(k)
                self.failed[k] = key
                lost.append(k)
                stack.extend(self.users[k])
        return lost

    @property
    def finished(self) -> bool:
        return not self.left
