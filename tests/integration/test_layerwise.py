"""Layer-wise distillation: the loss and its gradient against the formula, blocks that are gone, a teacher run alongside."""

import math

import pytest
import torch
from pydantic import ValidationError
from test_projection import ROWS, run, tuned
from torch.nn import functional as F

from compressed import compress as run_backend
from conftest import SMOKE
from cpet_bench.compression.depth import Depth
from cpet_bench.errors import StepFailed
from cpet_bench.models.pool import ModelPool
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.restoring import distill as distillation
from cpet_bench.settings import DistillSettings, TrainSettings
from cpet_bench.steps.context import Context
from cpet_bench.steps.tuning import _origins, run_teacher, run_tune
from cpet_bench.store import Store

ALL = DistillSettings(layers="all", weight=0.6, encoder_weight=0.4, decoder_weight=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ("llama", "t5"):
        make(arch, {**DEFAULTS, "hidden": 32, "intermediate": 64, "layers": 3}, root / arch)
        run_backend(Depth, root / arch, root / f"{arch}-short", drop=[1])
    return root


def features_of(model, out, settings=ALL):
    return distillation.teacher_features(model, ROWS, settings, TrainSettings(steps=1, batch=3), out, lambda *a: None)


def states(model):
    """By part, each block's outputs and then the last state, for all real tokens (one row a pass), and the task's loss.

    transformers' `hidden_states` has a block's input; its last entry is normed, so blocks' outputs are caught here.
    """
    both = model.config.is_encoder_decoder
    lists = {"encoder": model.encoder.block, "decoder": model.decoder.block} if both else {"last": model.model.layers}
    caught = {part: [[] for _ in blocks] for part, blocks in lists.items()}
    last, losses, hooks = {part: [] for part in lists}, [], []
    for part, blocks in lists.items():
        for place, block in zip(caught[part], blocks, strict=True):
            hooks.append(block.register_forward_hook(lambda m, a, out, to=place: to.append((out[0] if both else out)[0])))
    for r in ROWS:
        more = {"decoder_input_ids": torch.tensor([[model.config.decoder_start_token_id]])} if both else {}
        out = model(input_ids=torch.tensor([r["context_ids"]]), output_hidden_states=True, **more)
        for part in lists:
            last[part].append((out.hidden_states if part == "last" else out[f"{part}_hidden_states"])[-1][0])
        losses.append(F.cross_entropy(out.logits[0, -1, [9, 10]][None], torch.tensor([r["gold"]])))
    for hook in hooks:
        hook.remove()
    found = {part: [*caught[part], last[part]] for part in lists}
    return {part: [torch.cat(x) for x in layers] for part, layers in found.items()}, torch.stack(losses).mean()


PAIRS = [("llama", "llama", [0, 1, 2]), ("llama", "llama-short", [0, 2]), ("t5", "t5-short", [0, 2])]


@pytest.mark.parametrize(("arch", "student", "origins"), PAIRS)
def test_loss_and_gradient_are_those_of_the_formula(arch, student, origins, folders, tmp_path):
    """task + sum over parts of w (|h - t|^2 / n d + mean over blocks and tokens of |h_b - t_b|^2 / |t_b|^2)."""
    teacher = tuned(folders / arch, arch)
    with torch.no_grad():
        for name, p in teacher.named_parameters():
            if "lora_B" in name:
                p.mul_(-3)
    facts = features_of(teacher, tmp_path / "f")
    assert facts["tokens"] == 4 * (12 if arch == "llama" else 12 + 3)
    with torch.no_grad():
        wanted, _ = states(teacher)
    plain = tuned(folders / student, arch)
    mine, loss = states(plain)
    weights = {"last": 0.6, "encoder": 0.4, "decoder": 0.3}
    total = loss
    for part, layers in mine.items():
        total = total + weights[part] * ((layers[-1] - wanted[part][-1]) ** 2).mean()
        for here, there in enumerate(origins):
            h, t = layers[here], wanted[part][there]
            total = total + weights[part] * (((h - t) ** 2).mean(-1) / (t**2).mean(-1)).mean() / len(origins)
    total.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
    kept = None if student == arch else dict.fromkeys(mine, origins)
    found = run(tuned(folders / student, arch), tmp_path / "s", ALL, origins=kept)["losses"][0]
    assert found["loss"] == pytest.approx(float(total), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_other_blocks_and_other_features_are_refused(folders, tmp_path):
    features_of(tuned(folders / "llama", "llama"), tmp_path / "f")
    with pytest.raises(StepFailed, match="of 2 blocks here the teacher has 3"):
        run(tuned(folders / "llama-short", "llama"), tmp_path / "s", ALL)
    with pytest.raises(StepFailed, match="made for other distillation settings"):
        run(tuned(folders / "llama", "llama"), tmp_path / "t", DistillSettings())
    with pytest.raises(ValidationError, match="another model has others"):
        DistillSettings(layers="all", teacher={"model": "large"})
    assert "layers" not in DistillSettings().model_dump() and ALL.model_dump()["layers"] == "all"


def test_features_too_many_to_keep(folders, tmp_path, monkeypatch):
    teacher = tuned(folders / "llama", "llama")
    kept = features_of(teacher, tmp_path / "kept")
    size = (12 * 32 * 4) * 4  # tokens x width x bytes, of three blocks and the last state
    assert size <= kept["bytes"] < size + 2000 and not distillation.alongside(tmp_path / "kept")
    monkeypatch.setattr(distillation, "BUDGET", size)
    features_of(teacher, tmp_path / "still")
    assert not distillation.alongside(tmp_path / "still")
    monkeypatch.setattr(distillation, "BUDGET", size - 1)
    assert features_of(teacher, tmp_path / "f") == {"documents": 3, "alongside": True, "bytes_of_features": size}
    assert distillation.alongside(tmp_path / "f") and not (tmp_path / "f/features.safetensors").exists()


MATRIX = """
name: deep
compression:
  wanda24: null
  nf4: null
  none: none
  short: {backend: depth, drop: [0]}
restoring:
  cpet: null
  cpet-eora: null
  matched: null
  vanilla: {}
  all: {inherit: true, distill: {layers: all}}
  itself: {distill: {layers: all, teacher: compressed}}
task:
  smoke_sentiment: {include: FOLDER, limit: 20}
train: {steps: 4, batch: 4, documents: 32}
probes: {throughput: false, memory: false}
include:
  - {compression: short, restoring: [all, itself]}
exclude: [{pet: none}]
"""


@pytest.mark.slow
def test_through_the_command_line_and_again_with_the_teacher_alongside(cli, tmp_path, monkeypatch):
    """Blocks that are left are compared with those that they were; a teacher whose features are not kept teaches the same."""
    done = cli("run", cli.matrix(MATRIX.replace("FOLDER", str(SMOKE.parent / "smoke_task"))), timeout=900)
    assert done.returncode == 0, done.stderr
    found = {r["axes"]["restoring"]: r for r in cli.records("deep").values()}
    assert set(found) == {"all", "itself"}
    store = Store(str(cli.folder / "store"))
    monkeypatch.setattr(distillation, "BUDGET", 0)
    for name, record in found.items():
        training = record["training"]
        assert all(x["distill"] > 0 for x in training["losses"])
        tune = again(store, record["provenance"]["keys"]["tune"], tmp_path / name)
        with tune.model() as model:
            assert _origins(tune, model) == ({"last": [1]} if name == "all" else None)
        features = again(store, tune.keys["features"], tmp_path / f"{name}-features")
        assert run_teacher(features)["alongside"]
        tune.inputs["features"] = features.out
        losses = run_tune(tune)["losses"]
        assert [x["loss"] for x in losses] == pytest.approx([x["loss"] for x in training["losses"]], rel=1e-4)


def again(store, key, folder):
    """What a step is called with, another time, to write to `folder`."""
    identity = store.manifest(key).made["identity"]
    needs = identity["needs"]
    return Context(
        kind=identity["kind"],
        settings=identity["settings"],
        params={"checkpoint_every": 10, "compressions": 1},
        inputs={role: store.materialise(k) for role, k in needs.items()},
        facts={role: store.manifest(k).facts for role, k in needs.items()},
        keys=needs,
        out=folder / "out",
        scratch=folder / "scratch",
        machine={"device": "cpu", "dtype": "float32", "attention": "auto", "owns": ["cpu"]},
        pool=ModelPool(),
        progress=lambda *a: None,
        should_stop=lambda: False,
    )
