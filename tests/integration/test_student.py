"""The distilled student against its formula: blocks kept, the loss, what training brings, what it leaves behind."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from new_process import answer, answers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from cpet_bench import registry
from cpet_bench.compression import student
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.compression.student import Student, StudentSettings
from cpet_bench.errors import StepFailed, Stopping, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, block_lists
from cpet_bench.models.blocks import keep_blocks
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.settings import PetSettings, RecoverSettings
from cpet_bench.steps.models import run_compress

ARCHS = ("llama", "gpt2", "opt", "t5")
SMOKE = Path(__file__).parents[2] / "matrices/smoke.yaml"
HOW = {"device": "cpu", "dtype": "float32", "progress": lambda *_: None}
SMALL = StudentSettings(blocks=2, steps=40, batch_tokens=128, lr=2e-3, warmup=4)
LAYERS = 4


def examples(count=40, seed=0):
    """Texts of 6 to 14 tokens out of a few, so that there is something to learn about them."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (6 + i % 9,), generator=g).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    found = {}
    for arch in ARCHS:
        tiny.make(arch, {**tiny.DEFAULTS, "layers": LAYERS}, root / arch)
        out = root / f"{arch}-student"
        facts = Student.compress(root / arch, out, SMALL, examples=examples(), **HOW)
        found[arch] = SimpleNamespace(dense=root / arch, out=out, facts=facts)
    return found


def lists(arch):
    names = {"llama": ["model.layers"], "gpt2": ["transformer.h"], "opt": ["model.decoder.layers"]}
    return names.get(arch, ["encoder.block", "decoder.block"])


# -- what stays --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("total", "given", "kept"),
    [
        (12, {"depth": 0.5}, [0, 2, 4, 7, 9, 11]),  # DistilBERT's
        (30, {"blocks": 10}, [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]),
        (4, {"depth": 0.75}, [0, 2, 3]),
        (4, {"depth": 0.1}, [0]),
        (2, {"blocks": 1}, [0]),
    ],
)
def test_blocks_are_kept_evenly(total, given, kept):
    wanted = [round(i * (total - 1) / max(1, len(kept) - 1)) for i in range(len(kept))]
    assert student.spread(total, StudentSettings(**given)) == kept == wanted


@pytest.mark.parametrize("total", range(2, 40))
def test_kept_blocks_are_distinct_and_in_order(total):
    for n in range(1, total):
        kept = student.spread(total, StudentSettings(blocks=n))
        assert len(kept) == n and kept == sorted(set(kept)) and kept[0] == 0 and (n == 1 or kept[-1] == total - 1)


@pytest.mark.parametrize("arch", ARCHS)
def test_untrained_it_computes_what_the_blocks_kept_compute(made, arch):
    model = load_model(made[arch].dense)
    kept = dict.fromkeys(lists(arch), [0, 2, 3])
    cut = keep_blocks(model, kept)
    for name in lists(arch):  # the model itself, with blocks taken out of it
        parent, _, child = name.rpartition(".")
        blocks = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, nn.ModuleList([blocks[i] for i in (0, 2, 3)]))
    with torch.no_grad():
        ids = torch.arange(3, 51).view(4, 12)
        more = {"decoder_input_ids": ids[:, :5]} if arch == "t5" else {}
        wanted = model(input_ids=ids, use_cache=False, **more).logits
        assert torch.equal(cut(input_ids=ids, use_cache=False, **more).logits, wanted)
        new = cut.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=True)
        assert torch.equal(new, cut.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=False))


