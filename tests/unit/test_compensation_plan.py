"""What a compensated start is made from, by what the compression took."""

import pytest
from made_plans import MACHINE

from conftest import SMOKE
from cpet_bench.cells import expand
from cpet_bench.estimates import Estimates
from cpet_bench.matrix import load_matrix
from cpet_bench.plan import Planner
from cpet_bench.store import Store

PLANNED = """
extends: {smoke}
name: cut
compression:
  none: none
  pruned: {{backend: magnitude, pattern: "2:4"}}
  narrow: {{backend: structured, ratio: 0.2}}
  twice: [{{backend: structured, ratio: 0.2}}, {{backend: rtn, bits: 4, group: 8}}]
  short: [{{backend: depth, drop: [0]}}, {{backend: rtn, bits: 4, group: 8}}]
  small: {{backend: student, blocks: 1, width: 0.8}}
restoring: {{eora: {{recover: {{r: 4, act: identity, init: eora}}}}}}
exclude: []
include: [{{pet: lora, restoring: eora}}]
"""


def test_moments_are_of_the_dense_model_where_inputs_were_lost(tmp_path):
    """One for all that were cut, since it has the same; and only of what was cut is a start made as it was not before."""
    (tmp_path / "cut.yaml").write_text(PLANNED.format(smoke=SMOKE))
    matrix = load_matrix(tmp_path / "cut.yaml")
    plan = Planner(matrix, MACHINE).build(cells := expand(matrix))
    starts = {cell.axes["compression"]: plan.steps[plan.steps[plan.roles[cell.id]["tune"]].needs["init"]] for cell in cells}
    read = {name: plan.steps[start.needs["moments"]].needs["model"] for name, start in starts.items()}
    dense = {name for name, start in starts.items() if read[name] == start.needs["dense"] and name != "none"}
    assert dense == {"narrow", "twice"} and len({starts[name].needs["moments"] for name in dense}) == 1
    assert {name for name, start in starts.items() if start.settings.get("cuts")} == {"narrow", "twice", "short"}
    counts = {name: start.params["compressions"] for name, start in starts.items()}
    assert counts == {"none": 0, "small": 0, "twice": 2, "short": 2} | dict.fromkeys(("pruned", "narrow", "nf4", "wanda24"), 1)


def test_a_sequential_start_reads_the_text_itself(tmp_path):
    """Its key tells it, and the text, from a start that takes each layer by itself, whose key is as it was before."""
    text = PLANNED.format(smoke=SMOKE)
    text = text.replace("eora}}}", "eora}}, seq: {recover: {r: 4, act: identity, init: eora, sequential: true}}}")
    (tmp_path / "cut.yaml").write_text(text.replace("restoring: eora}]", "restoring: [eora, seq]}]"))
    matrix = load_matrix(tmp_path / "cut.yaml")
    plan = Planner(matrix, MACHINE).build(cells := expand(matrix))
    starts = {
        (cell.axes["compression"], cell.axes["restoring"]): plan.steps[plan.steps[plan.roles[cell.id]["tune"]].needs["init"]]
        for cell in cells
    }
    assert len({start.key for start in starts.values()}) == len(cells)
    for (compression, restoring), start in starts.items():
        assert start.needs.keys() == {"dense", "model", "pairs" if restoring == "seq" else "moments"}
        assert {"sequential", "documents", "seed"} <= start.settings.keys() or restoring == "eora"
        assert bool(start.settings.get("cuts")) == (compression in ("narrow", "twice", "short"))
    store = Store(str(tmp_path / "store"))
    (tmp_path / "store").mkdir()  # where times are kept
    plain, sequential = starts["pruned", "eora"], starts["pruned", "seq"]
    assert Estimates(store).seconds(sequential) > 100 > Estimates(store).seconds(plain) == 30  # it runs models over the text
    Estimates(store).learn(sequential, 5000.0, 1, 1)
    assert Estimates(store).seconds(plain) == 30 and Estimates(store).seconds(sequential) == pytest.approx(5000)
