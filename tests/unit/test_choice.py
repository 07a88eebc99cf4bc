"""Which cells come first, which fit into a budget, which make up a balanced sample; limits and times as a user writes them."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import made_plans
import pytest
from pydantic import ValidationError

from cpet_bench import choice
from cpet_bench.errors import InputError
from cpet_bench.matrix import load_matrix
from cpet_bench.settings import LimitSettings, seconds_of
from cpet_bench.steps import KINDS


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return made_plans.plan(tmp_path_factory.mktemp("plan"), models=3, compressions=6, pets=2, tasks=2, seeds=2)


def needs(plan, ids):
    return set(plan.closure(k for i in ids for k in plan.roles[i].values()))


TIMES = {"2h": 7200, "30min": 1800, "30m": 1800, "1h30min": 5400, "90": 90, 90: 90, "1.5h": 5400, "1d": 86400, "45 s": 45}
NO_TIMES = ["", "0", "-1h", "soon", "2x", "h", "nan", "inf", "1e400", True, None, "9" * 50, "2 weeks", 0, -5, float("inf")]


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_time(text):
    with pytest.raises(ValueError, match="is no time"):
        seconds_of(text)


def test_limits_are_for_every_kind_of_step():
    assert set(LimitSettings.model_fields) == set(KINDS)
    limits = LimitSettings(tune="2h", responses=90)
    assert limits.of("tune", 1.0) == 7200 and limits.of("responses", 1e6) == 90
    assert limits.of("probe", 1.0) == 600 and limits.of("probe", 100.0) == 2000
    with pytest.raises(ValidationError):
        LimitSettings(tune="fast")


def test_wrong_limits_name_file_line_and_key(tmp_path):
    path = tmp_path / "made.yaml"
    path.write_text(made_plans.text() + "limits: {tune: 2h, responses: 30min}\n")
    assert load_matrix(path).limits == LimitSettings(tune=7200, responses=1800)
    line = len(path.read_text().splitlines()) + 1
    for wrong, key in (("{tune: soon}", "limits.tune"), ("{tuning: 2h}", "limits"), ("{probe: -3}", "limits.probe")):
        path.write_text(made_plans.text() + f"\nlimits: {wrong}\n")
        with pytest.raises(InputError) as error:
            load_matrix(path)
        assert f"{path}:{line}: {key}" in str(error.value)
    assert "Did you mean tune?" in str(_error(path, made_plans.text() + "limits: {tun: 2h}\n"))


def _error(path, text):
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_matrix(path)
    return error.value


def test_what_others_are_compared_with_comes_first(plan):
    estimates, _ = made_plans.times(plan, 0)
    order = choice.useful(plan, plan.steps, estimates)
    assert sorted(c.id for c in order) == sorted(c.id for c in plan.cells)
    place = {cell.id: i for i, cell in enumerate(order)}
    refers = choice.references_of(plan.cells)
    dense = [c for c in plan.cells if not c.compression]
    assert {c.id for c in order[: len(dense)]} == {c.id for c in dense}
    referred = set().union(*refers.values())
    for cell in plan.cells:
        assert cell.id in referred or all(place[r] < place[cell.id] for r in refers[cell.id])
    untuned = [place[c.id] for c in dense if c.pet is None]
    assert max(untuned) < min(place[c.id] for c in dense if c.pet is not None)  # the cheap ones


@pytest.mark.parametrize("workers", [1, 4])
def test_a_budget_takes_what_fits_and_dense_cells_first(plan, workers):
    estimates, _ = made_plans.times(plan, 0)
    order = choice.useful(plan, plan.steps, estimates)
    machine = {"devices": [f"cuda:{i}" for i in range(workers)], "device": "cuda"}
    sizes = []
    for budget in (0.1, 1000.0, 6000.0, 40_000.0, 1e9):
        clock = choice.Clock(plan, plan.steps, estimates, machine)
        kept = choice.within(plan, order, plan.steps, clock, budget)
        total = sum(estimates[k] for k in needs(plan, kept)) / workers
        assert total <= budget + 1e-6
        assert clock.after([]) == pytest.approx(max(total, clock.path)) and clock.path <= budget
        left = [c for c in plan.cells if c.id not in kept]
        for cell in left[:40]:  # nothing that would still have fitted is left out
            assert clock.after(plan.closure(plan.roles[cell.id].values())) > budget
        sizes.append(len(kept))
    assert sizes[0] == 0 and sizes == sorted(sizes) and sizes[-1] == len(plan.cells)
    few = choice.within(plan, order, plan.steps, choice.Clock(plan, plan.steps, estimates, machine), 3000.0 / workers)
    assert few and {c.axes["compression"] for c in plan.cells if c.id in few} == {"none"}


def test_what_is_done_costs_nothing(plan):
    estimates, _ = made_plans.times(plan, 0)
    missing = [k for k, s in plan.steps.items() if s.kind == "metrics"]
    clock = choice.Clock(plan, missing, estimates, {"devices": ["cpu"], "device": "cpu"})
    kept = choice.within(plan, plan.cells, missing, clock, 4.0 * 10)
    assert len(kept) == 10  # metrics take four seconds each


def test_probes_of_workers_that_share_a_processor_take_their_full_time(plan):
    estimates, _ = made_plans.times(plan, 0)
    probes = [k for k, s in plan.steps.items() if s.kind == "probe"]
    took = {}
    for device in ("cpu", "cuda"):
        machine = {"devices": [f"{device}:{i}" for i in range(2)], "device": device}
        took[device] = choice.Clock(plan, probes, estimates, machine).after(probes)
    assert took["cpu"] == sum(estimates[k] for k in probes) == 2 * took["cuda"]


def test_shares():
    assert choice.share("20%") == 0.2 and choice.share("0.2") == 0.2 and choice.share("100%") == 1
    for wrong in ("0", "0%", "120%", "1.5", "-3%", "some", "nan", ""):
        with pytest.raises(InputError, match="is no share"):
            choice.share(wrong)


@pytest.mark.parametrize("part", [0.1, 0.2, 0.5])
def test_a_sample_is_balanced_over_every_axis(plan, part):
    kept = choice.sample(plan.cells, part)
    assert abs(len(kept) - part * len(plan.cells)) <= 6
    chosen = [c for c in plan.cells if c.id in kept]
    refers = choice.references_of(plan.cells)
    assert all(refers[c.id] <= kept for c in chosen)  # what a cell is compared with comes with it
    for axis in ("model", "compression", "pet", "task", "seed"):
        counts = Counter(c.axes[axis] for c in chosen if c.pet is not None or axis != "seed")
        assert counts.keys() == {c.axes[axis] for c in plan.cells}
        equal = [n for name, n in counts.items() if name != "none"]  # dense and untuned ones come in as references
        assert max(equal) - min(equal) <= max(6, 0.25 * sum(equal) / len(equal)), (axis, counts)
    kinds = Counter(c.axes["restoring"] for c in chosen)
    assert kinds.keys() == Counter(c.axes["restoring"] for c in plan.cells).keys()


def test_a_sample_is_the_same_for_the_same_seed_only(plan, tmp_path):
    assert choice.sample(plan.cells, 0.2, 1) == choice.sample(plan.cells, 0.2, 1)
    assert choice.sample(plan.cells, 0.2, 1) != choice.sample(plan.cells, 0.2, 2)
    assert choice.sample(plan.cells, 1.0) == {c.id for c in plan.cells}
    program = "import sys; sys.path.insert(0, sys.argv[1]); import made_plans, pathlib; from cpet_bench import choice\n"
    program += "cells = made_plans.plan(pathlib.Path(sys.argv[2]), tasks=2, seeds=2).cells\n"
    program += "print(sorted(choice.sample(cells, 0.2, 1)))"
    at = [str(Path(__file__).parent), str(tmp_path)]
    said = {
        subprocess.run(
            [sys.executable, "-c", program, *at], env=os.environ | {"PYTHONHASHSEED": h}, check=True, capture_output=True
        ).stdout
        for h in "123"
    }  # references are sets of ids, whose order differs between processes
    assert said == {f"{sorted(choice.sample(plan.cells, 0.2, 1))}\n".encode()}
    one = choice.sample(plan.cells, 1e-6)
    assert 1 <= len(one) <= 6  # one cell, with what it is compared with


def test_a_sample_of_many_cells_is_drawn_in_seconds(tmp_path):
    plan = made_plans.plan(tmp_path, models=10, compressions=12, pets=6, seeds=5)
    started = time.process_time()
    kept = choice.sample(plan.cells, 0.2)
    print(f"{len(kept)} of {len(plan.cells)} cells drawn in {time.perf_counter() - started:.2f} s")
    assert abs(len(kept) - 0.2 * len(plan.cells)) <= 6 and time.process_time() - started < 15
