"""Responses against lm-eval's HFLM on the same models and requests, and what a stop, a kill and a full memory leave of them."""

import json
import random

import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from cpet_bench.errors import StepFailed, Stopping, Unsupported
from cpet_bench.evaluation import forward, requests, scorer
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_log_likelihoods_are_hflms(arch, models, tmp_path):
    model, tokenizer = models(arch)
    lm = hflm(model, tokenizer)
    asked, texts = score_requests(), rolling_requests()
    theirs = lm.loglikelihood(instances(asked), disable_tqdm=True)
    rolled = lm.loglikelihood_rolling(instances(texts), disable_tqdm=True)
    folder = write(tmp_path, asked + texts, tokenizer, arch == "t5")
    facts, ours = respond(model, tokenizer, folder, tmp_path / "out")
    assert [r["index"] for r in ours] == list(range(len(asked) + len(texts)))
    for row, (logprob, greedy) in zip(ours, theirs, strict=False):
        assert row["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert row["greedy"] is greedy and row["text"] is None
    for row, logprob in zip(ours[len(asked) :], rolled, strict=True):
        assert row["logprob"] == pytest.approx(logprob, abs=1e-3, rel=1e-6)
    assert facts["requests"] == len(ours) and facts["halved"] == 0
    assert facts["tokens"] < facts["naive_tokens"]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert len(plan) == facts["batches"] and {i for batch in plan for i in batch} == set(range(len(ours)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_is_what_greedy_decoding_gives(arch, models, tmp_path):
    model, tokenizer = models(arch)
    lm = hflm(model, tokenizer)
    rng, ids = random.Random(4), []
    for length in (3, 9, 30):
        context = [rng.randint(3, 300) for _ in range(length)]
        given = torch.tensor([context])
        with torch.no_grad():
            made = model.generate(given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        answer = made[0, 1 if arch == "t5" else length :].tolist()[:4]
        ids += [(context, answer), (context, [*answer[:3], (answer[3] + 1) % 300]), (context, answer[:2])]
        ids.append((context, answer[:1]))
    folder = write(tmp_path, [], tokenizer, arch == "t5", ids=ids)
    _, ours = respond(model, tokenizer, folder, tmp_path / "out")
    theirs = lm._loglikelihood_tokens([(None, c, t) for c, t in ids], disable_tqdm=True)
    assert [r["greedy"] for r in ours] == [greedy for _, greedy in theirs]
    assert sum(r["greedy"] for r in ours) >= 6 and not all(r["greedy"] for r in ours)
    assert [r["logprob"] for r in ours] == pytest.approx([p for p, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_generated_texts_are_hflms(arch, models, tmp_path):
    model, tokenizer = models(arch)
    lm = hflm(model, tokenizer, 1)
    asked = generation_requests()
    theirs = lm.generate_until(instances(asked), disable_tqdm=True)
    facts, ours = respond(model, tokenizer, write(tmp_path, asked, tokenizer, arch == "t5"), tmp_path / "out", tokens=512)
    assert [r["text"] for r in ours] == theirs
    assert all(r["logprob"] is None and r["greedy"] is None for r in ours)
    assert facts["batches"] < len(asked) and len(set(theirs)) > 5


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt"])
def test_contexts_and_few_shot_examples_are_run_once(arch, models, tmp_path):
    model, tokenizer = models(arch)
    folder = write(tmp_path, score_requests(), tokenizer, False)
    table, about = pq.read_table(folder / "requests.parquet").to_pylist(), json.loads((folder / "requests.json").read_text())
    plan = scorer.plan(table, about, model, tokenizer, LONGEST, 256)
    assert any(b.groups and b.prefix for b in plan)
    real, trunk = [0], scorer.Scorer(model).trunk

    def count(module, args, given):
        mask = given["attention_mask"]
        if mask is not None:  # None: the check of the head
            real[0] += int(mask[:, -given["input_ids"].shape[1] :].sum())

    hook = trunk.register_forward_pre_hook(count, with_kwargs=True)
    try:
        facts, _ = respond(model, tokenizer, folder, tmp_path / "out")
    finally:
        hook.remove()
    assert real[0] == facts["tokens"] < 0.7 * facts["naive_tokens"]


def test_tasks_with_examples_of_their_own_do_not_mix(models, tmp_path):
    model, tokenizer = models("llama")
    asked = [pair for seed in (10, 11, 12) for pair in score_requests(seed)[:18]]
    folder = write(tmp_path, asked, tokenizer, False)
    table, about = pq.read_table(folder / "requests.parquet").to_pylist(), json.loads((folder / "requests.json").read_text())
    assert len({b.start for b in scorer.plan(table, about, model, tokenizer, LONGEST, 256) if b.prefix}) == 3
    theirs = hflm(model, tokenizer).loglikelihood(instances(asked), disable_tqdm=True)
    _, ours = respond(model, tokenizer, folder, tmp_path / "out")
    assert [r["logprob"] for r in ours] == pytest.approx([p for p, _ in theirs], abs=1e-4)


def test_other_architectures_branch_only_where_it_is_right(tmp_path):
    import transformers as tr

    tokenizer = tiny.make_tokenizer()
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {**small, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": LONGEST}
    configs = [
        (tr.Qwen2Config(**more), True),
        (tr.Qwen3Config(**more, head_dim=8), True),
        (tr.MistralConfig(**more, sliding_window=16), False),
        (tr.GPTNeoXConfig(**{k: v for k, v in more.items() if k != "num_key_value_heads"}), True),
        (tr.Gemma2Config(**more, head_dim=8, sliding_window=16, final_logit_softcapping=2.0), False),
        (tr.CohereConfig(**more, logit_scale=0.3), True),
        (tr.GraniteConfig(**more, logits_scaling=3.0), True),
        (tr.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4), False),
    ]
    torch.manual_seed(0)
    for number, (config, branches) in enumerate(configs):
        config.pad_token_id = config.bos_token_id = config.eos_token_id = tokenizer.pad_token_id
        model = tr.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.3)
        assert forward.can_branch(model) is branches, config.model_type
        lm = hflm(model, tokenizer)
        asked = score_requests()[:26]
        theirs = lm.loglikelihood(instances(asked), disable_tqdm=True)
        folder = tmp_path / str(number)
        _, ours = respond(model, tokenizer, write(folder, asked, tokenizer, False), folder / "out")
        assert [r["logprob"] for r in ours] == pytest.approx([p for p, _ in theirs], abs=2e-4), config.model_type
        assert [r["greedy"] for r in ours] == [g for _, g in theirs], config.model_type


def test_t5_of_version_1_1_does_not_scale_what_its_head_reads(tmp_path):
    import transformers as tr

    tokenizer = tiny.make_tokenizer()
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0, "pad_token_id": 0}
    config = tr.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **more)
    torch.manual_seed(0)
    model = tr.T5ForConditionalGeneration(config).eval()
    asked = score_requests()[:12]
    theirs = hflm(model, tokenizer).loglikelihood(instances(asked), disable_tqdm=True)
    _, ours = respond(model, tokenizer, write(tmp_path, asked, tokenizer, True), tmp_path / "out")
    assert [r["logprob"] for r in ours] == pytest.approx([p for p, _ in theirs], abs=1e-4, rel=1e-5)


def test_a_head_that_is_not_known_is_refused(models, tmp_path):
    model, tokenizer = models("llama")
    folder = write(tmp_path, score_requests()[:3], tokenizer, False)
    hook = model.lm_head.register_forward_hook(lambda m, a, out: out * 1.01)
    try:
        with pytest.raises(Unsupported, match="LlamaForCausalLM"):
            respond(model, tokenizer, folder, tmp_path / "out")
    finally:
        hook.remove()


def test_log_probabilities_that_are_no_numbers_fail(models, tmp_path):
    model, tokenizer = models("llama")
    folder = write(tmp_path, score_requests()[:3], tokenizer, False)
    hook = model.model.norm.register_forward_hook(lambda m, a, out: out * float("nan") if out.shape[1] > 3 else out)
    try:
        with pytest.raises(StepFailed, match="no numbers"):
            respond(model, tokenizer, folder, tmp_path / "out")
    finally:
        hook.remove()


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
