"""Compressions that a model's layers cannot take are told from its files, before anything is run."""

import json
import re

import pytest

from cpet_bench.compression.sizes import ModelSize
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, features
from cpet_bench.models.loading import load_model


def model(folder, arch="llama", **options):
    folder.mkdir()
    tiny.make(arch, {**tiny.DEFAULTS, **options}, folder)
    return folder


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_shapes_are_those_of_the_linear_layers(tmp_path, arch):
    """From the headers alone: the layers that every backend works on, with their inputs and outputs."""
    folder = model(tmp_path / arch, arch, intermediate=96)
    layers = block_linears(load_model(folder))
    found = ModelSize.of(folder).shapes
    wanted = {name: features(layer) for name, layer in layers.items()}
    assert set(found.values()) == set(wanted.values()) and len(found) == len(wanted) > 0
    for name, shape in found.items():  # the files of a model without its head have no prefix
        assert next(s for n, s in wanted.items() if n.endswith(name) or name.endswith(n)) == shape


def matrix(cli, compression: str, *models):
    """Cells of these models compressed so, untuned; the compression stands in line 5, after `extends`."""
    sources = ", ".join(f"{m.name}: {{source: 'local:{m}'}}" for m in models)
    names = ", ".join(m.name for m in models)
    return cli.matrix(
        f"name: fits\nmodel: {{{sources}}}\ncompression:\n  mine: {{{compression}}}\nexclude: []\n"
        f"include: [{{model: [{names}], compression: mine, restoring: none}}]\nprobes: {{throughput: false, memory: false}}\n"
    )


LAYER = r"model\.layers\.0\.(mlp|self_attn)\.\w+_proj"
WRONG = [
    ("backend: rtn, bits: 4, group: 48", rf"groups of 48 do not divide the width \d+ of {LAYER}; group can be 8, 16, 32, 64$"),
    ("backend: gptq, group: 128", rf"groups of 128 do not divide the width 64 of {LAYER}; group can be 16, 32, 64$"),
    ('backend: magnitude, pattern: "2:5"', rf"{LAYER} reads \d+ inputs, which 5 does not divide, so 2:5 cannot be; n:m works"),
]


@pytest.mark.parametrize(("compression", "says"), WRONG, ids=["rtn", "gptq", "magnitude"])
def test_what_no_model_can_take_is_refused_with_its_place(cli, tmp_path, compression, says):
    path = matrix(cli, compression, model(tmp_path / "small"))
    for verb in ("plan", "run"):
        done = cli(verb, path)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and re.search(says, line), done.stderr
        assert "matrix.yaml:5: compression.mine: small cannot" in line
    assert not (cli.folder / "runs").exists() and not (cli.folder / "store/objects").exists()


def test_what_is_packed_already_is_refused(cli, tmp_path):
    folder = model(tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    done = cli("plan", matrix(cli, "backend: wanda, sparsity: 0.5", folder))
    assert done.returncode == 2 and "the model is quantised (gptq): give the one it was made from" in done.stderr


def test_what_one_model_cannot_take_is_a_row(cli, tmp_path):
    """The other model's cells are done, and the plan said so before."""
    fits, odd = model(tmp_path / "fits", intermediate=96), model(tmp_path / "odd", intermediate=100)
    path = matrix(cli, "backend: rtn, bits: 4, group: 32", fits, odd)
    (told,) = json.loads(cli("plan", path, "--json").stdout)["unfit"]
    assert told["model"] == "odd" and "groups of 32 do not divide the width 100" in told["reason"]
    shown = cli("plan", path)
    assert "odd × mine will be unsupported" in shown.stdout
    done = cli("run", path, "--no-page")
    assert done.returncode == 0 and "odd × mine will be unsupported" in done.stderr
    found = {r["axes"]["model"]: r for r in cli.records("fits").values()}
    assert found["fits"]["status"] == "done" and found["odd"]["status"] == "unsupported"
    assert "width 100" in found["odd"]["reason"]["message"]
    again = cli("run", path, "--no-page")
    assert again.returncode == 0 and "will be unsupported" not in again.stderr
    assert json.loads(cli("plan", path, "--json").stdout)["total"]["run"] == 0


def test_after_a_step_that_changes_widths_nothing_is_told(cli, tmp_path):
    structured = "backend: structured, ratio: 0.3, importance: l1, parts: mlp"
    path = matrix(cli, structured, model(tmp_path / "small", intermediate=100))
    text = path.read_text().replace(f"{{{structured}}}", f"[{{{structured}}}, {{backend: rtn, bits: 4, group: 32}}]")
    path.write_text(text)
    assert json.loads(cli("plan", path, "--json").stdout)["unfit"] == []
