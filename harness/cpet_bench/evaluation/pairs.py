"""Training examples out of lm-eval tasks (or the user's own rows), with the prompt that evaluation asks with."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, StepFailed
from ..settings import PromptSettings, TrainData
from .encoding import Encoder
from .requests import IDS, build_instances, chat_template, document_ids, write_table
from .tasks import _reachable, load_tasks

SCHEMA = pa.schema(
    [
        ("document", pa.string()),
        ("context_ids", IDS),
        ("choice_ids", pa.list_(IDS)),
        ("gold", pa.int32()),
        ("target_ids", IDS),
    ]
)


def build_pairs(
    spec: dict[str, Any] | None,
    train_data: TrainData | None,
    prompt: PromptSettings,
    tokenizer,
    out: Path,
    documents: int,
    max_tokens: int,
    split: str = "train",
) -> dict[str, Any]:
    """Write `out`/pairs.parquet: the first `documents` training documents in the order of their content's hash.

    A row: document (id); context_ids (its last `max_tokens` tokens); for choices choice_ids and gold (index of the right
    one), target_ids being the right choice; for all else choice_ids empty, gold −1 and target_ids what is to be said: the
    answer and an end of text for generation.

    Args:
        spec: the task whose split `split` is used; None where train_data names a JSONL file or a `datasets` set.

    Returns facts: documents, tokens, kind, and the loss it is for. Raises InputError where a task has no such split, a row
    of the user's data is not as it should be, or no row can be used.
    """
    encoder = Encoder(tokenizer)
    if train_data and (train_data.jsonl or train_data.dataset):
        found = _own(train_data, prompt, encoder, documents)
        looked, name = len(found), str(train_data.jsonl or train_data.dataset)
    else:
        found, looked = _from_task(spec, prompt, encoder, documents, split)
        name = f"{spec['name']} ({split} split)"
    rows = []
    for row in found:
        target = row["choice_ids"][row["gold"]] if row.get("choice_ids") else row["target_ids"]
        if not target or not all(row.get("choice_ids", [])):
            continue  # an answer without a token cannot be learnt
        context = row["context_ids"][-max_tokens:]
        rows.append({"choice_ids": [], "gold": -1, **row, "target_ids": target, "context_ids": context})
    if not rows:
        raise _nothing_usable(name, looked)
    write_table(rows, SCHEMA, Path(out, "pairs.parquet"))
    choices = sum(bool(r["choice_ids"]) for r in rows)
    return {
        "documents": len(rows),
        "tokens": sum(len(r["context_ids"]) + len(r["target_ids"]) for r in rows),
        "kind": "choices" if choices == len(rows) else "targets" if not choices else "both",
        "single_token_choices": bool(choices) and all(len(c) == 1 for r in rows for c in r["choice_ids"]),
    }


def _nothing_usable(name: str, looked: int) -> InputError:
    why = f"none of the {looked} rows looked at has an answer of at least one token" if looked else "it is empty"
    remedy = "name other training data (train_data: {task: ...}, {jsonl: ...} or {dataset: ...})"
    return InputError(f"{name} has no usable training row: {why}; {remedy}", key="train_data")


def _from_task(spec, prompt: PromptSettings, encoder: Encoder, documents: int, split: str) -> tuple[list[dict[str, Any]], int]:
    """Examples of a task's split, from several tasks of a group in turn; and how many documents were looked at."""
    found: list[dict[str, Any]] = []
    looked = 0
    tasks = load_tasks(spec, prompt, split=split)["tasks"]
    share = -(-documents // len(tasks))
    for task in tasks.values():
        every = task.eval_docs
        names = document_ids(dict(enumerate(every)))
        first = sorted(names, key=lambda i: names[i])[:share]
        chosen = [every[i] for i in first]
        looked += len(chosen)
        task.doc_iterator = lambda chosen=chosen, **_: enumerate(chosen)  # lm-eval then asks about these alone
        by_document: dict[int, list] = {}
        for instance in build_instances(task, prompt, encoder, None):
            by_document.setdefault(instance.doc_id, []).append(instance)
        for number, instances in by_document.items():
            row = _example(task, instances, encoder)
            if row:
                found.append({"document": names[first[number]], **row})
    return sorted(found, key=lambda r: r["document"])[:documents], looked


def _example(task, instances: list, encoder: Encoder) -> dict[str, Any] | None:
    """One training example from lm-eval's requests about a document; None where it has no right answer."""
    instances = sorted(instances, key=lambda i: i.idx)
    doc, kind = instances[0].doc, instances[0].request_type
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        several_contexts = bool(getattr(task, "multiple_input", 0))
        gold = _gold(task.doc_to_text(doc) if several_contexts else task.doc_to_target(doc), choices)
        if gold is None:
            return None
        if several_contexts:  # the choices are in the context: what follows it is learnt with the right one
            context, target = encoder.pair(*instances[gold].args)
            return {"context_ids": context, "target_ids": target}
        pairs = [encoder.pair(*i.args) for i in instances[: len(choices)]]
        return {"context_ids": pairs[0][0], "choice_ids": [p[1] for p in pairs], "gold": gold}
    if kind == "loglikelihood":
        context, target = encoder.pair(*instances[0].args)
        return {"context_ids": context, "target_ids": target}
    if kind == "loglikelihood_rolling":
        ids = encoder.encode(instances[0].args[0])
        return {"context_ids": [encoder.prefix_token], "target_ids": ids} if ids else None
    target = task.doc_to_target(doc)
    if task.get_config("doc_to_choice") is not None and isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    if isinstance(target, list):
        target = target[0] if target else ""
    if target in (None, ""):
        return None
    delimiter = task.get_config("target_delimiter") or ""
    return _said(encoder, instances[0].args[0], str(target), delimiter)


def _said(encoder: Encoder, context: str, target: str, delimiter: str) -> dict[str, Any]:
    joined = target if not context or context[-1:].isspace() or target[:1].isspace() else delimiter + target
    ids, target_ids = encoder.pair(context, joined)
    if encoder.eos_token is not None:
        target_ids = [*target_ids, encoder.eos_token]
    return {"context_ids": ids, "target_ids": target_ids}


def _gold(value: Any, choices: list[str]) -> int | None:
    """Index of the (first) right choice, or None."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, str) and not isinstance(value, bool):
        return choices.index(value) if value in choices else None
    return int(value) if value is not None and 0 <= int(value) < len(choices) else None


# -- the user's own rows -----------------------------------------------------------------------------------------------
def _own(data: TrainData, prompt: PromptSettings, encoder: Encoder, documents: int) -> list[dict[str, Any]]:
    """Rows with `prompt` and `completion`, or `prompt`, `choices` and `label`.

    With a chat template the prompt is the user's turn; without, prompt and answer are parted by a space where neither has one.
    """
    rows = dict(_jsonl(Path(data.jsonl)) if data.jsonl else _dataset(data))
    names = document_ids(rows)
    templates = {key: text for key in ("prompt", "completion") if (text := getattr(data, key)) is not None}
    render = chat_template(prompt, encoder)
    found = []
    for place in sorted(rows, key=lambda p: names[p])[:documents]:
        row, where = rows[place], {"file": data.jsonl or data.dataset, "line": place}
        row = row | {key: _filled(template, row, key, where) for key, template in templates.items()}
        context = _text(row, "prompt", where)
        delimiter = " "
        if render:
            system = [{"role": "system", "content": prompt.system}] if prompt.system else []
            context, delimiter = render([*system, {"role": "user", "content": context}]), ""
        elif prompt.system:
            context = f"{prompt.system}\n\n{context}"
        if "choices" not in row:
            example = _said(encoder, context, _text(row, "completion", where), delimiter)
        else:
            choices, label = row["choices"], row.get("label")
            if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
                raise InputError("choices must be two or more texts", key="choices", **where)
            if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
                raise InputError(f"label must be an index from 0 to {len(choices) - 1}", key="label", **where)
            parted = context[-1:].isspace()
            pairs = [encoder.pair(context, c if parted or c[0].isspace() else delimiter + c) for c in choices]
            example = {"context_ids": pairs[0][0], "choice_ids": [p[1] for p in pairs], "gold": label}
        found.append({"document": names[place], **example})
    return found


def _filled(template: str, row: dict, key: str, where: dict) -> str:
    """A template of the user's over a row's columns; sandboxed, as a template may come from anywhere."""
    from jinja2 import StrictUndefined, TemplateError, UndefinedError
    from jinja2.sandbox import SandboxedEnvironment

    try:
        return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template).render(row)
    except UndefinedError as error:
        more = {"key": f"train_data.{key}", "given": error.message.split("'")[1], "allowed": map(str, row)}
        raise InputError(f"the template of {key}: {error.message}", **more, **where) from None
    except TemplateError as error:
        raise InputError(f"the template of {key}: {error}", key=f"train_data.{key}", **where) from None


def _text(row: dict, key: str, where: dict) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise InputError(f"a row needs {key!r} as text (and either completion, or choices and label)", key=key, **where)
    return row[key]


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at what else Unicode calls a line break
    except OSError as error:
        raise InputError(f"the training data cannot be read: {error.strerror or error}", file=path) from None
    except UnicodeDecodeError:
        raise InputError("the training data is not UTF-8 text", file=path) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"no valid JSON: {error}", file=path, line=number) from None
        if not isinstance(row, dict):
            raise InputError("a row must be a mapping", file=path, line=number)
        yield number, row


def _dataset(data: TrainData) -> Iterator[tuple[int, dict]]:
    import datasets

    name, _, config = data.dataset.partition(":")
    with _reachable(f"{data.dataset} ({data.split})"):
        found = datasets.load_dataset(name, config or None, split=data.split)
    yield from enumerate(found, 1)


# -- reading -----------------------------------------------------------------------------------------------------------
def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder that build_pairs wrote."""
    return pq.read_table(Path(folder, "pairs.parquet")).to_pylist()


def calibration_ids(folder: Path, documents: int, max_tokens: int, seed: int) -> list[list[int]]:
    """Token ids of at most `documents` documents, each its context and right answer, the first `max_tokens` tokens.

    Where the folder has more documents than asked for, they are drawn by `seed`.
    """
    rows = read_pairs(folder)
    if len(rows) > documents:
        rows = random.Random(seed).sample(rows, documents)
    found = [[*r["context_ids"], *r["target_ids"]][:max_tokens] for r in rows]
    if not any(found):
        raise StepFailed(f"{folder} has no text to calibrate on")
    return [f for f in found if f]
