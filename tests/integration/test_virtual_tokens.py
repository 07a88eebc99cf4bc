"""Virtual tokens on more kinds of model and of more kinds, one row at a time through PEFT's own forward as the reference."""

import json
import random

import pytest
import torch

from compressed import compress
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.errors import InputError, Unsupported
from cpet_bench.evaluation import batching
from cpet_bench.evaluation.forward import Scorer, can_branch
from cpet_bench.matrix import load_matrix
from cpet_bench.models.loading import load_model, load_tokenizer
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.settings import PetSettings, TrainSettings
from cpet_bench.training import train
from tiny_qwen import make_qwen2

METHODS = {
    "prompt_tuning": {},
    "p_tuning": {"encoder_hidden_size": 16},
    "prefix_tuning": {},
    "cartridge": {},
    "multitask_prompt_tuning": {"num_tasks": 1, "num_ranks": 2},
}
CASES = [(arch, method) for arch in ("qwen2", "opt") for method in METHODS]
CASES += [("llama", "multitask_prompt_tuning"), ("gpt2", "multitask_prompt_tuning")]
CASES += [("t5", "prefix_tuning"), ("t5", "cartridge")]
V = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(arch):
        if arch not in made:
            made[arch] = tmp_path_factory.mktemp(arch)
            if arch != "qwen2":
                make(arch, DEFAULTS, made[arch])
            else:
                make_qwen2(get("llama"), made[arch])
        return made[arch]

    return get


def settings(method, **more):
    return PetSettings(method=method, **{"num_virtual_tokens": V, **METHODS.get(method, {}), **more})


def attached(folder, method, **more):
    model = load_model(folder)
    methods.attach(model, settings(method, **more), seed=1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # unlike any start, and large enough to matter
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
    return model.eval()


def peft_logits(folder, adapter, ids, decoder=None, **more):
    """PEFT's own full forward over one row after the other, without a cache: the reference."""
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(load_model(folder), str(adapter)).eval()
    kind = json.loads((adapter / "adapter_config.json").read_text())["peft_type"]
    more |= {"task_ids": torch.tensor([0])} if kind == "MULTITASK_PROMPT_TUNING" else {}
    found = []
    for row, i in zip(ids, range(len(ids)), strict=True):
        both = {"decoder_input_ids": torch.tensor([decoder[i]])} if decoder else {"use_cache": False}
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)), **both, **more).logits[0]
        found.append(out[-len(decoder[i] if decoder else row) :])
    return found


def rows(seed=0, low=3, high=90):
    rng = random.Random(seed)
    start = [rng.randrange(low, high) for _ in range(9)]
    return [start + [rng.randrange(low, high) for _ in range(rng.randint(1, 9))] for _ in range(5)]


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_outputs_are_pefts(arch, method, folders, tmp_path):
    """Padded rows as training runs them, the model's own forward, and the same after a way through a folder."""
    model = attached(folders(arch), method)
    methods.save(model, tmp_path / "a")
    texts, answers = rows(), [[0, 7, 8], [0, 5], [0], [0, 4, 9, 11], [0, 3]]
    both = model.config.is_encoder_decoder
    wanted = peft_logits(folders(arch), tmp_path / "a", texts, answers if both else None)

    def compare():
        longest = max(map(len, texts))
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])
        more = {"decoder_input_ids": torch.tensor([a + [0] * (4 - len(a)) for a in answers])} if both else {}
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask, **more).logits
        assert found.shape[1] == (4 if both else longest)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine[: len(theirs)], theirs, atol=1e-4, rtol=0)

    compare()
    methods.detach(model)
    methods.attach_saved(model, tmp_path / "a", trainable=False)
    compare()
    methods.save(model, tmp_path / "b")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (tmp_path / "b/adapter_model.safetensors").read_bytes()
    methods.detach(model)
    bare = load_model(folders(arch))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in bare.named_modules()]
    more = {"decoder_input_ids": torch.tensor([[0, 5]])} if both else {}
    with torch.no_grad():
        ids = torch.tensor(texts[:1])
        assert torch.equal(model(input_ids=ids, **more).logits, bare(input_ids=ids, **more).logits)


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_scores_are_pefts_with_and_without_shared_starts(arch, method, folders, tmp_path):
    rng, both = random.Random(3), arch == "t5"
    model = attached(folders(arch), method)
    methods.save(model, tmp_path / "a")

    def draw(n):
        return tuple(rng.randrange(3, 90) for _ in range(n))

    shots, found = draw(30), []
    for number in range(4):
        context = shots + draw(5 + number)
        found += [batching.Piece(3 * number + k, context, draw(2 + k)) for k in range(3)]
    texts = [p.context if both else (*p.context, *p.continuation[:-1]) for p in found]
    answers = [[0, *p.continuation[:-1]] for p in found] if both else None
    wanted = []
    for piece, out in zip(found, peft_logits(folders(arch), tmp_path / "a", texts, answers), strict=True):
        logp = out[-len(piece.continuation) :].log_softmax(-1)
        wanted.append(float(logp.gather(1, torch.tensor(piece.continuation)[:, None]).sum()))
    assert can_branch(model) is not both
    for branch in (False, True)[: 1 if both else 2]:
        made = batching.batches(batching.rows_of(found, both, 0 if both else None), 512, 512, branch=branch)
        assert branch == any(b.groups or b.prefix for b in made)
        scorer = Scorer(model)
        with torch.inference_mode():
            scores = {piece.request: logp for batch in made for piece, logp, _ in scorer.score(batch)}
        assert [scores[p.request] for p in found] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("arch", "method"), CASES)
