"""`doctor --pet` really tries: methods × restorings × classes of layer, what fails with its reason, and what is kept of it."""

import gc
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpet_bench import doctor_pet
from cpet_bench.cli.main import main
from cpet_bench.devices import cache_root
from cpet_bench.doctor_pet_tries import Bench, attempt
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models.loading import load_model
from cpet_bench.pet import capability, methods
from cpet_bench.pet.capability import CLASSES, PARTS
from cpet_bench.settings import PetSettings
from cpet_bench.steps import tuning
from cpet_bench.steps.context import Context


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, with what is known of the machine and of PEFT already, but no findings."""
    for kind in ("machines", "indexes"):
        known, own = cache_root() / kind, tmp_path / "cache" / kind
        own.mkdir(parents=True)
        for file in known.glob("*.json") if known.is_dir() else ():
            if not file.name.startswith("capability-"):
                shutil.copyfile(file, own / file.name)
    monkeypatch.setenv("CPET_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick():
    """Collections each time a model is lent pass over what the libraries made."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_tried_shown_and_kept(cache, capsys, monkeypatch):
    """The whole command on one class of layer: a process that tunes, one that loads; the second call starts neither."""
    assert main(["doctor", "--pet", "NOLA", "lora", "xlora", "--layer", "packed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["device"] == "cpu" and found["versions"]["peft"] != "absent"
    assert found["classes"] == {"packed": "PackedLinear"} and len(found["cells"]) == 3 * len(PARTS)
    cells = {(c["method"], c["restoring"]): c for c in found["cells"]}
    for method in ("nola", "lora"):
        for part in PARTS:
            cell = cells[method, part]
            assert cell["state"] == "ok" and cell["reason"].startswith("two steps, ") and not cell["cached"], cell
    assert cells["nola", "vanilla"]["reason"] == "two steps, 2048 trainable parameters"  # 2 k on 4 layers
    for part in PARTS:
        assert (
            cells["xlora", part]["state"] == "unsupported"
            and "XLORA cannot be put on this model" in cells["xlora", part]["reason"]
        )
    assert sum(c["seconds"] for c in found["cells"]) > 0
    monkeypatch.setattr(doctor_pet, "tries", lambda *a, **k: pytest.fail("tried again"))
    assert main(["doctor", "--pet", "nola", "xlora", "--layer", "packed", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["cells"]
    assert all(c["cached"] for c in again)
    assert [c["reason"] for c in again] == [cells[c["method"], c["restoring"]]["reason"] for c in again]
    assert main(["doctor", "--pet", "nola", "xlora", "--layer", "packed"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "PackedLinear" in shown
        and "nola all xlora –" in shown
        and "4 ok, 4 unsupported, 0 failed (8 known from before)" in shown
    )
    assert "xlora on PackedLinear: PEFT's XLORA cannot be put on this model" in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pet", "lorra"], "There is no PET method 'lorra'. Did you mean lora"),
        (["--pet", "--layer", "int9"], "There is no class of layer 'int9'. Did you mean int8"),
        (["--layer", "int8"], "--layer and --fresh go with --pet"),
    ],
)
def test_what_there_is_not(words, says, capsys):
    assert main(["doctor", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_crash_is_the_cells_reason(cache, monkeypatch, tmp_path):
    """What takes a process down is that cell's; the others are tried in a fresh one, or said not to have been."""
    rows = {
        "tune": [
            {"name": "lora vanilla", "state": "ok", "reason": "two steps", "seconds": 1.0},
            {"name": "lora inherit", "state": "failed", "reason": "the process was ended by SIGSEGV", "seconds": 1.0},
            {"name": "(all others)", "state": "failed", "reason": "not tried: 3 tries", "seconds": 0.0},
        ],
        "load": [{"name": "lora vanilla", "state": "unsupported", "reason": "it computes something else", "seconds": 1.0}],
    }
    monkeypatch.setattr(doctor_pet, "tries", lambda group, *a, **k: rows[group.partition(" ")[0]])
    cells = doctor_pet.examine(["lora"], ["linear"])["cells"]
    assert [c["state"] for c in cells] == ["unsupported", "failed", "failed", "failed"]
    reasons = ["it computes something else", "the process was ended by SIGSEGV", "not tried: 3 tries", "not tried: 3 tries"]
    assert [c["reason"] for c in cells] == reasons
    assert set(capability.kept("cpu")) == {"linear lora vanilla"}  # the others may have been the machine's fault


@pytest.mark.parametrize("layer", ["conv1d", "t5", "nf4", "int8"])
def test_other_classes_of_layer(layer, tmp_path, quick):
    """The tries themselves, in this process."""
    bench = Bench(layer, tmp_path, "cpu")
    for part in PARTS:
        for verb in (bench.tune, bench.load):
            row = attempt(lambda verb=verb, part=part: verb("nola", part))
            assert row["state"] == "ok", (layer, part, row)
    with bench.lend("own", "eval") as model:
        assert capability.layers_of(model) == [layer] and not hasattr(model, "cpet_nola")


def test_a_try_that_must_fail_does(tmp_path, quick):
    """Loaded weights that compute something else, a tensor without a gradient: each is unsupported and says why."""
    bench = Bench("linear", tmp_path, "cpu")
    bench.tune("lora", "vanilla")
    assert attempt(lambda: bench.load("lora", "vanilla"))["state"] == "ok"
    file = bench.tuned("lora", "vanilla") / "adapter/adapter_model.safetensors"
    save_file({k: v * 1.5 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    row = attempt(lambda: bench.load("lora", "vanilla"))
    assert row["state"] == "unsupported" and "in a new process it computes something else: logits differ by" in row["reason"]
    shutil.rmtree(bench.tuned("lora", "vanilla"))
    put = methods.attach

    def blind(model, *args, **more):
        put(model, *args, **more)
        model.model.layers[1].self_attn.q_proj.lora_A["default"].register_forward_hook(lambda m, a, y: y.detach())
        return model

    methods.attach = blind
    try:
        row = attempt(lambda: bench.tune("lora", "vanilla"))
    finally:
        methods.attach = put
    assert row["state"] == "unsupported" and "never got a gradient" in row["reason"] and "layers.1" in row["reason"]


def test_a_failure_that_is_known_to_be_a_limit_is_unsupported(cache, tmp_path, monkeypatch):
    """Only where the training fails, and only where the probe found this method unsupported on such layers."""
    model = load_model(Bench("linear", tmp_path, "cpu").dense)
    settings = {"pet": {"method": "LoRA", "r": 4}, "recover": {"r": 4}}
    rest = dict.fromkeys(("params", "inputs", "facts", "keys", "out", "scratch", "machine", "pool", "progress", "should_stop"))
    ctx = Context("tune", settings, **{**rest, "inputs": {}})

    def fails(error):
        with tuning._known_limits(ctx, model):
            raise error

    with pytest.raises(StepFailed, match="^no gradient$"):
        fails(StepFailed("no gradient"))
    row = {"state": "unsupported", "reason": "it has no backward", "seconds": 1.0}
    capability.keep("cpu", {capability.name("linear", "lora", "recover"): row})
    with pytest.raises(
        Unsupported, match=r"no gradient \(doctor --pet found lora \(recover\) unsupported on nn.Linear: it has no"
    ):
        fails(StepFailed("no gradient"))
    with pytest.raises(torch.OutOfMemoryError):  # that is no limit of the method
        fails(torch.OutOfMemoryError("out of memory"))
    del settings["recover"]
    with pytest.raises(StepFailed, match="^no gradient$"):
        fails(StepFailed("no gradient"))
    with tuning._known_limits(ctx, model):
        methods.detach(methods.attach(model, PetSettings(**settings["pet"])))


def test_findings_are_of_these_versions_on_this_device(cache, monkeypatch):
    capability.keep("cpu", {"linear lora vanilla": {"state": "ok", "reason": "", "seconds": 0.0}})
    capability.keep("cpu", {"linear ia3 vanilla": {"state": "ok", "reason": "", "seconds": 0.0}})
    assert set(capability.kept("cpu")) == {"linear lora vanilla", "linear ia3 vanilla"} and not capability.kept("cuda")
    real = capability.versions
    monkeypatch.setattr(capability, "versions", lambda names: {**real(names), "peft": "0.0"})
    assert not capability.kept("cpu")
    assert CLASSES.keys() == {"linear", "conv1d", "t5", "int8", "nf4", "packed", "gptq"}
