"""What sharing is worth in scoring: lm-eval's HFLM and `respond` on the same 5-shot multiple-choice requests.

Prints tokens run, seconds, their ratios, and the largest difference of a log-probability. Documents are made up on the spot.

    python tests/benchmarks/scoring.py [MODEL_FOLDER] [--documents 48] [--shots 5] [--tokens 2048] [--batch 4]
        [--dtype float32] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
from pathlib import Path

TEXT = (
    "river stone bridge window garden letter winter summer doctor teacher kitchen market village engine mountain harbour "
    "music paper silver forest holiday morning evening travel answer question history science nature machine colour"
)
WORDS = TEXT.split()


def documents(count: int, shots: int, rng: random.Random) -> list[tuple[str, str]]:
    """(context, continuation) of four choices of two to five words per document, after the same worked examples."""

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    examples = "".join(f"Question: {text(20, 40)}?\nAnswer: {text(2, 5)}\n\n" for _ in range(shots))
    found = []
    for _ in range(count):
        context = f"{examples}Question: {text(20, 40)}?\nAnswer:"
        found += [(context, " " + text(2, 5)) for _ in range(4)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    for name, default in (("documents", 48), ("shots", 5), ("tokens", 2048), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    import pyarrow.parquet as pq
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from cpet_bench.evaluation import requests, scorer
    from cpet_bench.evaluation.encoding import Encoder
    from cpet_bench.models import tiny
    from cpet_bench.models.loading import load_model, load_tokenizer

    with tempfile.TemporaryDirectory() as root:
        where = Path(root)
        folder = Path(args.model) if args.model else where / "model"
        if not args.model:
            tiny.make("llama", {**tiny.DEFAULTS, "positions": 4096, "hidden": 256, "layers": 6, "intermediate": 1024}, folder)
        model = load_model(folder, device=args.device, dtype=args.dtype)
        tokenizer = load_tokenizer(folder)
        asked = documents(args.documents, args.shots, random.Random(0))
        instances = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in asked]
        encoder = Encoder(tokenizer, model.config.is_encoder_decoder)
        more = {"task": "made_up", "document": "", "repeat": 0}
        rows = [requests._row(inst, encoder) | {"index": n, "doc_id": n // 4, **more} for n, inst in enumerate(instances)]
        requests.write_table(rows, requests.SCHEMA, where / "requests.parquet")
        about = {"seq2seq": encoder.seq2seq, "prefix_token": encoder.prefix_token, "max_tokens": 10**6, "seed": 0}
        (where / "requests.json").write_text(json.dumps(about))

        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
        lm.loglikelihood(instances[:4], disable_tqdm=True)
        started = time.perf_counter()
        theirs = lm.loglikelihood(instances, disable_tqdm=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        naive = time.perf_counter() - started

        quiet = {"progress": lambda *_: None, "should_stop": lambda: False}
        started = time.perf_counter()
        facts = scorer.respond(model, tokenizer, where, where, tokens_per_batch=args.tokens, scratch=where / "scratch", **quiet)
        ours = time.perf_counter() - started
        answers = pq.read_table(where / "responses.parquet").to_pylist()

    print(f"{len(rows)} requests of {args.documents} documents, {args.shots} shots, {args.dtype} on {args.device}")
    print(f"HFLM     {facts['naive_tokens']:>9} tokens {naive:8.2f} s")
    print(f"respond  {facts['tokens']:>9} tokens {ours:8.2f} s  in {facts['batches']} batches")
    print(f"ratio    {facts['naive_tokens'] / facts['tokens']:>9.2f} tokens {naive / ours:8.2f} seconds")
    apart = max(abs(a["logprob"] - p) for a, (p, _) in zip(answers, theirs, strict=True))
    flags = sum(a["greedy"] != g for a, (_, g) in zip(answers, theirs, strict=True))
    print(f"largest difference of a log-probability {apart:.2e}, greedy flags that differ {flags}")


if __name__ == "__main__":
    main()
