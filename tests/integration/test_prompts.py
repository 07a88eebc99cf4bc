"""Prompt-learning methods: the model with virtual tokens computes what PEFT's own wrapper does, whoever runs it and how."""

import json
import subprocess
import sys

import pytest
import torch
from test_pet import shake

from cpet_bench.errors import InputError, Unsupported
from cpet_bench.evaluation.batching import batches as score_batches
from cpet_bench.evaluation.batching import pieces, rows_of
from cpet_bench.evaluation.forward import Scorer
from cpet_bench.models.arch import body
from cpet_bench.models.loading import load_model
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.settings import PetSettings, TrainSettings

METHODS = {
    "prompt_tuning": {"num_virtual_tokens": 5},
    "p_tuning": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 5},
}
ARCHS = ("llama", "gpt2", "t5")
CASES = [(a, m) for a in ARCHS for m in METHODS]
IDS = torch.randint(5, 200, (3, 11), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0  # padded on the right
MASK[2, 4:] = 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for arch in ARCHS:
        found[arch] = tmp_path_factory.mktemp(arch)
        make(arch, DEFAULTS, found[arch])
    return found


@pytest.fixture(scope="module")
def tuned(folders, tmp_path_factory):
    """By case: the folder of a module whose weights are not those of the start."""
    found = {}
    for arch, method in CASES:
        model = load_model(folders[arch])
        methods.attach(model, PetSettings(method=method, **METHODS[method]), seed=3)
        shake(model)
        found[arch, method] = tmp_path_factory.mktemp(f"{arch}-{method}")
        methods.save(model, found[arch, method])
    return found


def run(model):
    more = {"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, use_cache=False, **more)
    return out.logits


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_the_same_as_peft(arch, method, folders, tuned):
    from peft import PeftModel

    plain = run(load_model(folders[arch]))
    theirs = run(PeftModel.from_pretrained(load_model(folders[arch]), str(tuned[arch, method])).eval())
    model = load_model(folders[arch])
    methods.attach_saved(model, tuned[arch, method], trainable=False)
    ours = run(model)
    assert ours.shape == plain.shape  # nobody sees the virtual positions
    real = MASK.bool() if arch != "t5" else torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(ours[real], theirs[:, -ours.shape[1] :][real], atol=1e-4, rtol=1e-4)
    assert (ours - plain)[real].abs().max() > 1e-3
    methods.detach(model)
    assert torch.equal(run(model), plain) and not any("prompt" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_training_moves_the_virtual_tokens_alone(arch, method, folders, tmp_path):
    model = load_model(folders[arch])
    methods.attach(model, PetSettings(method=method, **METHODS[method]), seed=3)
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("cpet_prompt.") for n in trained)
    from cpet_bench.training import train

    pair = {"choice_ids": [[7], [9]], "target_ids": [7], "document": "x"}
    pairs = [pair | {"context_ids": row.tolist(), "gold": i % 3 % 2} for i, row in enumerate(IDS.repeat(3, 1))]
    facts = train(
        model,
        pairs,
        TrainSettings(steps=12, batch=6, lr=2e-2, warmup=0),
        scratch=tmp_path / "scratch",
        progress=lambda *_: None,
        should_stop=lambda: False,
    )
    assert facts["losses"][-1]["loss"] < facts["losses"][0]["loss"]
    now = dict(model.named_parameters())
    assert all((now[n] - p).abs().max() > 0 for n, p in trained.items() if n not in facts["unreachable"])
    model.eval()
    wanted = run(model)
    methods.save(model, tmp_path / "saved")
    methods.detach(model)
    methods.attach_saved(model, tmp_path / "saved", trainable=True)  # as inheriting does
    torch.testing.assert_close(run(model), wanted, atol=1e-5, rtol=1e-5)
    (own,) = [p for n, p in model.named_parameters() if p.requires_grad]
    assert own.numel() == facts["trainable_parameters"] if method == "prompt_tuning" else own.numel() > 0
    run_with_gradient = model(input_ids=IDS, **({"decoder_input_ids": IDS[:, :4]} if arch == "t5" else {}), use_cache=False)
    run_with_gradient.logits.square().mean().backward()
    assert own.grad is not None and own.grad.abs().max() > 0


@pytest.mark.parametrize(("arch", "method"), [c for c in CASES if c[0] != "t5"])
@pytest.mark.parametrize("branch", [False, True])
def test_scores_with_and_without_shared_starts(arch, method, branch, folders, tuned):
    """Log-probabilities from the scorer are those of whole sequences run through PEFT's wrapper."""
    from peft import PeftModel

    start = IDS.flatten().tolist() * 2
    asked = [(start + row[:7], answer) for row in IDS.tolist() for answer in ([7, 8], [9, 10, 11])]
    rows = [{"request_type": "loglikelihood", "context_ids": c, "continuation_ids": t} for c, t in asked]
    model = load_model(folders[arch])
    methods.attach_saved(model, tuned[arch, method], trainable=False)
    found = [p for i, row in enumerate(rows) for p in pieces(i, row, 120, False, 0)]
    plans = list(score_batches(rows_of(found, False, None), 512, 512, branch=branch))
    scorer, scores = Scorer(model), {}
    with torch.no_grad():
        for batch in plans:
            scores |= {piece.request: logprob for piece, logprob, _ in scorer.score(batch)}
    theirs = PeftModel.from_pretrained(load_model(folders[arch]), str(tuned[arch, method])).eval()
    for i, (context, target) in enumerate(asked):
        ids = torch.tensor([context + target])
        with torch.no_grad():
            logp = theirs(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :].log_softmax(-1)[0]
        wanted = sum(float(logp[len(context) + k - 1, t]) for k, t in enumerate(target))
        assert scores[i] == pytest.approx(wanted, abs=1e-4)
    cached = [b for b in plans if b.prefix or b.groups]
    assert bool(cached) == branch, "the test shows nothing"


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_generation(arch, method, folders, tuned):
    from peft import PeftModel

    model = load_model(folders[arch])
    methods.attach_saved(model, tuned[arch, method], trainable=False)
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    ours = model.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **more)
    theirs = PeftModel.from_pretrained(load_model(folders[arch]), str(tuned[arch, method])).eval()
    wanted = theirs.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **more)
    assert ours.tolist() == wanted.tolist()
    # A prompt that is padded on the left says the same as alone.
    short = IDS[:1, :6]
    alone = model.generate(input_ids=short, attention_mask=torch.ones_like(short), **more)
    if arch == "t5":
        return
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(short)], 1)
    both = model.generate(input_ids=torch.cat([IDS[:1], padded]), attention_mask=torch.cat([MASK[:1], mask]), **more)
    assert both[1, 11:].tolist() == alone[0, 6:].tolist() and both[0].tolist() == ours[0].tolist()


