"""Models that were cut, masked dense ones to hold them against, and modules trained on either."""

import json
from contextlib import contextmanager

import pytest
import torch

from compressed import compress as run_backend
from compressed import documents
from cpet_bench.compression.structured import Structured
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model
from cpet_bench.pet import methods
from cpet_bench.restoring.cuts import read_cuts
from cpet_bench.restoring.inheriting import cut_adapter
from cpet_bench.settings import PetSettings

EXAMPLES = documents(6, longest=20)
EVERY = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
STRUCTURED = {"ratio": 0.25, "spare": [0, 0], "multiple": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for arch in EVERY:
        tiny.make(arch, {**tiny.DEFAULTS, "layers": 4, "hidden": 32, "heads": 4, "intermediate": 48}, root / arch)
    return root


@pytest.fixture(scope="module")
def pruned(folders):
    """By architecture: the dense model without some of its neurons and (but for T5) heads, and the groups kept."""
    for arch in EVERY:
        run_backend(Structured, folders / arch, folders / f"{arch}-narrow", EXAMPLES, **STRUCTURED)
    found = {}
    for arch in EVERY:
        kept = json.loads((folders / f"{arch}-narrow/cpet_compression.json").read_text())["kept"]
        assert any(0 < len(groups) < 48 for label, groups in kept.items() if label.endswith("mlp"))
        assert arch == "t5" or any(len(groups) < 4 for label, groups in kept.items() if label.endswith("heads"))
        found[arch] = folders / f"{arch}-narrow", kept
    return found


def shaken(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                drawn = 0.2 * torch.randn(p.shape, generator=generator)
                p.copy_(p + drawn if "magnitude" in name or "ia3" in name or "ln_tuning" in name else drawn)


def train_d(folder, out, arch, **pet):
    """A PET module with weights that are not those of the start, on the dense model; saved in `out`."""
    model = load_model(folder)
    given = {"method": "lora", "target_modules": EVERY[arch], **pet}
    methods.attach(model, PetSettings(**{k: v for k, v in given.items() if v is not None}))
    shaken(model)
    methods.save(model, out)
    return out


@contextmanager
def masked(model, arch, groups, kept_blocks):
    """The dense model (whatever is attached to it) without the groups and blocks that went, written out by architecture.

    groups: by part of the dense model, those kept. A group that went puts out zeros: what reads it gets zeros there.
    """
    hooks = []
    for label, kept in groups.items():
        owner, _, kind = label.rpartition(".")
        block = model.get_submodule(owner)
        if kind == "mlp":
            reader = {"llama": "down_proj", "gpt2": "c_proj", "t5": "wo"}[arch]
            size = 1
        else:
            reader = {"llama": "o_proj", "gpt2": "c_proj"}[arch]
            size = {"llama": 16, "gpt2": 8}[arch]  # of 4 heads of 8; two share a key head in llama
        keep = torch.zeros(48 if kind == "mlp" else 32)
        for g in kept:
            keep[size * g : size * (g + 1)] = 1
        hooks.append(block.get_submodule(reader).register_forward_pre_hook(lambda m, args, keep=keep: (args[0] * keep,)))

    def passed_over(module, args, kwargs, out):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    for name, kept in kept_blocks.items():
        for i, block in enumerate(model.get_submodule(name)):
            if i not in kept:
                hooks.append(block.register_forward_hook(passed_over, with_kwargs=True))
    yield model
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def answer(model):
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    return model(input_ids=ids, **more).logits


def answer_of(folder, adapter):
    model = load_model(folder)
    methods.attach_saved(model, adapter, trainable=False)
    return answer(model)


def cut(folder, adapter, out, steps=1, dense=None):
    model = load_model(folder)
    return cut_adapter(adapter, model, read_cuts(model, folder, steps), out, dense)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


LORA = {"r": 3, "lora_alpha": 6}
