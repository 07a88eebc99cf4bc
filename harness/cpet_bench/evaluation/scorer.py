"""Responses of a model to requests: log-likelihoods and texts as lm-eval's HFLM gives them, what can be shared run once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from ..compression.sizes import LENGTHS
from ..errors import StepFailed, Stopping
from ..failpoints import failpoint
from ..pet.layer_limits import no_room
from ..pet.prompts import virtual_tokens
from ..training_model import start_token
from . import generation
from .batching import Batch, pieces, plan_hash, rows_of
from .batching import batches as score_batches
from .forward import Scorer, can_branch, check_head
from .requests import write_table

SCHEMA = pa.schema([("index", pa.int64()), ("logprob", pa.float64()), ("greedy", pa.bool_()), ("text", pa.string())])
_UNSET = 10**12  # tokenizers say 10^30 where they know of no limit

Job = Batch | generation.Prompts


def respond(
    model: nn.Module,
    tokenizer,
    requests: Path,
    out: Path,
    *,
    tokens_per_batch: int,
    scratch: Path,
    progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Answer `requests` (a folder that evaluation.requests wrote) and write `out`/responses.parquet and `out`/plan.json.

    A row a request, in order of index: logprob (float64; sum over the continuation's tokens, natural log), greedy (whether
    greedy decoding gives the continuation), text; what does not apply is null. plan.json has the requests of each batch.
    Finished batches are kept in `scratch`/responses.jsonl; a call that was stopped goes on from there.

    Returns facts: requests, batches, plan (its hash), halved (batches split for want of memory), tokens (run, padding not
    counted), naive_tokens (what HFLM runs for the same), seconds (of all calls).
    Raises Stopping once asked to; StepFailed where one row is too much for the memory; Unsupported for an unknown head.
    """
    table = pq.read_table(Path(requests, "requests.parquet")).to_pylist()
    about = json.loads(Path(requests, "requests.json").read_text())
    length = min(about["max_tokens"], max_length(model, tokenizer))
    model.eval()
    with torch.inference_mode():
        jobs = plan(table, about, model, tokenizer, length, tokens_per_batch)
        name = plan_hash([job.shape for job in jobs])
        kept = Kept(Path(scratch, "responses.jsonl"), name)
        if any(isinstance(job, Batch) for job in jobs):
            check_head(model)
        run = Runner(model, tokenizer, about["seed"])
        total = sum(job.tokens for job in jobs)
        done = sum(job.tokens for i, job in enumerate(jobs) if i in kept.lines)
        progress(done, total, "responses")
        for number, job in enumerate(jobs):
            if number in kept.lines:
                continue
            if should_stop():
                raise Stopping(f"stopped after {len(kept.lines)} of {len(jobs)} batches")
            kept.add(number, run.job(job))
            done += job.tokens
            progress(done, total, f"batch {len(kept.lines)} of {len(jobs)}")
    lines = [kept.lines[i] for i in range(len(jobs))]
    write_table(_rows(table, lines), SCHEMA, Path(out, "responses.parquet"))
    Path(out, "plan.json").write_text(json.dumps([job.requests for job in jobs]))
    starts = [job.start if isinstance(job, Batch) else () for job in jobs]
    shared = sum(len(now) for before, now in pairwise([(), *starts]) if now != before)
    return {
        "requests": len(table),
        "batches": len(jobs),
        "plan": name,
        "halved": sum(line["halved"] for line in lines),
        "tokens": sum(line["tokens"] for line in lines) + shared,
        "naive_tokens": naive_tokens(table, length, about) + sum(line["tokens"] for line in lines if line["texts"]),
        "seconds": sum(line["seconds"] for line in lines),
    }


def max_length(model: nn.Module, tokenizer) -> int:
    """How many tokens lm-eval lets this model read at once; 2,048 where neither it nor its tokenizer says.

    Raises StepFailed where virtual tokens leave no room for a document's.
    """
    config = model.config.get_text_config(decoder=True)
    found = next((getattr(config, name) for name in LENGTHS if getattr(config, name, None)), tokenizer.model_max_length)
    whole, taken = int(found) if found and found < _UNSET else 2048, virtual_tokens(model)
    if why := no_room(whole, taken):
        raise StepFailed(why)
    return whole - taken


