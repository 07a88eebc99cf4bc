"""The scorer where something is in the way: stops, full memories, samples, large vocabularies; and the whole way."""

import json
import random

import pyarrow.parquet as pq
import pytest
import torch
from scored import (
    LONGEST,
    generation_requests,
    hflm,
    instances,
    models,  # noqa: F401
    respond,
    rolling_requests,
    score_requests,
    sentence,
    write,
)

from cpet_bench.errors import StepFailed, Stopping
from cpet_bench.evaluation import forward, requests, scorer
from cpet_bench.evaluation.scorer import max_length
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model, load_tokenizer
from cpet_bench.pet import methods
from cpet_bench.settings import PetSettings


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_stopped_call_goes_on_where_it_was(arch, models, tmp_path):
    model, tokenizer = models(arch)
    asked = score_requests() + rolling_requests() + generation_requests()
    folder = write(tmp_path, asked, tokenizer, arch == "t5")
    facts, whole = respond(model, tokenizer, folder, tmp_path / "whole")
    ran = []
    counted = model.get_input_embeddings().register_forward_hook(lambda m, a, out: ran.append(out.shape))
    try:
        respond(model, tokenizer, folder, tmp_path / "again")
        undisturbed = len(ran)
        del ran[:]
        scratch, calls = tmp_path / "scratch", 0
        for _ in range(50):
            allowed = iter([False] * 4)
            try:
                later, resumed = respond(
                    model, tokenizer, folder, tmp_path / "out", scratch=scratch, should_stop=lambda a=allowed: next(a, True)
                )
                break
            except Stopping:
                calls += 1
                kept = scratch / "responses.jsonl"
                kept.write_bytes(kept.read_bytes() + b'{"batch": 99, "scores": [[0, -1')  # as a kill leaves it
    finally:
        counted.remove()
    assert calls >= 2 and resumed == whole
    assert {k: v for k, v in later.items() if k != "seconds"} == {k: v for k, v in facts.items() if k != "seconds"}
    # Each call checks the head (T5: both embeddings), and runs a shared start anew that it had not reached the end of.
    assert undisturbed <= len(ran) <= undisturbed + 4 * calls


