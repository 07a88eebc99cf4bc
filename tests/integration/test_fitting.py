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
BLOCKS = r"model\.layers"
WRONG = [
    ("backend: rtn, bits: 4, group: 48", rf"groups of 48 do not divide the width \d+ of {LAYER}; group can be 8, 16, 32, 64$"),
    ("backend: gptq, group: 128", rf"groups of 128 do not divide the width 64 of {LAYER}; group can be 16, 32, 64$"),
    ('backend: magnitude, pattern: "2:5"', rf"{LAYER} reads \d+ inputs, which 5 does not divide, so 2:5 cannot be; n:m works"),
    ("backend: depth, drop: [7]", rf"{BLOCKS} has blocks 0 to 1; there is no block 7 to drop$"),
    ("backend: depth, drop: [0, 1]", rf"drop \[0, 1\] drops 2 of the 2 blocks of {BLOCKS}; it must be 1 to 1$"),
    ("backend: depth, ratio: 0.1, order: last", rf"ratio 0.1 drops 0 of the 2 blocks of {BLOCKS}; it must be 1 to 1$"),
]


@pytest.mark.parametrize(("compression", "says"), WRONG, ids=[w[0] for w in WRONG])
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


@pytest.mark.parametrize("compression", ["backend: depth, drop: [1]", "backend: depth, ratio: 0.5, order: last"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_blocks_that_are_there_are_not_refused(cli, tmp_path, compression, arch):
    path = matrix(cli, compression, model(tmp_path / "small", arch))
    assert json.loads(cli("plan", path, "--json").stdout)["unfit"] == []


def test_a_block_that_one_model_has_is_no_mistake(cli, tmp_path):
    small, deep = model(tmp_path / "small"), model(tmp_path / "deep", layers=3)
    (told,) = json.loads(cli("plan", matrix(cli, "backend: depth, drop: [2]", small, deep), "--json").stdout)["unfit"]
    assert told["model"] == "small" and "there is no block 2 to drop" in told["reason"]


RANKS = [
    ("pet: {p: {method: loha, r: 100000}}", "vanilla: {}", "pet.p.r: small cannot be tuned so: {l} .* at most 32, or"),
    ("pet: {p: {method: lora, r: 33, target_modules: [v_proj]}}", "vanilla: {}", "pet.p.r: small cannot be tuned so: {l} has"),
    ("pet: {p: {method: nola, r: 33}}", "vanilla: {}", "pet.p.r: small cannot be tuned so: {l} .* rank of 33"),
    ("pet: {p: {method: adalora, init_r: 33, total_step: 2}}", "vanilla: {}", "pet.p.init_r: small .* {l} .* at most 32"),
    ("pet: {p: lora}", "deep: {recover: {r: 1000}}", "deep.recover.r: small cannot be restored so: {l} .* 32[.]$"),
]


def tuned(cli, pet: str, restoring: str, *models, more: str = ""):
    """Cells of these models tuned by `pet` and restored so; that stands in lines 4 and 6, after `extends`."""
    sources = ", ".join(f"{m.name}: {{source: 'local:{m}'}}" for m in models)
    names = ", ".join(m.name for m in models)
    name = restoring.partition(":")[0]
    return cli.matrix(
        f"name: fits\nmodel: {{{sources}}}\n{pet}\nrestoring:\n  {restoring}\nexclude: []\ntrain: {{steps: 2}}\n"
        f"include: [{{model: [{names}], pet: p, restoring: {name}, compression: none}}]\n"
        f"probes: {{throughput: false, memory: false}}\n{more}"
    )


@pytest.mark.parametrize(("pet", "restoring", "says"), RANKS, ids=["loha", "lora", "nola", "adalora", "recover"])
def test_a_rank_that_no_model_has_is_refused_with_its_place(cli, tmp_path, pet, restoring, says):
    path = tuned(cli, pet, restoring, model(tmp_path / "small"))
    line = 6 if "recover" in restoring else 4
    for verb in ("plan", "run"):
        done = cli(verb, path)
        (told,) = done.stderr.splitlines()
        layer = r"model\.layers\.0\.self_attn\.[kv]_proj"
        assert done.returncode == 2 and re.search(f"matrix.yaml:{line}: .*" + says.replace("{l}", layer), told), done.stderr
    assert not (cli.folder / "runs").exists() and not (cli.folder / "store/objects").exists()


LAYERS = [
    ("lora, target_modules: [qproj]", "p.target_modules: .*: No module of the model is named 'qproj'.*mean q_proj"),
    ("lora, target_modules: '.*qproj'", "p.target_modules: .*: No module of the model is named '.*qproj'"),
    ("lora, target_modules: [q_proj], layers_to_transform: [9]", "p.layers_to_transform: .*blocks are 0 to 1; .* block 9"),
    ("oft, oft_block_size: 24", "p.oft_block_size: .*_proj has 64 inputs, which 24 does not divide.* can be 16 or 32"),
    ("prompt_tuning, num_virtual_tokens: 511", "p.num_virtual_tokens: .* reads 512 tokens at once, and 511 virtual tokens"),
    ("oft, r: 5, oft_block_size: 0", "p.r: .*_proj has 64 inputs, which 5 does not divide.* can be 4 or 8"),
]


@pytest.mark.parametrize(("pet", "says"), LAYERS, ids=[w[0] for w in LAYERS])
def test_layers_that_no_model_has_are_refused_with_their_place(cli, tmp_path, pet, says):
    path = tuned(cli, f"pet: {{p: {{method: {pet}}}}}", "vanilla: {}", model(tmp_path / "small"))
    for verb in ("plan", "run"):
        done = cli(verb, path)
        (told,) = done.stderr.splitlines()
        assert done.returncode == 2 and re.search(f"matrix.yaml:4: pet.{says}", told), done.stderr
    assert not (cli.folder / "runs").exists() and not (cli.folder / "store/objects").exists()


def test_layers_that_one_model_has_are_no_mistake(cli, tmp_path):
    models = model(tmp_path / "llama"), model(tmp_path / "gpt", "gpt2")
    path = tuned(cli, "pet: {p: {method: lora, target_modules: [v_proj]}}", "vanilla: {}", *models)
    (told,) = json.loads(cli("plan", path, "--json").stdout)["unfit"]
    assert told["model"] == "gpt" and told["reason"] == "No module of the model is named 'v_proj'."


def test_a_module_that_the_user_has_needs_no_number_of_its_own(cli, tmp_path):
    """Nothing fresh is made of `pet` there."""
    pet = "pet: {p: {method: adalora}}"
    path = tuned(cli, pet, "mine: {inherit: {from: 'hf:nobody/nothing'}}", model(tmp_path / "small"))
    done = cli("plan", path)
    assert "total_step" not in done.stderr
    path.write_text(path.read_text().replace("mine: {inherit: {from: 'hf:nobody/nothing'}}", "mine: {recover: {r: 4}}"))
    done = cli("plan", path)
    assert done.returncode == 2 and "matrix.yaml:4: pet.p.total_step: " in done.stderr and "write total_step: 2" in done.stderr


@pytest.mark.slow
def test_a_rank_that_one_model_does_not_have_is_a_failed_row(cli, tmp_path):
    small, large = model(tmp_path / "small"), model(tmp_path / "large", hidden=128)
    path = tuned(cli, "pet: {p: {method: loha, r: 40, target_modules: [v_proj]}}", "vanilla: {}", small, large)
    (told,) = json.loads(cli("plan", path, "--json").stdout)["unfit"]
    assert told["model"] == "small" and told["pet"] == "p" and "rank of 40" in told["reason"]
    done = cli("run", path, "--no-page")
    assert done.returncode == 4 and "small × p will fail: model.layers.0.self_attn.v_proj has 64 inputs" in done.stderr
    found = {r["axes"]["model"]: r for r in cli.records("fits").values()}
    assert found["large"]["status"] == "done" and found["small"]["status"] == "failed"
    assert "give at most 32" in found["small"]["reason"]["message"]


def test_a_mistyped_field_ends_before_anything_is_run(cli, tmp_path):
    path = tuned(cli, "pet: {p: {method: lokr, r: 0}}", "vanilla: {}", model(tmp_path / "small"))
    for verb in ("plan", "run"):
        done = cli(verb, path)
        assert done.returncode == 2 and "matrix.yaml:4: pet.p.r: it must be at least 1, not 0" in done.stderr
    assert not (cli.folder / "runs").exists() and not (cli.folder / "store/objects").exists()


@pytest.mark.slow
def test_what_only_narrowed_layers_do_not_take_is_said_when_it_is_run(cli, tmp_path):
    structured = "compression: {thin: {backend: structured, ratio: 0.2, importance: l1, parts: mlp}}\n"
    path = tuned(cli, "pet: {p: lora}", "deep: {recover: {r: 32}}", model(tmp_path / "small", intermediate=48), more=structured)
    path.write_text(path.read_text().replace("compression: none}", "compression: thin}"))
    assert json.loads(cli("plan", path, "--json").stdout)["unfit"] == []
    done = cli("run", path, "--no-page")
    (record,) = cli.records("fits").values()
    assert done.returncode == 4 and record["status"] == "failed", done.stderr
    assert re.search(r"recover.r: .*mlp.* so a rank of 32 is more than its weight can have", record["reason"]["message"])


def test_nothing_is_told_of_mixtures_of_experts(cli, tmp_path):
    """Their weights lie in files otherwise than in the layers that are made of them, and routers are narrow."""
    folder = model(tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": 4}))
    path = tuned(cli, "pet: {p: {method: loha, r: 40}}", "vanilla: {}", folder)
    assert json.loads(cli("plan", path, "--json").stdout)["unfit"] == []


def test_after_a_step_that_changes_widths_nothing_is_told(cli, tmp_path):
    structured = "backend: structured, ratio: 0.3, importance: l1, parts: mlp"
    path = matrix(cli, structured, model(tmp_path / "small", intermediate=100))
    text = path.read_text().replace(f"{{{structured}}}", f"[{{{structured}}}, {{backend: rtn, bits: 4, group: 32}}]")
    path.write_text(text)
    assert json.loads(cli("plan", path, "--json").stdout)["unfit"] == []