def test_steps_through_a_cache_are_whole_passes(folders, tuned):
    for case in CASES:
        if case[0] == "t5":
            continue
        model = load_model(folders[case[0]])
        methods.attach_saved(model, tuned[case], trainable=False)
        trunk = body(model)
        with torch.no_grad():
            whole = trunk(input_ids=IDS[:1], use_cache=False).last_hidden_state
            first = trunk(input_ids=IDS[:1, :6], use_cache=True)
            rest = trunk(input_ids=IDS[:1, 6:], past_key_values=first.past_key_values, use_cache=True).last_hidden_state
        torch.testing.assert_close(torch.cat([first.last_hidden_state, rest], 1), whole, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused(folders, tuned):
    with pytest.raises(Unsupported, match="no decoder input"):
        methods.attach(load_model(folders["t5"]), PetSettings(method="multitask_prompt_tuning", num_virtual_tokens=5))
    other = load_model(folders["gpt2"])
    with pytest.raises(InputError, match=r"pet\.num_virtual_tokens"):
        methods.attach(other, PetSettings(method="p_tuning"))
    with pytest.raises(Unsupported, match=r"keys of width 32 .*c_attn makes 64; .*token_dim"):
        methods.attach(other, PetSettings(method="prefix_tuning", num_virtual_tokens=5, token_dim=32))
    model = load_model(folders["llama"])
    methods.attach_saved(model, tuned["llama", "prompt_tuning"], trainable=False)
    with pytest.raises(Unsupported, match="one module at a time"):
        methods.attach_saved(model, tuned["llama", "prompt_tuning"], trainable=False, name="second")


def test_loaded_in_another_process(folders, tuned):
    code = (
        "import sys, json, torch; from cpet_bench.models.loading import load_model; from cpet_bench.pet import methods\n"
        "ids = torch.arange(5, 15)[None]\n"
        "def answer(folder, saved):\n"
        "    model = methods.attach_saved(load_model(folder), saved, trainable=False)\n"
        "    return model(input_ids=ids, use_cache=False).logits[0, -1].tolist()\n"
        "print(json.dumps([answer(sys.argv[1], saved) for saved in sys.argv[2:]]))"
    )
    places = [tuned["llama", method] for method in METHODS]
    done = subprocess.run([sys.executable, "-c", code, folders["llama"], *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for place, theirs in zip(places, json.loads(done.stdout), strict=True):
        model = load_model(folders["llama"])
        methods.attach_saved(model, place, trainable=False)
        with torch.no_grad():
            mine = model(input_ids=torch.arange(5, 15)[None], use_cache=False).logits[0, -1]
        torch.testing.assert_close(torch.tensor(theirs), mine)


def test_a_run_with_virtual_tokens(cli):
    """Trained, inherited, distilled beside recovery, probed and scored, from the command line."""
    more = {"prompt_tuning": {}, "prefix_tuning": {"init_text": "was the film good"}}
    pets = "".join(f"  {m}: {json.dumps({'method': m, **METHODS[m], **more[m]})}\n" for m in more)
    text = (
        f"name: prompts\npet:\n{pets}"
        "restoring: {cpet: {inherit: true, recover: {r: 4}, distill: true}}\n"
        "train: {steps: 2, lr: 3e-2}\ntask: {smoke_sentiment: {limit: 8}}\n"
        "probes: {throughput: {prompt_tokens: 8, new_tokens: 3, repeats: 1}}\nexclude: [{pet: [none, lora]}]\n"
        "include: [{compression: wanda24, restoring: cpet}]\n"
    )
    done = cli("run", cli.matrix(text), timeout=560)
    assert done.returncode == 0, done.stderr
    records = cli.records("prompts")
    assert len(records) == 2 and {r["status"] for r in records.values()} == {"done"}, [r["reason"] for r in records.values()]
    for r in records.values():
        assert r["probes"]["prefill"]["value"] > 0 and r["training"]["inherited"]["steps"] == 2
        assert set(r["training"]["by_part"]) == {r["axes"]["pet"], "recovery"} and min(r["training"]["by_part"].values()) > 0