def test_generation_is_pefts(arch, method, folders, tmp_path):
    """Greedy answers of padded prompts from the cache, against PEFT's full forward for each next token."""
    model = attached(folders(arch), method)
    methods.save(model, tmp_path / "a")
    both, prompts = arch == "t5", [r[-n:] for r, n in zip(rows(5), (4, 9, 6), strict=False)]
    written = [[0] for _ in prompts] if both else [list(p) for p in prompts]
    for _ in range(4):
        for row, prompt in zip(written, prompts, strict=True):
            out = peft_logits(folders(arch), tmp_path / "a", [prompt if both else row], [row] if both else None)[0]
            out[-1, :3] = -1e9
            row.append(int(out[-1].argmax()))
    gaps = [9 - len(p) for p in prompts]
    ids = torch.tensor([p + [0] * g if both else [0] * g + p for p, g in zip(prompts, gaps, strict=True)])
    mask = (ids != 0).long()
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, suppress_tokens=[0, 1, 2], pad_token_id=0
    )
    assert [m[-4:] for m in made.tolist()] == [w[-4:] for w in written]


def test_several_trained_tensors(folders, tmp_path):
    """The loop fails a tensor without finite, non-zero gradients; the virtual tokens alone are trained, and counted right."""
    found = {}
    pair = {"document": "a", "context_ids": [5, 6, 7, 8], "choice_ids": [[9], [10]], "gold": 1, "target_ids": [10]}
    for method, more in (
        ("multitask_prompt_tuning", {}),
        ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 8}),
    ):
        model = load_model(folders("llama"))
        methods.attach(model, settings(method, **more))
        assert all(n.startswith("cpet_prompt.") for n, p in model.named_parameters() if p.requires_grad)
        quiet = {"progress": lambda *_: None, "should_stop": lambda: False}
        s = TrainSettings(steps=2, batch=1, warmup=0, lr=1e-2)
        found[method] = train(model, [pair], s, scratch=tmp_path / method, **quiet)
        assert found[method]["unreachable"] == []
        methods.detach(model)
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    width = model.config.hidden_size
    assert found["prefix_tuning"]["flops"] == 2 * (4 * 4 * weights + 4 * 2 * width)
    assert found["multitask_prompt_tuning"]["flops"] == 2 * ((4 + V) * 4 * weights + 4 * 2 * width)


def test_a_text_may_be_the_start(folders, tmp_path):
    folder = folders("llama")
    model, text = load_model(folder), "the film was good"
    methods.attach(model, settings("prompt_tuning", prompt_tuning_init="TEXT", prompt_tuning_init_text=text))
    words = load_tokenizer(folder)(text)["input_ids"][:V]
    own = model.cpet_prompt.embedding.weight
    assert torch.equal(own[: len(words)], model.get_input_embeddings().weight[words])
    methods.save(model, tmp_path / "a")
    assert str(folder) not in (tmp_path / "a/adapter_config.json").read_text()
    methods.detach(model)
    methods.attach_saved(model, tmp_path / "a", trainable=True)


