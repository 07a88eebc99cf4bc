"""Models that come in the format of compressed-tensors (llm-compressor, vLLM): read, tuned, restored; not compressed again."""

import pytest
import torch

from compressed import compress
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.errors import Unsupported
from cpet_bench.models.arch import block_linears, body, dense_weight
from cpet_bench.models.loading import load_model, load_tokenizer
from cpet_bench.models.sources import facts
from cpet_bench.models.tiny import DEFAULTS, make
from cpet_bench.pet import methods
from cpet_bench.restoring import recover
from cpet_bench.settings import PetSettings, RecoverSettings

GROUP, BITS = 32, 4
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`dense`, and `packed`: its linear layers rounded to 4 bits by compressed-tensors itself, 32 inputs to a scale."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    root = tmp_path_factory.mktemp("compressed-tensors")
    make("llama", DEFAULTS, root / "dense")
    model = load_model(root / "dense")
    weights = QuantizationArgs(num_bits=BITS, symmetric=True, strategy="group", group_size=GROUP)
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized"))
    for layer in block_linears(model).values():
        layer.weight_scale.data.copy_(scales(layer.weight))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(root / "packed")
    compressor.update_config(str(root / "packed"))
    load_tokenizer(root / "dense").save_pretrained(root / "packed")
    return root


def scales(weight):
    return weight.detach().view(len(weight), -1, GROUP).abs().amax(-1) / 7.5


def test_it_computes_with_the_rounded_weights(folders):
    dense, model = load_model(folders / "dense"), load_model(folders / "packed")
    for name, layer in block_linears(model).items():
        own = block_linears(dense)[name].weight
        scale = scales(own)[..., None]
        wanted = (torch.round(own.view(len(own), -1, GROUP) / scale).clamp(-8, 7) * scale).view_as(own)
        torch.testing.assert_close(dense_weight(layer), wanted, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        states = body(model)(input_ids=IDS).last_hidden_state  # the blocks run by themselves, as in scoring
        logits = model(input_ids=IDS).logits
        torch.testing.assert_close(model.lm_head(states), logits)
        assert (logits - dense(input_ids=IDS).logits).abs().max() > 1e-4
    assert not any(p.requires_grad for p in model.parameters())


def test_it_is_tuned_and_restored(folders):
    model = load_model(folders / "packed")
    methods.attach(model, PetSettings(method="lora", r=4, target_modules=["q_proj", "v_proj"]))
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    body(model)(input_ids=IDS).last_hidden_state.square().mean().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (2 * 2 + 2 * 7) and all(g is not None and torch.isfinite(g).all() for g in trained.values())


@pytest.mark.parametrize(("backend", "more"), [(Magnitude, {"pattern": "2:4"}), (BitsAndBytes, {"type": "nf4"})])
def test_it_is_not_compressed_again(backend, more, folders, tmp_path):
    with pytest.raises(Unsupported, match="compressed-tensors"):
        compress(backend, folders / "packed", tmp_path / "again", **more)


def test_records_say_that_it_is_run_unpacked(cli, folders):
    found = facts(folders / "packed")["quantised"]
    assert found == {"method": "compressed-tensors", "bits": 4, "group": 32, "kernel": found["kernel"]}
    text = (
        f"name: given\nmodel:\n  packed: {{source: 'local:{folders / 'packed'}'}}\n"
        "exclude: [{model: tiny}, {compression: [nf4, wanda24]}, {pet: none}, {restoring: [matched, cpet, cpet-eora]}]\n"
        "probes: {throughput: {prompt_tokens: 8, new_tokens: 2, repeats: 1}}\ntrain: {steps: 2}\n"
    )
    done = cli("run", cli.matrix(text))
    assert done.returncode == 0, done.stderr
    (record,) = cli.records("given").values()
    assert record["compression"] == {"given": found} and record["simulated"] == ["speed"]
    assert all(record["probes"][name]["simulated"] for name in ("prefill", "decode", "resident"))
    assert record["probes"]["disk"]["model"] < 0.8 * (folders / "dense/model.safetensors").stat().st_size
