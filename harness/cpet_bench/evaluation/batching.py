"""From requests to sequences that a model runs, with everything shared that can be, in batches of like length.

No model and no torch here: the plan follows from the requests and the settings alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A continuation to score after a context, both as long as the model can read. Several add up to a rolling request."""

    request: int
    context: Ids
    continuation: Ids


@dataclass
class Row:
    """One sequence to run. ids: what the (decoder's) model reads; encoder: what an encoder reads.

    scored: (piece, position): the continuation of `piece` is predicted from `position` of ids on.
    """

    ids: Ids
    encoder: Ids = ()
    scored: list[tuple[Piece, int]] = field(default_factory=list)

    @property
    def context(self) -> int:
        """Tokens before the first scored position's prediction: what rows of one document may share."""
        return min(position for _, position in self.scored) + 1

    @property
    def positions(self) -> int:
        return len({p + i for piece, p in self.scored for i in range(len(piece.continuation))})


@dataclass
class Batch:
    """Rows run together. groups: row numbers by shared context, where contexts are run once and then branched, else ()."""

    rows: list[Row]
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def requests(self) -> list[int]:
        return sorted({piece.request for row in self.rows for piece, _ in row.scored})

    @property
    def tokens(self) -> int:
        """Tokens really run, padding not counted."""
        if not self.groups:
            return sum(len(r.ids) + len(r.encoder) for r in self.rows)
        return sum(self._shared(g) + sum(len(self.rows[i].ids) - self._shared(g) for i in g) for g in self.groups)

    def _shared(self, group: tuple[int, ...]) -> int:
        return self.rows[group[0]].context

    def halves(self) -> list[Batch]:
        """Two batches of half the rows (a group stays whole, until it is alone)."""
        if len(self.groups) > 1:
            middle = len(self.groups) // 2
            return [self._of(self.groups[:middle]), self._of(self.groups[middle:])]
        middle = len(self.rows) // 2
        return [Batch(self.rows[:middle]), Batch(self.rows[middle:])]

    def _of(self, groups) -> Batch:
        rows = [self.rows[i] for g in groups for i in g]
        numbers = iter(range(len(rows)))
        return Batch(rows, tuple(tuple(next(numbers) for _ in g) for g in groups))


def pieces(request: int, row: dict, max_length: int, seq2seq: bool, prefix_token: int) -> list[Piece]:
    """A log-likelihood request as lm-eval's HFLM cuts it to `max_length`: contexts from the left, texts into windows."""
    context, continuation = tuple(row["context_ids"]), tuple(row["continuation_ids"])
    if row["request_type"] == "loglikelihood_rolling":
        return [Piece(request, c, t) for c, t in windows(continuation, prefix_token, max_length)]
    if seq2seq:
        return [Piece(request, context[-max_length:], continuation[-max_length:])]
    continuation = continuation[-max_length:]
    room = max_length + 1 - len(continuation)
    return [Piece(request, context[-room:], continuation)]


def windows(tokens: Ids, prefix_token: int, max_length: int) -> list[tuple[Ids, Ids]]:
    """(context, continuation) of consecutive windows that predict each token once, as lm-eval's rolling windows do."""
    found: list[tuple[Ids, Ids]] = []
    done = min(max_length, len(tokens))
    if done:
        found.append(((prefix_token,), tokens[:done]))
    while done < len(tokens):
        end = min(len(tokens), done + max_length)
        first = max(0, end - max_length - 1)
        found.append((tokens[first : done], tokens[done:end]))
        done = end
    return found


def rows_of(found: Iterable[Piece], seq2seq: bool, start: int | None) -> list[Row]:
    """The fewest sequences that score all pieces: one that begins another is read out of the longer one.

    A piece's sequence is its context and its continuation but the last token; for encoder-decoder models `start` and the
    continuation but the last token.
    """
    keyed = []
    for piece in found:
        answer = piece.continuation[:-1]
        key = (piece.context, (start, *answer)) if seq2seq else ((), (*piece.context, *answer))
        keyed.append((key, piece))
    keyed.sort(key=lambda k: (k[0], k[1].request), reverse=True)
    rows: list[Row] = []
    for (encoder, ids), piece in keyed:
        last = rows[-1] if rows else None
        if last is None or last.encoder != encoder or last.ids[: len(ids)] != ids:
            last = Row(ids, encoder)
            rows.append(last)
        last.scored.append((piece, 0 if seq2seq else len(piece.context) - 1))
    for row in rows:
        row.scored.sort(key=lambda s: (s[0].request, s[1]))
    return rows


def batches(rows: list[Row], tokens: int, positions: int, *, branch: bool) -> list[Batch]:
    """Rows in batches, longest first, of at most `tokens` tokens (padding counted) and `positions` scored positions.

    branch: whether rows that share a long context may run it once; done where it saves at least three tenths.
    """
    shared: dict[tuple[Ids, Ids], list[Row]] = {}
    for row in rows:
        key = (row.encoder, row.ids[: row.context]) if branch else (row.encoder, row.ids)
        shared.setdefault(key, []).append(row)
    plain: list[Row] = []
    together: list[list[Row]] = []
    for group in shared.values():
        context = group[0].context
        apart = sum(len(r.ids) for r in group)
        once = context + sum(len(r.ids) - context for r in group)
        if branch and len(group) > 1 and once < 0.7 * apart and all(r.context == context for r in group):
            together.append(sorted(group, key=_order))
        else:
            plain.extend(group)
    found = [Batch(b) for b in _packed(sorted(plain, key=_order), tokens, positions)]
    return found + _branched(sorted(together, key=lambda g: _order(g[0])), tokens, positions)


def _order(row: Row) -> tuple:
    return -(len(row.ids) + len(row.encoder)), row.scored[0][0].request


def _packed(rows: list[Row], tokens: int, positions: int) -> list[list[Row]]:
    found: list[list[Row]] = []
    width = used = 0
    for row in rows:
        longest = max(width, len(row.ids) + len(row.encoder))
        scored = row.positions
        if found and longest * (len(found[-1]) + 1) <= tokens and used + scored <= positions:
            found[-1].append(row)
            width, used = longest, used + scored
        else:
            found.append([row])
            width, used = len(row.ids) + len(row.encoder), scored
    return found


def _branched(groups: list[list[Row]], tokens: int, positions: int) -> list[Batch]:
    """Groups in batches: the contexts' tokens fit `tokens`, and the branches with the contexts they look at twice that."""
    found: list[list[list[Row]]] = []
    width = reach = count = used = 0
    for group in groups:
        context, longest = group[0].context, max(len(r.ids) for r in group)
        scored = sum(r.positions for r in group)
        fits = (
            bool(found)
            and max(width, context) * (len(found[-1]) + 1) <= tokens
            and max(reach, longest) * (count + len(group)) <= 2 * tokens
            and used + scored <= positions
        )
        if not fits:
            found.append([])
            width = reach = count = used = 0
        found[-1].append(group)
        width, reach = max(width, context), max(reach, longest)
        count, used = count + len(group), used + scored
    result = []
    for batch in found:
        rows = [row for group in batch for row in group]
        numbers = iter(range(len(rows)))
        result.append(Batch(rows, tuple(tuple(next(numbers) for _ in group) for group in batch)))
    return result


def plan_hash(plan: Sequence[Batch]) -> str:
    """16 hex digits that name a batch plan: the same requests in the same batches."""
    shape = [[b.requests, [len(r.ids) for r in b.rows], b.groups] for b in plan]
    return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]
