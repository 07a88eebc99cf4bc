"""Requests against what lm-eval's own simple_evaluate hands to its own HFLM for the same task files and tokenizer."""

import json

import pyarrow.parquet as pq
import pytest
from task_folder import make_folder

from cpet_bench.errors import InputError
from cpet_bench.evaluation.encoding import Encoder
from cpet_bench.evaluation.requests import build_requests, document_ids
from cpet_bench.evaluation.tasks import task_spec
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_tokenizer
from cpet_bench.settings import PromptSettings, TaskSettings

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KINDS = ["choose", "answer", "last_word", "whole_text", "which_start"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("requests") / "tasks"
    make_folder(found)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: folder}: a causal model, one whose tokenizer puts a first token before every text, an encoder-decoder."""
    from tokenizers.processors import TemplateProcessing

    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "t5"):
        tiny.make(name, tiny.DEFAULTS | {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 16}, root / name)
    tiny.make("llama", tiny.DEFAULTS | {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 16}, root / "bos")
    tokenizer = load_tokenizer(root / "bos")
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    tokenizer.save_pretrained(root / "bos")
    return {p.name: p for p in root.iterdir()}


def ours(folder, name, tokenizer, tmp_path, prompt=None, limit=None, split="test"):
    spec = task_spec(TaskSettings(include=str(folder), split=split), name, folder)
    facts = build_requests(spec, prompt or PromptSettings(), tokenizer, tmp_path / name, limit=limit)
    return pq.read_table(tmp_path / name / "requests.parquet").to_pylist(), facts


def theirs(folder, name, model, monkeypatch, template=None, **arguments):
    """[(kind, context text, context ids, continuation ids)] as HFLM gets them from lm-eval, in its order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    seen = []

    class Listener(HFLM):
        """Notes what it is asked, in the token ids that HFLM makes of it."""

        def _loglikelihood_tokens(self, requests, **_):
            seen.extend(("loglikelihood", context, list(ids), list(more)) for (context, _), ids, more in requests)
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests, **_):
            seen.extend(("loglikelihood_rolling", "", [], self.tok_encode(r.args[0])) for r in requests)
            return [-1.0] * len(requests)

        def generate_until(self, requests, **_):
            for r in requests:
                ids, _ = self.tok_batch_encode([r.args[0]])
                seen.append(("generate_until", r.args[0], ids[0].tolist(), json.dumps(r.args[1], sort_keys=True)))
            return ["yes"] * len(requests)

    monkeypatch.chdir(folder)  # lm-eval looks for relative data files in the working folder
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    auto, kind = (AutoModelForSeq2SeqLM, "seq2seq") if model.name == "t5" else (AutoModelForCausalLM, "causal")
    lm = Listener(pretrained=auto.from_pretrained(model), tokenizer=tokenizer, backend=kind, device="cpu", batch_size=1)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    simple_evaluate(lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **arguments)
    return seen


def as_theirs(rows):
    found = []
    for r in rows:
        last = r["gen_kwargs"] if r["request_type"] == "generate_until" else r["continuation_ids"]
        found.append((r["request_type"], r["context"], r["context_ids"], last))
    return found


@pytest.mark.parametrize("model", ["llama", "bos", "t5"])
@pytest.mark.parametrize("name", KINDS)
def test_same_requests_as_lm_eval(folder, models, name, model, tmp_path, monkeypatch):
    expected = theirs(folder, name, models[model], monkeypatch)
    monkeypatch.chdir(tmp_path)
    rows, facts = ours(folder, name, load_tokenizer(models[model]), tmp_path)
    assert as_theirs(rows) == expected and len(expected) >= 9
    assert facts["requests"] == len(rows) and facts["documents"] == 9
    assert facts["tokens"] == sum(len(r["context_ids"]) + len(r["continuation_ids"]) for r in rows)
    assert [r["index"] for r in rows] == list(range(len(rows)))
    about = json.loads((tmp_path / name / "requests.json").read_text())
    assert about["seq2seq"] == (model == "t5")


@pytest.mark.parametrize("model", ["llama", "bos"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("name", "shots"), [("choose", 3), ("answer", 2), ("choose", None)])
def test_same_fewshot_system_and_chat_as_lm_eval(folder, models, model, name, shots, chat, tmp_path, monkeypatch):
    system = "you love the book"
    more = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "system_instruction": system, "limit": 5}
    expected = theirs(folder, name, models[model], monkeypatch, TEMPLATE, num_fewshot=shots, **more)
    tokenizer = load_tokenizer(models[model])
    tokenizer.chat_template = TEMPLATE
    prompt = PromptSettings(fewshot=shots, system=system, chat_template=chat)
    rows, facts = ours(folder, name, tokenizer, tmp_path, prompt, limit=5)
    assert as_theirs(rows) == expected and facts["documents"] == 5
    first = rows[0]["context"]
    assert system in first and first.count(" train ") == (shots or 0) and ("<assistant>" in first) == chat


def test_a_chat_template_that_is_not_there_is_refused(folder, models, tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        ours(folder, "choose", load_tokenizer(models["llama"]), tmp_path, PromptSettings(chat_template=True))


def test_a_group_of_tasks_keeps_each_tasks_requests(folder, models, tmp_path):
    tokenizer = load_tokenizer(models["llama"])
    rows, facts = ours(folder, "both", tokenizer, tmp_path, limit=4)
    assert facts["documents"] == 8 and facts["types"] == {"loglikelihood": 12}
    for name in ("choose", "last_word"):
        alone, _ = ours(folder, name, tokenizer, tmp_path, limit=4)
        assert as_theirs(r for r in rows if r["task"] == name) == as_theirs(alone)


def test_validation_split_is_what_is_asked(folder, models, tmp_path):
    rows, facts = ours(folder, "choose", load_tokenizer(models["llama"]), tmp_path, split="validation")
    assert facts["documents"] == 6 and all(" validation " in r["context"] for r in rows)


def test_document_ids_follow_the_content_alone():
    a, b = {"text": "the film  was good", "label": 1}, {"label": 1, "text": "the film was good"}
    first = document_ids({0: a, 1: {"text": "bad"}})
    again = document_ids({5: {"text": "bad"}, 9: b})  # key order, white space and place do not count
    assert again == {5: first[1], 9: first[0]}
    assert document_ids({0: {"t": "na\u00efve"}})[0] == document_ids({0: {"t": "nai\u0308ve"}})[0]
    twice = document_ids({0: a, 1: b, 2: {"text": "the film was good", "label": 0}})
    assert twice[0] == first[0] and len(set(twice.values())) == 3
    assert all(len(v) == 16 and int(v, 16) >= 0 for v in twice.values())


def test_documents_are_named_the_same_whatever_the_prompt(folder, models, tmp_path):
    tokenizer = load_tokenizer(models["llama"])
    few, _ = ours(folder, "choose", tokenizer, tmp_path / "a", PromptSettings(fewshot=2), limit=3)
    plain, _ = ours(folder, "choose", tokenizer, tmp_path / "b")
    generated, _ = ours(folder, "answer", tokenizer, tmp_path / "c")
    names = [r["document"] for r in plain]
    assert [r["document"] for r in few] == names[:6]
    assert [r["document"] for r in generated] == names[::2] and len(set(names)) == 9


def test_an_empty_context_begins_with_the_first_token(models):
    tokenizer = load_tokenizer(models["llama"])
    assert Encoder(tokenizer).pair("", "good")[0] == [tokenizer.bos_token_id]
    assert Encoder(tokenizer).pair("  ", "good")[0] == [tokenizer.bos_token_id]
