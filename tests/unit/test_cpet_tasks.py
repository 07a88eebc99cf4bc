"""The sentiment tasks: how sentences become splits, and where the data comes from."""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cpet_bench.errors import InputError, StopError
from cpet_bench.evaluation.task_files import read_yaml
from cpet_bench.evaluation.tasks import load_tasks, task_spec
from cpet_bench.settings import PromptSettings, TaskSettings
from cpet_tasks import vader

NAMES = {
    "movie_reviews": "movieReviewSnippets",
    "amazon_reviews": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt_editorials": "nytEditorialSnippets",
}


def lines(count=400, seed=0):
    """Rated sentences; every tenth comes again in other dress, every twentieth of those with the other sign."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        rating = rng.choice([-1, 1]) * rng.uniform(0.2, 4)
        text = f"Sentence {i} is {'good' if rating > 0 else 'bad'}, no doubt!"
        found.append((rating, text))
        if i % 10 == 0:
            again = f"  sentence {i}  is &quot;{text.split()[3][:-1].upper()}&quot; -- no doubt"
            found.append((-rating if i % 20 == 0 else rating, again))
    return found


def as_file(rows):
    return "".join(f"{i}\t{rating}\t{text}\r\n" for i, (rating, text) in enumerate(rows, 1)).encode()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A source archive as the package's, with made-up sentences, where pip finds it; our pinned hashes say it is right."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as opened:
        for seed, file in enumerate(vader.FILES):
            data = as_file(lines(seed=seed))
            monkeypatch.setitem(vader.FILES, file, hashlib.sha256(data).hexdigest())
            member = tarfile.TarInfo(vader.INNER.format(file))
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    name, version = vader.PACKAGE.split("==")
    setup = f"from setuptools import setup\nsetup(name={name!r}, version={version!r})\n".encode()
    path = tmp_path / "index" / f"{name}-{version}.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as opened:
        for place, data in ((vader.OUTER, inner.getvalue()), (f"{name}-{version}/setup.py", setup)):
            member = tarfile.TarInfo(place)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    monkeypatch.setattr(vader, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("CPET_BENCH_CACHE", str(tmp_path / "cache"))
    return path


def words(text):
    """What makes two sentences the same, said otherwise than the code says it."""
    return "".join(c for c in text.lower() if c.isalnum())


# -- splits ------------------------------------------------------------------------------------------------------------
def test_repeated_texts_never_cross_splits(archive):
    splits = vader.load("movieReviewSnippets", version=1.0)
    texts = {name: [words(t) for t in split["text"]] for name, split in splits.items()}
    assert list(splits) == ["train", "validation", "test"]
    every = [t for split in texts.values() for t in split]
    assert len(set(every)) == len(every)
    sizes = {name: len(t) / len(every) for name, t in texts.items()}
    assert 0.5 < sizes["train"] < 0.7 and min(sizes.values()) > 0.12


def test_labels_are_the_ratings_signs_and_contradictions_are_left_out(archive):
    rows = vader.read(vader.fetch("movieReviewSnippets"))
    found = {words(r["text"]): r["label"] for split in vader.split_rows(rows, 1.0).values() for r in split}
    signs = {}
    for rating, text in lines():
        if abs(rating) >= 1:
            signs.setdefault(words(text.replace("&quot;", "")), set()).add(rating > 0)
    assert found == {t: int(s == {True}) for t, s in signs.items() if len(s) == 1}
    assert any(len(s) == 2 for s in signs.values())


def test_splits_depend_on_nothing_but_the_texts():
    rows = lines()
    first = vader.split_rows(rows, 1.0)
    random.Random(1).shuffle(rows)
    assert vader.split_rows(rows, 1.0) == first
    fewer = vader.split_rows(rows[:200], 1.0)  # the others' presence moves no text
    for name, split in fewer.items():
        places = {words(r["text"]): i for i, r in enumerate(first[name])}
        found = [places[words(r["text"])] for r in split if words(r["text"]) in places]
        assert found == sorted(found) and len(found) >= len(split) - 5


def test_the_order_says_nothing_about_the_label():
    ordered = [(3.0, f"good {i}") for i in range(500)] + [(-3.0, f"bad {i}") for i in range(500)]
    train = vader.split_rows(ordered, 1.0)["train"]
    assert 0.4 < sum(r["label"] for r in train[:200]) / 200 < 0.6


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("The film, it IS good!", "the film it is good", True),
        ("the\tfilm\n is  good", "the film is good", True),
        ("caf\u00e9 food", "cafe\u0301 food", True),
        ("don't", "don t", True),
        ("snake_case", "snake case", True),
        ("the film is good", "the film is bad", False),
        (":) :)", ":( :(", False),
        (":)", " : )", True),
    ],
)
def test_normalised_texts(a, b, same):
    assert (vader.normalise(a) == vader.normalise(b)) == same and vader.normalise(a)


# -- data --------------------------------------------------------------------------------------------------------------
def test_fetched_once_and_then_read_from_the_cache(archive, tmp_path, monkeypatch):
    kept = vader.fetch("tweets")
    assert kept.read_bytes() == as_file(lines(seed=2)) and kept.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(vader, "download", None)
    assert vader.fetch("tweets") == kept
    assert [p.name for p in kept.parent.iterdir()] == ["tweets.txt"]


def test_a_damaged_copy_is_unpacked_again(archive):
    kept = vader.fetch("tweets")
    kept.write_bytes(kept.read_bytes()[:-5])
    assert vader.fetch("tweets").read_bytes() == as_file(lines(seed=2))


def test_other_content_is_refused(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(vader.FILES, "tweets", "0" * 64)
    with pytest.raises(InputError, match="tweets in vaderSentiment==3.3.2 has the SHA-256 .* it is not used"):
        vader.fetch("tweets")
    assert not list((tmp_path / "cache/tasks").rglob("*.*t"))
    monkeypatch.setattr(vader, "SHA256", "0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        vader.fetch("tweets")


def test_without_the_package_the_run_stops(archive):
    archive.unlink()
    with pytest.raises(StopError, match="could not be fetched"):
        vader.load("tweets")


def test_entities_and_white_space_are_made_plain(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"1\t2.5\tlast  night &amp; again \r\n2\t-1\tbad\r\n")
    assert vader.read(file) == [(2.5, "last night & again"), (-1.0, "bad")]


# -- task files --------------------------------------------------------------------------------------------------------
def test_every_task_file_names_a_kept_file_and_belongs_to_the_group():
    folder = Path(vader.__file__).parent
    files = {p.stem: read_yaml(p) for p in folder.glob("*.yaml") if p.stem != "_vader"}
    group, plain = files.pop("cpet_sentiment"), files.pop("movie_snippets")
    assert plain["dataset_kwargs"] == files["movie_reviews"]["dataset_kwargs"]  # the same sentences, as text
    assert {c["task"]: c["dataset_kwargs"]["file"] for c in files.values()} == NAMES
    assert set(group["task"]) == set(NAMES) and set(vader.MIN) == set(vader.FILES) == set(NAMES.values())


def test_planning_asks_for_no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("CPET_BENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    spec = task_spec(TaskSettings(), "cpet_sentiment", tmp_path)
    assert spec["origin"] == "cpet_tasks" and set(spec["tasks"]) == {*NAMES, "cpet_sentiment"}
    assert re.fullmatch("[0-9a-f]{64}", spec["files"]["vader.py"]) and not list(tmp_path.iterdir())


def test_lm_eval_asks_about_the_splits(archive, monkeypatch):
    path = Path(vader.__file__)  # lm-eval imports the loader by its path: give it the one whose hashes are the made-up data's
    monkeypatch.setitem(sys.modules, str(path.with_suffix("")), vader)
    monkeypatch.setattr(vader, "__mtime__", path.stat().st_mtime_ns, raising=False)
    splits = vader.load("tweets")
    for split, key in (("test", None), ("validation", "validation"), ("test", "train")):
        spec = task_spec(TaskSettings(split=split), "tweets", archive.parent)
        task = load_tasks(spec, PromptSettings(fewshot=2), key)["tasks"]["tweets"]
        documents = list(task.eval_docs)
        assert documents == list(splits[key or split]) and task.get_config("num_fewshot") == 2
        text, label = documents[0]["text"], documents[0]["label"]
        assert task.doc_to_text(documents[0]) == f"Tweet: {text}\nOverall, the sentiment of this tweet is"
        assert task.doc_to_choice(documents[0])[task.doc_to_target(documents[0])] == vader.LABELS[label]


def test_sentences_as_plain_text(archive, monkeypatch):
    path = Path(vader.__file__)
    monkeypatch.setitem(sys.modules, str(path.with_suffix("")), vader)
    monkeypatch.setattr(vader, "__mtime__", path.stat().st_mtime_ns, raising=False)
    task = load_tasks(task_spec(TaskSettings(), "movie_snippets", archive.parent), PromptSettings())["tasks"]["movie_snippets"]
    documents = list(task.eval_docs)
    assert documents == list(vader.load("movieReviewSnippets")["test"])
    task.build_all_requests(limit=3)
    assert [i.args[0] for i in task.instances] == [d["text"] for d in documents[:3]]
    assert set(task.aggregation()) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}


@pytest.mark.slow
def test_the_real_download(tmp_path):
    """From the index to lm-eval's tasks, in a process of its own with an empty cache."""
    script = (
        "import json\n"
        "from pathlib import Path\n"
        "from cpet_bench.evaluation.tasks import load_tasks, task_spec\n"
        "from cpet_bench.settings import PromptSettings, TaskSettings\n"
        "tasks = load_tasks(task_spec(TaskSettings(), 'cpet_sentiment', Path()), PromptSettings())['tasks']\n"
        "print(json.dumps({n: {s: [len(d), sum(d['label'])] for s, d in t.dataset.items()} for n, t in tasks.items()}))\n"
        "task = tasks['movie_reviews']\n"
        "print(json.dumps([task.doc_to_text(task.eval_docs[0]), task.doc_to_choice(task.eval_docs[0])]))\n"
    )
    env = {**os.environ, "CPET_BENCH_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    counts, (prompt, choices) = map(json.loads, done.stdout.splitlines())
    assert {n: sum(size for size, _ in splits.values()) for n, splits in counts.items()} == {
        "movie_reviews": 9171,
        "amazon_reviews": 2439,
        "tweets": 2512,
        "nyt_editorials": 2931,
    }
    assert counts["movie_reviews"] == {"train": [5444, 2721], "validation": [1860, 925], "test": [1867, 951]}
    assert re.fullmatch(r"Review: .+\nOverall, the sentiment of this review is", prompt) and choices == vader.LABELS
