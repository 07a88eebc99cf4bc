"""NOLA (arXiv 2310.02556) beside a model's linear layers: y = layer(x) + s B A x, made of a seed and trained coefficients.

base = AutoModelForCausalLM.from_pretrained(...)      # the compressed model
model = attach_nola(base, "this folder")              # the same object, which computes with both
"""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file


@cache
def draw(seed, part, count, rows, columns):
    """Random matrices (count x rows columns), uniform in [-1, 1); drawn on the CPU, so that they are the same anywhere."""
    text = f"{seed} {part} {count} {rows} {columns}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
    return torch.empty(count, rows * columns).uniform_(-1, 1, generator=generator)


def attach_nola(base, folder):
    about, weights = json.loads(Path(folder, "nola.json").read_text()), load_file(Path(folder, "nola.safetensors"))
    s = about["settings"]
    k, r, seed, scale = s["k"], s["r"], s["seed"], s["lora_alpha"] / s["r"]
    for name, (n_in, n_out) in about["layers"].items():
        alpha, beta = weights[f"{name}.alpha"], weights[f"{name}.beta"]
        start = draw(seed, "A0", 1, r, n_in).view(r, n_in) / n_in**0.5
        a = start + (alpha @ (draw(seed, "M", k, r, n_in) / k**0.5)).view(r, n_in)
        b = (beta @ (draw(seed, "N", k, n_out, r) / k**0.5)).view(n_out, r)

        def beside(layer, args, y, a=a, b=b):
            x = args[0]
            return y + (scale * (x @ a.to(x).t()) @ b.to(x).t()).to(y.dtype)

        base.get_submodule(name).register_forward_hook(beside)
    return base
