"""Models and trainings for the tests of NOLA."""

import pytest
import torch

from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.rtn import Rtn
from cpet_bench.models import tiny
from cpet_bench.settings import PetSettings, TrainSettings
from cpet_bench.training import train

KINDS = ("llama", "gpt2", "t5", "nf4", "int8", "packed")
DOCS = [{"context_ids": [5 + i, 9, 7], "choice_ids": [], "gold": 0, "target_ids": [20 + i, 31, 8]} for i in range(8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gpt2", "t5"):
        tiny.make(arch, tiny.DEFAULTS, root / arch)
    how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
    for kind in ("nf4", "int8"):
        BitsAndBytes.compress(root / "llama", root / kind, BitsAndBytes.Settings(type=kind), **how)
    Rtn.compress(root / "llama", root / "packed", Rtn.Settings(bits=4, group=32), **how)
    return root


@torch.no_grad()
def answer(model):
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def pet(**more):
    return PetSettings(**{"method": "nola", "k": 6, "r": 4, "lora_alpha": 3, "target_modules": "all-linear", **more})


def coefficients(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def shake(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in coefficients(model).values():
            p.normal_(std=0.3, generator=generator)


def learn(model, folder, steps=4, **more):
    settings = TrainSettings(steps=steps, batch=4, documents=8, lr=5e-2, warmup=0, **more)
    return train(model, DOCS, settings, scratch=folder, progress=lambda *a: None, should_stop=lambda: False)
