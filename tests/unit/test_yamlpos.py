"""The YAML reader: YAML 1.2 scalars, a line for everything, and nothing that a file can do to the reader."""

import time

import pytest

from cpet_bench import yamlpos
from cpet_bench.errors import InputError


def parse(text, tmp_path):
    return yamlpos.parse(text, tmp_path / "m.yaml")


def test_scalars_are_yaml_1_2(tmp_path):
    text = "a: 2:4\nb: no\nc: 2026-11-24\nd: 1e-3\ne: true\nf: ~\ng: '1'\nh: 0x10\ni: .inf\nj: -7\nk: 1_000\n"
    found = parse(text, tmp_path).data
    assert found == {
        "a": "2:4",
        "b": "no",
        "c": "2026-11-24",
        "d": 0.001,
        "e": True,
        "f": None,
        "g": "1",
        "h": "0x10",
        "i": ".inf",
        "j": -7,
        "k": "1_000",
    }


def test_lines_of_keys_and_items(tmp_path):
    found = parse("a:\n  b: 1\n  c: [x,\n    y]\nd:\n  - e: 2\n  - f: 3\n", tmp_path)
    lines = {path: line for path, (_, line) in found.places.items()}
    assert lines["a", "b"] == 2 and lines["a", "c"] == 3 and lines["a", "c", 1] == 4
    assert lines["d", 0, "e"] == 6 and lines["d", 1] == 7 and lines["d", 1, "f"] == 7
    assert found.locate(("a", "b", "nothing"))[1] == 2


def test_aliases_and_merging(tmp_path):
    found = parse("base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\ntwo: *b\n", tmp_path).data
    assert found["one"] == {"y": 3, "x": 1} and found["two"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("a: 1\na: 2\n", "twice", 2),
        ("a: !!python/object:os.system {}\n", "tags", 1),
        ("a: 1\n---\nb: 2\n", "second one", 2),
        ("a: [1, 2\nb: 3\n", "no valid YAML", 2),
        ("a:\n  [1]: 2\n", "key must be text", 2),
        ("a: *nothing\n", "no anchor", 1),
        ("a: &a [*a]\n", "no anchor", 1),
        ("<<: 3\n", "mappings only", 1),
        ("a: \x07\n", "no valid YAML", None),
        ("true: 1\n", "key must be text", 1),
    ],
)
def test_what_is_refused(text, says, line, tmp_path):
    with pytest.raises(InputError, match=says) as caught:
        parse(text, tmp_path)
    assert caught.value.file and (line is None or caught.value.line == line)


def test_a_billion_laughs_end_at_once(tmp_path):
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    started = time.process_time()
    with pytest.raises(InputError, match="aliases followed"):
        parse(text, tmp_path)
    assert time.process_time() - started < 2


def test_deep_nesting_is_refused_and_not_a_crash(tmp_path):
    with pytest.raises(InputError, match="nest"):  # libyaml has a limit of its own
        parse("[" * 100_000, tmp_path)
    with pytest.raises(InputError, match="nested deeper"):
        parse("".join("  " * i + "a:\n" for i in range(200)), tmp_path)


def test_a_large_file_is_not_read(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"a: 1\n" * 2_000_000)
    with pytest.raises(InputError, match="at most"):
        yamlpos.read(path)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        yamlpos.read(path)
