"""On an accelerator: the whole way in bfloat16, CUDA's own clock, and what a processor and a GPU must agree on."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
UNTUNED = "tiny--{}--none--none--smoke_sentiment--s0"


def test_the_whole_way_on_a_gpu(cli):
    matrix = cli.matrix("name: gpu\ndevice: {devices: [\"cuda:0\"], dtype: bfloat16}\n")
    done = cli("run", matrix)
    assert done.returncode == 0, done.stderr
    records = cli.records("gpu")
    assert len(records) == 12 and {r["status"] for r in records.values()} == {"done"}
    for record in records.values():
        assert record["probes"]["peak_device"]["value"] > 0
        assert record["probes"]["prefill"]["device"].startswith("cuda")
        assert record["provenance"]["device"]["name"] == torch.cuda.get_device_name(0)


def test_gptq_on_a_gpu(cli):
    pytest.importorskip("gptqmodel")
    lines = "compression: {none: none, gptq4: {backend: gptq}, gptq3: {backend: gptq, bits: 3, desc_act: true}}"
    matrix = cli.matrix(f"name: gptq\n{lines}\ndevice: {{devices: [\"cuda:0\"], dtype: bfloat16}}\n")
    done = cli("run", matrix)
    assert done.returncode == 0, done.stderr
    records = cli.records("gptq")
    assert {r["status"] for r in records.values()} == {"done"}
    losses = [records[UNTUNED.format(name)]["metrics"]["log_loss"]["value"] for name in ("none", "gptq4", "gptq3")]
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=0.2)


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_block_by_block_wherever_hidden_states_wait(tmp_path, monkeypatch, arch):
    """SparseGPT on a GPU gives the same files from the whole model, with hidden states left there, and with them on the CPU."""
    from compressed import compress, documents
    from cpet_bench import registry
    from cpet_bench.compression import streaming
    from cpet_bench.models import tiny

    tiny.make(arch, tiny.DEFAULTS, tmp_path / "model")
    backend, found = registry.get("compression", "sparsegpt"), []
    for home in ("cuda:0", "cpu", None):
        if home:
            monkeypatch.setattr(streaming.Streamed, "home", lambda self, home=home: home)
        else:
            monkeypatch.setattr(streaming, "matched", _no)
        out = tmp_path / str(home)
        facts = compress(backend, tmp_path / "model", out, documents(), "cuda:0", pattern="2:4")
        assert facts["streamed"] is bool(home)
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("arch", ["llama", "t5"])
def test_a_sequential_start_is_that_of_a_processor(tmp_path, arch):
    from compressed import compress, documents
    from cpet_bench.compression.magnitude import Magnitude
    from cpet_bench.models import tiny
    from cpet_bench.models.loading import load_model
    from cpet_bench.restoring.sequential import sequential_compensation

    tiny.make(arch, tiny.DEFAULTS, tmp_path / "dense")
    compress(Magnitude, tmp_path / "dense", tmp_path / "pruned", None, "cpu", pattern="2:4")
    facts = []
    for device in ("cpu", "cuda:0"):
        dense, pruned = (load_model(tmp_path / name, device=device) for name in ("dense", "pruned"))
        how = (4, tmp_path / device.partition(":")[0], lambda *_: None)
        facts.append(sequential_compensation(dense, tmp_path / "dense", pruned, documents(), *how))
    for name in ("error_before", "error_after", "left"):
        assert facts[1][name] == pytest.approx(facts[0][name], rel=1e-2)


def _no(*args):
    from cpet_bench.compression.streaming import NotStreamed

    raise NotStreamed("the test says so")


def test_float32_says_the_same_as_on_a_processor(smoke, cli):
    """Without TF32 a dense model's log-probabilities differ by rounding alone."""
    matrix = cli.matrix("name: gpu\ndevice: {devices: [\"cuda:0\"], dtype: float32, tf32: false}\n")
    assert cli("run", matrix, "--only", "restoring=none", "--only", "compression=none").returncode == 0
    here, there = (r[UNTUNED.format("none")]["metrics"] for r in (cli.records("gpu"), smoke.records))
    assert here["acc"]["value"] == there["acc"]["value"]
    assert here["log_loss"]["value"] == pytest.approx(there["log_loss"]["value"], abs=1e-3)


def test_the_clock_of_a_gpu_waits_for_the_work():
    """A large product takes the time that its operations must take: the clock does not stop when the kernel was only sent."""
    from cpet_bench.probes.throughput import _seconds

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = False
    a @ a
    small = _seconds(lambda: a[:1024] @ a, "cuda:0")
    large = _seconds(lambda: [a @ a for _ in range(4)], "cuda:0")
    assert large > 5 * small


def test_two_gpus_share_the_work(cli):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone here")
    matrix = cli.matrix("name: two\ndevice: {devices: [\"cuda:0\", \"cuda:1\"], dtype: float32}\n")
    done = cli("run", matrix)
    assert done.returncode == 0, done.stderr
    assert {e["device"] for e in cli.events("two") if e["event"] == "start"} == {"cuda:0", "cuda:1"}
