"""What full fine-tuning or BitFit (arXiv 2106.10199) changed, on a model: W + D for its weights, or a bias added to a layer.

base = AutoModelForCausalLM.from_pretrained(...)       # the compressed model
model = attach_whole(base, "this folder")              # the same object, changed
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


@torch.no_grad()
def attach_whole(base, folder):
    about, found = json.loads(Path(folder, "whole.json").read_text()), load_file(Path(folder, "whole.safetensors"))
    for name, d in found.items():
        if about["method"] == "full":
            weight = base.get_parameter(name)
            weight.copy_(weight + d.to(weight.device))
        else:
            layer = base.get_submodule(name.rpartition(".")[0])
            layer.register_forward_hook(lambda layer, args, y, d=d: y + d.to(y))
    return base
