"""Training examples: the ids are those that lm-eval's encoding gives for the prompt evaluation asks with."""

import json

import pytest
from task_folder import make_folder

from cpet_bench.errors import InputError, StepFailed, StopError
from cpet_bench.evaluation.pairs import build_pairs, calibration_ids, read_pairs
from cpet_bench.evaluation.requests import build_requests, document_ids
from cpet_bench.evaluation.tasks import task_spec
from cpet_bench.models.tiny import make_tokenizer
from cpet_bench.settings import PromptSettings, TaskSettings, TrainData

PLAIN = PromptSettings()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(task folder, its rows by split)."""
    folder = tmp_path_factory.mktemp("pairs") / "tasks"
    return folder, make_folder(folder)


def pairs(place, name, tokenizer, out, *, data=None, prompt=PLAIN, documents=100, max_tokens=512, split="train"):
    spec = task_spec(TaskSettings(include=str(place[0])), name, place[0])
    facts = build_pairs(spec, data, prompt, tokenizer, out, documents, max_tokens, split=split)
    return read_pairs(out), facts


def own(tmp_path, tokenizer, *rows, **more):
    """The pairs of a JSONL file with these rows (or lines)."""
    file = tmp_path / "own.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    out = tmp_path / "own"
    prompt = more.pop("prompt", PLAIN)
    facts = build_pairs({"name": "t"}, TrainData(jsonl=str(file)), prompt, tokenizer, out, more.get("documents", 100), 512)
    return read_pairs(out), facts


def by_id(rows):
    return dict(zip(document_ids(dict(enumerate(rows))).values(), rows, strict=True))


# -- out of tasks ------------------------------------------------------------------------------------------------------
def test_choices(place, tokenizer, tmp_path):
    rows, facts = pairs(place, "choose", tokenizer, tmp_path)
    documents = by_id(place[1]["train"])
    assert [r["document"] for r in rows] == sorted(documents)
    for row in rows:
        document = documents[row["document"]]
        assert tokenizer.decode(row["context_ids"]) == f"Review: {document['text']}\nSentiment:"
        assert [tokenizer.decode(c) for c in row["choice_ids"]] == [" negative", " positive"]
        assert row["gold"] == document["label"] and row["target_ids"] == row["choice_ids"][row["gold"]]
    assert facts == {
        "documents": 12,
        "tokens": sum(len(r["context_ids"]) + len(r["target_ids"]) for r in rows),
        "kind": "choices",
        "single_token_choices": True,
    }


def test_generation_ends_with_the_end_of_text(place, tokenizer, tmp_path):
    rows, facts = pairs(place, "answer", tokenizer, tmp_path)
    documents = by_id(place[1]["train"])
    for row in rows:
        document = documents[row["document"]]
        assert tokenizer.decode(row["context_ids"]) == f"Question: {document['text']}\nAnswer:"
        assert tokenizer.decode(row["target_ids"]) == f" {document['answer']}</s>"
        assert row["gold"] == -1 and row["choice_ids"] == []
    assert facts["kind"] == "targets" and not facts["single_token_choices"] and len(rows) == 12


def test_loglikelihood(place, tokenizer, tmp_path):
    rows, _ = pairs(place, "last_word", tokenizer, tmp_path)
    documents = by_id(place[1]["train"])
    assert len(rows) == 12
    for row in rows:
        words = documents[row["document"]]["text"].split()
        assert tokenizer.decode(row["context_ids"]) == " ".join(words[:-1])
        assert tokenizer.decode(row["target_ids"]) == " " + words[-1]  # the space at the context's end moves over


def test_rolling_text_is_learnt_whole(place, tokenizer, tmp_path):
    rows, _ = pairs(place, "whole_text", tokenizer, tmp_path)
    documents = by_id(place[1]["train"])
    assert len(rows) == 12
    for row in rows:
        assert row["context_ids"] == [tokenizer.bos_token_id]
        assert tokenizer.decode(row["target_ids"]) == documents[row["document"]]["text"]


def test_several_contexts_learn_the_ending_after_the_right_one(place, tokenizer, tmp_path):
    rows, facts = pairs(place, "which_start", tokenizer, tmp_path)
    documents = by_id(place[1]["train"])
    for row in rows:
        document = documents[row["document"]]
        start = document["starts"][document["label"]]
        both = tokenizer.decode(row["context_ids"] + row["target_ids"])
        assert both.split() == f"{start} {document['ending']}".split()
        assert tokenizer.decode(row["target_ids"]).strip() == document["ending"]
    assert facts["kind"] == "targets" and {documents[r["document"]]["label"] for r in rows} == {0, 1}


@pytest.mark.parametrize("name", ["choose", "last_word"])
def test_training_asks_as_evaluation_does(place, tokenizer, tmp_path, name):
    """On one split the contexts and choices are those of the requests."""
    import pyarrow.parquet as pq

    rows, _ = pairs(place, name, tokenizer, tmp_path / "pairs", split="test")
    build_requests(task_spec(TaskSettings(include=str(place[0])), name, place[0]), PLAIN, tokenizer, tmp_path)
    asked = {}
    for r in pq.read_table(tmp_path / "requests.parquet").to_pylist():
        asked.setdefault(r["document"], []).append((r["context_ids"], r["continuation_ids"]))
    learnt = {r["document"]: [(r["context_ids"], c) for c in r["choice_ids"] or [r["target_ids"]]] for r in rows}
    assert learnt == asked and len(learnt) == 9


def test_fewshot_system_and_chat_are_evaluations(place, tokenizer, tmp_path):
    import copy

    own_tokenizer = copy.deepcopy(tokenizer)
    own_tokenizer.chat_template = TEMPLATE
    prompt = PromptSettings(fewshot=2, system="we love the book", chat_template=True)
    rows, _ = pairs(place, "choose", own_tokenizer, tmp_path, prompt=prompt)
    for row in rows:
        text = tokenizer.decode(row["context_ids"])
        assert text.startswith("<system>we love the book\n<user>Review:") and text.endswith("<assistant>")
        assert text.count("<user>Review:") == 3
        shown = [t.split("\nSentiment:")[0] for t in text.split("Review: ")[1:]]
        assert shown[-1] not in shown[:-1]  # no document is shown its own answer


def test_the_first_in_hash_order_are_taken_and_long_contexts_cut_at_the_left(place, tokenizer, tmp_path):
    every, _ = pairs(place, "choose", tokenizer, tmp_path / "a")
    few, facts = pairs(place, "choose", tokenizer, tmp_path / "b", documents=5, max_tokens=4)
    assert facts["documents"] == 5
    assert [r["document"] for r in few] == [r["document"] for r in every][:5]
    assert [r["context_ids"] for r in few] == [r["context_ids"][-4:] for r in every][:5]


def test_a_group_gives_a_share_of_each_task(place, tokenizer, tmp_path):
    rows, facts = pairs(place, "both", tokenizer, tmp_path, documents=8)
    assert facts["documents"] == 8 and facts["kind"] == "both"
    assert sum(bool(r["choice_ids"]) for r in rows) == 4


def test_a_task_without_training_data_says_so(place, tokenizer, tmp_path):
    folder = tmp_path / "tasks"
    make_folder(folder)
    shared = folder / "shared.yaml"
    text = shared.read_text().replace("training_split: train\n", "").replace("fewshot_split: train\n", "")
    shared.write_text(text)
    with pytest.raises(InputError, match=r"choose has no train split \(it has: validation, test\)"):
        pairs((folder, None), "choose", tokenizer, tmp_path / "out")


# -- the user's rows ---------------------------------------------------------------------------------------------------
UNUSABLE = """
include: shared.yaml
task: unusable
output_type: {kind}
doc_to_text: "Review: {{{{text}}}}"
doc_to_target: {target}
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize(
    ("kind", "target", "metric", "more"),
    [
        ("generate_until", '""', "exact_match", "generation_kwargs: {until: [x]}"),
        ("multiple_choice", '"neither"', "acc", "doc_to_choice: [good, bad]"),
    ],
)
def test_a_set_without_one_usable_row_is_refused_by_name(tokenizer, tmp_path, kind, target, metric, more):
    folder = tmp_path / "tasks"
    make_folder(folder)
    (folder / "unusable.yaml").write_text(UNUSABLE.format(kind=kind, target=target, metric=metric, more=more))
    message = r"unusable \(train split\) has no usable training row: none of the 12 rows looked at has an answer.*train_data"
    with pytest.raises(InputError, match=message) as found:
        pairs((folder,), "unusable", tokenizer, tmp_path / "out")
    assert found.value.key == "train_data" and not (tmp_path / "out/pairs.parquet").exists()


