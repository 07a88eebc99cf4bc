"""`select`: which cells have their rate chosen, what the plan makes of it, and what wins."""

import pytest
from made_plans import MACHINE
from test_matrix import BASE, load

from cpet_bench.cells import expand
from cpet_bench.errors import InputError, StepFailed
from cpet_bench.plan import Planner
from cpet_bench.steps.selecting import _at_the_edge, choice

GRID = "select: {lr: [1e-3, 3e-3, 1e-2], documents: 20}\n"


def cells_of(text, tmp_path):
    matrix = load(text, tmp_path)
    return {c.id.removeprefix("tiny--").replace("--movie_reviews", ""): c for c in expand(matrix)}, matrix


def test_the_nearest_setting_counts(tmp_path):
    cells, _ = cells_of(BASE + GRID, tmp_path)
    assert cells["nf4--lora--cpet--s1"].select.lr == (1e-3, 3e-3, 1e-2) == cells["none--lora--vanilla--s0"].select.lr
    assert cells["nf4--none--none--s0"].select is None
    text = BASE.replace("target_modules: [q_proj]", "target_modules: [q_proj], train: {lr: 2e-3}")
    text = text.replace("cpet: {", "cpet: {select: {lr: [1e-4, 2e-4]}, ").replace("vanilla: {}", "vanilla: {train: {lr: 5e-3}}")
    text = text.replace("matched: {", "matched: {select: false, ")
    cells, _ = cells_of(text + GRID, tmp_path)
    assert cells["nf4--lora--cpet--s0"].select.lr == (1e-4, 2e-4)
    assert cells["nf4--lora--cpet--s0"].dense.select is None and cells["nf4--lora--cpet--s0"].dense.train.lr == 2e-3
    assert cells["nf4--lora--vanilla--s0"].select is None and cells["nf4--lora--vanilla--s0"].train.lr == 5e-3
    assert cells["nf4--lora--matched--s0"].select is None and cells["nf4--lora--matched--s0"].train.lr == 2e-3
    text = BASE.replace("vanilla: {}", "vanilla: {}\n  transfer: {inherit: true, train: {steps: 0}}")
    cells, _ = cells_of(text + GRID, tmp_path)
    assert cells["nf4--lora--transfer--s0"].select is None  # nothing is trained


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BASE + "select: {lr: [1e-3]}\n", "at least 2"),
        (BASE + "select: {lr: [1e-3, 1e-3]}\n", "twice"),
        (BASE + "select: {lr: [1e-3, 2e-3], on: test}\n", "validation"),
        (BASE + "select: {lr: [1e-3, 2e-3], document: 3}\n", "Did you mean documents"),
        (BASE.replace("vanilla: {}", "vanilla: {train: {lr: 1e-3}, select: {lr: [1e-3, 2e-3]}}"), "not both"),
    ],
)
def test_mistakes(text, says, tmp_path):
    with pytest.raises(InputError, match=says):
        load(text, tmp_path)


def test_the_reported_split_cannot_decide(tmp_path):
    text = BASE.replace("limit: 10", "limit: 10, split: validation") + GRID
    matrix = load(text, tmp_path)
    with pytest.raises(InputError, match="which is the one this task reports") as caught:
        Planner(matrix, MACHINE).build(expand(matrix))
    assert caught.value.key == "task.movie_reviews.split" and caught.value.line == 15


def test_candidates_are_tried_once_and_at_the_first_seed(tmp_path):
    matrix = load(BASE + GRID, tmp_path)
    plan = Planner(matrix, MACHINE).build(expand(matrix))
    steps = list(plan.steps.values())
    trials = [s for s in steps if s.kind == "trial"]
    assert len(trials) == 3 * 6  # vanilla, cpet and matched on both compressions; whatever the number of seeds
    assert {s.settings["seed"] for s in trials} == {0} and {s.settings["train"]["lr"] for s in trials} == {1e-3, 3e-3, 1e-2}
    assert all(s.settings["spec"]["split"] == "validation" and s.settings["limit"] == 20 for s in trials)
    tunes = [s for s in steps if s.kind == "tune"]
    assert len(tunes) == 6 and all("rate" in s.needs and "lr" not in s.settings["train"] for s in tunes)
    roles = plan.roles["tiny--nf4--lora--cpet--movie_reviews--s0"]
    assert plan.steps[roles["tune"]].kind == "select" == plan.steps[roles["dense_tune"]].kind
    reported = [s for s in steps if s.kind == "requests" and s.settings["spec"]["split"] == "test"]
    used = {k for s in trials for k in s.needs.values()}
    assert reported and not used & {s.key for s in reported}


def test_weights_of_distillation_are_crossed_with_rates_where_something_is_distilled(tmp_path):
    matrix = load(BASE + "select: {lr: [1e-3, 3e-3], weight: [0.1, 1, 10]}\n", tmp_path)
    plan = Planner(matrix, MACHINE).build(expand(matrix))
    grids = {s.label.split(" lora ")[1]: s.settings["grid"] for s in plan.steps.values() if s.kind == "select"}
    assert len(grids["cpet s0"]) == 6 and len(grids["vanilla s0"]) == len(grids["matched s0"]) == 2
    trials = [s for s in plan.steps.values() if s.kind == "trial" and "distill" in s.settings]
    assert sorted(s.settings["distill"]["weight"] for s in trials) == 4 * [0.1] + 4 * [1] + 4 * [10]


def test_without_select_the_keys_are_as_they_were(tmp_path):
    def keys(text):
        matrix = load(text, tmp_path)
        return Planner(matrix, MACHINE).build(expand(matrix)).roles

    given = BASE.replace("target_modules: [q_proj]", "target_modules: [q_proj], train: {lr: 1e-3}")
    assert keys(given) == keys(given + GRID) == keys(BASE)


def trial(acc, loss):
    both = {"acc": (acc, True), "log_loss": (loss, False)}
    return {"metrics": {name: {"value": v, "higher_is_better": up} for name, (v, up) in both.items()}}


def test_what_wins():
    grid = [{"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}]
    assert choice(grid, [trial(0.7, 1), trial(0.8, 2), trial(0.6, 0.1)]) == (1, "acc")
    assert choice(grid, [trial(0.8, 1), trial(0.8, 0.5), trial(0.8, 0.5)]) == (1, "acc")  # log-loss, then the smaller rate
    assert choice(grid, [{"failed": "not finite"}, trial(0.4, 2), {"failed": "not finite"}]) == (1, "acc")
    perplexity = [{"metrics": {"word_perplexity": {"value": v, "higher_is_better": False}}} for v in (30.0, 20.0, 25.0)]
    assert choice(grid, perplexity) == (1, "word_perplexity")
    with pytest.raises(StepFailed, match="none of the 3 candidates could be trained; the first one: not finite"):
        choice(grid, [{"failed": "not finite"}] * 3)


def test_an_edge_is_of_everything_that_was_tried():
    grid = [{"lr": lr, "weight": weight} for lr in (1e-3, 3e-3, 1e-2) for weight in (0.1, 1.0, 10.0)]
    assert [_at_the_edge(grid, i) for i in range(9)] == [True, True, True, True, False, True, True, True, True]
    assert [_at_the_edge([{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)], i) for i in range(3)] == [True, False, True]
