"""What mistakes say, in the words of a matrix and of the command line."""

import pytest
import yaml
from test_matrix import BASE, REPO, load

from cpet_bench import registry
from cpet_bench.cli.main import main
from cpet_bench.errors import InputError
from cpet_bench.settings import RestoringSettings, Settings

RATES = [n / 10 for n in range(1, 40)]
SHAPES = [
    ("train: {lr: 1e-3}", "select: {lr: [1e-3]}", "select.lr", "it should have at least 2 items, not 1"),
    ("train: {lr: 1e-3}", "select: {lr: []}", "select.lr", "it should have at least 2 items, not 0"),
    ("train: {lr: 1e-3}", f"select: {{lr: {RATES}}}", "select.lr", "it should have at most 32 items, not 39"),
    ("train: {lr: 1e-3}", "train: {betas: [0.9, 0.99, 0.999]}", "train.betas", "it should have at most 2 items, not 3"),
    ("train: {lr: 1e-3}", "select: {lr: 1e-3}", "select.lr", "it must be a list, not 0.001"),
    ("train: {lr: 1e-3}", "device: {devices: cpu}", "device.devices", "it must be a list, not 'cpu'"),
    ("inherit: true", 'inherit: "yes"', "restoring.cpet.inherit", "it must be true, false or a mapping, not 'yes'"),
    ("distill: true", "distill: 3", "restoring.cpet.distill", "it must be true, false or a mapping, not 3"),
    ("distill: true", "distill: {kl: 3}", "restoring.cpet.distill.kl", "it must be a mapping, not 3"),
    ("r: 4}, ", "calibration: 3}, ", "restoring.cpet.recover.calibration", "it must be a mapping, not 3"),
    ("limit: 10", "train_data: 3", "task.movie_reviews.train_data", "it must be a mapping, not 3"),
    (
        "inherit: true",
        "inherit: {from: nowhere}",
        "restoring.cpet.inherit.from",
        "it must be local:FOLDER or hf:ORG/NAME, not 'nowhere'",
    ),
    ("tiny:llama", "llama", "model.tiny.source", "it must be KIND:PLACE, such as hf:ORG/NAME"),
    ('"tiny:llama"', '"tiny:llama", sha256: AB', "model.tiny.sha256", "it must be 64 hexadecimal digits in lower case"),
]


@pytest.mark.parametrize(("old", "new", "key", "says"), SHAPES, ids=[new[:40] for _, new, *_ in SHAPES])
def test_what_has_the_wrong_shape_is_told_in_words_of_a_matrix(old, new, key, says, tmp_path):
    assert old in BASE
    with pytest.raises(InputError) as caught:
        load(BASE.replace(old, new, 1), tmp_path)
    text = str(caught.value)
    assert caught.value.key == key and says in text and caught.value.line, text
    assert not any(word in text for word in ("instance of", "Settings", "tuple", "pattern", "validation", "dictionary")), text


def test_every_pattern_of_a_setting_is_said_in_words():
    found = [Settings, *(registry.get("compression", n).Settings for n in registry.names("compression"))]
    for cls in found:  # grows on the way
        found += [c for c in cls.__subclasses__() if c not in found]
        for name, field in cls.model_fields.items():
            if any(getattr(part, "pattern", None) for part in field.metadata):
                assert field.description, f"{cls.__name__}.{name}"


def test_a_file_that_is_no_matrix_suggests_only_near_names(tmp_path, capsys):
    for name in ("smoke.yaml", "ablation.yaml", "other.yml"):
        (tmp_path / name).write_text(BASE)
    says = {
        "nofile.yaml": "There is no matrix {}.",
        "smokee.yaml": "There is no matrix {}. Did you mean {folder}/smoke.yaml?",
        "smoke": "There is no matrix {}. Did you mean {folder}/smoke.yaml?",
        "n" * 300: "There is no matrix {}.",
        "": "{} is a folder; a matrix is a YAML file, such as {folder}/ablation.yaml, {folder}/other.yml, {folder}/smoke.yaml.",
    }
    for name, text in says.items():
        path = tmp_path / name
        assert main(["plan", str(path)]) == main(["run", str(path)]) == 2
        assert set(capsys.readouterr().err.splitlines()) == {f"cpet-bench: {text.format(path, folder=tmp_path)}"}
    (tmp_path / "empty").mkdir()
    assert main(["run", str(tmp_path / "empty")]) == 2 and "is a folder" in capsys.readouterr().err


def test_the_readme_writes_controls_as_they_are_accepted():
    lines = [line for line in (REPO / "README.md").read_text().splitlines() if "control: " in line]
    controls = [RestoringSettings(**value) for line in lines for value in yaml.safe_load(line.strip("# ")).values()]
    assert {own.control for own in controls} == {"matched", "wider"}


@pytest.mark.parametrize("words", ["gap nope", "status nope", "status", "export c --to x --run nope", "export c --to x"])
def test_without_any_run_the_folder_that_was_looked_in_is_named(words, tmp_path, capsys):
    assert main([*words.split(), "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert f"There are no runs in the folder '{tmp_path}/runs'." in said and "allowed" not in said.lower()
    assert ("There is no run 'nope'." in said) == ("nope" in words)
