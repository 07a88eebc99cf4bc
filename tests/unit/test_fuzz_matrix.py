"""Matrices that are wrong in every way, written by Hypothesis: each ends with status 2 and one message that says where."""

import contextlib
import copy
import io
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpet_bench.cli.main import main

BASE = {
    "name": "fuzz",
    "model": {"tiny": {"source": "tiny:llama", "options": {"hidden": 64}}},
    "compression": {
        "none": "none",
        "nf4": {"backend": "bitsandbytes", "type": "nf4"},
        "w": {"backend": "wanda", "pattern": "2:4", "calibration": {"documents": 8}},
    },
    "pet": {"none": "none", "lora": {"method": "lora", "r": 4, "target_modules": ["q_proj"]}},
    "restoring": {
        "vanilla": {},
        "cpet": {"inherit": True, "recover": {"r": 4}, "distill": {"weight": 1.0}},
        "matched": {"control": "matched", "of": "cpet"},
    },
    "task": {"movie_reviews": {"limit": 10}},
    "seed": [0, 1],
    "train": {"lr": 1e-3, "steps": 4},
    "prompt": {"fewshot": 0},
    "probes": {"throughput": {"batch": 1}},
    "device": {"dtype": "float32"},
    "exclude": [{"compression": "none", "restoring": "cpet"}],
}
CALLS = 1000
LINED = re.compile(r"\.ya?ml:\d+: ")

text = st.text(min_size=1, max_size=40)
name = st.text(st.sampled_from("abcxyz0189_.+-/\\ %é漢\u202e\u0000'\"{}[]:#&*!|>"), min_size=1, max_size=80)
huge = st.one_of(st.integers(min_value=10**10), st.integers(max_value=-1), st.just(float("inf")), st.just(float("nan")))
nested = st.sampled_from([[], {}, [1, [2]], {"a": 1}])
wrong_scalar = st.one_of(text.filter(lambda t: not _numeric(t)), huge, nested)
odd_key = text.filter(lambda t: t not in ("lr", "steps", "train", "from"))


