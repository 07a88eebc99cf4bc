"""The made-up task beside the smoke matrix: its rows follow the rule its file states, and a tiny model can learn it."""

import hashlib
import itertools
import json
from pathlib import Path

from cpet_bench.evaluation.pairs import build_pairs, read_pairs
from cpet_bench.evaluation.tasks import load_tasks, task_spec
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model, load_tokenizer
from cpet_bench.settings import PromptSettings, TaskSettings

MATRICES = Path(__file__).parents[2] / "matrices"
SIZES = {"train": 128, "validation": 64, "test": 64}


def rows(split):
    return [json.loads(line) for line in (MATRICES / "smoke_task" / f"{split}.jsonl").read_text().splitlines()]


def test_the_rows_follow_the_stated_rule():
    words = {1: ["good", "great", "fine", "excellent", "brilliant"], 0: ["bad", "awful", "poor", "terrible", "boring"]}
    nouns = ["film", "movie", "book", "story", "plot", "acting", "food", "service"]
    turns = []
    for label in (1, 0):
        texts = {
            " ".join(filter(None, parts))
            for parts in itertools.product(["the", "this"], nouns, ["was", "is"], ["", "very", "so"], words[label])
        }
        turns.append([(t, label) for t in sorted(texts, key=lambda t: hashlib.sha256(t.encode()).hexdigest())])
    expected = list(itertools.chain.from_iterable(zip(*turns, strict=True)))
    found = [(r["text"], r["label"]) for split in SIZES for r in rows(split)]
    assert found == expected[:256] and len({t for t, _ in found}) == 256
    for split, size in SIZES.items():
        assert len(rows(split)) == size and sum(r["label"] for r in rows(split)) == size / 2


def test_a_tiny_model_learns_it_in_some_dozens_of_steps(tmp_path):
    import torch

    tiny.make("llama", tiny.DEFAULTS, tmp_path / "model")
    tokenizer, model = load_tokenizer(tmp_path / "model"), load_model(tmp_path / "model")
    spec = task_spec(TaskSettings(include="smoke_task"), "smoke_sentiment", MATRICES)
    assert not spec["code"] and len(load_tasks(spec, PromptSettings())["tasks"]["smoke_sentiment"].eval_docs) == 64
    batches = {}
    for split in ("train", "test"):
        facts = build_pairs(spec, None, PromptSettings(), tokenizer, tmp_path / split, 1000, 512, split=split)
        assert facts["single_token_choices"] and facts["documents"] == SIZES[split]
        found = read_pairs(tmp_path / split)
        contexts = [torch.tensor(r["context_ids"]) for r in found]
        ids = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_value=tokenizer.pad_token_id)
        batches[split] = ids, torch.tensor([len(c) - 1 for c in contexts]), torch.tensor([r["gold"] for r in found])
    labels = torch.tensor([c[0] for c in read_pairs(tmp_path / "test")[0]["choice_ids"]])

    def scores(split, part=slice(None)):
        ids, last, gold = (x[part] for x in batches[split])
        return model(input_ids=ids).logits[torch.arange(len(ids)), last][:, labels], gold

    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(48):
        logits, gold = scores("train", slice(step * 16 % 128, step * 16 % 128 + 16))
        torch.nn.functional.cross_entropy(logits, gold).backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        logits, gold = scores("test")
    assert (logits.argmax(-1) == gold).float().mean() > 0.9
