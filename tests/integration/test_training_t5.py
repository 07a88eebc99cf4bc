"""CPET on an encoder-decoder model, trained and scored, against METHODS' formulas in plain torch on transformers' own T5.

Nothing of the reference below comes from cpet_bench: LoRA on q and k, y = W x + alpha / r B A x; the recovery beside every
linear layer of the blocks, y + s U2 gelu(U1 x); the verbaliser, which compares the label words' logits at the decoder's one
position; MSE of the encoder's (0.005) and the decoder's (0.05) hidden states with M + D's over all non-padding tokens
(arXiv 2307.07705, section 3, and its T5 code).
"""

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from transformers import T5ForConditionalGeneration

from cpet_bench.evaluation import requests, scorer
from cpet_bench.models.loading import load_model, load_tokenizer
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.restoring.distill import teacher_features
from cpet_bench.results.validate import validate
from cpet_bench.settings import DistillSettings, PetSettings, RecoverSettings, TrainSettings
from cpet_bench.training import train

WORDS = [[301], [302], [303]]  # what the labels are called
LORA, RECOVER = {"r": 4, "lora_alpha": 6, "target_modules": ["q", "k"]}, {"r": 3, "alpha": 1.5}
DOCUMENTS = [
    {"document": "a", "context_ids": [5, 6, 7, 8, 44, 45], "choice_ids": WORDS, "gold": 1, "target_ids": [302]},
    {"document": "b", "context_ids": [11, 12], "choice_ids": WORDS, "gold": 0, "target_ids": [301]},
    {"document": "c", "context_ids": [5, 14, 15, 16, 17, 18, 19, 20, 21], "choice_ids": WORDS, "gold": 2, "target_ids": [303]},
    {"document": "d", "context_ids": [30], "choice_ids": WORDS[:2], "gold": 1, "target_ids": [302]},
]


# -- the reference -----------------------------------------------------------------------------------------------------
class Reference:
    """A T5 of transformers with LoRA and recovery modules by hooks, their tensors being `parts[layer][name]`."""

    def __init__(self, folder, parts):
        self.model = T5ForConditionalGeneration.from_pretrained(folder).eval().requires_grad_(False)
        self.parts = {layer: {n: t.detach().clone().requires_grad_() for n, t in own.items()} for layer, own in parts.items()}
        for layer, own in self.parts.items():
            self.model.get_submodule(layer).register_forward_hook(self.beside(own))

    @staticmethod
    def beside(own):
        def hook(module, args, y):
            (x,) = args
            if "A" in own:
                y = y + 6 / 4 * (x @ own["A"].T) @ own["B"].T
            if "U1" in own:
                z = x @ own["U1"].T
                y = y + 1.5 / 3 * (z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))) @ own["U2"].T
            return y

        return hook

    def of(self, document, answer=()):
        start = self.model.config.decoder_start_token_id
        ids, own = torch.tensor([document["context_ids"]]), torch.tensor([[start, *answer]])
        return self.model(input_ids=ids, decoder_input_ids=own, output_hidden_states=True)

    def states(self, documents, place):
        """Hidden states of all tokens of all documents: (the encoder's, the decoder's). place -1: the last, -2: before it."""
        outs = [self.of(d) for d in documents]
        return (
            torch.cat([o.encoder_hidden_states[place][0] for o in outs]),
            torch.cat([o.decoder_hidden_states[place][0] for o in outs]),
        )

    def task_loss(self, documents):
        losses = []
        for d in documents:
            logits = self.of(d).logits[0, 0]
            among = torch.stack([logits[word] for (word,) in d["choice_ids"]])
            losses.append(-(among[d["gold"]] - torch.log(torch.exp(among).sum())))
        return sum(losses) / len(losses)


