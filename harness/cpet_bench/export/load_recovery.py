"""Recovery modules of CPET (arXiv 2307.07705) beside a model's linear layers: y = layer(x) + s U2 act(U1 x).

base = AutoModelForCausalLM.from_pretrained(...)             # the compressed model
model = PeftModel.from_pretrained(base, "this folder")       # first the adapter
attach_recovery(base, "this folder")                         # then these; `model` computes with both
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ACT = {"gelu": torch.nn.functional.gelu, "sigmoid": torch.sigmoid, "identity": lambda z: z}


def attach_recovery(base, folder):
    about, weights = json.loads(Path(folder, "recovery.json").read_text()), load_file(Path(folder, "recovery.safetensors"))
    settings = about["settings"]
    act, scale = ACT[settings["act"]], (settings["alpha"] or settings["r"]) / settings["r"]
    for name in about["layers"]:
        u1, u2 = weights[f"{name}.U1"], weights[f"{name}.U2"]

        def beside(layer, args, y, u1=u1, u2=u2):
            x = args[0]
            return y + (scale * act(x @ u1.to(x).t()) @ u2.to(x).t()).to(y.dtype)

        base.get_submodule(name).register_forward_hook(beside)
    return base
