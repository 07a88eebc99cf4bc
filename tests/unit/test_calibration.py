"""Calibration text that is too short: refused with the matrix where no text could do, else before the model is loaded."""

from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_plans import MACHINE, SMOKE_TASK

from cpet_bench import registry
from cpet_bench.cells import expand
from cpet_bench.compression.calibration import check_text, least_tokens
from cpet_bench.errors import InputError, StepFailed
from cpet_bench.matrix import load_matrix
from cpet_bench.plan import Planner
from cpet_bench.steps.models import run_compress

# By backend: settings that read text, and the least there is of it
TEXT = {
    "wanda": ('pattern: "2:4"', 64),
    "sparsegpt": ("sparsity: 0.5", 128),
    "gptq": ("bits: 4", 128),
    "structured": ("ratio: 0.2", 64),
    "depth": ("ratio: 0.2", 64),
    "moefy": ("batch: 200", 200),
    "student": ("depth: 0.5, batch_tokens: 1000", 1000),
}
NONE = ["rtn, bits: 4", "magnitude, sparsity: 0.5", "structured, ratio: 0.2, importance: l2", "depth, ratio: 0.2, order: last"]


def plan(backend, tmp_path, chain="{}"):
    """The plan of a matrix with this compression; chain: `{}` with what stands around it."""
    lines = ["name: short", "model: {tiny: {source: 'tiny:llama'}}", "compression:"]
    lines += [f"  c: {chain.replace('{}', f'{{backend: {backend}}}')}", f"task: {{smoke_sentiment: {{include: {SMOKE_TASK}}}}}"]
    path = tmp_path / "matrix.yaml"
    path.write_text("\n".join(lines))
    matrix = load_matrix(path)
    return Planner(matrix, MACHINE).build(expand(matrix))


@pytest.mark.parametrize("name", TEXT)
def test_settings_that_no_text_can_fill_are_refused_with_what_would_do(name, tmp_path):
    given, least = TEXT[name]
    documents = -(-least // 8)
    with pytest.raises(InputError) as caught:
        plan(f"{name}, {given}, calibration: {{documents: {documents - 1}, max_tokens: 8}}", tmp_path)
    assert caught.value.key == "compression.c.calibration" and caught.value.line == 4
    longer = -(-least // (documents - 1))
    wanted = (
        f"at least {least} tokens .* come to {8 * documents - 8}; documents: {documents} or more, or max_tokens: {longer} or"
    )
    assert caught.match(wanted)
    for fits in (f"documents: {documents}, max_tokens: 8", f"documents: {documents - 1}, max_tokens: {longer}"):
        assert plan(f"{name}, {given}, calibration: {{{fits}}}", tmp_path).steps


def test_documents_of_one_token_are_no_text_however_many(tmp_path):
    with pytest.raises(InputError, match="no context.*max_tokens: 2 or more"):
        plan("structured, ratio: 0.2, calibration: {documents: 1000, max_tokens: 1}", tmp_path)


def test_a_task_that_is_not_there_is_named_where_it_stands(tmp_path):
    for chain, at in (("{}", ""), ("[{backend: depth, drop: [0]}, {}]", ".1")):
        with pytest.raises(InputError, match="no task 'smoke_sentimant'. Did you mean smoke_sentiment") as caught:
            plan("wanda, sparsity: 0.5, calibration: {task: smoke_sentimant}", tmp_path, chain)
        assert caught.value.key == f"compression.c{at}.calibration.task" and caught.value.line == 4


def test_in_a_mixture_the_step_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        short = 'wanda, pattern: "2:4", calibration: {documents: 1, max_tokens: 9}'
        plan(short, tmp_path, "[{backend: depth, drop: [0]}, {}]")
    assert caught.value.key == "compression.c.1.calibration"


@pytest.mark.parametrize("backend", NONE)
def test_what_reads_no_text_needs_none(backend, tmp_path):
    steps = plan(backend, tmp_path).steps.values()
    assert not [s for s in steps if s.kind == "pairs"] and any(s.kind == "compress" for s in steps)


def test_text_given_with_an_importance_that_reads_none_changes_nothing(tmp_path):
    def key(**more):
        given = "".join(f", {k}: {v}" for k, v in more.items())
        return [s.key for s in plan(f"structured, ratio: 0.2{given}", tmp_path).steps.values() if s.kind == "compress"]

    for importance in ("l1", "l2", "random"):
        with_text = key(importance=importance, calibration="{task: smoke_sentiment, documents: 3, max_tokens: 4}")
        assert with_text == key(importance=importance)
    assert key() != key(calibration="{documents: 11}") != key(calibration="{documents: 12}")


# -- the documents really there --------------------------------------------------------------------------------------------
def compress_step(tmp_path, lengths, **calibration):
    """The compress step of Wanda on a source that is not there, with these documents."""
    rows = [{"context_ids": list(range(n - 1)), "target_ids": [n]} for n in lengths]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    context = SimpleNamespace(
        settings={"backend": "wanda", "settings": {"pattern": "2:4", "calibration": calibration}},
        inputs={"source": tmp_path / "absent", "examples": tmp_path},
        out=tmp_path / "out",
        pool=SimpleNamespace(clear=lambda: None),
        machine={"owns": ["cpu"], "dtype": "float32"},
        progress=lambda *_: None,
    )
    return run_compress(context)


def test_too_little_text_fails_the_step_before_the_model_is_loaded(tmp_path):
    with pytest.raises(StepFailed) as caught:
        compress_step(tmp_path, [10, 20, 1, 1])
    said = str(caught.value)
    assert "wanda needs calibration text of at least 64 tokens" in said
    assert "4 documents with 30 tokens (of 128 documents asked for)" in said
    assert "more documents" not in said and "max_tokens" not in said and "another task" in said  # all of all there are
    with pytest.raises(
        StepFailed, match=r"3 documents with 60 tokens; what helps: more documents, or a max_tokens above 20, or"
    ):
        compress_step(tmp_path, [30] * 5, documents=3, max_tokens=20)
    with pytest.raises(InputError, match="absent is no model folder"):  # enough of it: the model is what is missing
        compress_step(tmp_path, [30, 40])


def test_a_plugin_that_says_no_number_takes_any_text():
    class Plain:
        name, calibrated = "plain", True

    settings = SimpleNamespace(calibration=registry.get("compression", "wanda").Settings(pattern="2:4").calibration)
    assert least_tokens(Plain, settings) == 1
    check_text(Plain, settings, [[5, 6]])
    with pytest.raises(StepFailed, match="plain needs calibration text"):
        check_text(Plain, settings, [[5]])
