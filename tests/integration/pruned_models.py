"""Structurally pruned models, and the masked dense ones they are held against."""

import json

import pytest
import torch

from cpet_bench.compression.structured import Structured
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model

EXAMPLES = torch.randint(3, 200, (5, 16), generator=torch.Generator().manual_seed(0)).tolist()
HOW = {"examples": EXAMPLES, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
ARCHS = ("llama", "gpt2", "opt", "t5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in ARCHS:
        tiny.make(arch, {**tiny.DEFAULTS, "hidden": 64, "heads": 8, "intermediate": 96}, root / arch)
    return root


def compress(source, out, **given):
    return Structured.compress(source, out, Structured.Settings(**given), **HOW)


def kept(folder):
    return json.loads((folder / "cpet_compression.json").read_text())["kept"]


def config(folder):
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def logits(model, ids=None):
    ids = torch.tensor(EXAMPLES) if ids is None else ids
    more = {"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {"use_cache": False}
    return model(input_ids=ids, **more).logits


# -- what the pruned model computes --------------------------------------------------------------------------------------
@torch.no_grad()
def masked(arch, folder, found):
    """The dense model with rows, biases and columns of every group not in `found` set to zero, written out by architecture."""
    model = load_model(folder)
    for label, keep in found.items():
        module = model.get_submodule(label.rpartition(".")[0])
        kind = label.rpartition(".")[2]
        if arch == "llama" and kind == "heads":  # 8 heads of 8, 4 key heads
            gone = [u for u in range(4) if u not in keep]
            for u in gone:
                module.q_proj.weight[16 * u : 16 * u + 16] = 0
                module.o_proj.weight[:, 16 * u : 16 * u + 16] = 0
                module.k_proj.weight[8 * u : 8 * u + 8] = 0
                module.v_proj.weight[8 * u : 8 * u + 8] = 0
        elif kind == "heads":
            for u in set(range(8)) - set(keep):
                if arch == "gpt2":
                    for start in (0, 64, 128):
                        module.c_attn.weight[:, start + 8 * u : start + 8 * u + 8] = 0
                        module.c_attn.bias[start + 8 * u : start + 8 * u + 8] = 0
                    module.c_proj.weight[8 * u : 8 * u + 8] = 0
                else:
                    for layer in (module.q_proj, module.k_proj, module.v_proj):
                        layer.weight[8 * u : 8 * u + 8] = 0
                        layer.bias[8 * u : 8 * u + 8] = 0
                    module.out_proj.weight[:, 8 * u : 8 * u + 8] = 0
        else:
            gone = [j for j in range(96) if j not in keep]
            if arch == "llama":
                module.gate_proj.weight[gone] = module.up_proj.weight[gone] = 0
                module.down_proj.weight[:, gone] = 0
            elif arch == "gpt2":
                module.c_fc.weight[:, gone] = 0
                module.c_fc.bias[gone] = 0
                module.c_proj.weight[gone] = 0
            elif arch == "opt":
                module.fc1.weight[gone] = 0
                module.fc1.bias[gone] = 0
                module.fc2.weight[:, gone] = 0
            else:
                module.wi.weight[gone] = 0
                module.wo.weight[:, gone] = 0
    return model
