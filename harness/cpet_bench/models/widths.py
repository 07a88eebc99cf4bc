"""Parts of a block that can be narrowed whole (MLP neurons, attention heads), and models whose blocks differ in width.

transformers builds every block alike from its config. A model with blocks of several widths keeps those that differ in
`cpet_widths` of its config.json, by the part's name; `narrowed` gives the class that builds it so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import Unsupported
from .formats import WIDTHS_KEY as KEY

Fits = Callable[[nn.Module, tuple[str, ...]], bool]  # whether a module's children of these names are of classes looked for
_MLP = (  # names of the layers that make a neuron, of the layer that reads it, and of the config's width
    (("gate_proj", "up_proj"), "down_proj", ("intermediate_size",)),
    (("wi_0", "wi_1"), "wo", ("d_ff",)),
    (("wi",), "wo", ("d_ff",)),
    (("fc1",), "fc2", ("ffn_dim", "intermediate_size")),
    (("c_fc",), "c_proj", ("n_inner", "intermediate_size")),
)
_HEADS = (  # q, k, v (or all of them in one layer), and the layer that reads them
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q", "k", "v"), "o"),
    (("c_attn",), "c_proj"),
)


@dataclass(frozen=True)
class Part:
    """An MLP or an attention of one block, as groups that can only go whole.

    name: of the module that holds it; kind: `mlp` or `heads`; groups: how many there are now (neurons, or key heads with
    their query heads). rows: by layer, the first output of each group's runs and how long a run is; column: of the layer
    that reads them, the same for its inputs. config: names its width may have in the model's config.
    """

    name: str
    kind: str
    groups: int
    rows: dict[str, tuple[tuple[int, ...], int]]
    reader: str
    columns: int
    config: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What tells it from every other part of the model."""
        return f"{self.name}.{self.kind}"

    def outputs(self, layer: str, kept: list[int]) -> list[int]:
        """Outputs of `layer` that belong to the groups `kept`, in the layer's own order."""
        starts, run = self.rows[layer]
        return [start + g * run + i for start in starts for g in kept for i in range(run)]

    def inputs(self, kept: list[int]) -> list[int]:
        """Inputs of the reading layer that belong to the groups `kept`."""
        return [g * self.columns + i for g in kept for i in range(self.columns)]


def parts(model: nn.Module, plain: bool = True) -> list[Part]:
    """The parts of every block that can be narrowed, in order; a block's other modules are left out.

    plain: only those of plain linear layers, which `narrow` can cut; else those of any class, quantised ones too.
    """
    from .arch import block_lists, is_linear

    ours = _plain if plain else lambda m, names: all(is_linear(getattr(m, n)) if hasattr(m, n) else False for n in names)
    found = []
    for blocks in block_lists(model):
        for name, module in model.get_submodule(blocks).named_modules():
            if name:
                found += [p for p in (_mlp(f"{blocks}.{name}", module, ours), _heads(f"{blocks}.{name}", module, ours)) if p]
    return found


def _plain(module: nn.Module, names: tuple[str, ...]) -> bool:
    from transformers.pytorch_utils import Conv1D

    return all(isinstance(getattr(module, n, None), (nn.Linear, Conv1D)) for n in names)


def _mlp(name: str, module: nn.Module, ours: Fits) -> Part | None:
    from .arch import features

    for makers, reader, config in _MLP:
        if ours(module, (*makers, reader)):
            width = features(getattr(module, reader))[0]
            if all(features(getattr(module, n))[1] == width for n in makers):
                return Part(name, "mlp", width, dict.fromkeys(makers, ((0,), 1)), reader, 1, config)
    return None


