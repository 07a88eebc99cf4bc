import random

from cpet_bench.schedule import Schedule
from cpet_bench.steps import make_step


def step(name, **needs):
    return make_step("tune", {"name": name}, needs, name)


def graph(*edges):
    """Steps by name; each edge is (name, {role: name})."""
    steps, keys = {}, {}
    for name, needs in edges:
        made = step(name, **{role: keys[n] for role, n in needs.items()})
        keys[name] = made.key
        steps[made.key] = made
    return steps, keys


def test_needs_come_first_and_the_longest_path_before_short_ones():
    steps, k = graph(("m", {}), ("short", {"model": "m"}), ("long", {"model": "m"}), ("after", {"x": "long"}))
    s = Schedule(steps, steps, (), {k["after"]: 100.0}, workers=2)
    assert s.next() == k["m"]
    s.start(k["m"])
    assert s.next() is None
    s.finish(k["m"])
    assert s.next() == k["long"]


def test_a_worker_gets_steps_of_the_model_it_holds():
    steps, k = graph(("a", {}), ("b", {}), ("on-a", {"model": "a"}), ("on-b", {"model": "b"}), ("b2", {"x": "on-b"}))
    first = {k["on-b"]: 0, k["on-a"]: 1}
    s = Schedule(steps, list(steps)[2:], list(steps)[:2], {k["b2"]: 50.0}, first=first)
    assert s.next(held=[k["a"]]) == k["on-a"]
    assert s.next(held=[]) == k["on-b"]
    s = Schedule(steps, list(steps)[2:], list(steps)[:2], {k["b2"]: 50.0}, workers=2)
    assert s.next(held=[k["a"]]) == k["on-b"]  # what the end waits for goes before a model that is held


def test_a_failure_takes_only_what_follows_from_it():
    steps, k = graph(("m", {}), ("bad", {"model": "m"}), ("child", {"x": "bad"}), ("other", {"model": "m"}))
    s = Schedule(steps, steps, [k["m"]], {})
    s.start(k["bad"])
    assert set(s.fail(k["bad"])) == {k["bad"], k["child"]}
    assert s.next() == k["other"] and not s.finished
    s.finish(k["other"])
    assert s.finished


def test_a_damaged_need_is_made_again_first():
    steps, k = graph(("m", {}), ("t", {"model": "m"}), ("u", {"model": "m"}))
    s = Schedule(steps, [k["t"], k["u"]], [k["m"]], {})
    s.start(k["t"])
    s.redo(k["m"], k["t"])
    assert s.next() == k["m"]
    s.start(k["m"])
    assert s.next() is None
    s.finish(k["m"])
    assert {s.next()} <= {k["t"], k["u"]}


def test_a_failure_of_a_parked_or_found_step_leaves_the_work_right():
    steps, k = graph(("m", {}), ("t", {"model": "m"}), ("u", {"model": "t"}), ("v", {"model": "m"}))
    s = Schedule(steps, steps, (), dict.fromkeys(steps, 10.0))
    assert s.work == 40
    s.park(s.next())
    assert s.next() is None
    s.finish(k["m"])  # another run made it
    assert s.work == 30 and s.next() in (k["t"], k["v"])
    s.start(k["t"])
    assert s.work == 20
    s.fail(k["t"])
    assert s.work == 10 and s.next() == k["v"]
    s.start(k["v"])
    s.back(k["v"])
    assert s.work == 10 and s.next() == k["v"]


def test_random_graphs_run_each_step_once_and_in_order():
    rng = random.Random(1)
    for _ in range(50):
        edges = []
        for i in range(30):
            needs = {f"r{j}": f"n{j}" for j in rng.sample(range(i), min(i, rng.randint(0, 3)))}
            edges.append((f"n{i}", needs))
        steps, _ = graph(*edges)
        s, ran, running = Schedule(steps, steps, (), {}), [], []
        while not s.finished:
            key = s.next()
            if key is not None and len(running) < 3:
                assert all(n in ran for n in steps[key].needs.values())
                s.start(key)
                running.append(key)
                continue
            done = running.pop(rng.randrange(len(running)))
            s.finish(done)
            ran.append(done)
        assert sorted(ran) == sorted(steps)


def test_a_choice_among_trials_does_not_wait_for_all_trials_of_the_model_held():
    """So that cells are finished one after the other, and a run that is stopped has some of them."""
    edges = [("m", {})]
    for cell in "xyz":
        edges += [(f"trial {cell}", {"model": "m"}), (f"select {cell}", {"trial0": f"trial {cell}"})]
        edges += [(f"score {cell}", {"model": "m", "adapter": f"select {cell}"})]
    steps, k = graph(*edges)
    first = {key: i // 3 for i, key in enumerate(list(steps)[1:])}
    s = Schedule(steps, list(steps)[1:], list(steps)[:1], {}, first=first)
    names, order = {v: n for n, v in k.items()}, []
    while (key := s.next(held=[k["m"]])) is not None:
        s.start(key)
        order.append(names[key])
        s.finish(key)
    assert order == [f"{what} {cell}" for cell in "xyz" for what in ("trial", "select", "score")]
