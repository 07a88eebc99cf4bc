"""Training documents as padded batches: what each row feeds the model, and where its loss is taken.

A document (see `evaluation.pairs`) is one of three kinds: choices of one token each (its context alone is run, the choices
are compared at the last position), choices of several tokens (a row per choice), or a target text (one row). The row of the
right answer is the one whose hidden states are distilled.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .settings import TrainSettings


@dataclass(frozen=True)
class Row:
    """One sequence. ids: what the model (of an encoder-decoder model: its decoder) reads. encoder: what its encoder reads.

    places, tokens: positions of ids whose next token is scored, and that token (-1: the document's choices are compared).
    gold: whether this is the row of the right answer.
    """

    document: int
    choice: int
    ids: tuple[int, ...]
    encoder: tuple[int, ...]
    places: tuple[int, ...]
    tokens: tuple[int, ...]
    gold: bool


@dataclass(frozen=True)
class Document:
    """The rows of one training document; choices: token ids to compare where all choices are single tokens, else ()."""

    index: int
    kind: str  # "single", "several" or "target"
    rows: tuple[Row, ...]
    choices: tuple[int, ...]
    answer: int

    @property
    def length(self) -> int:
        return max(max(len(r.ids), len(r.encoder)) for r in self.rows)

    @property
    def distilled(self) -> Row:
        return next(r for r in self.rows if r.gold)


def data_order(n_docs: int, train: TrainSettings) -> list[list[int]]:
    """Indices of the documents of each step, from `order_seed` alone; more steps only add to the end.

    The first min(n_docs, train.documents) documents are shuffled anew for each pass over them.
    """
    n = min(n_docs, train.documents)
    if n < 1:
        raise ValueError("there are no training documents")
    generator, queue, order = random.Random(train.order_seed), [], []
    for _ in range(train.steps):
        while len(queue) < train.batch:
            one_pass = list(range(n))
            generator.shuffle(one_pass)
            queue += one_pass
        order.append(queue[: train.batch])
        queue = queue[train.batch :]
    return order


def document(index: int, pair: dict, max_tokens: int, start: int | None = None) -> Document:
    """The rows of one pair. Contexts lose their first tokens where a row would be longer than `max_tokens`.

    Args:
        start: the decoder's first token, for encoder-decoder models; None for decoder-only ones.
    """
    context = [int(t) for t in pair["context_ids"]]
    choices = [tuple(int(t) for t in c) for c in pair["choice_ids"]]
    gold = int(pair["gold"])
    if not choices:
        answers, kind, gold = [tuple(int(t) for t in pair["target_ids"])], "target", 0
    elif all(len(c) == 1 for c in choices):
        answers, kind = [choices[gold]], "single"
    else:
        answers, kind = choices, "several"
    rows = []
    for number, answer in enumerate(answers):
        answer = answer[:max_tokens]
        room = max_tokens if start is not None else max(1, max_tokens - len(answer) + 1)
        prefix = tuple(context[-room:]) if context else ()
        read = (start, *answer[:-1]) if start is not None else (*prefix, *answer[:-1])
        first = 0 if start is not None else len(prefix) - 1
        if first < 0:
            raise ValueError(f"training document {index} has no context to predict its answer from")
        places = tuple(range(first, first + len(answer)))
        tokens = (-1,) if kind == "single" else answer
        encoder = prefix if start is not None else ()
        rows.append(Row(index, number, read, encoder, places, tokens, number == gold or kind == "single"))
    return Document(index, kind, tuple(rows), tuple(c[0] for c in choices) if kind == "single" else (), gold)


def split(documents: list[Document], micro: int, overhead: int = 48) -> list[list[Document]]:
    """Group documents, longest first, so that the least is padded: each group costs rows x longest + `overhead` tokens.

    Groups have at most `micro` documents. `overhead` is what a forward and backward pass costs before its first token.
    """
    order = sorted(documents, key=lambda d: (-d.length, d.index))
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        options = []
        for begin in range(max(0, end - micro), end):
            rows = sum(len(d.rows) for d in order[begin:end])
            options.append((best[begin][0] + rows * order[begin].length + overhead, begin))
        best.append(min(options))
    groups, end = [], len(order)
    while end:
        groups.append(order[best[end][1] : end])
        end = best[end][1]
    return groups[::-1]
