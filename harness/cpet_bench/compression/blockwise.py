"""Block by block: each block's layers are changed from what they read, and the next block sees what is given after that.

The loop that Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323) share. As in the authors' code,
the layers of one block are all observed before any of them is changed, unless they are asked for in turn. Of an encoder-decoder
model the encoder's blocks come first; the decoder then reads the encoder as it is by then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported

if TYPE_CHECKING:
    import torch

OTHERS = "magnitude and rtn read no text and work"
TOKENS = 4096  # padded tokens a batch of calibration documents has at most


def change_blocks(
    model,
    layers: dict[str, Any],
    examples: list[list[int]],
    observe: Callable[[Any, torch.Tensor], Any],
    change: Callable[[dict[str, Any], Any], None],
    progress: Callable[[int, int, str], None],
    in_turn: bool = False,
) -> None:
    """Change `layers` (all linear layers of the blocks, by name) of `model` in place.

    observe: (statistic so far or None, x) -> statistic; x is (tokens x in) in fp32, padding left out.
    change: called with the layers that read the very same input (q, k, v; gate, up) and its statistic.
    in_turn: a block's layers are changed in the order they run, each seeing what those before it give by then, at the cost
        of one pass through the block for each set of layers that read the same.
    Of the hidden states only those that enter one block are kept at a time.

    Raises:
        Unsupported: a layer that not all tokens go through.
    """
    import torch

    from ..models.arch import block_lists

    lists = block_lists(model)
    total, done = sum(len(model.get_submodule(name)) for name in lists), 0
    with torch.no_grad():
        for name in lists:
            blocks = model.get_submodule(name)
            kinds = _kinds(model, len(blocks))
            batches = first_inputs(model, blocks, examples)
            for i, block in enumerate(blocks):
                mine = {n: m for n, m in layers.items() if n.startswith(f"{name}.{i}.")}
                sets = [mine]
                if in_turn:
                    sets = [group for group, _ in _observed(block, kinds[i], mine, batches[:1], lambda *_: None)]
                for some in sets:
                    for group, statistic in _observed(block, kinds[i], some, batches, observe):
                        change(group, statistic)
                done += 1
                if i + 1 < len(blocks):
                    for batch in batches:
                        batch["hidden"] = run_block(block, batch, kinds[i])
                progress(done, total, f"block {done} of {total}")


def _kinds(model, blocks: int) -> list[int]:
    """For each block the first one of its kind: kinds of attention differ in the mask and positions the model gives them."""
    types = getattr(model.config, "layer_types", None) or ()
    return [types.index(kind) for kind in types] if len(types) == blocks else [0] * blocks


def _observed(block, kind: int, layers: dict[str, Any], batches: list[dict[str, Any]], observe) -> list[tuple[dict, Any]]:
    """Groups of layers that read one tensor, each with the statistic of it over all batches."""
    leader: dict[str, str] = {}
    statistics: dict[str, Any] = {}
    first: dict[tuple, str] = {}
    alive = []  # so that no later tensor takes the memory of an earlier one
    now: dict[str, Any] = {}

    def look(name: str):
        def hook(module, args):
            x, real = args[0], now["real"]
            if name not in leader:
                leader[name] = first.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype, x._version), name)
                alive.append(x)
            if leader[name] != name:
                return
            flat = x.reshape(-1, x.shape[-1])
            if len(flat) != real.numel():
                raise Unsupported(
                    f"not every token goes through {name}, so what it reads is not the calibration text; {OTHERS}"
                )
            statistics[name] = observe(statistics.get(name), flat[real.reshape(-1).to(x.device)].float())

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in layers.items()]
    try:
        for batch in batches:
            now["real"] = batch["real"]
            run_block(block, batch, kind)
            alive.clear()
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name in layers if name not in leader]
    if unused:
        raise Unsupported(f"no input reaches {', '.join(unused[:6])}, so it cannot be changed by what it reads; {OTHERS}")
    return [({n: layers[n] for n in layers if leader[n] == name}, found) for name, found in statistics.items()]


def first_inputs(model, blocks, examples: list[list[int]]) -> list[dict[str, Any]]:
    """What enters the first of `blocks`, batch by batch, with the other arguments the model gives its blocks.

    Each batch: `hidden` (rows x positions x width), `real` (rows x positions, true at tokens), and `rest`, by the first block
    of each kind the other arguments by name.
    """
    from ..models.arch import body
    from ..models.passes import text_inputs

    class Caught(Exception):
        pass

    kinds = sorted(set(_kinds(model, len(blocks))))
    batch: dict[str, Any] = {}

    def catch(kind: int):
        def hook(module, args, kwargs):
            taken = inspect.signature(module.forward)
            rest = dict(taken.bind(*args, **kwargs).arguments)
            for name, parameter in taken.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    rest |= rest.pop(name, {})
            batch.setdefault("hidden", rest.pop(next(iter(taken.parameters))))
            batch["rest"][kind] = {k: v for k, v in rest.items() if k not in ("past_key_values", "use_cache")}
            if kind == kinds[-1]:
                raise Caught

        return hook

    handles = [blocks[kind].register_forward_pre_hook(catch(kind), with_kwargs=True) for kind in kinds]
    found = []
    try:
        for group in grouped(examples):
            arguments, real = text_inputs(model, group)
            batch = {"real": real, "rest": {}}
            try:
                body(model)(**arguments)
            except Caught:
                found.append(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def grouped(examples: list[list[int]]) -> list[list[list[int]]]:
    """Documents of like length together, at most TOKENS padded tokens a batch."""
    groups: list[list[list[int]]] = []
    for tokens in sorted(examples, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > TOKENS:
            groups.append([])
        groups[-1].append(tokens)
    return groups


def run_block(block, batch: dict[str, Any], kind: int = 0) -> torch.Tensor:
    """The block's output hidden states for one batch of `first_inputs`; `kind` is the first block of its kind.

    T5's first block makes the position biases that all others are given: they stay in the batch.
    """
    rest = batch["rest"][kind]
    found = block(batch["hidden"], **rest)
    if not isinstance(found, tuple):
        return found
    for place, name in enumerate(("position_bias", "encoder_decoder_position_bias"), start=1):
        if name in rest and place < len(found) and rest[name] is None:
            rest[name] = found[place]
    return found[0]