def parts_of(model):
    """The trainable tensors of one of our models, by layer and by the name that METHODS gives them."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer, name = where(name)
            found.setdefault(layer, {})[name] = p
    return found


def where(name):
    for end, short in ((".lora_A.default.weight", "A"), (".lora_B.default.weight", "B"), (".U1", "U1"), (".U2", "U2")):
        if name.endswith(end):
            return name.removesuffix(end).removeprefix("cpet_recovery.0.").replace("/", "."), short
    raise AssertionError(name)


# -- ours --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """M, and C with each weight of its blocks rounded to a sixteenth."""
    dense, rounded = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("rounded")
    make("t5", DEFAULTS, dense)
    model = T5ForConditionalGeneration.from_pretrained(dense)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".layer." in name and p.dim() == 2:
                p.copy_((p * 16).round() / 16)
    model.save_pretrained(rounded)
    load_tokenizer(dense).save_pretrained(rounded)
    return dense, rounded


def ours(folder, seed, recovery=None):
    model = load_model(folder)
    methods.attach(model, PetSettings(method="lora", **LORA))
    if recovery:
        recover.attach_recovery(model, recovery, seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def trained(model, rows, tmp_path, distill=None, features=None, **settings):
    """What one step found, and the gradients it used."""
    grads = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: grads.__setitem__(where(name), p.grad.clone()))
    plain = {"steps": 1, "batch": len(rows), "warmup": 0, "clip": None, **settings}
    more = {"distill": distill, "features": features, "scratch": tmp_path, "progress": lambda *_: None}
    found = train(model, rows, TrainSettings(**plain), should_stop=lambda: False, **more)
    return found, grads


@pytest.mark.parametrize(("hidden", "place"), [("last", -1), ("last_block_input", -2)])
def test_loss_and_gradients_are_the_formulas(hidden, place, folders, tmp_path):
    dense, rounded = folders
    settings = DistillSettings(hidden=hidden)
    teacher = ours(dense, seed=1)
    teacher_features(teacher, DOCUMENTS, settings, TrainSettings(steps=1, batch=4), tmp_path / "f", lambda *_: None)
    student = ours(rounded, seed=2, recovery=RecoverSettings(**RECOVER))
    reference, above = Reference(rounded, parts_of(student)), Reference(dense, parts_of(teacher))
    assert len(reference.parts) == 32 and sum("A" in own for own in reference.parts.values()) == 12  # all in the blocks

    task = reference.task_loss(DOCUMENTS)
    (mine_e, mine_d), (theirs_e, theirs_d) = reference.states(DOCUMENTS, place), above.states(DOCUMENTS, place)
    assert len(mine_e) == 18 and len(mine_d) == 4  # no padding
    encoder = 0.005 * (mine_e - theirs_e.detach()).square().mean()
    decoder = 0.05 * (mine_d - theirs_d.detach()).square().mean()
    loss = task + encoder + decoder
    loss.backward()

    found, grads = trained(student, DOCUMENTS, tmp_path / "s", settings, tmp_path / "f")
    line = found["losses"][0]
    assert line["task"] == pytest.approx(float(task.detach()), rel=1e-5)
    assert line["distill"] == pytest.approx(float((encoder + decoder).detach()), rel=1e-5)
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert min(encoder.item(), decoder.item()) > 1e-3 * task.item()  # each of them is seen
    wanted = {(layer, name): t.grad for layer, own in reference.parts.items() for name, t in own.items()}
    assert grads.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    for place_, grad in wanted.items():
        assert torch.allclose(grads[place_], grad, rtol=1e-5, atol=1e-5 * largest), place_
    # queries and keys of a decoder that reads one token get no gradient but rounding from any loss; the record names them
    unreachable = {where(name) for name in found["unreachable"]}
    assert len(unreachable) == 16 and all("decoder" in layer and layer[-1] in "qk" for layer, _ in unreachable)
    assert all(float(wanted[place_].abs().max()) < 1e-6 * largest for place_ in unreachable)


def test_scores_after_training_are_transformers_own(folders, tmp_path):
    _, rounded = folders
    model = ours(rounded, seed=2, recovery=RecoverSettings(**RECOVER))
    before = Reference(rounded, parts_of(model)).task_loss(DOCUMENTS)
    trained(model, DOCUMENTS, tmp_path / "s", steps=20, lr=5e-3)
    reference = Reference(rounded, parts_of(model))
    after = reference.task_loss(DOCUMENTS)
    assert float(after.detach()) < 0.5 * float(before.detach())

    asked = [(d, tuple(words)) for d in DOCUMENTS for words in [*d["choice_ids"], [302, 17, 5]]]
    rows = [
        {"request_type": "loglikelihood", "context_ids": d["context_ids"], "continuation_ids": list(answer)}
        | {"index": n, "task": "t", "doc_id": n, "document": d["document"], "repeat": 0}
        for n, (d, answer) in enumerate(asked)
    ]
    requests.write_table(rows, requests.SCHEMA, tmp_path / "requests.parquet")
    about = {"seq2seq": True, "prefix_token": 1, "max_tokens": 64, "seed": 0}
    (tmp_path / "requests.json").write_text(json.dumps(about))
    (tmp_path / "out").mkdir()
    more = {"scratch": tmp_path / "scratch", "progress": lambda *_: None, "should_stop": lambda: False}
    tokenizer = load_tokenizer(rounded)
    scorer.respond(model.eval(), tokenizer, tmp_path, tmp_path / "out", tokens_per_batch=64, **more)
    found = pq.read_table(tmp_path / "out" / "responses.parquet").to_pylist()
    for (d, answer), row in zip(asked, found, strict=True):
        logp = torch.log_softmax(reference.of(d, answer[:-1]).logits[0], -1)
        wanted = sum(float(logp[i, token].detach()) for i, token in enumerate(answer))
        assert row["logprob"] == pytest.approx(wanted, rel=1e-5, abs=1e-5), (d["document"], answer)
        assert row["greedy"] is (logp.argmax(-1).tolist() == list(answer))


MATRIX = """
name: t5
model: {tiny: {source: "tiny:t5"}}
compression: {half: {backend: magnitude, pattern: "2:4"}}
pet: {lora: {method: lora, r: 4, target_modules: [q, k]}}
restoring: {cpet: {inherit: true, recover: {r: 4}, distill: {hidden: last_block_input}}}
train: {steps: 12, lr: 5e-3, batch_tokens: 600, early_stop: {every: 2, patience: 2, documents: 16}}
probes: {throughput: false, memory: false}
include: [{compression: half, pet: lora, restoring: cpet}]
"""


def test_the_whole_way_from_a_matrix_to_a_record(cli):
    done = cli("run", cli.matrix(MATRIX), "--no-page")
    assert done.returncode == 0, done.stderr
    ((name, record),) = cli.records("t5").items()
    training = record["training"]
    curve = pq.read_table(cli.folder / f"runs/t5/losses/{name}.parquet").to_pylist()
    assert curve == training["losses"] and len(curve) == training["steps"]
    both = [line["distill_encoder"] + line["distill_decoder"] for line in curve]
    assert both == pytest.approx([line["distill"] for line in curve], rel=1e-5) and min(both) > 0
    looks = [line["validation"] for line in curve if line["validation"] is not None]
    assert len(looks) >= 3 and min(looks) == training["early_stop"]["best_loss"] < 0.6
    assert training["batches"]["tokens"] == 600 and training["inherited"]["steps"] > 0
    assert record["metrics"]["log_loss"]["value"] < 0.6  # of two labels; a guess has 0.69
    assert validate(cli.folder / "runs/t5").faults == []
