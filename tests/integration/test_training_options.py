"""Options of the training loop: passes that give the same gradients, early stop, batches by tokens, float16."""

import random

import pytest
import torch

from cpet_bench.errors import InputError, StepFailed, Stopping
from cpet_bench.models.loading import load_model
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.restoring.distill import Kept, teacher_features
from cpet_bench.settings import DistillSettings, PetSettings, RecoverSettings, TrainSettings
from cpet_bench.training import data_order, train
from cpet_bench.training_rows import document, padded_tokens, visits

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["v", "o"]}


def rows(count, seed=0, flip=()):
    """Documents whose answer follows from their first token; of those in `flip` it is the other one."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        gold = rng.randint(0, 1)
        context = [5 + gold, *(rng.randint(20, 200) for _ in range(rng.randint(2, 24)))]
        gold = 1 - gold if i in flip else gold
        found.append({"context_ids": context, "choice_ids": [[9], [10]], "gold": gold, "target_ids": [9 + gold]})
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for arch in TARGETS:
        found[arch] = tmp_path_factory.mktemp(arch)
        make(arch, DEFAULTS, found[arch])
    return found


@pytest.fixture
def tuned(folders):
    def load(arch="llama", folder=None, recovery=False, seed=1, dtype="float32", **lora):
        model = load_model(folder or folders[arch], dtype=dtype)
        methods.attach(model, PetSettings(method="lora", r=4, lora_alpha=4, target_modules=TARGETS[arch], **lora))
        if recovery:
            recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        return model

    return load


def run(model, pairs, scratch, *, stop=lambda: False, progress=lambda *_: None, distill=None, features=None, seed=0, **s):
    settings = TrainSettings(**{"steps": 1, "warmup": 0, "weight_decay": 0, "clip": None, "schedule": "constant"} | s)
    more = {"scratch": scratch, "progress": progress, "should_stop": stop, "distill": distill, "features": features}
    return train(model, pairs, settings, seed=seed, **more)


def gradients(model, *args, **more):
    """The gradients that the (last) step used."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, name=name: found.__setitem__(name, p.grad.clone()))
    facts = run(model, *args, **more)
    return found, facts


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def furthest(a, b):
    """Largest difference of two sets of tensors, in units of the largest entry."""
    assert a.keys() == b.keys()
    largest = max(float(t.abs().max()) for t in a.values())
    return max(float((a[n] - b[n]).abs().max()) for n in a) / largest


# -- passes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", TARGETS)
def test_accumulated_and_checkpointed_gradients_are_the_same(arch, tuned, tmp_path):
    documents = rows(8)
    distill = DistillSettings(hidden="last_block_input")
    teacher_features(tuned(arch, seed=2), documents, distill, TrainSettings(steps=1, batch=8), tmp_path / "f", lambda *_: None)
    more = {"batch": 8, "distill": distill, "features": tmp_path / "f"}
    whole, facts = gradients(tuned(arch, recovery=True), documents, tmp_path / "a", **more)
    assert facts["micro_batch"] == 8 and facts["losses"][0]["distill"] > 0
    parts, few = gradients(tuned(arch, recovery=True), documents, tmp_path / "b", micro_batch=2, **more)
    assert few["micro_batch"] == 2 and furthest(whole, parts) < 5e-6  # sums in another order, in float32
    assert few["losses"][0]["loss"] == pytest.approx(facts["losses"][0]["loss"], rel=1e-6)
    model = tuned(arch, recovery=True)
    again, _ = gradients(model, documents, tmp_path / "c", gradient_checkpointing=True, **more)
    assert furthest(whole, again) < 5e-6 and not model.is_gradient_checkpointing


# -- early stop --------------------------------------------------------------------------------------------------------
STOP = {"early_stop": {"every": 2, "patience": 3, "documents": 8}, "batch": 8, "lr": 2e-2}


def loss_of(model, documents):
    """Mean cross-entropy among the choices, one document at a time."""
    losses = []
    with torch.no_grad():
        for d in documents:
            scores = model.eval()(input_ids=torch.tensor([d["context_ids"]])).logits[0, -1, [9, 10]]
            losses.append(torch.logsumexp(scores, 0) - scores[d["gold"]])
    return float(torch.stack(losses).mean())