def test_what_another_plan_left_is_not_used(models, tmp_path):
    model, tokenizer = models("llama")
    folder = write(tmp_path, score_requests(), tokenizer, False)
    _, whole = respond(model, tokenizer, folder, tmp_path / "out", scratch=tmp_path / "s", tokens=256)
    kept = (tmp_path / "s" / "responses.jsonl").read_text().splitlines()
    wrong = [kept[0], *(json.dumps(json.loads(line) | {"scores": [[0, 1.0, True]]}) for line in kept[1:])]
    (tmp_path / "s" / "responses.jsonl").write_text("\n".join(wrong) + "\n")
    _, other = respond(model, tokenizer, folder, tmp_path / "other", scratch=tmp_path / "s", tokens=512)
    assert [r["logprob"] for r in other] == pytest.approx([r["logprob"] for r in whole], abs=1e-4)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_batch_too_large_for_the_memory_is_halved(arch, models, tmp_path):
    model, tokenizer = models(arch)
    folder = write(tmp_path, score_requests() + generation_requests()[:5], tokenizer, arch == "t5")
    _, whole = respond(model, tokenizer, folder, tmp_path / "whole", tokens=1024)

    def full(module, args, kwargs, out, rows=2):
        if len(kwargs["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    trunk = model.get_decoder()
    hook = trunk.register_forward_hook(full, with_kwargs=True)
    try:
        facts, halved = respond(model, tokenizer, folder, tmp_path / "halved", tokens=1024)
    finally:
        hook.remove()
    assert facts["halved"] > 5
    assert [r["text"] for r in halved] == [r["text"] for r in whole]
    for a, b in zip(halved, whole, strict=True):
        assert a["greedy"] == b["greedy"] and (a["logprob"] is None or a["logprob"] == pytest.approx(b["logprob"], abs=1e-4))
    hook = trunk.register_forward_hook(lambda *a: full(*a, rows=0), with_kwargs=True)
    check = pytest.MonkeyPatch()
    check.setattr(scorer, "check_head", lambda model: None)
    try:
        with pytest.raises(StepFailed, match="(?i)out of memory"):
            respond(model, tokenizer, folder, tmp_path / "none", tokens=1024)
    finally:
        hook.remove(), check.undo()


def test_another_error_is_not_taken_for_a_full_memory(models, tmp_path):
    model, tokenizer = models("llama")
    folder = write(tmp_path, score_requests(), tokenizer, False)

    def broken(module, args, kwargs, out):
        if len(kwargs["input_ids"]) > 2:
            raise RuntimeError("shapes do not match")

    hook = model.get_decoder().register_forward_hook(broken, with_kwargs=True)
    try:
        with pytest.raises(RuntimeError, match="shapes"):
            respond(model, tokenizer, folder, tmp_path / "out")
    finally:
        hook.remove()


def test_sampling_follows_the_seed_and_leaves_the_global_generator(models, tmp_path):
    model, tokenizer = models("llama")
    kind = {"until": ["</s>"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    asked = [("generate_until", (sentence(random.Random(n), 5 + n), kind)) for n in range(8)]
    folder = write(tmp_path, asked, tokenizer, False)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    _, one = respond(model, tokenizer, folder, tmp_path / "a", tokens=64)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    _, two = respond(model, tokenizer, folder, tmp_path / "b", tokens=64)
    assert one == two
    about = json.loads((folder / "requests.json").read_text())
    (folder / "requests.json").write_text(json.dumps(about | {"seed": 1}))
    _, other = respond(model, tokenizer, folder, tmp_path / "c", tokens=64)
    assert [r["text"] for r in other] != [r["text"] for r in one]


def test_repeats_in_other_batches_are_other_samples(models, tmp_path):
    model, tokenizer = models("llama")
    kind = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    folder = write(tmp_path, [("generate_until", ("the film was", kind))] * 6, tokenizer, False)
    facts, ours = respond(model, tokenizer, folder, tmp_path / "out", tokens=8)
    assert facts["batches"] == 3 and len({r["text"] for r in ours}) == 6


@pytest.mark.parametrize(
    "kind, message", [({"max_gen_toks": LONGEST}, "no room"), ({"custom_generate": "x/y", "until": "a"}, "custom_generate")]
)
def test_generation_that_cannot_be_is_refused(kind, message, models, tmp_path):
    model, tokenizer = models("llama")
    folder = write(tmp_path, [("generate_until", ("the film", kind))], tokenizer, False)
    with pytest.raises(StepFailed, match=message):
        respond(model, tokenizer, folder, tmp_path / "out")


def test_requests_of_another_kind_of_model_are_refused(models, tmp_path):
    model, tokenizer = models("t5")
    with pytest.raises(StepFailed, match="kind"):
        respond(model, tokenizer, write(tmp_path, score_requests()[:2], tokenizer, False), tmp_path / "out")


def test_adapters_and_recovery_stay_in_force(models, tmp_path):
    from cpet_bench.pet import methods
    from cpet_bench.restoring import recover
    from cpet_bench.settings import PetSettings, RecoverSettings

    model, tokenizer = models("llama", seed=3)
    asked = score_requests()
    folder = write(tmp_path, asked, tokenizer, False)
    _, bare = respond(model, tokenizer, folder, tmp_path / "bare")
    methods.attach(model, PetSettings(method="lora", r=4, init_lora_weights=False))
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("U2"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()
    try:
        theirs = hflm(model, tokenizer).loglikelihood(instances(asked), disable_tqdm=True)
        _, ours = respond(model, tokenizer, folder, tmp_path / "out")
    finally:
        recover.detach_recovery(model)
        methods.detach(model)
    assert [r["logprob"] for r in ours] == pytest.approx([p for p, _ in theirs], abs=2e-4)
    assert max(abs(a["logprob"] - b["logprob"]) for a, b in zip(ours, bare, strict=True)) > 0.1


def test_a_large_vocabulary_is_scored_in_parts(models, tmp_path, monkeypatch):
    model, tokenizer = models("gpt2")
    folder = write(tmp_path, score_requests() + rolling_requests(), tokenizer, False)
    _, whole = respond(model, tokenizer, folder, tmp_path / "whole")
    monkeypatch.setattr(forward, "LOGITS", 7 * len(tokenizer))
    seen = []
    inner = forward.logits
    monkeypatch.setattr(forward, "logits", lambda m, hidden: seen.append(len(hidden)) or inner(m, hidden))
    _, parts = respond(model, tokenizer, folder, tmp_path / "parts")
    assert max(seen) == 7
    assert [r["logprob"] for r in parts] == pytest.approx([r["logprob"] for r in whole], abs=1e-4)
    assert [r["greedy"] for r in parts] == [r["greedy"] for r in whole]


def test_bfloat16_is_close_and_progress_ends_at_its_total(models, tmp_path):
    model, tokenizer = models("llama", seed=9)
    folder = write(tmp_path, score_requests(), tokenizer, False)
    _, exact = respond(model, tokenizer, folder, tmp_path / "a")
    shown = []
    _, rough = respond(model.to(torch.bfloat16), tokenizer, folder, tmp_path / "b", progress=lambda *a: shown.append(a))
    difference = max(abs(a["logprob"] - b["logprob"]) for a, b in zip(exact, rough, strict=True))
    assert 0 < difference < 1.0
    done = [d for d, _, _ in shown]
    assert done == sorted(done) and shown[-1][0] == shown[-1][1]


def test_batches_are_the_same_whatever_the_weights(models, tmp_path):
    folder = tmp_path
    plans = []
    for seed in (0, 5):
        model, tokenizer = models("llama", seed=seed)
        write(folder, score_requests(), tokenizer, False)
        facts, _ = respond(model, tokenizer, folder, tmp_path / str(seed))
        plans.append(facts["plan"])
    assert plans[0] == plans[1]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {shots}
output_type: {kind}
doc_to_text: "{{{{text}}}} Answer"
"""
CHOICE = 'doc_to_choice: [" good film", " bad", " awful story"]\ndoc_to_target: label\nmetric_list: [{metric: acc}]\n'
WRITE = (
    'doc_to_target: " good"\ngeneration_kwargs: {until: [" film"], max_gen_toks: 8, do_sample: false}\n'
    "metric_list: [{metric: exact_match}]\n"
)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_tasks_from_requests_to_responses_are_lm_evals(arch, models, tmp_path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from cpet_bench.evaluation.tasks import task_spec
    from cpet_bench.settings import PromptSettings, TaskSettings

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    model, tokenizer = models(arch)
    folder, rng = tmp_path / "tasks", random.Random(0)
    folder.mkdir()
    documents = [{"text": sentence(rng, rng.randint(4, 9)), "label": n % 3} for n in range(10)]
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    tasks = {"mine_choice": ("multiple_choice", 3, CHOICE), "mine_text": ("generate_until", 0, WRITE)}
    for name, (kind, shots, rest) in tasks.items():
        text = TASK.format(name=name, data=folder / "data.jsonl", shots=shots, kind=kind)
        (folder / f"{name}.yaml").write_text(text + rest)
    lm = hflm(model, tokenizer, 1)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, log_samples=True, bootstrap_iters=0)["samples"]
    for name, (kind, _, _) in tasks.items():
        spec = task_spec(TaskSettings(name=name, include=str(folder)), name, tmp_path)
        asked = tmp_path / name
        asked.mkdir()
        requests.build_requests(spec, PromptSettings(max_tokens=LONGEST), tokenizer, asked)
        facts, ours = respond(model, tokenizer, asked, tmp_path / name / "out")
        rows = pq.read_table(asked / "requests.parquet").to_pylist()
        theirs = {s["doc_id"]: s["resps"] for s in found[name]}
        assert len(rows) == 10 * (3 if kind == "multiple_choice" else 1)
        for row, mine in zip(rows, ours, strict=True):
            answer = theirs[row["doc_id"]][row["choice"]][0]
            if kind == "generate_until":
                assert mine["text"] == answer
            else:
                assert mine["logprob"] == pytest.approx(answer[0], abs=1e-4) and mine["greedy"] is answer[1]
        if arch == "llama" and kind == "multiple_choice":
            assert facts["tokens"] < facts["naive_tokens"] / 2


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_virtual_tokens_that_fill_the_context_are_no_score(arch, tmp_path):
    """Nothing of a document could be read; each answer would have the log-probability 0."""
    tiny.make(arch, {**tiny.DEFAULTS, "positions": 32}, tmp_path / arch)
    for count, left in ((30, 2), (31, None), (40, None)):
        pet = PetSettings(method="prompt_tuning", num_virtual_tokens=count)
        model = methods.attach(load_model(tmp_path / arch), pet)
        if left:
            assert max_length(model, load_tokenizer(tmp_path / arch)) == left
            continue
        with pytest.raises(StepFailed, match=f"reads 32 tokens at once, and {count} virtual tokens leave no room"):
            max_length(model, load_tokenizer(tmp_path / arch))
