"""Models and trainings for the tests of whole weights and biases."""

import pytest
import torch

from compressed import compress, documents
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.compression.moefy import Moefy
from cpet_bench.compression.rtn import Rtn
from cpet_bench.models import tiny
from cpet_bench.settings import PetSettings, TrainSettings
from cpet_bench.training import train

DOCS = [{"context_ids": [5 + i, 9, 7], "choice_ids": [], "gold": 0, "target_ids": [20 + i, 31, 8]} for i in range(8)]
FULL, EXISTING, ALL = PetSettings(method="full"), PetSettings(method="BitFit"), PetSettings(method="bitfit", where="all")
ELSE = ("embed", "shared", "wte", "wpe", "lm_head", "relative_attention_bias")  # what stays frozen, in the three families


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gpt2", "t5"):
        tiny.make(arch, tiny.DEFAULTS, root / arch)
    for pruned, arch in (("pruned", "llama"), ("pruned2", "gpt2")):
        compress(Magnitude, root / arch, root / pruned, pattern="2:4")
    compress(BitsAndBytes, root / "llama", root / "nf4", type="nf4")
    compress(Rtn, root / "gpt2", root / "packed", bits=4, group=32)
    compress(Moefy, root / "llama", root / "moefy", documents(), experts=4, top=0.5, epochs=2)
    return root


def loss_of(model):
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return torch.nn.functional.cross_entropy(model(input_ids=ids, **more).logits[:, -1], ids[:, 0])


def trained(model):
    """Differences by the names of the weights they are added to."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return {n.removeprefix("cpet_whole.0.").replace("/", "."): p for n, p in named}


def learn(model, folder, steps=3, **more):
    settings = TrainSettings(steps=steps, batch=4, documents=8, lr=1e-2, warmup=0, **more)
    return train(model, DOCS, settings, scratch=folder, progress=lambda *a: None, should_stop=lambda: False)


def shake(model, scale=0.05):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in trained(model).values():
            p.normal_(std=scale, generator=generator)
