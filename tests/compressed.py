"""What the tests of compression backends share: compressing a tiny model, its logits, reloading, training modules on it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import torch

from cpet_bench.models.arch import block_linears
from cpet_bench.models.loading import load_model


def documents(count=24, longest=60, seed=0):
    """Token ids of documents of many lengths, some words far more frequent than others."""
    rng = random.Random(seed)
    return [[3 + int(290 * rng.random() ** 3) for _ in range(rng.randint(2, longest))] for _ in range(count)]


def compress(backend, source: Path, out: Path, examples=None, device="cpu", **settings):
    """Facts of a backend run as its step runs it."""
    how = {"device": device, "dtype": "float32", "progress": lambda done, total, text: None}
    return backend.compress(source, out, backend.Settings(**settings), examples=examples, **how)


@torch.no_grad()
def answer(model):
    """Logits of fixed tokens, (4 x 12 x vocabulary)."""
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def answer_elsewhere(folder: Path, path: Path):
    """The same, of a model loaded in a process of its own."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import torch, compressed as c; from pathlib import Path\n"
    code += f"torch.set_num_threads(1); torch.save(c.answer(c.load_model(Path({str(folder)!r}))), {str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def inputs_of(model, examples, names=None):
    """By layer, all inputs (tokens x in, fp64) of the documents, each run alone, so that nothing is padded."""
    layers = {n: m for n, m in block_linears(model).items() if names is None or n in names}
    seen = {name: [] for name in layers}
    hooks = [
        m.register_forward_pre_hook(lambda _m, args, name=n: seen[name].append(args[0].reshape(-1, args[0].shape[-1])))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        for ids in examples:
            more = {}
            if model.config.is_encoder_decoder:
                more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
            model(input_ids=torch.tensor([ids]), **more)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


def can_be_trained(folder: Path):
    """LoRA and recovery modules go on the model; each of their tensors gets a gradient, and the loss falls."""
    from cpet_bench.pet import methods
    from cpet_bench.restoring import recover
    from cpet_bench.settings import PetSettings, RecoverSettings

    model = load_model(folder)
    target = [name.rpartition(".")[2] for name in block_linears(model)][0]
    methods.attach(model, PetSettings(method="lora", r=4, target_modules=[target]))
    recover.attach_recovery(model, RecoverSettings(r=4), seed=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_" in n for n in trained) and any("cpet_recovery" in n for n in trained)
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids, losses, learned = torch.arange(3, 51).view(4, 12), [], set()
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        learned |= {n for n, p in trained.items() if p.grad.any()}
        optimiser.step()
        optimiser.zero_grad()
    assert learned == trained.keys() and losses[2] < losses[0]
