"""What a compression takes of a device's memory, and which models it cannot take, from the shapes of the model's tensors.
Importing this loads no torch.

A backend's `memory(settings, size)` gives bytes: of tensors, beside what the libraries themselves take of a process. They are
for 32-bit floats, since backends compute in them, and for as much calibration text as its settings allow.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.tensors import places

F32 = 4
LIBRARIES = 6e8  # bytes that a process has after importing torch and transformers
BATCH = 4096  # padded tokens that are run at once (blockwise.TOKENS)
LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # where lm-eval looks for a model's context, in its order
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_TRANSPOSED = ("gpt2", "openai-gpt")  # transformers' Conv1D keeps weights as inputs x outputs
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters: `total`, `blocks` (all of them together), `block` (the largest), `layer` (the largest layer of a
    block), `outside` (what is in no block, without a head of its own), `largest` (tensor). Lengths: `depth` (blocks), `width`
    (hidden states), `widest` (what a layer of a block reads or gives), `vocabulary`, `heads`. pairs: whether there are an
    encoder and a decoder. shapes: (inputs, outputs) of the blocks' linear layers by name, of plain weights alone. quantised:
    the format of a model that is packed already. model_type: transformers' name of the architecture. mixture: whether it has
    experts, whose weights lie in files otherwise than in the layers that are made of them. modules: names of all modules that
    have tensors. lists: by the name of a list of blocks, how many it has. positions: how many tokens it reads at once, as its
    config says it.
    """

    total: int
    blocks: int
    block: int
    layer: int
    outside: int
    largest: int
    depth: int
    width: int
    widest: int
    vocabulary: int
    heads: int
    pairs: bool
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    quantised: str | None = None
    model_type: str = ""
    mixture: bool = False
    modules: frozenset[str] = frozenset()
    lists: dict[str, int] = field(default_factory=dict)
    positions: int | None = None

    @classmethod
    def of(cls, folder: Path) -> ModelSize | None:
        """The sizes of a model folder, from the headers of its files; None where they do not show them."""
        try:
            there = places(folder)
            text = Path(folder, "config.json").read_text()
            config = json.loads(text)
        except (OSError, ValueError, KeyError):
            return None
        by_block: dict[str, int] = defaultdict(int)
        inside, outside = {}, {}
        for name, place in there.items():
            found = re.match(r"(.*?\.?\d+)\.", name)
            if found:
                by_block[found[1]] += place.count
                inside[name] = place
            else:
                outside[name] = place
        tables = [p.shape for p in outside.values() if len(p.shape) == 2]
        layers = [p.shape for p in inside.values() if len(p.shape) == 2]
        if not tables or not layers:
            return None
        words = max(tables)
        return cls(
            total=sum(p.count for p in there.values()),
            blocks=sum(by_block.values()),
            block=max(by_block.values()),
            layer=max(a * b for a, b in layers),
            outside=sum(p.count for name, p in outside.items() if not _HEAD.search(name)),
            largest=max(p.count for p in there.values()),
            depth=len(by_block),
            width=words[1],
            widest=max(max(shape) for shape in layers),
            vocabulary=config.get("vocab_size") or words[0],
            heads=next((config[k] for k in _HEADS if isinstance(config.get(k), int)), max(1, words[1] // 64)),
            pairs=bool(config.get("is_encoder_decoder")),
            shapes={} if config.get("quantization_config") else _shapes(inside, config.get("model_type") in _TRANSPOSED),
            quantised=(config.get("quantization_config") or {}).get("quant_method"),
            model_type=str(config.get("model_type", "")),
            mixture="expert" in text,
            modules=frozenset(_modules(there)),
            lists=_lists(by_block),
            positions=next((config[k] for k in LENGTHS if isinstance(config.get(k), int) and config[k]), None),
        )


def _modules(tensors: Iterable[str]) -> Iterator[str]:
    """Names of the modules that have these tensors, and of those that they are in."""
    for name in tensors:
        while "." in name:
            name = name.rpartition(".")[0]
            yield name


def _lists(blocks: Iterable[str]) -> dict[str, int]:
    """Lists of blocks by name, and how many each has, from the names of the blocks; none where some are missing."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in blocks:
        before, _, number = name.rpartition(".")
        if number.isdigit():
            found[before].add(int(number))
    return {name: len(there) for name, there in found.items() if max(there) + 1 == len(there)}


def _shapes(inside: dict[str, Any], transposed: bool) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of linear layers from the tensors of the blocks; T5's table of position biases is none."""
    found = {}
    for name, place in inside.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and len(place.shape) == 2 and not layer.endswith("relative_attention_bias"):
            found[layer] = place.shape if transposed else place.shape[::-1]
    return found


def run(size: ModelSize, documents: int, tokens: int) -> int:
    """Bytes of one batch of documents of so many tokens on its way through a block, without gradients."""
    rows = max(1, min(documents, BATCH // tokens))
    found = rows * tokens * (6 * size.width + 4 * size.widest)
    if size.pairs:  # T5's attention has its scores and its position biases as they are
        found += 3 * rows * size.heads * tokens**2
    return F32 * found


def streamed(size: ModelSize, calibration: Any) -> int:
    """Bytes of compressing block by block, without what is computed for a layer: what lies outside the blocks, one block, the
    hidden states of all documents with their masks, and one batch in work."""
    documents, tokens = calibration.documents, calibration.max_tokens
    waiting = documents * tokens * size.width * (2 if size.pairs else 1) + documents * tokens**2
    if size.pairs:
        waiting += documents * size.heads * tokens**2
    return F32 * (size.outside + size.block + waiting) + run(size, documents, tokens)


def whole(size: ModelSize, calibration: Any = None) -> int:
    """Bytes of the model in float32 with, where it is run, one batch of documents in work."""
    return F32 * size.total + (run(size, calibration.documents, calibration.max_tokens) if calibration else 0)
