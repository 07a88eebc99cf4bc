"""Block by block: each block's layers are changed from what they read, and the next block sees what is given after that.

The loop that Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323) share. As in the authors' code,
the layers of one block are all observed before any of them is changed, unless they are asked for in turn. Of an encoder-decoder
model the encoder's blocks come first; the decoder then reads what the encoder gives by then. A block has its weights only while
it is at work (streaming.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import Unsupported

if TYPE_CHECKING:
    import torch

    from .streaming import Whole

OTHERS = "magnitude and rtn read no text and work"
TOKENS = 4096  # padded tokens a batch of calibration documents has at most


def change_blocks(
    opened: Whole,
    examples: list[list[int]],
    observe: Callable[[Any, torch.Tensor], Any],
    change: Callable[[dict[str, Any], Any], None],
    progress: Callable[[int, int, str], None],
    in_turn: bool = False,
) -> None:
    """Change all linear layers of the blocks of an opened model.

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

    model, device = opened.model, opened.device
    lists = block_lists(model)
    total, done = sum(len(model.get_submodule(name)) for name in lists), 0
    ended: dict[str, list[Any]] = {}
    with torch.no_grad():
        for name in lists:
            blocks = model.get_submodule(name)
            kinds = kinds_of(model, len(blocks))
            batches = first_inputs(opened, name, examples, ended)
            if name == lists[-1]:
                ended.clear()
            for i, block in enumerate(blocks):
                with opened.held(f"{name}.{i}"):
                    mine = {n: m for n, m in opened.layers.items() if n.startswith(f"{name}.{i}.")}
                    sets = [mine]
                    if in_turn:
                        looked = observed(block, kinds[i], mine, batches[:1], lambda *_: None, device)
                        sets = [group for group, _ in looked]
                    for some in sets:
                        found = observed(block, kinds[i], some, batches, observe, device)
                        while found:  # each statistic may be as large as a layer
                            change(*found.pop(0))
                    done += 1
                    if i + 1 < len(blocks):
                        for batch in batches:
                            batch["hidden"] = hidden_of(run_block(block, batch, kinds[i], device))
                    elif name != lists[-1]:
                        ended[name] = [run_block(block, batch, kinds[i], device) for batch in batches]
                progress(done, total, f"block {done} of {total}")


def kinds_of(model, blocks: int) -> list[int]:
    """For each block the first one of its kind: kinds of attention differ in the mask and positions the model gives them."""
    types = getattr(model.config, "layer_types", None) or ()
    return [types.index(kind) for kind in types] if len(types) == blocks else [0] * blocks


def observed(
    block, kind: int, layers: dict[str, Any], batches: list[dict[str, Any]], observe, device: str | None, instead: str = OTHERS
) -> list[tuple[dict, Any]]:
    """Groups of layers that read one tensor, each with the statistic of it over all batches, in the order they run.

    instead: what works where a layer cannot be looked at so, for the message.
    """
    leader: dict[str, str] = {}
    statistics: dict[str, Any] = {}
    first: dict[tuple, str] = {}
    alive = []  # so that no later tensor takes the memory of an earlier one
    now: dict[str, Any] = {}

    def look(name: str):
        def hook(module, args):
            x = args[0]
            if name not in leader:
                leader[name] = first.setdefault((x.data_ptr(), x.shape, x.stride(), x.dtype, x._version), name)
                alive.append(x)
            if leader[name] != name:
                return
            rows = read(x, now["real"], name, f"what it reads is not the calibration text; {instead}")
            statistics[name] = observe(statistics.get(name), rows)

        return hook

    hooks = [module.register_forward_pre_hook(look(name)) for name, module in layers.items()]
    try:
        for batch in batches:
            now["real"] = batch["real"]
            run_block(block, batch, kind, device)
            alive.clear()
    finally:
        for hook in hooks:
            hook.remove()
    unused = [name for name in layers if name not in leader]
    if unused:
        raise Unsupported(f"no input reaches {', '.join(unused[:6])}, so it cannot be changed by what it reads; {instead}")
    return [({n: layers[n] for n in layers if leader[n] == name}, found) for name, found in statistics.items()]


def read(x: torch.Tensor, real: torch.Tensor, name: str, otherwise: str) -> torch.Tensor:
    """What layer `name` reads of the text, (tokens x in) in fp32, of its input `x` where `real` says that tokens stand.

    Raises Unsupported, with what is so `otherwise`, where not all tokens go through it.
    """
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) != real.numel():
        raise Unsupported(f"not every token goes through {name}, so {otherwise}")
    return flat[real.reshape(-1).to(x.device)].float()


def first_inputs(opened: Whole, name: str, examples: list[list[int]], ended: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """What enters the first block of the list `name`, batch by batch, with the other arguments the model gives its blocks.

    ended: by list of blocks before this one, what its last block gives for each batch; its blocks are not run again.

    Each batch: `hidden` (rows x positions x width), `real` (rows x positions, true at tokens), and `rest`, by the first block
    of each kind the other arguments by name. They are where `opened.home` says.
    """
    from ..models.arch import body
    from ..models.passes import text_inputs

    model = opened.model
    blocks = model.get_submodule(name)

    class Caught(Exception):
        pass

    kinds = sorted(set(kinds_of(model, len(blocks))))
    between = [f"{name}.{i}" for i in range(kinds[-1])]
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
        for number, group in enumerate(grouped(examples)):
            arguments, real = text_inputs(model, group)
            batch = {"real": real, "rest": {}}
            try:
                with opened.passed(between), _replayed(opened, {k: v[number] for k, v in ended.items()}):
                    body(model)(**arguments)
            except Caught:
                found.append(moved(batch, opened.home()))
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


@contextmanager
def _replayed(opened: Whole, ended: dict[str, Any]) -> Iterator[None]:
    """Within this the blocks of the lists in `ended` give what it holds for them, whatever they are given."""
    with ExitStack() as stack:
        for name, output in ended.items():
            here = moved(output, opened.device)
            for block in opened.model.get_submodule(name):
                before = block.__dict__.get("forward")  # accelerate's, of a model spread over several devices
                if before:
                    stack.callback(setattr, block, "forward", before)
                block.forward = lambda *args, here=here, **kwargs: here
                stack.callback(block.__dict__.pop, "forward")
        yield


def moved(value: Any, device: str | torch.device | None) -> Any:
    """`value` with the tensors in it, at any depth, on `device` (None: where they are)."""
    import torch

    if device is None:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    return type(value)(moved(v, device) for v in value) if type(value) in (tuple, list) else value


def run_block(block, batch: dict[str, Any], kind: int = 0, device: str | None = None) -> torch.Tensor | tuple:
    """What the block gives for one batch of `first_inputs`, as it gives it; `kind` is the first block of its kind.

    device: where the batch goes for it (None: where it is); the result is where the batch was.
    T5's first block makes the position biases that all others are given: they stay in the batch.
    """
    rest = batch["rest"][kind]
    home = None if device is None else batch["hidden"].device
    found = moved(block(moved(batch["hidden"], device), **moved(rest, device)), home)
    if not isinstance(found, tuple):
        return found
    for place, name in enumerate(("position_bias", "encoder_decoder_position_bias"), start=1):
        if name in rest and place < len(found) and rest[name] is None:
            rest[name] = found[place]
    return found


def hidden_of(given: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states of what a block gives: the first of several things, or (BART's blocks) all that it gives."""
    return given[0] if isinstance(given, tuple) else given
