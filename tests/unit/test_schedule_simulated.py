"""The schedule on 64 made-up devices with a clock of their own: how close the end comes to the earliest possible one."""

import heapq
import time
from collections import Counter

import made_plans
import pytest

from cpet_bench import choice
from cpet_bench.schedule import ALONE, Schedule

LOAD = 15.0  # seconds to load a model that the worker does not hold
CAPACITY = 2


def simulate(plan, workers, estimates, taken, alone=(), before=None):
    """Run the schedule to its end on a virtual clock: (makespan, loads, [(start, end, worker, key)])."""
    order = choice.first_use(plan, choice.useful(plan, plan.steps, estimates))
    schedule = Schedule(plan.steps, plan.steps, (), estimates, first=order, workers=workers, alone=alone)
    held = [[] for _ in range(workers)]
    idle, busy, now, loads, log = list(range(workers)), [], 0.0, 0, []
    while not schedule.finished:
        waiting = []
        for worker in idle:
            key = schedule.next(held[worker])
            if key is None:
                waiting.append(worker)
                continue
            schedule.start(key)
            seconds, model = taken[key], plan.steps[key].needs.get("model")
            if model:
                if model not in held[worker]:
                    loads += 1
                    seconds += LOAD
                held[worker] = [*[m for m in held[worker] if m != model], model][-CAPACITY:]
            heapq.heappush(busy, (now + seconds, worker, key))
            log.append((now, now + seconds, worker, key))
        assert busy, "steps are left, and none can run"
        now, worker, key = heapq.heappop(busy)
        schedule.finish(key)
        idle = [*waiting, worker]
    return now, loads, log


def bound(plan, workers, taken):
    """No schedule ends earlier: the longest path, and all the work spread over the workers, without any loading."""
    ends = {}
    for key, step in plan.steps.items():
        ends[key] = taken[key] + max((ends[n] for n in step.needs.values()), default=0.0)
    return max(max(ends.values()), sum(taken.values()) / workers)


@pytest.mark.parametrize("workers", [1, 4, 16, 64])
@pytest.mark.parametrize("sizes", [{"models": 4, "compressions": 10, "pets": 2, "seeds": 2}, {"models": 1, "compressions": 30}])
def test_the_end_comes_close_to_the_earliest_possible(tmp_path, workers, sizes):
    plan = made_plans.plan(tmp_path, **sizes)
    assert len(plan.cells) > 400
    for seed in range(3):
        estimates, taken = made_plans.times(plan, seed)
        makespan, loads, log = simulate(plan, workers, estimates, taken)
        ratio = makespan / bound(plan, workers, taken)
        print(f"{len(plan.cells)} cells, {len(plan.steps)} steps, {workers} workers: {ratio:.3f} of the bound, {loads} loads")
        assert ratio <= 1.15
        check(plan, log)


def check(plan, log):
    """Each step once, after all it needs, one at a time on a worker."""
    ends = {key: end for _, end, _, key in log}
    assert Counter(key for *_, key in log) == Counter(list(plan.steps))
    free = {}
    for start, end, worker, key in log:
        assert all(ends[n] <= start + 1e-6 for n in plan.steps[key].needs.values())
        assert start >= free.get(worker, 0.0) - 1e-6
        free[worker] = end


def test_models_are_not_loaded_more_often_than_there_is_use_for(tmp_path):
    """One worker, models that take turns in the plan: each is loaded about once, not once a step."""
    plan = made_plans.plan(tmp_path, models=3, compressions=6)
    estimates, taken = made_plans.times(plan, 0)
    _, loads, log = simulate(plan, 1, estimates, taken)
    models = {plan.steps[key].needs["model"] for *_, key in log if "model" in plan.steps[key].needs}
    uses = sum("model" in plan.steps[key].needs for *_, key in log)
    print(f"{loads} loads of {len(models)} models for {uses} uses")
    assert loads <= 3 * len(models) < uses / 4


