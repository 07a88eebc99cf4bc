"""What lm-eval asks of a model: one row per request, in the order in which lm-eval wants the answers, with token ids."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, StepFailed, Unsupported
from ..settings import PromptSettings
from .encoding import Encoder
from .tasks import load_tasks

IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("task", pa.string()),
        ("doc_id", pa.int64()),
        ("document", pa.string()),
        ("request_type", pa.string()),
        ("choice", pa.int32()),
        ("repeat", pa.int32()),
        ("context", pa.string()),
        ("continuation", pa.string()),
        ("gen_kwargs", pa.string()),
        ("context_ids", IDS),
        ("continuation_ids", IDS),
    ]
)


def build_requests(
    spec: dict[str, Any], prompt: PromptSettings, tokenizer, out: Path, limit: int | None = None
) -> dict[str, Any]:
    """Write `out`/requests.parquet and `out`/requests.json (what scoring has to know besides) for a task or group.

    A row: index; task; doc_id (lm-eval's); document (see document_ids); request_type (loglikelihood,
    loglikelihood_rolling, generate_until); choice; repeat; context and continuation as text; gen_kwargs as JSON; token ids of
    both, not cut yet. A rolling request has its text as continuation.

    Returns facts: requests, documents, tokens, types. Raises InputError for a chat template that is not there, Unsupported
    for tasks with images or sound.
    """
    encoder = Encoder(tokenizer)
    rows: list[dict[str, Any]] = []
    types: Counter[str] = Counter()
    documents = 0
    for name, task in load_tasks(spec, prompt)["tasks"].items():
        instances = build_instances(task, prompt, encoder, limit)
        names: dict[int, str] = document_ids({i.doc_id: i.doc for i in instances})
        documents += len(names)
        for instance in instances:
            row = _row(instance, encoder)
            types[row["request_type"]] += 1
            row |= {"task": name, "doc_id": instance.doc_id, "document": names[instance.doc_id], "choice": instance.idx}
            for repeat in range(instance.repeats or 1):
                rows.append(row | {"index": len(rows), "repeat": repeat})
    write_table(rows, SCHEMA, Path(out, "requests.parquet"))
    about = {
        "seq2seq": encoder.seq2seq,
        "prefix_token": encoder.prefix_token,
        "max_tokens": prompt.max_tokens,
        "seed": 0,
    }
    Path(out, "requests.json").write_text(json.dumps(about))
    tokens = sum(len(r["context_ids"]) + len(r["continuation_ids"]) for r in rows)
    return {"requests": len(rows), "documents": documents, "tokens": tokens, "types": dict(types)}


def prompt_arguments(prompt: PromptSettings) -> dict[str, Any]:
    """The prompt settings under the names that lm-eval's `evaluate()` has for them."""
    return {
        "system_instruction": prompt.system,
        "apply_chat_template": prompt.chat_template,
        "fewshot_as_multiturn": prompt.chat_template,
    }


def build_instances(task, prompt: PromptSettings, encoder: Encoder, limit: int | None) -> list:
    """lm-eval's instances of a task, as its `evaluate()` builds them."""
    task.build_all_requests(
        limit=limit,
        chat_template=chat_template(prompt, encoder),
        tokenizer_name="",
        **prompt_arguments(prompt),
    )
    return task.instances


def chat_template(prompt: PromptSettings, encoder: Encoder) -> Callable | None:
    """The function lm-eval gets to render conversations, if the prompt settings want one."""
    if not prompt.chat_template:
        return None
    if not encoder.tokenizer.chat_template:
        raise InputError("the model's tokenizer has no chat template", key="prompt.chat_template")
    return encoder.chat


def _row(instance, encoder: Encoder) -> dict[str, Any]:
    kind, args = instance.request_type, instance.args
    row: dict[str, Any] = {"request_type": kind, "context": args[0], "continuation": None, "gen_kwargs": None}
    if kind == "generate_until":
        kwargs = args[1] if isinstance(args[1], dict) else {}
        ids: tuple[list[int], list[int]] = (encoder.prompt(args[0]), [])
        row["gen_kwargs"] = json.dumps(kwargs, sort_keys=True)
        extra = args[2:]
    elif kind == "loglikelihood_rolling":
        row |= {"context": "", "continuation": args[0]}
        ids, extra = ([], encoder.encode(args[0])), args[1:]
    else:
        row["continuation"] = args[1]
        ids, extra = encoder.pair(args[0], args[1]), args[2:]
        if not ids[1]:
            raise StepFailed(f"the answer {args[1]!r} of document {instance.doc_id} of {instance.task_name} has no token")
    if extra:
        raise Unsupported(f"task {instance.task_name} asks about more than text")
    return row | {"context_ids": ids[0], "continuation_ids": ids[1]}


def document_ids(documents: dict[int, Any]) -> dict[int, str]:
    """16 hex digits per document, from its normalised content; the second of two equal ones gets another than the first.

    The same document has the same id in every run, whatever the prompt, the limit or the model.
    """
    seen: Counter[str] = Counter()
    found = {}
    for number, document in documents.items():
        text = json.dumps(document, sort_keys=True, ensure_ascii=False, default=str)
        text = " ".join(unicodedata.normalize("NFC", text).split())
        seen[text] += 1
        again = f"\n{seen[text]}" if seen[text] > 1 else ""
        found[number] = hashlib.sha256((text + again).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return found


def write_table(rows: list[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    """Rows as zstd-compressed parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