def test_own_rows(tokenizer, tmp_path):
    rows = [
        {"prompt": "the film was", "completion": "good"},
        {"prompt": "the film was ", "completion": "bad"},
        {"prompt": "the book was", "choices": ["good", " bad"], "label": 1},
        {"prompt": "the plot was\n", "choices": ["great", "awful"], "label": 0},
    ]
    found, facts = own(tmp_path, tokenizer, *rows, "", "  ")
    said = {
        (tokenizer.decode(r["context_ids"]), tokenizer.decode(r["target_ids"]), tuple(map(tokenizer.decode, r["choice_ids"])))
        for r in found
    }
    assert said == {
        ("the film was", " good</s>", ()),
        ("the film was", " bad</s>", ()),
        ("the book was", " bad", (" good", " bad")),
        ("the plot was", "\ngreat", ("\ngreat", "\nawful")),
    }
    assert facts["documents"] == 4 and facts["kind"] == "both"
    assert [r["document"] for r in found] == sorted(by_id(rows))
    few, _ = own(tmp_path, tokenizer, *rows, documents=2)
    assert few == found[:2]


def test_own_rows_with_system_text_and_chat_template(tokenizer, tmp_path):
    import copy

    row = {"prompt": "was it good", "choices": ["yes", "no"], "label": 0}
    found, _ = own(tmp_path, tokenizer, row, prompt=PromptSettings(system="be true"))
    assert tokenizer.decode(found[0]["context_ids"]) == "be true\n\nwas it good"
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    prompt = PromptSettings(system="be true", chat_template=True)
    found, _ = own(tmp_path, chatty, row, {"prompt": "was it", "completion": "no"}, prompt=prompt)
    said = {tokenizer.decode([*r["context_ids"], *r["target_ids"]]) for r in found}
    assert said == {"<system>be true\n<user>was it good\n<assistant>yes", "<system>be true\n<user>was it\n<assistant>no</s>"}


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        ({"completion": "good"}, "prompt", "needs 'prompt' as text"),
        ({"prompt": 3, "completion": "good"}, "prompt", "needs 'prompt' as text"),
        ({"prompt": "", "completion": "good"}, "prompt", "needs 'prompt' as text"),
        ({"prompt": "it was"}, "completion", "needs 'completion' as text"),
        ({"prompt": "it was", "completion": ["good"]}, "completion", "needs 'completion' as text"),
        ({"prompt": "it was", "choices": ["good"], "label": 0}, "choices", "two or more texts"),
        ({"prompt": "it was", "choices": "good bad", "label": 0}, "choices", "two or more texts"),
        ({"prompt": "it was", "choices": ["good", ""], "label": 0}, "choices", "two or more texts"),
        ({"prompt": "it was", "choices": ["good", 1], "label": 0}, "choices", "two or more texts"),
        ({"prompt": "it was", "choices": ["good", "bad"]}, "label", "an index from 0 to 1"),
        ({"prompt": "it was", "choices": ["good", "bad"], "label": 2}, "label", "an index from 0 to 1"),
        ({"prompt": "it was", "choices": ["good", "bad"], "label": -1}, "label", "an index from 0 to 1"),
        ({"prompt": "it was", "choices": ["good", "bad"], "label": True}, "label", "an index from 0 to 1"),
        ({"prompt": "it was", "choices": ["good", "bad"], "label": "good"}, "label", "an index from 0 to 1"),
        ("[1, 2]", None, "a row must be a mapping"),
        ('{"prompt": ', None, "no valid JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_key(tokenizer, tmp_path, row, key, message):
    with pytest.raises(InputError, match=message) as found:
        own(tmp_path, tokenizer, {"prompt": "it was", "completion": "good"}, "", row)
    assert (found.value.line, found.value.key) == (3, key) and str(found.value.file).endswith("own.jsonl")


def test_unreadable_files_are_named(tokenizer, tmp_path):
    data = TrainData(jsonl=str(tmp_path / "gone.jsonl"))
    with pytest.raises(InputError, match="gone.jsonl: the training data cannot be read"):
        build_pairs({"name": "t"}, data, PLAIN, tokenizer, tmp_path, 10, 512)
    (tmp_path / "gone.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        build_pairs({"name": "t"}, data, PLAIN, tokenizer, tmp_path, 10, 512)
    (tmp_path / "gone.jsonl").write_bytes(b"\n")
    with pytest.raises(InputError, match=r"gone.jsonl has no usable training row: it is empty; name other training data"):
        build_pairs({"name": "t"}, data, PLAIN, tokenizer, tmp_path, 10, 512)


def test_a_line_may_hold_what_unicode_calls_a_line_break(tokenizer, tmp_path):
    line = json.dumps({"prompt": "the film\u2028was\u0085", "completion": "good"}, ensure_ascii=False)
    found, _ = own(tmp_path, tokenizer, line)
    assert tokenizer.decode(found[0]["context_ids"] + found[0]["target_ids"]).startswith("the film\u2028was")


def test_rows_of_a_datasets_set(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    rows = [{"prompt": "the film was", "completion": w} for w in ("good", "bad", "poor")]
    (tmp_path / "set/train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = TrainData(dataset=str(tmp_path / "set"))
    build_pairs({"name": "t"}, data, PLAIN, tokenizer, tmp_path / "out", 10, 512)
    said = [tokenizer.decode(r["target_ids"]) for r in read_pairs(tmp_path / "out")]
    assert sorted(said) == [" bad</s>", " good</s>", " poor</s>"]


def test_a_set_without_a_network_is_a_stop(tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(StopError, match="some-org/some-set"):
        build_pairs({"name": "t"}, TrainData(dataset="some-org/some-set"), PLAIN, tokenizer, tmp_path, 10, 512)


# -- calibration -------------------------------------------------------------------------------------------------------
def test_calibration_text_is_prompt_and_answer(place, tokenizer, tmp_path):
    rows, _ = pairs(place, "choose", tokenizer, tmp_path)
    whole = [[*r["context_ids"], *r["target_ids"]] for r in rows]
    assert calibration_ids(tmp_path, 100, 512, 0) == whole
    few = calibration_ids(tmp_path, 4, 6, 0)
    assert len(few) == 4 and all(f in [w[:6] for w in whole] for f in few)
    assert calibration_ids(tmp_path, 4, 6, 0) == few != calibration_ids(tmp_path, 4, 6, 1)
    with pytest.raises(StepFailed, match="no text to calibrate on"):
        calibration_ids(tmp_path, 4, 0, 0)


def test_templates_over_a_rows_own_columns(tmp_path, tokenizer):
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say hi.", "input": "", "output": "hi"}]
    file = tmp_path / "alpaca.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompt = "Do: {{ instruction }}{% if input %} With {{ input }}.{% endif %}\nAnswer:\n"
    build_pairs(
        None, TrainData(jsonl=str(file), prompt=prompt, completion="{{ output }}"), PLAIN, tokenizer, tmp_path / "t", 100, 512
    )
    found = {(tokenizer.decode(r["context_ids"]), tokenizer.decode(r["target_ids"])) for r in read_pairs(tmp_path / "t")}
    plain = tmp_path / "plain.jsonl"
    said = [("Do: Add. With 1 2.\nAnswer:\n", "3"), ("Do: Say hi.\nAnswer:\n", "hi")]
    plain.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in said))
    build_pairs(None, TrainData(jsonl=str(plain)), PLAIN, tokenizer, tmp_path / "p", 100, 512)
    wanted = {(tokenizer.decode(r["context_ids"]), tokenizer.decode(r["target_ids"])) for r in read_pairs(tmp_path / "p")}
    assert found == wanted and len(found) == 2
    for template, says in (
        ("{{ instructions }}", "'instructions' is undefined. Did you mean instruction"),
        ("{{ input", "the template of prompt"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            data = TrainData(jsonl=str(file), prompt=template, completion="{{ output }}")
            build_pairs(None, data, PLAIN, tokenizer, tmp_path / "w", 100, 512)
        assert caught.value.key == "train_data.prompt" and caught.value.line == 1
    with pytest.raises(ValueError, match="a task has its own"):
        TrainData(task="x", prompt="{{ y }}")
