"""Training documents as padded batches: what each row feeds the model, and where its loss is taken.

A document (see `evaluation.pairs`) is one of three kinds: choices of one token each (its context alone is run, the choices
are compared at the last position), choices of several tokens (a row per choice), or a target text (one row). The row of the
right answer is the one whose hidden states are distilled.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .errors import InputError
from .settings import TrainSettings

POOL = 16  # batches by tokens are cut from about so many batches' worth of shuffled documents, sorted by length


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


def trained_on(n_docs: int, train: TrainSettings) -> int:
    """How many documents are trained on: the first of min(n_docs, train.documents), but for those that early stop holds out.

    Raises InputError where none is left.
    """
    n = min(n_docs, train.documents)
    if train.early_stop and train.early_stop.documents >= n:
        message = f"{train.early_stop.documents} of the {n} training documents are to be held out: nothing is left to train on"
        raise InputError(f"{message}; hold out fewer, or give more training data", key="train.early_stop.documents")
    return n - (train.early_stop.documents if train.early_stop else 0)


def visits(pairs: list[dict], train: TrainSettings, start: int | None) -> tuple[list[list[int]], dict[int, Document]]:
    """The documents of each step by their indices, and the rows of all that are visited. The same for every seed and cell.

    start: the decoder's first token, for encoder-decoder models; None for decoder-only ones.
    """
    if not train.steps:
        return [], {}
    if train.batch_tokens:
        every = [document(i, pairs[i], train.max_tokens, start) for i in range(trained_on(len(pairs), train))]
        order = token_order(every, train)
        return order, {i: every[i] for step in order for i in step}
    order = data_order(len(pairs), train)
    return order, {i: document(i, pairs[i], train.max_tokens, start) for step in order for i in step}


def data_order(n_docs: int, train: TrainSettings) -> list[list[int]]:
    """Indices of the documents of each step, from `order_seed` alone; more steps only add to the end.

    The documents (see `trained_on`) are shuffled anew for each pass over them.
    """
    n = trained_on(n_docs, train)
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


def token_order(documents: list[Document], train: TrainSettings) -> list[list[int]]:
    """As `data_order`, with as many documents of like length per step as come to `batch_tokens` padded tokens at most.

    Each pass shuffles the documents, sorts them by length within pools of about POOL batches, cuts those into batches and
    shuffles the batches. A document that is longer than the budget is a batch of its own. `documents`: by their index.
    """
    budget, generator = train.batch_tokens, random.Random(train.order_seed)
    order: list[list[int]] = []
    while len(order) < train.steps:
        one_pass = list(range(len(documents)))
        generator.shuffle(one_pass)
        batches: list[list[int]] = []
        while one_pass:
            size = tokens = 0
            while size < len(one_pass) and tokens < POOL * budget:
                tokens += padded_tokens([documents[one_pass[size]]])
                size += 1
            pool, one_pass = one_pass[:size], one_pass[size:]
            batch: list[int] = []
            for i in sorted(pool, key=lambda i: documents[i].length):
                if batch and padded_tokens([documents[j] for j in (*batch, i)]) > budget:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        generator.shuffle(batches)
        order += batches
    return order[: train.steps]


def padded_tokens(documents: list[Document]) -> int:
    """Tokens that a pass over all of `documents` at once runs, padding among them."""
    rows = [r for d in documents for r in d.rows]
    texts = len(documents) * max(len(d.rows[0].encoder) for d in documents)
    return len(rows) * max(len(r.ids) for r in rows) + texts


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
