"""Models and requests for the tests of the scorer, and what lm-eval's own model class says to them."""

import json
import random

import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cpet_bench.evaluation import requests, scorer
from cpet_bench.evaluation.encoding import Encoder
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model, load_tokenizer

WORDS = tiny.WORDS.split()
ARCHITECTURES = ("llama", "gpt2", "opt", "t5")
LONGEST = 160


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("models"), {}

    def get(arch, **options):
        name = json.dumps([arch, options], sort_keys=True)
        if name not in made:
            folder = root / str(len(made))
            tiny.make(arch, {**tiny.DEFAULTS, "positions": LONGEST, **options}, folder)
            made[name] = load_model(folder), load_tokenizer(folder)
        return made[name]

    return get


def sentence(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def score_requests(seed=0):
    """Few-shot documents with shared contexts, single-token answers, and the odd ones."""
    rng = random.Random(seed)
    shots = sentence(rng, 60)
    found = []
    for _ in range(6):
        context = f"{shots} Question {sentence(rng, rng.randint(5, 20))} Answer"
        found += [(context, " " + sentence(rng, rng.randint(2, 5))) for _ in range(3)]
    for _ in range(4):
        context = sentence(rng, rng.randint(3, 30))
        found += [(context, f" {word}") for word in ("good", "bad")]
    for _ in range(3):  # each choice has a context of its own
        found.append((sentence(rng, rng.randint(20, 40)), " " + sentence(rng, 2)))
    found += [(sentence(rng, 260) + " ", sentence(rng, 3)), (sentence(rng, 300), " good bad"), (sentence(rng, 300), " bad")]
    found += [("", sentence(rng, 6)), ("", "film"), ("the", " film")]
    found += [("the film", " was not good"), ("the film was", " not good")]
    found += [found[0], found[3]]
    return [("loglikelihood", pair) for pair in found]


def rolling_requests(seed=1):
    rng = random.Random(seed)
    return [("loglikelihood_rolling", (sentence(rng, n),)) for n in (5, 90, 400, 777)]


def generation_requests(seed=2):
    rng = random.Random(seed)
    kinds = [
        {"until": [" film", "\n"], "max_gen_toks": 14},
        {"until": "e", "max_gen_toks": 20, "do_sample": False, "temperature": 0.7},
        {"until": [], "max_gen_toks": 6, "do_sample": False},
    ]
    lengths = (3, 40, 11, 300, 25)
    return [("generate_until", (sentence(rng, n), kind)) for kind in kinds for n in lengths]


def instances(asked):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for kind, args in asked]


def hflm(model, tokenizer, batch_size=4):
    """lm-eval's own model. Without its cache of one-token answers, which is wrong by a token where a text is cut in two ways
    (0.4.13 reads the first positions for the shorter continuation; ("a b", " c d") and ("a b c", " d") show it)."""
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=LONGEST, logits_cache=False)


def write(folder, asked, tokenizer, seq2seq, max_tokens=LONGEST, ids=()):
    """A requests folder as `build_requests` writes it; `ids`: more log-likelihood requests, given as token ids."""
    encoder = Encoder(tokenizer, seq2seq)
    rows = [requests._row(i, encoder) for i in instances(asked)]
    rows += [{"request_type": "loglikelihood", "context_ids": c, "continuation_ids": t} for c, t in ids]
    rows = [row | {"index": n, "task": "t", "doc_id": n, "document": str(n), "repeat": 0} for n, row in enumerate(rows)]
    requests.write_table(rows, requests.SCHEMA, folder / "requests.parquet")
    about = {"seq2seq": seq2seq, "prefix_token": encoder.prefix_token, "max_tokens": max_tokens, "seed": 0}
    (folder / "requests.json").write_text(json.dumps(about))
    return folder


def respond(model, tokenizer, folder, out, *, tokens=256, scratch=None, should_stop=lambda: False, progress=lambda *_: None):
    out.mkdir(parents=True, exist_ok=True)
    more = {"scratch": scratch or out / "scratch", "progress": progress, "should_stop": should_stop}
    facts = scorer.respond(model, tokenizer, folder, out, tokens_per_batch=tokens, **more)
    return facts, pq.read_table(out / "responses.parquet").to_pylist()