def test_it_stops_when_held_out_documents_get_worse_and_keeps_the_best(tuned, tmp_path):
    documents = rows(32, flip=range(24, 32))  # what is learnt is wrong for those held out
    model = tuned(lora_dropout=0.2)
    facts = run(model, documents, tmp_path / "a", steps=40, **STOP)
    seen = {line["step"]: line["validation"] for line in facts["losses"]}
    looks = {step: loss for step, loss in seen.items() if loss is not None}
    best = min(looks, key=looks.get)
    assert facts["steps"] == len(seen) == best + 6 < 40 and set(looks) == set(range(2, best + 7, 2))
    about = facts["early_stop"]
    assert (about["best_step"], about["stopped"], about["looks"]) == (best, True, len(looks))
    assert about["best_loss"] == looks[best] == pytest.approx(loss_of(model, documents[24:]), rel=1e-5)  # without dropout
    read = sum(len(d["context_ids"]) for d in documents[24:])
    assert facts["documents"] == 8 * facts["steps"] and about["tokens"] == len(looks) * read
    plain = tuned(lora_dropout=0.2)
    run(plain, documents, tmp_path / "b", steps=best, batch=8, lr=2e-2, documents=24)
    assert all(torch.equal(p, weights(plain)[n]) for n, p in weights(model).items())


def test_without_a_reason_to_stop_it_runs_to_its_end(tuned, tmp_path):
    facts = run(tuned(), rows(32), tmp_path, steps=5, **STOP)
    assert [line["step"] for line in facts["losses"] if line["validation"] is not None] == [2, 4, 5]
    assert facts["steps"] == 5 and not facts["early_stop"]["stopped"]


@pytest.mark.parametrize("at", [3, 4, 7])
def test_a_killed_training_with_early_stop_ends_as_an_undisturbed_one(at, tuned, tmp_path):
    documents = rows(32, flip=range(24, 32))
    settings = {"steps": 40, "checkpoint_every": 3, **STOP}
    whole = tuned(lora_dropout=0.2)
    wanted = run(whole, documents, tmp_path / "whole", **settings)

    def die(done, *_):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tuned(lora_dropout=0.2), documents, tmp_path / "part", progress=die, **settings)
    again = tuned(lora_dropout=0.2)
    found = run(again, documents, tmp_path / "part", **settings)
    assert all(torch.equal(weights(whole)[n], p) for n, p in weights(again).items())
    assert found["early_stop"] == wanted["early_stop"]
    strip = [[{k: v for k, v in line.items() if k != "seconds"} for line in f["losses"]] for f in (found, wanted)]
    assert strip[0] == strip[1]


def test_a_training_stopped_on_request_after_its_last_look_does_not_go_on(tuned, tmp_path):
    documents = rows(32, flip=range(24, 32))
    settings = {"steps": 40, **STOP}
    whole = run(tuned(), documents, tmp_path / "whole", **settings)
    seen = []
    model = tuned()
    with pytest.raises(Stopping):
        more = {"progress": lambda done, *_: seen.append(done), "stop": lambda: len(seen) == whole["steps"]}
        run(model, documents, tmp_path / "part", **more, **settings)
    found = run(tuned(seed=5), documents, tmp_path / "part", progress=lambda done, *_: seen.append(done), **settings)
    assert seen == list(range(1, whole["steps"] + 1)) and found["early_stop"] == whole["early_stop"]


def test_looking_leaves_a_four_bit_base_trainable(folders, tuned, tmp_path):
    """bitsandbytes repacks its weights in evaluation mode on a processor, and then passes no gradient."""
    from cpet_bench.compression.bnb import BitsAndBytes

    how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *_: None}
    BitsAndBytes.compress(folders["llama"], tmp_path / "nf4", BitsAndBytes.Settings(type="nf4"), **how)
    model = tuned(folder=tmp_path / "nf4")
    facts = run(model, rows(16), tmp_path / "s", steps=4, **STOP | {"early_stop": {"every": 1, "documents": 8}})
    assert facts["early_stop"]["looks"] == 4 and all(line["grad_norm"] > 0 for line in facts["losses"])
    assert not any(m.training for m in model.modules())  # as it was lent


def test_held_out_documents_are_never_trained_on(tuned, tmp_path):
    train_ = TrainSettings(steps=30, batch=4, documents=20, early_stop={"documents": 6})
    assert {i for step in data_order(50, train_) for i in step} == set(range(14))
    assert {i for step in data_order(17, train_) for i in step} == set(range(11))
    distill = DistillSettings()
    documents = rows(20)
    teacher_features(tuned(), documents, distill, train_, tmp_path, lambda *_: None)
    assert set(Kept(tmp_path, distill).where) == set(map(str, range(14)))
    with pytest.raises(InputError, match="6 of the 6 training documents are to be held out.*hold out fewer"):
        run(tuned(), rows(6), tmp_path, steps=2, early_stop={"documents": 6})