def _heads(name: str, module: nn.Module, ours: Fits) -> Part | None:
    from .arch import features

    size = getattr(module, "head_dim", None) or getattr(module, "key_value_proj_dim", None)
    for makers, reader in _HEADS:
        if not size or not ours(module, (*makers, reader)):
            continue
        width = features(getattr(module, reader))[0]
        if len(makers) == 1:
            if features(getattr(module, makers[0]))[1] == 3 * width:
                rows = {makers[0]: ((0, width, 2 * width), size)}
                return Part(name, "heads", width // size, rows, reader, size)
            continue
        q, k, v = (features(getattr(module, n))[1] for n in makers)
        heads = k // size
        if q == width and k == v and k % size == 0 and q % k == 0:
            run = size * (q // k)
            rows = dict(zip(makers, (((0,), run), ((0,), size), ((0,), size)), strict=True))
            return Part(name, "heads", heads, rows, reader, run)
    return None


def heads_refused(model: nn.Module, part: Part) -> str | None:
    """Why the heads of an attention cannot go one by one, or None."""
    module = model.get_submodule(part.name)
    if hasattr(module, "has_relative_attention_bias"):
        return "all blocks share one position bias per head, so heads cannot go block by block"
    size = getattr(module, "head_dim", 0)
    for name, weight in module.named_parameters():
        if name.partition(".")[0] not in (*part.rows, part.reader) and tuple(weight.shape) != (size,):
            return f"{part.name}.{name} spans the heads"
    return None


@torch.no_grad()
def narrow(model: nn.Module, part: Part, kept: list[int]) -> None:
    """Keep the groups `kept` (ascending) of a part and take the others out of its layers, in place. Works on meta tensors."""
    module = model.get_submodule(part.name)
    for name in part.rows:
        _cut(getattr(module, name), part.outputs(name, kept), out=True)
    _cut(getattr(module, part.reader), part.inputs(kept), out=False)
    if part.kind == "heads":
        before, after = part.groups * part.columns, len(kept) * part.columns
        size = getattr(module, "head_dim", 0) or module.key_value_proj_dim
        changed = dict.fromkeys(("num_heads", "n_heads", "num_attention_heads"), (before // size, after // size))
        changed |= dict.fromkeys(("split_size", "inner_dim"), (before, after))
        changed["num_key_value_heads"] = (part.groups, len(kept))
        for name, (old, new) in changed.items():
            if getattr(module, name, None) == old:
                setattr(module, name, new)
    elif getattr(module, "intermediate_size", None) == part.groups:
        module.intermediate_size = len(kept)


def _cut(layer: nn.Module, kept: list[int], out: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    conv = isinstance(layer, Conv1D)
    dim = int(out == conv)
    index = torch.tensor(kept, device=layer.weight.device)
    grad = layer.weight.requires_grad
    layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, index), requires_grad=grad)
    if out and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach().index_select(0, index), requires_grad=layer.bias.requires_grad)
    if conv:
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def note_widths(model: nn.Module) -> dict[str, int]:
    """Put the widths of `model` into its config, as transformers has them where all blocks are alike, and the rest in KEY.

    Returns the rest: groups (neurons, key heads) by part. What transformers would build is found by building it, on the
    meta device.
    """
    now = parts(model)
    config = model.config
    if hasattr(config, KEY):
        delattr(config, KEY)
    for kind, write in (("mlp", _write_mlp), ("heads", _write_heads)):
        mine = [p for p in now if p.kind == kind]
        if len({p.groups for p in mine}) != 1 or not any(p.kind == kind for p in _different(model, now)):
            continue
        before = dict(config.__dict__)
        write(config, mine[0])
        if any(p.kind == kind for p in _different(model, now)):
            config.__dict__.clear()
            config.__dict__.update(before)
    rest = {p.label: p.groups for p in _different(model, now)}
    if rest:
        setattr(config, KEY, rest)
    return rest


def _write_mlp(config, part: Part) -> None:
    for name in part.config:
        if hasattr(config, name):
            setattr(config, name, part.groups)
            return


def _write_heads(config, part: Part) -> None:
    if getattr(config, "head_dim", None) and hasattr(config, "num_key_value_heads"):
        config.num_attention_heads = part.groups * part.columns // config.head_dim
        config.num_key_value_heads = part.groups


def _different(model: nn.Module, now: list[Part]) -> list[Part]:
    """Parts that transformers would build with another width from the config as it is; all, where it takes no such config."""
    cls = getattr(type(model), "_cpet_plain", type(model))
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            built = {p.label: p.groups for p in parts(cls(config))}
    except Exception:  # a config's own checks raise errors of many classes
        return now
    return [p for p in now if built.get(p.label) != p.groups]


def narrowed(auto: Any, config: dict[str, Any]) -> Any:
    """`auto`, transformers' auto class, or the model's own class that builds the widths its config.json notes.

    Args: config: config.json of the model folder.
    Raises: Unsupported: code of the model's own, which these classes do not read, or a part that the model does not have.
    """
    widths = config.get(KEY)
    if not widths:
        return auto
    from transformers import AutoConfig

    if config.get("auto_map"):
        raise Unsupported("models that run code of their own cannot have blocks of several widths here")
    kind = type(AutoConfig.for_model(config["model_type"]))
    plain = auto._model_mapping[kind]

    def build(self, *args, **kwargs):
        plain.__init__(self, *args, **kwargs)
        there = {p.label: p for p in parts(self)}
        for name, groups in widths.items():
            if name not in there or there[name].groups < groups:
                raise Unsupported(f"config.json notes {groups} groups for {name}, which this {plain.__name__} does not have")
            narrow(self, there[name], list(range(groups)))

    return type(plain.__name__, (plain,), {"__init__": build, "_cpet_plain": plain, "__module__": plain.__module__})
