"""The training loop on tiny models: its losses against plain ones written here, resuming, memory, and what is an error."""

import math

import pytest
import torch
from torch.nn import functional as F

from cpet_bench.errors import StepFailed, Stopping
from cpet_bench.models.loading import load_model
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.restoring.distill import teacher_features
from cpet_bench.settings import DistillSettings, PetSettings, TrainSettings
from cpet_bench.training import learning_rate, train
from tiny_qwen import make_qwen2

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "t5": ["v", "o"]}
TARGETS |= {"opt": ["k_proj", "fc2"], "qwen2": ["q_proj", "o_proj"]}
SINGLE = [
    {"document": "a", "context_ids": [5, 6, 7, 8], "choice_ids": [[9], [10]], "gold": 1, "target_ids": [10]},
    {"document": "b", "context_ids": [11, 12], "choice_ids": [[9], [10]], "gold": 0, "target_ids": [9]},
    {"document": "c", "context_ids": [5, 14, 15, 16, 17, 18], "choice_ids": [[9], [10]], "gold": 0, "target_ids": [9]},
]
SEVERAL = [
    {"document": "d", "context_ids": [5, 6, 7], "choice_ids": [[9, 20], [10], [3, 4, 5]], "gold": 0, "target_ids": [9, 20]},
    {"document": "e", "context_ids": [8, 8, 9, 9], "choice_ids": [[30], [31, 32]], "gold": 1, "target_ids": [31, 32]},
]
TARGET = [
    {"document": "f", "context_ids": [5, 6, 7], "choice_ids": [], "gold": -1, "target_ids": [40, 41, 42]},
    {"document": "g", "context_ids": [8, 9, 10, 11, 12], "choice_ids": [], "gold": -1, "target_ids": [43]},
]
ROWS = {"single": SINGLE, "several": SEVERAL, "target": TARGET}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for arch in TARGETS:
        found[arch] = tmp_path_factory.mktemp(arch)
        make_qwen2(found["llama"], found[arch]) if arch == "qwen2" else make(arch, DEFAULTS, found[arch])
    return found


@pytest.fixture
def tuned(folders):
    """A tiny model with LoRA on it whose weights are not those of the start."""

    def load(arch="llama", seed=1, shaken=True):
        model = load_model(folders[arch])
        methods.attach(model, PetSettings(method="lora", r=4, lora_alpha=4, target_modules=TARGETS[arch]))
        if shaken:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    if p.requires_grad:
                        p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        return model

    return load


def quiet(*_):
    return None


def run(model, rows, scratch, *, stop=lambda: False, progress=quiet, **more):
    plain = {"steps": 1, "batch": len(rows), "warmup": 0, "weight_decay": 0, "clip": None}
    settings = TrainSettings(**plain | more.pop("s", {}))
    return train(model, rows, settings, scratch=scratch, progress=progress, should_stop=stop, **more)