def _numeric(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def places(value, at=()):
    """Every mapping in `value`, by its path."""
    if isinstance(value, dict):
        yield at
        for key, inner in value.items():
            yield from places(inner, (*at, key))


CLOSED = [p for p in places(BASE) if p not in {(a,) for a in ("model", "compression", "pet", "restoring", "task")}]
CLOSED = [p for p in CLOSED if p[:1] != ("pet",) or len(p) != 1]
NUMBERS = [
    ("train", "lr"),
    ("train", "steps"),
    ("task", "movie_reviews", "limit"),
    ("restoring", "cpet", "recover", "r"),
    ("restoring", "cpet", "distill", "weight"),
    ("compression", "w", "calibration", "documents"),
    ("prompt", "fewshot"),
    ("probes", "throughput", "batch"),
    ("model", "tiny", "options", "hidden"),
]
WORDS = [
    ("model", "tiny", "source"),
    ("compression", "nf4", "backend"),
    ("compression", "nf4", "type"),
    ("compression", "w", "pattern"),
    ("pet", "lora", "method"),
    ("restoring", "matched", "control"),
    ("restoring", "matched", "of"),
    ("device", "dtype"),
]
AXES = ["model", "compression", "pet", "restoring", "task"]


def put(path, value):
    found = copy.deepcopy(BASE)
    at = found
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return found


def add(path, key, value):
    found = copy.deepcopy(BASE)
    at = found
    for part in path:
        at = at[part]
    at.pop(key, None)
    at[f"zz{key}"] = value
    return found


def bad_word(path, word):
    good = {"tiny:llama", "tiny:gpt2", "tiny:opt", "tiny:t5", "cpet", "vanilla", "lora"}
    return put(path, "nothing" if isinstance(word, str) and word in good else word)


def bad_name(axis, word):
    found = copy.deepcopy(BASE)
    found[axis][f"/{word}"] = next(iter(found[axis].values()))
    return found


documents = st.one_of(
    st.builds(put, st.sampled_from(NUMBERS), wrong_scalar.filter(lambda v: v != {})),
    st.builds(bad_word, st.sampled_from(WORDS), st.one_of(text, huge, st.just([]), st.just(None))),
    st.builds(add, st.sampled_from(CLOSED), odd_key, st.one_of(text, huge, st.just({}))),
    st.builds(lambda a, v: put((a,), v), st.sampled_from(AXES), st.one_of(st.just({}), st.just([]), huge, text)),
    st.builds(bad_name, st.sampled_from(AXES), name),
    st.builds(lambda v: put(("seed",), v), st.one_of(st.sampled_from([[], [1, 1], [-1], [[0]], 2**40]), text)),
    st.builds(lambda r: put(("exclude",), r), st.sampled_from([3, [3], [{}], [{"x": 1}], [{"seed": 9}], [{"model": []}]])),
    st.builds(lambda e: put(("extends",), e), st.sampled_from(["self.yaml", "../no.yaml", "/no/such.yaml", 3, ["a", 1], "\0"])),
    st.builds(lambda v: put(("allow_code",), v), st.sampled_from(["yes", 1, [], "true"])),
    st.builds(lambda n: put(("name",), n), name.map(lambda n: "../" + n)),
)
REPEATED = "a{0}: &a{0} [{1}]\n"
raw = st.one_of(
    st.text(max_size=200).filter(lambda t: not t.strip().startswith("#")),
    st.binary(max_size=100).map(lambda b: b"\xff" + b),
    st.integers(7, 12).map(lambda d: "a0: &a0 [x]\n" + "".join(REPEATED.format(i, f"*a{i - 1}," * 12) for i in range(1, d))),
    st.integers(100, 5000).map(lambda d: "[" * d),
    st.integers(100, 3000).map(lambda d: "".join("  " * i + "a:\n" for i in range(d))[:100_000]),
    st.sampled_from(["a: !!python/object/apply:os.system ['x']\n", "a: !x y\n", "- a\n", "3\n", "", "? [a]\n: b\n"]),
    st.just("a: 1\n" * 2_000_000),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def kib(name: str) -> int:
    return int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


@pytest.fixture(scope="module", autouse=True)
def memory_before():
    """Resident memory in KiB at this module's start, and the peak set back to it (Linux)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")
    return kib("VmRSS")


def call(path: Path) -> tuple[int, str, float]:
    out, err = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", str(path), "--runs", str(path.parent / "runs"), "--store", str(path.parent / "store")])
    assert not out.getvalue()
    return code, err.getvalue(), time.perf_counter() - started


def judge(path: Path, place: bool) -> None:
    code, message, seconds = call(path)
    assert code == 2, message
    assert message.startswith("cpet-bench: ") and str(path.parent) in message and "Traceback" not in message, message
    assert message.count("\n") == 1 or "\n" in path.read_text(errors="replace"), message
    assert len(message) < 5000 and seconds < 5
    if place:
        assert LINED.search(message), message


@settings(max_examples=CALLS - CALLS // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=documents)
def test_wrong_matrices(document, folder):
    path = folder / "self.yaml"
    body = json.dumps(document, ensure_ascii=True, indent=1)
    path.write_text(body.replace("Infinity", ".inf").replace("NaN", ".nan"))
    judge(path, place=True)


@settings(max_examples=CALLS // 5, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=raw)
def test_files_that_are_no_matrix(content, folder):
    path = folder / "raw.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    judge(path, place=False)


def test_memory_stayed_small(memory_before):
    """The peak of all of the above over what this process had before, which may hold other tests' libraries: with the
    100 MiB of a bare command, under 500 MiB."""
    if memory_before is None:
        pytest.skip("the peak of memory is measured on Linux")
    assert kib("VmHWM") - memory_before < 400 * 1024
