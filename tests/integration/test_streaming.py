"""Compressing part by part: the same files as from the whole model."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressed import compress, documents
from cpet_bench import registry
from cpet_bench.compression import streaming
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model

EXAMPLES = documents(8, 30)
HOW = {"magnitude": {"pattern": "2:4"}, "wanda": {"sparsity": 0.6}, "sparsegpt": {"pattern": "2:4"}, "rtn": {"bits": 3}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Llama in bfloat16 and in several files, GPT-2, T5 (tied) in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gpt2", "t5"):
        tiny.make(arch, {**tiny.DEFAULTS, "layers": 3}, root / arch)
    for arch, more in (("llama", {"max_shard_size": "60KB"}), ("t5", {})):
        model = load_model(root / arch, dtype="bfloat16")
        for old in (root / arch).glob("*.safetensors"):
            old.unlink()
        model.save_pretrained(root / arch, **more)
    assert (root / "llama/model.safetensors.index.json").is_file()
    return root


def done(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refuse(*args):
    raise streaming.NotStreamed("the test says so")


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_every_byte_is_that_of_the_model_loaded_whole(folders, tmp_path, monkeypatch, arch, name):
    backend = registry.get("compression", name)
    facts = compress(backend, folders / arch, tmp_path / "streamed", EXAMPLES, **HOW[name])
    monkeypatch.setattr(streaming, "matched", refuse)
    whole = compress(backend, folders / arch, tmp_path / "whole", EXAMPLES, **HOW[name])
    assert facts.pop("streamed") is True
    assert whole.pop("streamed") is False and whole.pop("loaded_whole") == "the test says so"
    assert facts == whole
    assert done(tmp_path / "streamed") == done(tmp_path / "whole")


def test_what_cannot_be_streamed_is_loaded_whole(folders, tmp_path):
    """Two tensors where the config ties them to one; tensors under a name that only the library knows; the prefix left out."""
    odd = tmp_path / "odd"
    tiny.make("llama", tiny.DEFAULTS, odd)
    state = load_file(odd / "model.safetensors")
    wanda = registry.get("compression", "wanda")
    embedding = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": embedding * 2}, odd / "model.safetensors", metadata={"format": "pt"})
    facts = compress(wanda, odd, tmp_path / "a", EXAMPLES, sparsity=0.5)
    assert facts["streamed"] is False and "lm_head.weight and model.embed_tokens.weight" in facts["loaded_whole"]
    with safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("lm_head.weight"), embedding * 2)
    save_file(state | {"lm_head.weight": embedding.clone()}, odd / "model.safetensors", metadata={"format": "pt"})
    assert compress(wanda, odd, tmp_path / "b", EXAMPLES, sparsity=0.5)["streamed"] is True
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(bare, odd / "model.safetensors", metadata={"format": "pt"})
    assert compress(wanda, odd, tmp_path / "c", EXAMPLES, sparsity=0.5)["streamed"] is True
    assert done(tmp_path / "b") == done(tmp_path / "c")
    legacy = {name.replace("norm.weight", "norm.gamma"): tensor for name, tensor in state.items()}
    save_file(legacy, odd / "model.safetensors", metadata={"format": "pt"})
    facts = compress(wanda, odd, tmp_path / "d", EXAMPLES, sparsity=0.5)
    assert facts["streamed"] is False and "is not in its files" in facts["loaded_whole"]