def logp(model, context, answer):
    """(log-probability of each token of `answer`, last hidden states of the decoder, of the encoder), one plain pass."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        out = model(
            input_ids=torch.tensor([context]),
            decoder_input_ids=torch.tensor([start + answer[:-1]]),
            output_hidden_states=True,
        )
        scores, states = out.logits[0], out.decoder_hidden_states[-1][0]
        chosen = F.log_softmax(scores, -1)[torch.arange(len(answer)), torch.tensor(answer)]
        return chosen, states, out.encoder_hidden_states[-1][0]
    out = model(input_ids=torch.tensor([context + answer[:-1]]), output_hidden_states=True)
    scores = out.logits[0, len(context) - 1 :]
    return F.log_softmax(scores, -1)[torch.arange(len(answer)), torch.tensor(answer)], out.hidden_states[-1][0], None


def reference(model, kind, rows):
    if kind == "target":
        every = torch.cat([logp(model, r["context_ids"], r["target_ids"])[0] for r in rows])
        return -every.mean()
    losses = []
    for r in rows:
        sums = torch.stack([logp(model, r["context_ids"], c)[0].sum() for c in r["choice_ids"]])
        losses.append(torch.logsumexp(sums, 0) - sums[r["gold"]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("kind", ROWS)
def test_task_loss_and_its_gradient(arch, kind, tuned, tmp_path):
    plain = tuned(arch)
    loss = reference(plain, kind, ROWS[kind])
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
    found = run(tuned(arch), ROWS[kind], tmp_path)["losses"][0]
    assert found["task"] == pytest.approx(float(loss), rel=1e-5) and found["loss"] == found["task"]
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_distillation_is_the_mean_square_over_real_tokens(arch, tuned, tmp_path):
    teacher, student = tuned(arch, seed=2), tuned(arch, seed=1)
    settings = DistillSettings(weight=0.7)
    teacher_features(teacher, SINGLE, settings, TrainSettings(steps=1, batch=3), tmp_path / "f", quiet)
    wanted = 0.0
    for at, weight in ((1, 0.7 if arch == "llama" else 0.05), (2, 0.005)):
        states = [[logp(m, r["context_ids"], r["target_ids"])[at] for r in SINGLE] for m in (student, teacher)]
        if states[0][0] is not None:
            mine, theirs = (torch.cat(s) for s in states)
            wanted += weight * float(F.mse_loss(mine, theirs))
    found = run(student, SINGLE, tmp_path / "s", distill=settings, features=tmp_path / "f")["losses"][0]
    assert found["distill"] == pytest.approx(wanted, rel=1e-4)
    assert found["loss"] == pytest.approx(found["task"] + found["distill"], rel=1e-6)


def test_what_enters_the_last_block(tuned, tmp_path):
    teacher, student = tuned(seed=2), tuned(seed=1)
    settings = DistillSettings(hidden="last_block_input")
    teacher_features(teacher, SINGLE, settings, TrainSettings(steps=1, batch=3), tmp_path / "f", quiet)

    def entering(model):
        ids = [torch.tensor([r["context_ids"]]) for r in SINGLE]
        return torch.cat([model(input_ids=i, output_hidden_states=True).hidden_states[-2][0] for i in ids])

    wanted = float(F.mse_loss(entering(student), entering(teacher)))
    found = run(student, SINGLE, tmp_path / "s", distill=settings, features=tmp_path / "f")["losses"][0]
    assert found["distill"] == pytest.approx(wanted, rel=1e-4)


def test_logit_distillation(tuned, tmp_path):
    teacher, student = tuned(seed=2), tuned(seed=1)
    settings = DistillSettings(weight=0, kl={"weight": 0.5, "temperature": 2.0, "top_k": 8})
    teacher_features(teacher, TARGET, settings, TrainSettings(steps=1, batch=2), tmp_path / "f", quiet)
    total = count = 0
    for r in TARGET:
        ids = torch.tensor([r["context_ids"] + r["target_ids"][:-1]])
        theirs, mine = (m(input_ids=ids).logits[0, len(r["context_ids"]) - 1 :] for m in (teacher, student))
        values, places = theirs.topk(8)
        p, q = F.softmax(values / 2, -1), F.log_softmax(mine.gather(1, places) / 2, -1)
        total += float((p * (p.log() - q)).sum())
        count += len(p)
    found = run(student, TARGET, tmp_path / "s", distill=settings, features=tmp_path / "f")["losses"][0]
    assert found["kl"] == pytest.approx(0.5 * 4 * total / count, rel=1e-3)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_it_learns_and_leaves_the_rest_alone(tuned, tmp_path):
    model = tuned(shaken=False)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    found = run(model, SINGLE, tmp_path, s={"steps": 30, "lr": 1e-2})
    assert found["losses"][-1]["task"] < 0.1 * found["losses"][0]["task"]
    assert found["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["documents"] == 90 and found["tokens"] == 30 * 12 and found["flops"] > 0
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_stopped_training_ends_as_an_undisturbed_one(tuned, tmp_path):
    settings = {"steps": 9, "lr": 1e-2, "batch": 2, "checkpoint_every": 4}
    whole = tuned()
    wanted = run(whole, SINGLE, tmp_path / "whole", s=settings)
    seen = []

    def progress(done, total, text):
        seen.append(done)

    part = tuned()
    with pytest.raises(Stopping):
        run(part, SINGLE, tmp_path / "part", s=settings, progress=progress, stop=lambda: len(seen) == 6)
    again = tuned(seed=5)  # whatever it starts from, the checkpoint says where it goes on
    found = run(again, SINGLE, tmp_path / "part", s=settings, progress=progress)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert all(torch.equal(weights(whole)[n], p) for n, p in weights(again).items())
    assert [x["loss"] for x in found["losses"]] == [x["loss"] for x in wanted["losses"]]


def test_a_torn_or_foreign_checkpoint_is_not_used(tuned, tmp_path):
    settings = {"steps": 4, "batch": 2, "checkpoint_every": 2}
    run(tuned(), SINGLE, tmp_path, s=settings)
    path = tmp_path / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    seen = []
    run(tuned(), SINGLE, tmp_path, s=settings, progress=lambda done, *_: seen.append(done))
    assert seen == [1, 2, 3, 4]
    run(tuned(), SINGLE, tmp_path, s=settings | {"lr": 5e-3}, progress=lambda done, *_: seen.append(done))
    assert seen == [1, 2, 3, 4] * 2


@pytest.mark.parametrize("kind", [*ROWS, "mixed"])
def test_passes_of_fewer_documents_give_the_same(kind, tuned, tmp_path):
    rows = ROWS.get(kind, SINGLE + SEVERAL + TARGET)
    a, b = tuned(), tuned()
    one = run(a, rows, tmp_path / "a")["losses"][0]
    many = run(b, rows, tmp_path / "b", s={"micro_batch": 1})["losses"][0]
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-4)


def limited(model, rows, exception):
    """Raise `exception` where more than `rows` sequences are run at once, as a device of little memory does."""

    def hook(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if len(ids) > rows:
            raise exception

    return model.model.register_forward_pre_hook(hook, with_kwargs=True)


MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")]


@pytest.mark.parametrize("error", MEMORY)
def test_out_of_memory_means_smaller_passes_with_the_same_result(error, tuned, tmp_path):
    same = [SINGLE[0]] * 8  # one length, so that all would go through at once
    wanted = run(tuned(), same, tmp_path / "a")["losses"][0]
    model = tuned()
    hook = limited(model, 3, error)
    found = run(model, same, tmp_path / "b")
    hook.remove()
    assert found["micro_batch"] == 2 and found["losses"][0]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    model = tuned()
    limited(model, 0, error)
    with pytest.raises(StepFailed, match="out of memory even with one document"):
        run(model, same, tmp_path / "c")


def test_another_error_is_not_taken_for_memory(tuned, tmp_path):
    model = tuned()
    limited(model, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        run(model, SINGLE, tmp_path)


def test_a_loss_that_is_no_number(tuned, tmp_path):
    model = tuned()
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad)[0, 0] = math.nan
    with pytest.raises(StepFailed, match="not finite at step 1"):
        run(model, SINGLE, tmp_path)


def test_a_tensor_that_learns_nothing_is_an_error(tuned, tmp_path):
    model = tuned()
    model.stray = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(StepFailed, match="never got a gradient other than zero: stray"):
        run(model, SINGLE, tmp_path, s={"steps": 3})
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(StepFailed, match="nothing to train"):
        run(model, SINGLE, tmp_path / "none")


def test_a_base_without_gradient_is_an_error_and_not_a_result(folders, tmp_path):
    """4-bit weights that a pass in evaluation mode repacked: PEFT's own training goes on with one warning."""
    from cpet_bench.compression.bnb import BitsAndBytes

    how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": quiet}
    BitsAndBytes.compress(folders["llama"], tmp_path / "nf4", BitsAndBytes.Settings(type="nf4"), **how)
    model = load_model(tmp_path / "nf4")
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    methods.attach(model, PetSettings(method="lora", r=4, target_modules=["q_proj"]))
    with pytest.raises(StepFailed, match="no gradient reached .*4-bit weights that .* loaded afresh"):
        run(model, SINGLE, tmp_path / "s", s={"steps": 3})
    model = load_model(folders["llama"])
    methods.attach(model, PetSettings(method="lora", r=4, target_modules=["q_proj"]))
    for layer in model.model.layers:
        layer.forward = torch.no_grad()(layer.forward)
    with pytest.raises(StepFailed, match="no gradient reached .*: what runs of the model does not use them$"):
        run(model, SINGLE, tmp_path / "t", s={"steps": 3})


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", [0.5, 1, 1, 0.75, 0.25]),
        ("noam", [0.5, 1, math.sqrt(2 / 3), math.sqrt(2 / 4), math.sqrt(2 / 5)]),
    ],
)
def test_learning_rates(schedule, rates):
    settings = TrainSettings(lr=1, warmup=2, schedule=schedule, steps=5)
    assert [learning_rate(i, 5, settings) for i in range(5)] == pytest.approx(rates)
