"""The display is folded out of events alone: counts, time left, a line for each worker, plain lines for pipes."""

import io
import json

from cpet_bench.display import Plain, State, clock, lines

MACHINE = {"devices": ["cpu:0", "cpu:1"], "dtype": "float32"}
RUN = {
    "event": "run",
    "time": 100.0,
    "cells": 6,
    "steps": 20,
    "missing": 8,
    "recorded": 1,
    "left_out": 2,
    "estimate": 80.0,
    "needed": 40.0,
    "machine": MACHINE,
}


def start(key, device, at, estimate=10.0):
    row = {"event": "start", "time": at, "key": key, "kind": "tune", "label": f"tune {key}"}
    return row | {"device": device, "estimate": estimate}


def done(key, device, at, estimate=10.0, peak=2**30):
    row = {"event": "done", "time": at, "key": key, "label": f"tune {key}", "device": device}
    return row | {"estimate": estimate, "peak": peak, "seconds": 12.0, "bytes": 1}


EVENTS = [
    RUN,
    start("a", "cpu:0", 100.0),
    start("b", "cpu:1", 101.0),
    {"event": "progress", "time": 103.0, "key": "a", "device": "cpu:0", "label": "tune a"}
    | {"done": 3, "total": 9, "text": "loss 1", "memory": 2**31},
    done("a", "cpu:0", 112.0),
    {"event": "cell", "time": 112.1, "cell": "x", "status": "done", "metric": "acc", "value": 0.5},
    {"event": "worker-died", "time": 113.0, "device": "cpu:1", "key": "b", "label": "tune b", "code": -9},
    start("b", "cpu:0", 113.5),
    {"event": "damaged", "time": 114.0, "key": "a", "user": "b", "estimate": 10.0, "again": True, "why": "cut"},
    {"event": "found", "time": 114.5, "key": "f", "label": "model m", "estimate": 10.0},
    start("a", "cpu:0", 115.0),
    start("c", "cpu:1", 115.0),
    {"event": "failed", "time": 118.0, "key": "c", "label": "tune c", "status": "failed", "message": "nan"}
    | {"lost": 3, "estimate": 30.0},
    {"event": "cell", "time": 118.0, "cell": "y", "status": "failed", "metric": None, "value": None},
    {"event": "cell", "time": 118.0, "cell": "z", "status": "pending", "metric": None, "value": None},
]


def fold(events):
    state = State()
    for row in events:
        state.take(row)
    return state


def test_counts_follow_the_events():
    s = fold(EVENTS)
    assert (s.total, s.done, s.failed, len(s.running), s.waiting) == (9, 2, 3, 1, 3)
    assert (s.cells, s.cells_done) == (6, 3)  # one was recorded before, one is done, one failed; pending is not
    assert list(s.running) == ["cpu:0"] and s.running["cpu:0"]["key"] == "a"
    assert s.devices == {"cpu:0": 2**30, "cpu:1": 0} and s.failures == ["tune c: nan"]
    assert s.estimate == 90 and s.spent == 50


def test_time_left_goes_by_estimates_at_the_rate_so_far():
    assert fold(EVENTS[:1]).left(100.0) == 40.0  # nothing known yet: two workers
    s = fold(EVENTS[:5])  # 10 of 80 estimated seconds are done and 10 of b's have passed, in 12 seconds of one clock
    assert abs(s.left(112.0) - 60 / (20 / 12)) < 1e-9
    assert fold(EVENTS).left(1e9) >= 0


def test_the_log_of_a_run_rebuilds_the_display():
    whole = fold(json.loads(json.dumps(row)) for row in EVENTS)
    assert vars(whole) == vars(fold(EVENTS))
    again = fold([*EVENTS, *EVENTS])  # a second run of the same name is appended to the log
    assert vars(again) == vars(whole)
    kept = fold(row for row in EVENTS if row["event"] != "progress")
    assert vars(kept) == vars(whole)  # what is kept lacks the ticks of steps that have ended


def test_a_line_for_each_worker():
    first, second, whole = lines(fold(EVENTS[:4]), 104.0)
    assert "cpu:0" in first and "tune a" in first and "3/9" in first and "loss 1" in first and "2.0 GiB" in first
    assert "4 s of about 10 s" in first and "tune b" in second
    assert "steps 0 done, 2 running, 6 waiting" in whole and "cells 1/6" in whole and "left" in whole and "memory" in whole
    assert lines(fold(EVENTS), 119.0)[1].endswith("idle") and "3 failed" in lines(fold(EVENTS), 119.0)[2]


def test_plain_lines_when_not_a_terminal():
    stream = io.StringIO()
    display = Plain(stream)
    for row in EVENTS:
        display(row)
    text = stream.getvalue().splitlines()
    assert text[0] == "6 cells, 20 steps, 8 to run, about 40 s on cpu:0, cpu:1 in float32, 2 cells left for later"
    assert "[1/8] tune a  12 s" in text and "      x: acc 0.5000" in text
    assert any("ended (status -9)" in line for line in text) and any("FAILED: tune c: nan" in line for line in text)
    assert any("made by another run" in line for line in text) and "\x1b" not in stream.getvalue()


def test_clock():
    assert [clock(s) for s in (4.4, 99, 185, 7800)] == ["4 s", "99 s", "3:05 min", "2:10 h"]
