"""Controls of equal size: how many parameters a cell trains, and LoRA ranks that train as many.

One rank for all layers cannot always reach a number (r 8 may miss by 5 %), so ranks differ by one from layer to layer.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from torch import nn

from ..errors import StepFailed, Unsupported

TOLERANCE = 0.01


def trainable_count(model: nn.Module) -> int:
    """Parameters of `model` that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched_ranks(shapes: dict[str, tuple[int, int]], target: int) -> dict[str, int]:
    """LoRA rank per layer so that the sum of r (in + out) is within 1 % of `target`; no two ranks differ by more than one.

    The layers with one rank more are spread over the depth of the model, the largest kinds of layer first.

    Args:
        shapes: (in, out) by layer, in the model's order.
    Raises:
        StepFailed: no such ranks exist; the nearest sum is named.
    """
    costs = {name: a + b for name, (a, b) in shapes.items()}
    whole = sum(costs.values())
    base, left = divmod(target, whole) if whole else (0, target)
    if not base:
        raise StepFailed(f"rank 1 on {len(shapes)} layers trains {whole} parameters, more than the {target} to be matched")
    ranks = dict.fromkeys(shapes, base)
    for cost in sorted(set(costs.values()), reverse=True):
        alike = [name for name, c in costs.items() if c == cost]
        more = min(len(alike), left // cost)
        for i in range(more):
            ranks[alike[i * len(alike) // more]] += 1
        left -= more * cost
    smallest = min((c for name, c in costs.items() if ranks[name] == base), default=None)
    if smallest is not None and smallest - left < left:  # one more comes nearer than none
        ranks[next(name for name, c in costs.items() if c == smallest and ranks[name] == base)] += 1
    total = sum(ranks[name] * costs[name] for name in shapes)
    if abs(total - target) > TOLERANCE * target:
        raise StepFailed(f"ranks on {len(shapes)} layers train {total} parameters at the nearest, not {target}")
    return ranks


def wider(folder: Path, target: int, out: Path, seed: int = 0) -> None:
    """D's saved LoRA with its ranks extended to `target` parameters (within 1 %), written to `out`; it computes the same.

    A gets new rows, drawn Kaiming-uniform from `seed`; B new columns of zeros; alpha grows so that each layer's scale
    (alpha / r, or alpha / sqrt r with use_rslora) stays what it was.

    Raises:
        Unsupported: the adapter is not plain LoRA.
        StepFailed: it has more parameters than `target` already, or the number cannot be met.
    """
    import torch
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file, save_file

    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    layers = _layers(config, tensors)
    shapes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in layers.items()}
    ranks = matched_ranks(shapes, target)
    smaller = [name for name, (a, _) in layers.items() if ranks[name] < a.shape[0]]
    if smaller:
        raise StepFailed(f"the inherited adapter is larger than the {target} parameters to be matched ({smaller[0]})")
    generator = torch.Generator().manual_seed(seed)
    power = 0.5 if config.get("use_rslora") else 1.0
    alphas, written = {}, {}
    for name, (a, b) in layers.items():
        old, new = a.shape[0], ranks[name]
        key = get_pattern_key(config.get("alpha_pattern", {}).keys(), name)
        alphas[name] = config.get("alpha_pattern", {}).get(key, config["lora_alpha"]) * (new / old) ** power
        rows = nn.init.kaiming_uniform_(torch.empty(new - old, a.shape[1]), a=math.sqrt(5), generator=generator)
        written[f"{_PREFIX}{name}.lora_A.weight"] = torch.cat([a, rows.to(a.dtype)]).contiguous()
        columns = torch.zeros(b.shape[0], new - old, dtype=b.dtype)
        written[f"{_PREFIX}{name}.lora_B.weight"] = torch.cat([b, columns], dim=1).contiguous()
    base = max(set(ranks.values()), key=lambda r: (list(ranks.values()).count(r), r))
    plain = next(name for name, r in ranks.items() if r == base)
    config |= {
        "r": base,
        "lora_alpha": alphas[plain],
        "target_modules": sorted(layers),
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != base},
        "alpha_pattern": {re.escape(n): alpha for n, alpha in alphas.items() if alpha != alphas[plain]},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(written, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


_PREFIX = "base_model.model."


def _layers(config: dict, tensors: dict) -> dict[str, tuple]:
    """(A, B) by layer of a plain LoRA; Unsupported for anything else."""
    odd = [k for k in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices") if config.get(k)]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        what = config.get("peft_type") if config.get("peft_type") != "LORA" else ", ".join(odd) or "bias"
        raise Unsupported(f"control wider extends plain LoRA alone, and this adapter is (or has) {what}")
    found: dict[str, dict] = {}
    for key, tensor in tensors.items():
        parts = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not parts or tensor.dim() != 2:
            raise Unsupported(f"control wider extends plain LoRA alone, and this adapter has {key}")
        found.setdefault(parts[1], {})[parts[2]] = tensor
    order = sorted(found, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)])
    return {name: (found[name]["A"], found[name]["B"]) for name in order}
