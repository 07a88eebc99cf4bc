"""Distillation from a teacher of another width: the learned map against the formula, and another model as the teacher."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from conftest import SMOKE
from cpet_bench.cells import expand
from cpet_bench.errors import InputError, StepFailed, Stopping
from cpet_bench.matrix import load_matrix
from cpet_bench.models.loading import load_model, load_tokenizer
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.restoring.distill import same_tokens, teacher_features
from cpet_bench.restoring.teachers import vocabulary
from cpet_bench.settings import DistillSettings, OtherTeacher, PetSettings, RestoringSettings, TrainSettings
from cpet_bench.training import train

TARGETS = {"llama": ["q_proj", "v_proj"], "t5": ["v", "o"]}
ROWS = [
    {"document": "a", "context_ids": [5, 6, 7, 8], "choice_ids": [[9], [10]], "gold": 1, "target_ids": [10]},
    {"document": "b", "context_ids": [11, 12], "choice_ids": [[9], [10]], "gold": 0, "target_ids": [9]},
    {"document": "c", "context_ids": [5, 14, 15, 16, 17, 18], "choice_ids": [[9], [10]], "gold": 0, "target_ids": [9]},
]
WIDTHS = {"small": 32, "large": 48}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in TARGETS:
        for name, width in WIDTHS.items():
            make(arch, {**DEFAULTS, "hidden": width, "intermediate": 64, "seed": width}, root / f"{arch}-{name}")
    return root


def tuned(folder, arch):
    model = load_model(folder)
    methods.attach(model, PetSettings(method="lora", r=2, target_modules=TARGETS[arch]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def run(model, scratch, distill, *, stop=lambda: False, seed=0, origins=None, **more):
    plain = {"steps": 1, "batch": 3, "warmup": 0, "weight_decay": 0, "clip": None, "checkpoint_every": 1}
    settings = TrainSettings(**plain | more)
    how = {"scratch": scratch, "progress": lambda *a: None, "should_stop": stop, "seed": seed, "origins": origins}
    return train(model, ROWS, settings, distill=distill, features=scratch.parent / "f", **how)


def features_of(teacher, distill, out):
    return teacher_features(teacher, ROWS, distill, TrainSettings(steps=1, batch=3), out, lambda *a: None)


def states(model):
    """By part, the hidden states of all real tokens of the rows, each row run alone; and the task's loss."""
    found, losses = {}, []
    for r in ROWS:
        ids, more = torch.tensor([r["context_ids"]]), {}
        if model.config.is_encoder_decoder:
            more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
        out = model(input_ids=ids, output_hidden_states=True, **more)
        if model.config.is_encoder_decoder:
            here = {"encoder": out.encoder_hidden_states[-1], "decoder": out.decoder_hidden_states[-1]}
        else:
            here = {"last": out.hidden_states[-1]}
        for part, hidden in here.items():
            found.setdefault(part, []).append(hidden[0])
        losses.append(F.cross_entropy(out.logits[0, -1, [9, 10]][None], torch.tensor([r["gold"]])))
    return {part: torch.cat(rows) for part, rows in found.items()}, torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("arch", "student", "teacher"), [("llama", "small", "large"), ("llama", "large", "small"), ("t5", "small", "large")]
)
def test_loss_and_gradients_are_those_of_the_formula(arch, student, teacher, folders, tmp_path):
    """task + sum of w |h W^T - t|^2 / (n d); from the first step of Adam, the signs of W's gradient."""
    distill = DistillSettings(weight=0.7, encoder_weight=0.4, decoder_weight=0.3)
    big = tuned(folders / f"{arch}-{teacher}", arch)
    features_of(big, distill, tmp_path / "f")
    with torch.no_grad():
        wanted, _ = states(big)
    plain = tuned(folders / f"{arch}-{student}", arch)
    mine, loss = states(plain)
    maps, generator = {}, torch.Generator().manual_seed(3)
    for part in mine:  # the start: orthonormal rows or columns
        start = torch.nn.init.orthogonal_(torch.empty(WIDTHS[teacher], WIDTHS[student]), generator=generator)
        short = start @ start.t() if len(start) <= start.shape[1] else start.t() @ start
        torch.testing.assert_close(short, torch.eye(len(short)), atol=1e-5, rtol=0)
        maps[part] = start.requires_grad_()
    weights = {"last": 0.7, "encoder": 0.4, "decoder": 0.3}
    terms = [weights[p] * ((mine[p] @ maps[p].t() - wanted[p]) ** 2).sum() / wanted[p].numel() for p in mine]
    (loss + sum(terms)).backward()
    every = [*maps.values(), *[p for p in plain.parameters() if p.grad is not None]]
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in every))
    model = tuned(folders / f"{arch}-{student}", arch)
    facts = run(model, tmp_path / "s", distill, seed=3, lr=1e-3)
    found = facts["losses"][0]
    assert found["distill"] == pytest.approx(float(sum(terms)), rel=1e-4)
    assert found["loss"] == pytest.approx(float(loss + sum(terms)), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
    kept = load_file(tmp_path / "s/training.safetensors")
    for part, start in maps.items():
        moved = kept[f"weight/cpet_projection.{part}"] - kept[f"start/cpet_projection.{part}"]
        torch.testing.assert_close(kept[f"start/cpet_projection.{part}"], start.detach())
        clear = start.grad.abs() > 1e-3 * start.grad.abs().max()
        torch.testing.assert_close(moved[clear], -1e-3 * start.grad[clear].sign(), atol=1e-5, rtol=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts["trainable_parameters"] == trained and not any("projection" in n for n, _ in model.named_parameters())
    assert facts["projection_parameters"] == len(mine) * 32 * 48
    assert facts["projection"] == dict.fromkeys(mine, [WIDTHS[student], WIDTHS[teacher]])


def test_the_same_width_has_no_map_and_none_wants_none(folders, tmp_path):
    distill = DistillSettings()
    same = tuned(folders / "llama-small", "llama")
    features_of(same, distill, tmp_path / "f")
    facts = run(tuned(folders / "llama-small", "llama"), tmp_path / "s", distill)
    assert "projection" not in facts and "projection_parameters" not in facts
    with pytest.raises(StepFailed, match="hidden states have 32 numbers and the student's 48: projection: auto maps them"):
        run(tuned(folders / "llama-large", "llama"), tmp_path / "t", DistillSettings(projection="none"))
    with pytest.raises(StepFailed, match="the student is an encoder-decoder model and its teacher a decoder-only one"):
        run(tuned(folders / "t5-small", "t5"), tmp_path / "u", distill)
    flops = facts["flops"]
    features_of(tuned(folders / "llama-large", "llama"), distill, tmp_path / "f")
    wider = run(tuned(folders / "llama-small", "llama"), tmp_path / "v", distill)
    assert wider["flops"] - flops == 6 * 32 * 48 * sum(len(r["context_ids"]) for r in ROWS)


def test_alongside_and_stopped_and_resumed(folders, tmp_path):
    """A teacher run alongside gives what kept features give; a training that was stopped goes on with its map."""
    distill = DistillSettings()
    teacher = tuned(folders / "llama-large", "llama")
    features_of(teacher, distill, tmp_path / "f")
    more = {"steps": 6, "batch": 2, "lr": 1e-2}
    whole = run(tuned(folders / "llama-small", "llama"), tmp_path / "whole", distill, **more)
    seen = []
    with pytest.raises(Stopping):
        run(
            tuned(folders / "llama-small", "llama"),
            tmp_path / "part",
            distill,
            stop=lambda: seen.append(1) or len(seen) == 3,
            **more,
        )
    part = run(tuned(folders / "llama-small", "llama"), tmp_path / "part", distill, **more)
    assert [x["loss"] for x in part["losses"]] == [x["loss"] for x in whole["losses"]]
    settings = TrainSettings(warmup=0, weight_decay=0, clip=None, **more)
    how = {"scratch": tmp_path / "beside", "progress": lambda *a: None, "should_stop": lambda: False}
    beside = train(tuned(folders / "llama-small", "llama"), ROWS, settings, distill=distill, teacher=teacher, **how)
    for one, other in zip(beside["losses"], whole["losses"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


# -- another model of the matrix ------------------------------------------------------------------------------------------
def test_settings_that_were_there_before_keep_their_form():
    """What is hashed into keys: later settings are left out while they have their defaults."""
    before = {"weight", "encoder_weight", "decoder_weight", "hidden", "teacher", "kl"}
    assert DistillSettings().model_dump().keys() == before
    assert RestoringSettings(distill={}).model_dump(mode="json")["distill"].keys() == before
    chosen = DistillSettings(projection="none", teacher={"model": "large"})
    found = chosen.model_dump(mode="json")
    assert found["projection"] == "none" and found["teacher"] == {"model": "large"}
    assert DistillSettings.model_validate(chosen.model_dump()) == chosen and chosen.teacher == OtherTeacher(model="large")


MATRIX = """
name: taught
extends: SMOKE
model:
  tiny: {source: "tiny:llama", options: {hidden: 32, intermediate: 64, layers: 2, heads: 4}}
  large: {source: "tiny:llama", options: {hidden: 48, intermediate: 64, layers: 3, heads: 4, seed: 1}}
  other: {source: "local:other"}
compression: {nf4: null, wanda24: null, none: none}
pet: {none: null, lora: {method: lora, r: 2, target_modules: [q_proj, v_proj]}}
restoring:
  cpet: null
  cpet-eora: null
  matched: null
  vanilla: {}
  taught: {distill: {teacher: {model: large}}}
  mistaught: {distill: {teacher: {model: other}}}
task:
  smoke_sentiment: {include: FOLDER, limit: 20}
train: {steps: 4, batch: 4, documents: 32}
probes: {throughput: false, memory: false}
include:
  - {model: tiny, restoring: [taught, mistaught]}
exclude: []
"""


def write(folder, text=MATRIX):
    path = folder / "taught.yaml"
    path.write_text(text.replace("SMOKE", str(SMOKE)).replace("FOLDER", str(SMOKE.parent / "smoke_task")))
    return path


def other_tokens(folder):
    """A model folder whose tokenizer has two words' ids the other way round."""
    make("llama", DEFAULTS, folder)
    text = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["film"], vocabulary["book"] = vocabulary["book"], vocabulary["film"]
    (folder / "tokenizer.json").write_text(json.dumps(text))


@pytest.mark.slow
def test_a_larger_model_teaches_through_the_command_line(cli):
    other_tokens(cli.folder / "other")
    path = write(cli.folder)
    done = cli("run", path)
    assert done.returncode == 4, done.stderr
    found = {r["axes"]["restoring"]: r for r in cli.records("taught").values()}
    training = found["taught"]["training"]
    assert found["taught"]["status"] == "done" and training["projection"] == {"last": [32, 48]}
    assert training["projection_parameters"] == 32 * 48 and training["by_part"] == {"lora": training["trainable_parameters"]}
    assert training["losses"][-1]["distill"] < training["losses"][0]["distill"]
    assert "dense_tune" not in found["taught"]["provenance"]["keys"]  # a D of its own is not needed
    assert training["taught_by"]["id"].split("--")[0] != "tiny" and training["taught_by"]["steps"] > 0
    wrong = found["mistaught"]
    assert wrong["status"] == "failed" and wrong["reason"]["type"] == "StepFailed"
    assert "the tokenizers of tiny and of its teacher other differ" in wrong["reason"]["message"]
    assert "name a model with the tokenizer of tiny" in wrong["reason"]["message"]


def test_a_teacher_of_other_tokens_is_refused_before_anything_runs(cli):
    """Where both models are here: by name, and with the remedy."""
    other_tokens(cli.folder / "other")
    make("llama", DEFAULTS, cli.folder / "mine")
    text = MATRIX.replace("  other: {", '  mine: {source: "local:mine"}\n  other: {')
    path = write(cli.folder, text.replace("{model: tiny, r", "{model: mine, r"))
    done = cli("run", path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "restoring.mistaught.distill.teacher: the tokenizers of mine and of its teacher other differ" in done.stderr
    assert "name a model with the tokenizer of mine" in done.stderr and not list(cli.folder.glob("runs/*/records"))
    done = cli("plan", path, "--only", "restoring=taught,none")
    assert done.returncode == 0, done.stderr
    assert vocabulary(cli.folder / "mine") == load_tokenizer(cli.folder / "mine").get_vocab()


def test_tokenizers_that_give_the_same_ids(folders, tmp_path):
    other_tokens(tmp_path / "other")
    one, same, other = (load_tokenizer(f) for f in (folders / "llama-small", folders / "t5-large", tmp_path / "other"))
    assert same_tokens(one, same) and not same_tokens(one, other)


def test_a_teacher_that_the_matrix_does_not_have(tmp_path):
    make("llama", DEFAULTS, tmp_path / "other")
    with pytest.raises(InputError, match=r"distill.teacher.model: there is no model 'larg'.*Did you mean large"):
        load_matrix(write(tmp_path, MATRIX.replace("model: large}", "model: larg}")))
    with pytest.raises(InputError, match=r"distill.teacher: 'largest' is not one of these.*compressed, dense"):
        load_matrix(write(tmp_path, MATRIX.replace("{model: large}", "largest")))
    cells = expand(load_matrix(write(tmp_path)))
    assert {c.axes["restoring"]: c.teacher.id for c in cells} == {
        "taught": "large--none--lora--vanilla--smoke_sentiment--s0",
        "mistaught": "other--none--lora--vanilla--smoke_sentiment--s0",
    }