@pytest.mark.parametrize("method", ["prefix_tuning", "cartridge"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "opt"])
def test_a_prefix_may_start_from_a_text(arch, method, folders, tmp_path):
    """At the start, a document after the prefix is read as it is after the text itself, repeated to fill the prefix."""
    folder = folders(arch)
    model, words = load_model(folder), load_tokenizer(folder)("good film")["input_ids"]
    document, count = [5, 9, 17, 30, 12], len(words) + 2
    modules = dict(model.named_modules())
    before = {n: m.training for n, m in modules.items()}
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([words + words[:2] + document])).logits[0, count:]
        bare = model(input_ids=torch.tensor([document])).logits[0]
    methods.attach(model, settings(method, num_virtual_tokens=count, init_text="good film"), seed=1)
    assert [modules[n].training for n in before] == list(before.values())
    with torch.no_grad():
        found = model(input_ids=torch.tensor([document])).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - bare).abs().max() > 1e-2
    methods.save(model, tmp_path / "a")
    theirs = peft_logits(folder, tmp_path / "a", [document])[0]
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)


def test_the_first_of_a_cartridge_stay_as_they_are(folders, tmp_path):
    """Also where it is inherited, that is, trained on from what was saved."""
    folder = folders("llama")
    fields = {"num_virtual_tokens": 6, "num_frozen_tokens": 2, "init_text": "the film was good"}
    model = methods.attach(load_model(folder), settings("cartridge", **fields))
    quiet = {"progress": lambda *_: None, "should_stop": lambda: False}
    pair = {"document": "a", "context_ids": [5, 6, 7, 8], "choice_ids": [[9], [10]], "gold": 1, "target_ids": [10]}
    held = [model.cpet_prompt.weight.detach().clone()]
    for turn in range(2):
        s = TrainSettings(steps=3, batch=1, warmup=0, lr=1e-2)
        facts = train(model, [pair], s, scratch=tmp_path / f"s{turn}", **quiet)
        assert facts["trainable_parameters"] == 4 * held[0].shape[1]
        held.append(model.cpet_prompt.weight.detach().clone())
        methods.save(model, tmp_path / "a")
        methods.detach(model)
        methods.attach_saved(model, tmp_path / "a", trainable=True)
    for earlier, later in zip(held, held[1:], strict=False):
        assert torch.equal(later[:2], earlier[:2]) and (later[2:] - earlier[2:]).abs().max() > 1e-3


def test_a_four_bit_model_is_read_and_trained_still(folders, tmp_path):
    """bitsandbytes' layers lose their gradient on a processor once they were run for evaluation."""
    compress(BitsAndBytes, folders("llama"), tmp_path / "nf4", type="nf4")
    model = load_model(tmp_path / "nf4", dtype="float32")
    methods.attach(model, settings("cartridge", init_text="the film was good"))
    model(input_ids=torch.tensor([[5, 9, 17]])).logits.square().mean().backward()
    assert model.cpet_prompt.trainable_embedding.grad.abs().max() > 0


MATRIX = """
model: {tiny: {source: "tiny:llama"}}
pet:
  some: {%s}
task: {movie_reviews: {}}
"""


@pytest.mark.parametrize(
    ("fields", "key", "says"),
    [
        ("method: prefix_tuning, num_virtual_tokens: 3, init_txt: good", "init_txt", "Did you mean init_text"),
        ("method: prefix_tuning, num_virtual_tokens: 3, init_text: 7", "init_text", "should be a text.*not 7"),
        ("method: cartridge, num_virtual_tokens: 3, init_text: ' '", "init_text", "should be a text.*not ' '"),
        (
            "method: prefix_tuning, num_virtual_tokens: 3, init_text: good, prefix_projection: true",
            "prefix_projection",
            "leave one of the two out",
        ),
        ("method: prompt_tuning, num_virtual_tokens: 3, init_text: good", "init_text", "prompt_tuning has no field"),
    ],
)
def test_the_matrix_refuses_a_start_that_is_none(tmp_path, fields, key, says):
    path = tmp_path / "m.yaml"
    path.write_text(MATRIX % fields)
    with pytest.raises(InputError, match=says) as caught:
        load_matrix(path)
    assert caught.value.key == f"pet.some.{key}" and caught.value.line == 4


def test_a_text_and_a_model_that_reads_none(folders):
    model = load_model(folders("t5"))
    with pytest.raises(Unsupported, match="in decoder-only models alone"):
        methods.attach(model, settings("prefix_tuning", init_text="good"))
    assert not hasattr(model, "cpet_prompt")
