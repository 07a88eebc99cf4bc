"""Logits of model folders, computed in a process that has nothing but the folders."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@torch.no_grad()
def answer(model, ids=None):
    """Logits for a few fixed tokens."""
    ids = torch.arange(3, 51).view(4, 12) if ids is None else ids
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def answers(folders, kept: Path):
    """`answer` of the model of each folder, from a new process; `kept`: a file it may write."""
    done = subprocess.run([sys.executable, __file__, kept, *folders], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = load_file(kept)
    return [found[str(i)] for i in range(len(folders))]


if __name__ == "__main__":
    from cpet_bench.models.loading import load_model

    save_file({str(i): answer(load_model(folder)) for i, folder in enumerate(sys.argv[2:])}, sys.argv[1])