# -- batches by tokens -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [None, 0])
def test_batches_by_tokens(start):
    pairs = rows(60)
    train_ = TrainSettings(steps=40, batch_tokens=80)
    order, documents = visits(pairs, train_, start)
    assert visits(pairs, train_, start)[0] == order
    assert visits(pairs, train_.model_copy(update={"steps": 90}), start)[0][:40] == order
    assert visits(pairs, train_.model_copy(update={"order_seed": 1}), start)[0] != order
    sizes = [padded_tokens([documents[i] for i in step]) for step in order]
    assert max(sizes) <= 80 and sum(sizes) / len(sizes) > 55
    read = [i for step in order for i in step]
    passes = visits(pairs, train_.model_copy(update={"steps": 400}), start)[0]
    first, seen = [], set()
    for step in passes:  # one pass after the other, each document once in each
        first += step
        seen |= set(step)
        if len(seen) == 60:
            break
    assert sorted(first) == list(range(60))
    real = sum(documents[i].length for i in read)
    assert real / sum(sizes) > 0.85  # of documents as they come, half would be padding
    longest = document(0, {**pairs[0], "context_ids": list(range(5, 205))}, 512, start)
    assert padded_tokens([longest]) > 80  # alone in its batch
    alone, _ = visits([{**pairs[0], "context_ids": list(range(5, 205))}, *pairs[1:]], train_, start)
    assert all(step == [0] for step in alone if 0 in step)


def test_training_with_batches_by_tokens(tuned, tmp_path):
    documents = rows(40)
    settings = TrainSettings(steps=12, batch_tokens=90, max_tokens=64)
    distill = DistillSettings()
    teacher_features(tuned(seed=2), documents, distill, settings, tmp_path / "f", lambda *_: None)
    more = {"distill": distill, "features": tmp_path / "f", "steps": 12, "batch_tokens": 90, "max_tokens": 64}
    facts = run(tuned(), documents, tmp_path / "s", lr=1e-2, **more)
    fewest, most = facts["batches"]["documents"]
    assert 1 <= fewest < most and facts["batches"]["tokens"] == 90 and facts["micro_batch"] == most
    assert facts["documents"] == sum(map(len, visits(documents, settings, None)[0]))
    assert facts["tokens"] <= facts["padded_tokens"] <= 12 * 90
    other = run(tuned(), documents, tmp_path / "o", lr=1e-2, seed=7, **more)
    assert [x["loss"] for x in other["losses"]] == [x["loss"] for x in facts["losses"]]  # all seeds share the order


# -- float16 -----------------------------------------------------------------------------------------------------------
def test_gradients_of_a_float16_base_are_those_of_float32(tuned, tmp_path, monkeypatch):
    documents = rows(8)
    wanted, _ = gradients(tuned(recovery=True), documents, tmp_path / "a", batch=8)
    model = tuned(recovery=True, dtype="float16")
    got = {}
    real = torch.optim.AdamW.step

    def step(self, *args, **more):
        got.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        return real(self, *args, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    facts = run(model, documents, tmp_path / "b", batch=8)
    assert facts["loss_scale"] == 2**16 and furthest(wanted, got) < 5e-3
    monkeypatch.setattr("cpet_bench.training_scale.START", 2.0**60)
    model = tuned(recovery=True, dtype="float16")
    again = run(model, documents, tmp_path / "c", batch=8)
    assert 1 < again["loss_scale"] < 2**60 and furthest(wanted, got) < 5e-3  # halved until nothing overflowed
    assert again["losses"][0]["loss"] == facts["losses"][0]["loss"]


def test_small_gradients_survive_float16(tuned, tmp_path, monkeypatch):
    """Without the scale, gradients below 6e-8 on their way through the base would be zeros."""
    documents = rows(8)

    def shrunk(model):  # the loss barely depends on what the head reads
        with torch.no_grad():
            model.model.norm.weight.mul_(1e-5)
        return model

    wanted, _ = gradients(shrunk(tuned()), documents, tmp_path / "a", batch=8)
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert 0 < largest < 1e-5
    found = run(shrunk(tuned(dtype="float16")), documents, tmp_path / "b", batch=8)
    norm = sum(float(g.square().sum()) for g in wanted.values()) ** 0.5
    assert found["losses"][0]["grad_norm"] == pytest.approx(norm, rel=0.02)
    monkeypatch.setattr("cpet_bench.training_scale.START", 1.0)
    lost = run(shrunk(tuned(dtype="float16")), documents, tmp_path / "c", batch=8)
    assert abs(lost["losses"][0]["grad_norm"] / norm - 1) > 0.05


def test_a_loss_that_overflows_float16_says_what_helps(tuned, tmp_path):
    model = tuned(dtype="float16")
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    with pytest.raises(StepFailed, match="not finite at step 1"):
        run(model, rows(8), tmp_path, batch=8)
