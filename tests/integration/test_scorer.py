"""Responses against lm-eval's HFLM on the same models and requests, and what a stop, a kill and a full memory leave of them."""

import json
import random

import pyarrow.parquet as pq
import pytest
import torch
from scored import (
    ARCHITECTURES,
    LONGEST,
    generation_requests,
    hflm,
    instances,
    models,  # noqa: F401
    respond,
    rolling_requests,
    score_requests,
    write,
)

from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.evaluation import forward, scorer
from cpet_bench.models import tiny


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
