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
from ..pet.rewriting import rewrites

TOLERANCE = 0.01


def trainable_count(model: nn.Module) -> int:
    """Parameters of `model` that require a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched_ranks(shapes: dict[str, tuple[int, int]], target: int) -> dict[str, int]:
    """LoRA rank per layer so that the sum of r (in + out) is within 1 % of `target`; no two ranks differ by more than one.

    The layers with one rank more are spread over the kinds of layer and over the depth of the model.

    Args:
        shapes: (in, out) by layer, in the model's order.
    Raises:
        StepFailed: no such ranks exist; the nearest sum is named.
    """
    costs = {name: a + b for name, (a, b) in shapes.items()}
    whole = sum(costs.values())
    if whole > (1 + TOLERANCE) * target:
        raise StepFailed(f"rank 1 on {len(shapes)} layers trains {whole} parameters, more than the {target} to be matched")
    ranks = {name: max(1, more) for name, more in _spread(costs, target).items()}
    near(sum(r * costs[name] for name, r in ranks.items()), target, len(shapes))
    return ranks


def near(total: int, target: int, layers: int) -> None:
    """StepFailed where `total` parameters on so many layers are not within 1 % of `target`."""
    if abs(total - target) > TOLERANCE * target:
        raise StepFailed(f"ranks on {layers} layers that differ by one train {total} parameters at the nearest, not {target}")


def _spread(costs: dict[str, int], target: int) -> dict[str, int]:
    """Ranks k or k + 1 by layer, the sum of rank times cost as near to `target` as any such choice comes."""
    base, left = divmod(target, sum(costs.values()))
    share = left / sum(costs.values())
    kinds: dict[int, list[str]] = {}
    for name, cost in costs.items():
        kinds.setdefault(cost, []).append(name)
    # Which sums the first kinds can reach, as the bits of a number: bit s for the sum s.
    reach = [1]
    for cost, names in kinds.items():
        bits = reach[-1]
        for _ in names:
            bits |= bits << cost
        reach.append(bits)
    below = (reach[-1] & ((1 << (left + 1)) - 1)).bit_length() - 1
    above = reach[-1] >> (left + 1)
    step = (above & -above).bit_length() - 1  # zeros before the lowest sum above
    total = left + 1 + step if above and step + 1 < left - below else below
    ranks = dict.fromkeys(costs, base)
    for before, (cost, names) in reversed(list(zip(reach[:-1], kinds.items(), strict=True))):
        possible = [i for i in range(len(names) + 1) if total >= i * cost and before >> (total - i * cost) & 1]
        more = min(possible, key=lambda i: (abs(i - share * len(names)), i))
        for i in range(more):
            ranks[names[i * len(names) // more]] += 1
        total -= more * cost
    return ranks


def wider(folder: Path, target: int, out: Path, seed: int = 0) -> None:
    """D's saved LoRA with its ranks extended to `target` parameters (within 1 %), written to `out`; it computes the same.

    Every layer is extended by as many ranks, or one more. A gets new rows, drawn Kaiming-uniform from `seed`; B new columns of
    zeros; alpha grows so that each layer's scale (alpha / r, or alpha / sqrt r with use_rslora) stays what it was.

    Raises:
        Unsupported: the adapter is not plain LoRA.
        StepFailed: it has more parameters than `target` already, or the number cannot be met.
    """
    import torch
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file, save_file

    if not Path(folder, "adapter_config.json").is_file():
        raise Unsupported("control wider extends plain LoRA alone, and this adapter is not in PEFT's format")
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    layers = _layers(config, tensors)
    shapes = {name: (a.shape[1], b.shape[0]) for name, (a, b) in layers.items()}
    costs = {name: a + b for name, (a, b) in shapes.items()}
    held = sum(t.numel() for t in tensors.values())
    if held > (1 + TOLERANCE) * target:
        raise StepFailed(f"the inherited adapter has {held} parameters, more than the {target} to be matched")
    more = _spread(costs, max(0, target - held))
    ranks = {name: a.shape[0] + more[name] for name, (a, _) in layers.items()}
    near(sum(r * costs[name] for name, r in ranks.items()), target, len(ranks))
    generator = torch.Generator().manual_seed(seed)
    power = 0.5 if config.get("use_rslora") else 1.0
    pattern = config.get("alpha_pattern") or {}
    alphas, written = {}, {}
    for name, (a, b) in layers.items():
        old, new = a.shape[0], ranks[name]
        alphas[name] = pattern.get(get_pattern_key(pattern.keys(), name), config["lora_alpha"]) * (new / old) ** power
        rows = torch.empty(new - old, a.shape[1])
        if new > old:
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=generator)
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
_MORE_THAN_LORA = (
    *("use_dora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "layer_replication", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
)


def _layers(config: dict, tensors: dict) -> dict[str, tuple]:
    """(A, B) by layer of a plain LoRA; Unsupported for anything else."""
    odd = [k for k in _MORE_THAN_LORA if config.get(k)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if rewrites(config):
        odd.append(f"init_lora_weights {config['init_lora_weights']}, which changes the base by the rank")
    if config.get("peft_type") != "LORA":
        odd = [str(config.get("peft_type"))]
    if odd:
        raise Unsupported(f"control wider extends plain LoRA alone, and this adapter is (or has) {', '.join(odd)}")
    found: dict[str, dict] = {}
    for key, tensor in tensors.items():
        parts = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if not parts or tensor.dim() != 2:
            raise Unsupported(f"control wider extends plain LoRA alone, and this adapter has {key}")
        found.setdefault(parts[1], {})[parts[2]] = tensor
    order = sorted(found, key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)])
    return {name: (found[name]["A"], found[name]["B"]) for name in order}
