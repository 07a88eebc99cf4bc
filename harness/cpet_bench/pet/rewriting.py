"""LoRA whose start is taken out of the base weights (PiSSA, OLoRA, CorDA, LoRA-GA), kept as plain LoRA. Does not load torch.

PiSSA (arXiv 2404.02948) and OLoRA (2406.01775) start from a part s B0 A0 of the weight W and leave W - s B0 A0 in the base.
What such a module learned is s (B A - B0 A0), whatever the base, so that is what is kept: LoRA of twice the rank on the base as
it was (PEFT's `path_initial_model_for_weight_conversion` makes the same). The factors alone mean nothing on another model, on a
compressed one, or beside a start that was drawn with another seed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    import torch

REWRITES_BASE = ("pissa", "olora", "corda", "lora_ga")
NEEDS_DATA = ("corda", "eva", "lora_ga")  # PEFT prepares these in functions of their own; without it takes `eva` for plain LoRA


def rewrites(fields: dict[str, Any]) -> bool:
    """Whether LoRA with these fields changes the base weights as it starts."""
    init = fields.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(REWRITES_BASE)


def without_its_start(folder: Path, fields: dict[str, Any]) -> str:
    """Why the adapter in `folder`, whose configuration has these fields, cannot be used; empty where it can."""
    if not rewrites(fields):
        return ""
    return (
        f"The adapter in {folder} is {fields['init_lora_weights']} without what it started from, which its weights are no use "
        "without: save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
    )


def as_saved(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of the plain LoRA that such a module is kept as: ranks doubled, each layer's scale as it was."""
    if not rewrites(fields):
        return fields
    more = 2**0.5 if fields.get("use_rslora") else 2  # the scale is alpha / sqrt(r) there
    found = {k: v for k, v in fields.items() if k not in ("corda_config", "lora_ga_config")} | {"init_lora_weights": True}
    found |= {"r": 2 * fields.get("r", 8), "lora_alpha": more * fields.get("lora_alpha", 8)}
    for key, factor in (("rank_pattern", 2), ("alpha_pattern", more)):
        if fields.get(key):
            found[key] = {name: factor * value for name, value in fields[key].items()}
    return found


def difference(state: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of plain LoRA that add what was learned: A (2r x in) = [A; A0], B (out x 2r) = [B, -B0]; others as they are."""
    import torch

    found = {}
    for name, tensor in state.items():
        factor = re.search(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$", name)
        if not factor:
            found[name] = tensor
        elif factor[1] == "A":
            found[name] = torch.cat([tensor, start[name]], dim=0)
        else:
            found[name] = torch.cat([tensor, -start[name]], dim=1)
    return found
