"""What `--devices` may say, which workers come of it, and what each worker sees of the machine."""

import pytest

from cpet_bench import devices
from cpet_bench.errors import InputError, StepFailed, Unsupported
from cpet_bench.prepared import prepare
from cpet_bench.settings import DeviceSettings
from cpet_bench.worker import describe

HOST = {"cpu": {"name": "a processor", "memory": 2**35, "dtype": "float32"}}
GPUS = {f"cuda:{i}": {"name": "a GPU", "memory": 2**36, "dtype": "bfloat16"} for i in range(4)}
BOTH = HOST | GPUS


@pytest.mark.parametrize(
    ("wanted", "found", "names"),
    [
        (["auto"], HOST, ["cpu"]),
        (["auto"], BOTH, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (["cpu"], BOTH, ["cpu"]),
        (["cpu:1"], HOST, ["cpu"]),
        (["cpu:3"], HOST, ["cpu:0", "cpu:1", "cpu:2"]),
        (["cuda:1"], BOTH, ["cuda:1"]),
        (["cuda:0", "cuda:3"], BOTH, ["cuda:0", "cuda:3"]),
        (["cuda:0+cuda:1", "cuda:2"], BOTH, ["cuda:0+cuda:1", "cuda:2"]),
    ],
)
def test_workers(wanted, found, names):
    assert devices.workers(wanted, found) == names


@pytest.mark.parametrize(
    ("wanted", "found", "says"),
    [
        (["cuda:0"], HOST, "There is no device 'cuda:0' here"),
        (["cuda:9"], BOTH, "There is no device 'cuda:9' here"),
        (["cpu:0"], HOST, "There is no device 'cpu:0' here"),
        (["cpu:-2"], HOST, "no device"),
        (["cpu", "cuda:0"], BOTH, "two kinds do not compare"),
        (["cpu", "cpu"], BOTH, "stands alone"),
        (["cpu:2", "cpu"], HOST, "stands alone"),
        (["cpu+cuda:0"], BOTH, "no device 'cpu'"),
        (["cuda:1", "cuda:1"], BOTH, "cuda:1 is named twice"),
        (["cuda:0+cuda:0"], BOTH, "cuda:0 is named twice"),
        (["cuda:0+cuda:1", "cuda:1"], BOTH, "cuda:1 is named twice"),
        (["auto", "cuda:0"], BOTH, "There is no device 'auto' here"),
        (["cuda:0+"], BOTH, "There is no device '' here"),
        ([], BOTH, "No device is named"),
        (["mps"], HOST, "There is no device 'mps' here"),
    ],
)
def test_wrong_workers(wanted, found, says):
    with pytest.raises(InputError, match=says) as error:
        devices.workers(wanted, found)
    assert error.value.key is None and "Allowed:" in str(error.value)  # whoever asks knows where it stands


@pytest.mark.parametrize("given", ["[gpu]", '["cpu:0"]', "[]"])
def test_a_wrong_device_is_named_with_its_place(given, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "facts", lambda: {"devices": HOST})
    path = tmp_path / "matrix.yaml"
    path.write_text(f"model: {{tiny: 'tiny:llama'}}\ntask: {{movie_reviews: {{}}}}\ndevice:\n  devices: {given}\n")
    with pytest.raises(InputError) as error:
        prepare(path)
    assert str(error.value).startswith(f"{path}:4: device.devices: ") and "Allowed: auto, cpu, cpu:N." in str(error.value)
    with pytest.raises(InputError) as error:
        prepare(path, device=["gpu"])
    assert str(error.value).startswith("--devices: There is no device 'gpu' here.")


def test_the_threads_of_a_processor_are_divided(monkeypatch):
    monkeypatch.setattr(devices, "facts", lambda: {"devices": BOTH})
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 8)

    def threads(names, given=None):
        return devices.resolve(DeviceSettings(devices=names, threads=given))["threads"]

    assert [threads(["cpu"]), threads(["cpu:2"]), threads(["cpu:3"]), threads(["cpu:20"])] == [8, 4, 2, 1]
    assert threads(["cpu:2"], 6) == 3 and threads(["cuda:0"]) is None and threads(["cuda:0", "cuda:1"], 4) == 4


def test_what_enters_keys_is_the_kind_of_device(monkeypatch):
    monkeypatch.setattr(devices, "facts", lambda: {"devices": BOTH})
    for names, kind in ((["cpu:2"], "cpu"), (["cuda:1"], "cuda"), (["cuda:0+cuda:1"], "cuda")):
        machine = devices.resolve(DeviceSettings(devices=names))
        assert machine["device"] == kind and machine["dtype"] == ("float32" if kind == "cpu" else "bfloat16")


@pytest.mark.parametrize(
    ("worker", "device", "owns"),
    [
        ("cpu", "cpu", ["cpu"]),
        ("cpu:1", "cpu", ["cpu"]),
        ("cuda:2", "cuda:2", ["cuda:2"]),
        ("cuda:0+cuda:1", "cuda:0", ["cuda:0", "cuda:1"]),
    ],
)
def test_a_worker_sees_torch_names(worker, device, owns):
    machine = devices.of_worker({"device": "cuda", "threads": 2}, worker)
    assert machine == {"device": device, "owns": owns, "worker": worker, "threads": 2}


def test_a_model_over_several_gpus_stays_off_the_others(monkeypatch):
    import torch

    from cpet_bench.models.loading import placement

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda name: (int(1e9) * (1 + int(name[-1])), int(1e10)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert placement("cuda:1") == {"device_map": {"": "cuda:1"}}
    spread = placement("cuda:1+cuda:3")
    assert spread["max_memory"] == {0: 0, 1: int(0.9 * 2e9), 2: 0, 3: int(0.9 * 4e9)} and spread["device_map"] == "balanced"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unsupported("not here"), "unsupported"),
        (ImportError("No module named 'flash_attn'"), "unsupported"),
        (NotImplementedError("Could not run 'aten::x' on this backend"), "unsupported"),
        (RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"), "unsupported"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "failed"),
        (RuntimeError("shapes do not fit"), "failed"),
        (StepFailed("the loss is nan"), "failed"),
    ],
)
def test_what_a_platform_cannot_do_is_unsupported(error, status):
    assert describe(error)["status"] == status
