"""Windows and truncation against lm-eval's own functions; the plan's sharing and packing against plain counting."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpet_bench.evaluation.batching import REACH, Piece, batches, pieces, plan_hash, rows_of, windows

LL = "loglikelihood"
timeless = settings(deadline=None)  # machines are busy


def piece(request, context, continuation):
    return Piece(request, tuple(context), tuple(continuation))


@given(st.integers(0, 40), st.integers(1, 12))
@timeless
def test_windows_are_lm_evals(count, max_length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = tuple(range(100, 100 + count))
    theirs = map(make_disjoint_window, get_rolling_token_windows(list(tokens), 7, max_length, 1))
    ours = windows(tokens, 7, max_length)
    assert ours == [(tuple(c), tuple(t)) for c, t in theirs]
    assert sum((t for _, t in ours), ()) == tokens
    assert all(len(c) + len(t) - 1 <= max_length for c, t in ours)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(6, 12))
@timeless
def test_long_contexts_are_cut_as_hflm_cuts_them(context, continuation, max_length):
    row = {"request_type": LL, "context_ids": range(context), "continuation_ids": range(50, 50 + continuation)}
    (found,) = pieces(3, row, max_length, False, 0)
    whole = [*range(context), *range(50, 50 + continuation)][-(max_length + 1) :]  # HFLM: inp is this but the last token
    assert [*found.context, *found.continuation] == whole
    assert len(found.continuation) == continuation and found.request == 3


def test_an_encoder_reads_the_end_of_a_long_context():
    row = {"request_type": LL, "context_ids": range(9), "continuation_ids": [5, 6]}
    assert pieces(0, row, 4, True, 0) == [piece(0, [5, 6, 7, 8], [5, 6])]


ids = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
some = st.lists(st.tuples(ids, ids), min_size=1, max_size=14).map(lambda p: [piece(i, c, t) for i, (c, t) in enumerate(p)])


@given(some)
@timeless
def test_the_fewest_rows_score_every_piece(found):
    rows = rows_of(found, False, None)
    sequences = {(*p.context, *p.continuation[:-1]) for p in found}
    needed = {s for s in sequences if not any(o != s and o[: len(s)] == s for o in sequences)}
    assert sorted(r.ids for r in rows) == sorted(needed)
    seen = []
    for row in rows:
        for p, position in row.scored:
            read = (*p.context, *p.continuation[:-1])
            assert row.ids[: len(read)] == read and position == len(p.context) - 1
            seen.append(p.request)
    assert sorted(seen) == list(range(len(found)))


@given(some)
@timeless
def test_rows_of_an_encoder_decoder_share_the_encoders_text(found):
    rows = rows_of(found, True, 9)
    for row in rows:
        for p, position in row.scored:
            assert row.encoder == p.context and position == 0
            assert row.ids[: len(p.continuation)] == (9, *p.continuation[:-1])
    assert sorted(p.request for r in rows for p, _ in r.scored) == list(range(len(found)))


long_ids = st.tuples(st.integers(0, 3), st.integers(1, 20), ids).map(lambda t: (t[0],) * t[1] + t[2])
many = st.lists(st.tuples(long_ids, ids), min_size=1, max_size=20).map(lambda p: [piece(i, c, t) for i, (c, t) in enumerate(p)])


@given(many, st.integers(20, 60), st.booleans())
@timeless
def test_batches_hold_every_row_once_and_keep_their_limits(found, tokens, branch):
    rows = rows_of(found, False, None)
    plan = batches(rows, tokens, 30, branch=branch)
    assert sorted(r.ids for b in plan for r in b.rows) == sorted(r.ids for r in rows)
    for batch in plan:
        assert all(r.ids[: batch.prefix] == batch.start and batch.prefix < r.context for r in batch.rows)
        if not branch:
            assert not batch.groups and not batch.prefix
        if batch.groups:
            assert [i for g in batch.groups for i in g] == list(range(len(batch.rows)))
            widths = [batch.rows[g[0]].context - batch.prefix for g in batch.groups]
            for g in batch.groups:
                assert len(g) > 1 and len({batch.rows[i].ids[: batch.rows[i].context] for i in g}) == 1
        else:
            widths = [len(r.ids) - batch.prefix for r in batch.rows]
        if len(widths) > 1:  # one that is too long for the limits still runs, alone
            assert max(widths) * len(widths) <= tokens
            assert max(len(r.ids) for r in batch.rows) * len(batch.rows) <= REACH * tokens
            assert sum(r.positions for r in batch.rows) <= 30


@given(many, st.integers(20, 60))
@timeless
def test_sharing_never_runs_more_tokens(found, tokens):
    rows = rows_of(found, False, None)
    plan = batches(rows, tokens, 10**6, branch=True)
    starts = [b.start for b in plan]
    shared = sum(len(s) for before, s in zip([(), *starts], starts, strict=False) if s != before)
    assert sum(b.tokens for b in plan) + shared <= sum(len(r.ids) for r in rows)


def test_choices_of_a_document_run_its_context_once():
    context = tuple(range(40))
    found = [piece(i, context, (100 + i, 200 + i, 300 + i)) for i in range(4)]
    (batch,) = batches(rows_of(found, False, None), 512, 512, branch=True)
    assert batch.groups == ((0, 1, 2, 3),) and batch.tokens == 40 + 4 * 2
    (plain,) = batches(rows_of(found, False, None), 512, 512, branch=False)
    assert not plain.groups and plain.tokens == 4 * 42


def test_few_shot_examples_run_once_for_all_documents():
    shots = tuple(range(1000, 1300))
    found = [piece(i, (*shots, i // 4, 7, 8, i // 4), (100 + i, 200 + i)) for i in range(40)]
    plan = batches(rows_of(found, False, None), 512, 512, branch=True)
    assert {b.prefix for b in plan} == {300}
    assert sum(b.tokens for b in plan) == 10 * 4 + 40


def test_a_document_that_is_the_shared_start_itself_still_has_a_token_to_score_from():
    shots = tuple(range(1000, 1300))
    found = [piece(0, shots, (5, 6)), *(piece(i, (*shots, i), (5, 6)) for i in range(1, 12))]
    plan = batches(rows_of(found, False, None), 512, 512, branch=True)
    assert {b.prefix for b in plan} == {299}


def test_two_tasks_have_a_prefix_each():
    found = [piece(i, (*range(s, s + 200), i, i), (1, 2)) for s in (1000, 2000) for i in range(s, s + 8)]
    plan = batches(rows_of(found, False, None), 512, 512, branch=True)
    assert {(b.start[0], b.prefix) for b in plan} == {(1000, 200), (2000, 200)}


def test_choices_of_an_encoders_text_stay_together():
    found = [piece(i, [50 + i // 3] * 20, (100 + i, *range(i % 3))) for i in range(12)]
    plan = batches(rows_of(found, True, 0), 100, 100, branch=False)
    for batch in plan:
        texts = {r.encoder for r in batch.rows}
        assert batch.tokens == 20 * len(texts) + sum(len(r.ids) for r in batch.rows)
    assert sum(len({r.encoder for r in b.rows}) for b in plan) <= 4 + len(plan) - 1


def test_halves_keep_all_rows_and_end():
    context = tuple(range(40))
    found = [piece(i, (*context, i // 4), (100 + i, 200 + i)) for i in range(12)]
    (batch,) = batches(rows_of(found, False, None), 4096, 4096, branch=True)
    assert len(batch.groups) == 3
    stack, alone = [batch], []
    while stack:
        at = stack.pop()
        if len(at.rows) == 1:
            alone.append(at.rows[0].ids)
            continue
        first, second = at.halves()
        assert first.rows + second.rows == at.rows and first.rows and second.rows
        assert all(sorted(i for g in h.groups for i in g) == list(range(len(h.rows))) for h in (first, second) if h.groups)
        stack += [first, second]
    assert sorted(alone) == sorted(r.ids for r in batch.rows)


@pytest.mark.parametrize("branch", [True, False])
def test_the_plan_follows_from_the_requests_and_settings_alone(branch):
    found = [piece(i, (*range(30), i // 4), (100 + i, 200 + i)) for i in range(24)]

    def plan(pieces_, tokens):
        return plan_hash([b.shape for b in batches(rows_of(pieces_, False, None), tokens, tokens, branch=branch)])

    assert plan(found, 256) == plan(found[::-1], 256)
    assert plan(found, 256) != plan(found, 128)