def plan(table: list[dict], about: dict, model: nn.Module, tokenizer, length: int, tokens: int) -> list[Job]:
    """All batches in the order in which they are run. It follows from the requests, the settings and the model's class."""
    seq2seq = model.config.is_encoder_decoder
    if seq2seq != about["seq2seq"]:
        raise StepFailed("the requests were built for a model of another kind (encoder-decoder or not) than this one")
    generate = [row for row in table if row["request_type"] == "generate_until"]
    score = [row for row in table if row["request_type"] != "generate_until"]
    found = [p for row in score for p in pieces(row["index"], row, length, seq2seq, about["prefix_token"])]
    rows = rows_of(found, seq2seq, start_token(model))
    jobs: list[Job] = list(score_batches(rows, tokens, tokens, branch=can_branch(model)))
    return jobs + generation.batches(generate, tokenizer, length, tokens, seq2seq, about["prefix_token"])


def naive_tokens(table: list[dict], length: int, about: dict) -> int:
    """Tokens that HFLM runs for the log-likelihoods, padding not counted: each request's whole sequence.

    HFLM does run sequences once that differ in their last token alone (answers of one token), on decoder-only models.
    """
    total = 0
    seen: set[tuple] = set()
    for row in table:
        if row["request_type"] == "generate_until":
            continue
        for piece in pieces(row["index"], row, length, about["seq2seq"], about["prefix_token"]):
            ids = (*piece.context, *piece.continuation[:-1])
            if about["seq2seq"]:
                total += len(ids) + 1
            elif row["request_type"] == "loglikelihood_rolling" or ids not in seen:
                seen.add(ids)
                total += len(ids)
    return total


class Runner:
    """Runs jobs, in halves where the memory does not do."""

    def __init__(self, model: nn.Module, tokenizer, seed: int):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.scorer = Scorer(model)

    def job(self, job: Job) -> dict[str, Any]:
        """scores: [request, logprob, greedy] of each piece; texts: [request, text]; tokens, halved, seconds."""
        started = time.perf_counter()
        line = self._run(job)
        return {**line, "seconds": time.perf_counter() - started}

    def _run(self, job: Job) -> dict[str, Any]:
        try:
            if isinstance(job, Batch):
                scores = [[piece.request, logprob, greedy] for piece, logprob, greedy in self.scorer.score(job)]
                wrong = next((request for request, logprob, _ in scores if math.isnan(logprob)), None)
                if wrong is not None:
                    raise StepFailed(f"the model's log-probabilities are no numbers (request {wrong}): its states overflowed")
                return {"scores": scores, "texts": [], "tokens": job.tokens, "halved": 0}
            texts, tokens = generation.answer(self.model, self.tokenizer, job, self.seed)
            return {"scores": [], "texts": list(zip(job.requests, texts, strict=True)), "tokens": tokens, "halved": 0}
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Only here, past the handler, is the failed pass's memory free: the exception held its frames.
        self.scorer.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = len(job.rows if isinstance(job, Batch) else job.ids)
        if rows == 1:
            raise StepFailed(f"out of memory on a single sequence of {job.tokens} tokens: {reason}")
        first, second = (self._run(half) for half in job.halves())
        return {k: first[k] + second[k] for k in first} | {"halved": first["halved"] + second["halved"] + 1}


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of this machine did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))


class Kept:
    """Finished batches of this plan by number, as JSON lines that are only ever appended to."""

    def __init__(self, path: Path, plan: str):
        self.path, self.lines = path, dict[int, dict[str, Any]]()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a kill may leave half a line
        found = [json.loads(line) for line in whole.splitlines()]
        if not found or found[0].get("plan") != plan:
            path.write_text(json.dumps({"plan": plan}) + "\n")
            return
        with path.open("r+b") as file:
            file.truncate(len(whole))
        self.lines = {line["batch"]: line for line in found[1:]}

    def add(self, number: int, line: dict[str, Any]) -> None:
        failpoint("responses.before")
        with self.path.open("a") as file:
            size = file.tell()
            file.write(json.dumps({"batch": number, **line}) + "\n")
        failpoint("responses.written", path=self.path, since=size)
        self.lines[number] = line


def _rows(table: list[dict], lines: list[dict]) -> list[dict[str, Any]]:
    """Responses in the order of the requests; the pieces of a long text are summed, whatever order they were run in."""
    scores: dict[int, list[tuple[float, bool]]] = {}
    for line in lines:
        for request, logprob, greedy in line["scores"]:
            scores.setdefault(request, []).append((logprob, greedy))
    texts = {request: text for line in lines for request, text in line["texts"]}
    found = []
    for row in sorted(table, key=lambda r: r["index"]):
        index, mine = row["index"], scores.get(row["index"], [])
        if row["request_type"] == "generate_until":
            found.append({"index": index, "logprob": None, "greedy": None, "text": texts[index]})
        else:
            logprob, greedy = math.fsum(p for p, _ in mine), all(g for _, g in mine)
            found.append({"index": index, "logprob": logprob, "greedy": greedy, "text": None})
    return found