def test_dense_cells_are_complete_first(tmp_path):
    """On one worker, where no order ends earlier than another, the first cells complete are what others are held against."""
    plan = made_plans.plan(tmp_path, models=1, compressions=4, seeds=1)
    estimates, taken = made_plans.times(plan, 0)
    _, _, log = simulate(plan, 1, estimates, taken)
    end = {key: end for _, end, _, key in log}
    complete = sorted(plan.cells, key=lambda c: max(end[k] for k in plan.roles[c.id].values()))
    assert [c.axes["compression"] for c in complete[:3]] == ["none"] * 3
    vanilla = [i for i, c in enumerate(complete) if c.axes["restoring"] in ("none", "vanilla")]
    others = [i for i, c in enumerate(complete) if c.axes["restoring"] not in ("none", "vanilla")]
    assert sum(vanilla) / len(vanilla) < sum(others) / len(others)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_speed_is_measured_while_nothing_else_computes(tmp_path, workers):
    plan = made_plans.plan(tmp_path, models=2, compressions=4)
    estimates, taken = made_plans.times(plan, 0)
    makespan, _, log = simulate(plan, workers, estimates, taken, alone=ALONE)
    check(plan, log)
    probes = [(start, end, key) for start, end, _, key in log if plan.steps[key].kind == "probe"]
    assert len(probes) > 5
    for start, end, key in probes:
        during = [k for s, e, _, k in log if k != key and s < end - 1e-9 and e > start + 1e-9]
        assert not during
    alone = sum(taken[key] for *_, key in probes)
    rest = {key: 0.0 if plan.steps[key].kind == "probe" else seconds for key, seconds in taken.items()}
    assert makespan <= 1.15 * (bound(plan, workers, rest) + alone + LOAD * len(probes))
    _, _, free = simulate(plan, workers, estimates, taken)
    assert any(s < end and e > start for start, end, key in probes for s, e, _, k in free if k != key), "the test shows nothing"


def test_its_bookkeeping_is_fast(tmp_path):
    """100,000 steps in a few seconds: here a quarter of that, and the time a step takes does not grow with their number."""

    def each(models: int) -> float:
        plan = made_plans.plan(tmp_path, models=models, compressions=16, pets=4, seeds=5)
        estimates, _ = made_plans.times(plan, 0)
        started = time.process_time()
        schedule, running = Schedule(plan.steps, plan.steps, (), estimates, workers=64), []
        while not schedule.finished:
            key = schedule.next(plan.steps[running[0]].needs.values() if running else ())
            if key is None or len(running) == 64:
                schedule.finish(running.pop(0))
                continue
            schedule.start(key)
            running.append(key)
        seconds = time.process_time() - started
        print(f"{len(plan.steps)} steps scheduled in {seconds:.2f} s")
        return seconds / len(plan.steps)

    few, many = each(1), each(8)
    assert many < 10 / 100_000 and many < 6 * few


def test_parking_is_as_fast_as_not_parking(tmp_path):
    """Steps that other runs compute are set aside one by one: the heaps are not sorted anew for each."""
    plan = made_plans.plan(tmp_path, models=8, compressions=16, pets=4, seeds=4)
    estimates, _ = made_plans.times(plan, 0)
    wanted = [k for k, s in plan.steps.items() if s.kind == "tune"]
    schedule = Schedule(plan.steps, wanted, plan.steps.keys() - set(wanted), estimates)
    started, parked = time.process_time(), []
    while (key := schedule.next()) is not None:
        schedule.park(key)
        parked.append(key)
    assert time.process_time() - started < 2 and len(parked) == len(set(parked)) > 1000
    for key in parked:
        schedule.unpark(key)
    ran = []
    while (key := schedule.next()) is not None:
        schedule.start(key)
        schedule.finish(key)
        ran.append(key)
    assert sorted(ran) == sorted(wanted) and schedule.finished