@pytest.mark.parametrize("arch", ARCHS)
def test_it_really_is_smaller(made, arch):
    facts, model, dense = made[arch].facts, load_model(made[arch].out), load_model(made[arch].dense)
    assert block_lists(model) == lists(arch) and all(len(model.get_submodule(n)) == 2 for n in lists(arch))
    gone = sum(p.numel() for n in lists(arch) for i in (1, 2) for p in dense.get_submodule(f"{n}.{i}").parameters())
    assert facts["teacher_parameters"] - facts["parameters"] == gone > 0
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["bytes"] == sum(p.stat().st_size for p in made[arch].out.glob("*.safetensors"))
    stored = sum(t.numel() for f in made[arch].out.glob("*.safetensors") for t in load_file(f).values())
    assert stored == facts["parameters"]
    assert "simulated" not in facts and Student.structure(SMALL)
    note = json.loads((made[arch].out / "cpet_compression.json").read_text())
    assert note["backend"] == "student"
    assert note["kept_blocks"] == facts["kept_blocks"] == dict.fromkeys(lists(arch), [0, 3])


# -- the loss ----------------------------------------------------------------------------------------------------------
def seen(model, text, kept):
    """Logits and blocks' outputs of one text run alone, by hooks on the blocks."""
    states, hooks = [], []
    for name, indices in kept.items():
        for i in indices:
            keep = lambda m, a, out: states.append((out[0] if isinstance(out, tuple) else out)[0])  # noqa: E731
            hooks.append(model.get_submodule(f"{name}.{i}").register_forward_hook(keep))
    ids, more = torch.tensor([text]), {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *text[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, states


def terms(teacher, model, texts, kept, temperature):
    """Means over tokens of both terms, text by text."""
    mine = {name: range(len(indices)) for name, indices in kept.items()}
    kl, hidden, tokens = 0.0, 0.0, sum(map(len, texts))
    for text in texts:
        (logits_t, states_t), (logits_s, states_s) = seen(teacher, text, kept), seen(model, text, mine)
        p, q = (torch.softmax(x / temperature, -1) for x in (logits_t, logits_s))
        kl += float((p * (p.log() - q.log())).sum()) * temperature**2 / tokens
        for t, s in zip(states_t, states_s, strict=True):
            hidden += float((((s - t) ** 2).mean(1) / (t**2).mean(1)).sum()) / tokens / len(states_t)
    return kl, hidden


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("micro", [1, 1024])
def test_the_loss_is_the_formula_however_it_is_split(made, arch, micro, monkeypatch, tmp_path):
    monkeypatch.setattr(student, "MICRO", micro)
    settings = SMALL.model_copy(update={"steps": 1, "temperature": 3.0, "hidden": 0.7, "kl": 0.2})
    texts = examples(7)
    facts = Student.compress(made[arch].dense, tmp_path / "out", settings, examples=texts, **HOW)
    teacher = load_model(made[arch].dense)
    kept = dict.fromkeys(lists(arch), [0, 3])
    read = [texts[i] for i in student.order([len(t) for t in texts], 1, 128, 0)[0]]
    kl, hidden = terms(teacher, keep_blocks(teacher, kept), read, kept, 3.0)
    first = facts["training"]["losses"][0]
    assert first["kl"] == pytest.approx(kl, rel=1e-3) and first["hidden"] == pytest.approx(hidden, rel=1e-3)
    assert first["loss"] == pytest.approx(0.2 * kl + 0.7 * hidden, rel=1e-3)


def test_steps_read_the_tokens_asked_for():
    lengths = [5, 9, 30, 2, 7]
    plan = student.order(lengths, 20, 25, seed=4)
    for batch in plan:
        read = [lengths[i] for i in batch]
        assert sum(read) >= 25 > sum(read[:-1])
    assert sorted(sum(plan, [])[:5]) == [0, 1, 2, 3, 4]  # one pass after the other
    assert student.order(lengths, 20, 25, seed=4) == plan != student.order(lengths, 20, 25, seed=5)
    assert student.order(lengths, 25, 25, seed=4)[:20] == plan


# -- what it brings ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ARCHS)
def test_it_comes_nearer_to_the_teacher_on_text_it_has_not_seen(made, arch):
    facts = made[arch].facts["training"]
    values = [step["loss"] for step in facts["losses"]]
    assert len(values) == 40 and sum(values[-5:]) < 0.8 * sum(values[:5])
    assert facts["measured_on"] == "held-out documents" and made[arch].facts["held_out_documents"] == 4
    held = [t for i, t in enumerate(examples()) if i % 10 == 9]
    teacher, kept = load_model(made[arch].dense), dict.fromkeys(lists(arch), [0, 3])
    before = terms(teacher, keep_blocks(teacher, kept), held, kept, 1.0)[0]
    after = terms(teacher, load_model(made[arch].out), held, kept, 1.0)[0]  # as loaded again
    assert facts["kl_start"] == pytest.approx(before, rel=1e-3)
    assert facts["kl_end"] == pytest.approx(after, rel=1e-3)
    assert after < 0.8 * before


def test_its_cost_is_told(made):
    facts = made["llama"].facts["training"]
    texts = [t for i, t in enumerate(examples()) if i % 10 != 9]
    read = [texts[i] for step in student.order([len(t) for t in texts], 40, 128, 0) for i in step]
    assert (facts["steps"], facts["documents"], facts["tokens"]) == (40, len(read), sum(map(len, read)))
    assert facts["padded_tokens"] >= facts["tokens"] and facts["seconds"] > 0 and facts["peak_memory"] > 0
    block = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    vocabulary = len(tiny.make_tokenizer())
    assert facts["flops"] == facts["tokens"] * (6 * (2 * block + 64 * vocabulary) + 2 * (4 * block + 64 * vocabulary))


def test_without_hidden_states(made, tmp_path):
    settings = SMALL.model_copy(update={"hidden": 0.0, "steps": 20})
    facts = Student.compress(made["llama"].dense, tmp_path / "out", settings, examples=examples(), **HOW)["training"]
    assert all(step["hidden"] == 0 for step in facts["losses"]) and facts["kl_end"] < facts["kl_start"]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_the_seed_says_what_comes_out(made, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        settings = SMALL.model_copy(update={"seed": seed})
        Student.compress(made["gpt2"].dense, tmp_path / name, settings, examples=examples(), **HOW)
    assert weights(tmp_path / "same") == weights(made["gpt2"].out) != weights(tmp_path / "other")


def test_stopped_it_goes_on_to_the_same_end(made, tmp_path, monkeypatch):
    monkeypatch.setattr(student, "CHECKPOINT", 7)
    steps = []
    how = {**HOW, "examples": examples(), "scratch": tmp_path / "scratch", "progress": lambda *a: steps.append(a[0])}

    def run(stop):
        return Student.compress(made["llama"].dense, tmp_path / "out", SMALL, should_stop=stop, **how)

    with pytest.raises(Stopping, match="step 10 of 40"):
        run(lambda: len(steps) == 10)
    assert not (tmp_path / "out").exists()
    steps.clear()
    facts = run(lambda: False)
    assert steps == list(range(11, 41)) and weights(tmp_path / "out") == weights(made["llama"].out)
    same = ("losses", "steps", "documents", "tokens", "padded_tokens", "kl_start", "kl_end")
    assert all(facts["training"][k] == made["llama"].facts["training"][k] for k in same)


def test_a_checkpoint_of_another_training_is_not_used(made, tmp_path):
    how = {**HOW, "scratch": tmp_path, "should_stop": lambda: True}
    with pytest.raises(Stopping):
        Student.compress(made["llama"].dense, tmp_path / "a", SMALL, examples=examples(seed=1), **how)
    Student.compress(made["llama"].dense, tmp_path / "b", SMALL, examples=examples(), **HOW, scratch=tmp_path)
    assert weights(tmp_path / "b") == weights(made["llama"].out)


def test_its_step_offers_what_it_resumes_from(made, tmp_path, monkeypatch):
    monkeypatch.setattr("cpet_bench.evaluation.pairs.calibration_ids", lambda *_: examples())
    context = SimpleNamespace(
        settings={"backend": "student", "settings": SMALL.model_dump(mode="json")},
        inputs={"source": made["llama"].dense, "examples": None},
        out=tmp_path / "out",
        scratch=tmp_path / "scratch",
        should_stop=lambda: True,
        pool=SimpleNamespace(clear=lambda: None),
        machine={"owns": ["cpu"], "dtype": "float32"},
        progress=lambda *_: None,
    )
    with pytest.raises(Stopping):
        run_compress(context)
    context.should_stop = lambda: False
    run_compress(context)
    assert weights(tmp_path / "out") == weights(made["llama"].out)


# -- with the other parts ----------------------------------------------------------------------------------------------
def test_the_same_in_a_new_process(made, tmp_path):
    folders = [made[arch].out for arch in ARCHS]
    for folder, found in zip(folders, answers(folders, tmp_path / "logits"), strict=True):
        assert torch.equal(found, answer(load_model(folder)))


@pytest.mark.parametrize("arch", ARCHS)
def test_lora_and_recovery_train_on_it(made, arch):
    model = load_model(made[arch].out)
    before = answer(model)
    layers = sorted({name.rpartition(".")[2] for name in block_linears(model)})
    deployed = methods.attach(model, PetSettings(method="lora", r=4, target_modules=layers), seed=0)
    recover.attach_recovery(deployed, RecoverSettings(r=4), seed=0)
    trained = {n: p for n, p in deployed.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids, values, reached = torch.arange(3, 51).view(4, 12), [], set()
    for _ in range(3):
        loss = deployed(input_ids=ids, labels=ids).loss
        loss.backward()
        reached |= {n for n, p in trained.items() if float(p.grad.abs().max()) > 0}
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(loss.detach()))
    assert values[2] < values[0] and reached == set(trained)
    recover.detach_recovery(deployed)
    methods.detach(deployed)
    assert torch.equal(answer(model), before)


def test_compressed_further(made, tmp_path):
    for backend, settings in ((Magnitude, {"pattern": "2:4"}), (BitsAndBytes, {"type": "nf4"})):
        out = tmp_path / backend.name
        backend.compress(made["llama"].out, out, backend.Settings(**settings), examples=None, **HOW)
        model = load_model(out)
        assert len(model.model.layers) == 2 and bool(answer(model).isfinite().all())


def test_a_student_of_a_student_keeps_both_notes(made, tmp_path):
    settings = StudentSettings(blocks=1, steps=2)
    Student.compress(made["opt"].out, tmp_path / "out", settings, examples=examples(5), **HOW)
    note = json.loads((tmp_path / "out/cpet_compression.json").read_text())
    assert note["kept_blocks"] == {"model.decoder.layers": [0]}
    assert note["before"][0]["kept_blocks"] == {"model.decoder.layers": [0, 3]}


@pytest.mark.parametrize("more", [{}, {"blocks": 2}], ids=["width", "width and depth"])
def test_narrower_blocks(made, tmp_path, more):
    """The teacher is the whole model; the student computes what it is loaded as, is smaller, and learnt."""
    settings = StudentSettings(width=0.6, importance="l2", steps=20, batch_tokens=128, lr=2e-3, warmup=4, **more)
    facts = Student.compress(made["llama"].dense, tmp_path / "out", settings, examples=examples(), **HOW)
    whole, cut = load_model(made["llama"].dense), load_model(tmp_path / "out")
    blocks = len(cut.model.layers)
    assert blocks == (2 if more else LAYERS) == len(facts["kept_blocks"]["model.layers"])
    before, after = (sum(p.numel() for p in m.model.layers[:blocks].parameters()) for m in (whole, cut))
    assert after / before == pytest.approx(0.6, abs=0.1) and facts["parameters"] == sum(p.numel() for p in cut.parameters())
    note = json.loads((tmp_path / "out/cpet_compression.json").read_text())
    assert facts["groups_left"] == {part: len(groups) for part, groups in note["kept"].items()}
    assert facts["training"]["kl_end"] < facts["training"]["kl_start"]
    again = Student.compress(made["llama"].dense, tmp_path / "again", settings, examples=examples(), **HOW)
    assert again["training"]["losses"] == facts["training"]["losses"]


# -- what cannot be ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [{}, {"width": 1}, {"width": 0}, {"depth": 0.5, "importance": "l1"}]
    + [{"depth": 0.5, "blocks": 2}, {"depth": 0}, {"depth": 1.0}, {"blocks": 0}, {"blocks": 1, "kl": 0}]
    + [{"blocks": 1, key: value} for key, value in (("temperature", 0), ("steps", 0), ("lr", 0), ("layers", 3))],
    ids=str,
)
def test_settings_that_are_refused(wrong):
    with pytest.raises(ValidationError):
        StudentSettings.model_validate(wrong)


def test_orders_that_cannot_work():
    assert registry.get("compression", "student") is Student
    for before, says in (("bitsandbytes", "packed"), ("magnitude", "zeros"), ("wanda", "zeros"), ("moefy", "routers")):
        assert says in Student.refuse(SMALL, [before]) and "put " in Student.refuse(SMALL, [before])
    assert Student.refuse(SMALL, []) is Student.refuse(SMALL, ["student"]) is None


@pytest.mark.parametrize("given", [{"blocks": 4}, {"blocks": 9}, {"depth": 0.99}])
def test_nothing_to_leave_out(made, tmp_path, given):
    with pytest.raises(Unsupported, match="4 blocks.*at most 3"):
        Student.compress(made["llama"].dense, tmp_path / "out", StudentSettings(**given), examples=examples(), **HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, [], [[]]])
def test_without_text(made, tmp_path, text):
    with pytest.raises(StepFailed, match="text"):
        Student.compress(made["llama"].dense, tmp_path / "out", SMALL, examples=text, **HOW)


def test_a_packed_source(made, tmp_path):
    BitsAndBytes.compress(made["llama"].dense, tmp_path / "nf4", BitsAndBytes.Settings(type="nf4"), examples=None, **HOW)
    with pytest.raises(Unsupported, match="quantised"):
        Student.compress(tmp_path / "nf4", tmp_path / "out", SMALL, examples=examples(), **HOW)


def test_a_loss_that_is_no_number(made, tmp_path):
    broken = tmp_path / "broken"
    tiny.make("llama", {**tiny.DEFAULTS, "layers": LAYERS}, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StepFailed, match="not finite at step 1"):
        Student.compress(broken, tmp_path / "out", SMALL, examples=examples(), **HOW)


def test_a_config_that_does_not_count_its_blocks(made):
    model = load_model(made["llama"].dense)
    model.config.num_hidden_layers = 7
    with pytest.raises(Unsupported, match="does not say how many blocks"):
        keep_blocks(model, {"model.layers": [0, 1]})


# -- in a plan ---------------------------------------------------------------------------------------------------------
def test_a_plan_knows_that_it_trains(tmp_path):
    from cpet_bench.cells import expand
    from cpet_bench.estimates import Estimates
    from cpet_bench.matrix import load_matrix
    from cpet_bench.plan import Planner
    from cpet_bench.settings import LimitSettings
    from cpet_bench.store import Store

    path = tmp_path / "matrix.yaml"
    students = "".join(f"  {n}: {{backend: student, depth: 0.5, steps: {s}}}\n" for n, s in (("long", 1000), ("short", 10)))
    path.write_text(f'extends: {SMOKE}\ncompression:\n{students}  sparse: {{backend: magnitude, pattern: "2:4"}}\n')
    matrix = load_matrix(path)
    machine = dict.fromkeys(("device", "name", "dtype", "attention", "tf32", "threads", "tokens_per_batch"))
    plan = Planner(matrix, machine).build(expand(matrix))
    estimates = Estimates(Store(str(tmp_path / "store")))
    taken = {s.label.split()[-1]: estimates.seconds(s) for s in plan.steps.values() if s.kind == "compress"}
    assert taken["sparse"] == 30 < taken["short"] < 600 < taken["long"]
    assert LimitSettings().of("compress", taken["long"]) == 20 * taken["long"]
