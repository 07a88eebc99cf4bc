"""From requests to sequences that a model runs, with everything shared that can be, in batches of like length.

No model and no torch here: the plan follows from the requests and the settings alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Ids = tuple[int, ...]
REACH = 4


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
    """Rows run together.

    groups: row numbers by shared context, where contexts are run once and then branched, else (). prefix: how many tokens at
    the start of all rows are run once, for this batch and for those after it that start the same.
    """

    rows: list[Row]
    groups: tuple[tuple[int, ...], ...] = ()
    prefix: int = 0

    @property
    def requests(self) -> list[int]:
        return sorted({piece.request for row in self.rows for piece, _ in row.scored})

    @property
    def shape(self) -> list:
        return [self.requests, [len(r.ids) for r in self.rows], self.groups, self.prefix]

    @property
    def start(self) -> Ids:
        """The tokens that the rows share with other batches."""
        return self.rows[0].ids[: self.prefix]

    @property
    def tokens(self) -> int:
        """Tokens really run; neither padding nor the prefix is counted, an encoder's text once for all its rows."""
        shared = sum((len(g) - 1) * (self.rows[g[0]].context - self.prefix) for g in self.groups)
        own = sum(len(r.ids) - self.prefix for r in self.rows)
        return own - shared + sum(map(len, {r.encoder for r in self.rows}))

    def halves(self) -> list[Batch]:
        """Two batches of half the rows (a group stays whole, until it is alone)."""
        if len(self.groups) > 1:
            middle = len(self.groups) // 2
            return [self._of(self.groups[:middle]), self._of(self.groups[middle:])]
        middle = len(self.rows) // 2
        return [Batch(self.rows[:middle], prefix=self.prefix), Batch(self.rows[middle:], prefix=self.prefix)]

    def _of(self, groups) -> Batch:
        return _batch([[self.rows[i] for i in g] for g in groups], self.prefix)


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
        found.append((tokens[first:done], tokens[done:end]))
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

    branch: whether rows that share a context may run it once, and contexts that share their start (few-shot examples) that;
    done where it saves at least three tenths. What a batch looks at with that, rows times their length, is up to REACH times
    `tokens`.
    """
    shared: dict[tuple[Ids, Ids], list[Row]] = {}
    for row in rows:
        key = (row.encoder, row.ids[: row.context]) if branch else (row.encoder, row.ids)
        shared.setdefault(key, []).append(row)
    groups: list[list[Row]] = []
    for group in shared.values():
        context = group[0].context
        apart = sum(len(r.ids) for r in group)
        if branch and len(group) > 1 and apart - (len(group) - 1) * context < 0.7 * apart:
            groups.append(sorted(group, key=_order))
        else:
            groups.extend([row] for row in group)
    found: list[Batch] = []
    for prefix, members in _prefixes(groups, tokens // 2) if branch else [(0, groups)]:
        members.sort(key=lambda g: _order(g[0]))
        for kind in ([g for g in members if len(g) == 1], [g for g in members if len(g) > 1]):
            found += [_batch(b, prefix) for b in _packed(kind, prefix, tokens, positions)]
    return found


def _order(row: Row) -> tuple:
    return -(len(row.encoder) or len(row.ids)), row.scored[0][0].request


def _batch(groups: list[list[Row]], prefix: int) -> Batch:
    rows = [row for g in groups for row in g]
    if len(groups[0]) == 1:
        return Batch(rows, prefix=prefix)
    numbers = iter(range(len(rows)))
    return Batch(rows, tuple(tuple(next(numbers) for _ in g) for g in groups), prefix)


def _packed(groups: list[list[Row]], prefix: int, tokens: int, positions: int) -> list[list[list[Row]]]:
    """Groups in batches: contexts (single rows whole) fit `tokens`, and branches with all they look at REACH times that."""
    found: list[list[list[Row]]] = []
    width = reach = count = used = 0
    for group in groups:
        longest = max(len(r.ids) + len(r.encoder) for r in group)
        context = (group[0].context if len(group) > 1 else longest) - prefix
        scored = sum(r.positions for r in group)
        fits = (
            bool(found)
            and max(width, context) * (len(found[-1]) + 1) <= tokens
            and max(reach, longest) * (count + len(group)) <= REACH * tokens
            and used + scored <= positions
        )
        if not fits:
            found.append([])
            width = reach = count = used = 0
        found[-1].append(group)
        width, reach = max(width, context), max(reach, longest)
        count, used = count + len(group), used + scored
    return found


def _prefixes(groups: list[list[Row]], least_saved: int) -> list[tuple[int, list[list[Row]]]]:
    """(length, groups) of sets of groups whose contexts start with the same tokens; length 0: those left over.

    From the contexts in lexical order and what neighbours share: a set is taken whole where that saves at least half of what
    sharing at any depth could, and is else cut where the neighbours share least. A set has batches of its own: it must save
    `least_saved` tokens.
    """
    order = sorted(groups, key=lambda g: (g[0].ids[: g[0].context], g[0].scored[0][0].request))
    starts = [g[0].ids[: g[0].context - 1] for g in order]  # the last token of a context stays with what is scored
    common = [0, *(_common(a, b) for a, b in zip(starts, starts[1:], strict=False))]
    lengths = [g[0].context + sum(len(r.ids) - g[0].context for r in g) for g in order]
    found: list[tuple[int, list[list[Row]]]] = []
    alone: list[list[Row]] = []
    stack = [(0, len(order))]
    while stack:
        first, end = stack.pop()
        inner = common[first + 1 : end]
        if sum(inner) < max(1, least_saved):
            alone += order[first:end]
            continue
        least = min(inner)
        saved = least * len(inner)
        if 2 * saved >= sum(inner) and saved >= max(least_saved, 0.3 * sum(lengths[first:end])):
            found.append((least, order[first:end]))
            continue
        cuts = [first, *(first + 1 + i for i, c in enumerate(inner) if c == least), end]
        stack += reversed(list(zip(cuts, cuts[1:], strict=False)))
    return [(0, alone), *found] if alone else found


def _common(a: Ids, b: Ids) -> int:
    """How many tokens `a` and `b` share at their start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def plan_hash(shapes: Sequence[list]) -> str:
    """16 hex digits that name a batch plan, from each batch's `shape`: the same requests in the same batches."""
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
