"""Feed-forward networks split into experts, of which a router picks some for each token (MoEfication, arXiv 2110.01786).

A routed model is an ordinary model folder with `cpet_routers.safetensors` beside the weights, which are those of the dense
model. The neurons of the experts that are not picked are multiplied by zero after the activation: whatever reads the
network's product (its output layer, a LoRA or a recovery module beside that) sees the experts picked and nothing else.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import StepFailed, Unsupported
from .arch import block_lists, features
from .blocks import linears_in
from .formats import ROUTERS_FILE as FILE

# Children of a feed-forward network by model family: what the activation reads, the activation, what multiplies it, output.
_SHAPES = (
    ("gate_proj", "act_fn", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM
    ("c_fc", "act", None, "c_proj"),  # GPT-2
    ("fc1", "activation_fn", None, "fc2"),  # OPT, Phi, BART
    ("wi", "act", None, "wo"),  # T5
    ("wi_0", "act", "wi_1", "wo"),  # T5 v1.1
    ("dense_h_to_4h", "act", None, "dense_4h_to_h"),  # GPT-NeoX, Falcon
)


@dataclass(frozen=True)
class Ffn:
    """One feed-forward network: `name` of the module it is in, and of its children. gate: another linear multiplies it."""

    name: str
    w_in: str
    act: str
    gate: str | None
    w_out: str


def feed_forwards(model: nn.Module) -> list[Ffn]:
    """The feed-forward network of every block, in order. Raises Unsupported: a block has none that is known, or several."""
    found: list[Ffn] = []
    for blocks in block_lists(model):
        for i, block in enumerate(model.get_submodule(blocks)):
            mine = []
            for name, module in block.named_modules(prefix=f"{blocks}.{i}"):
                children = dict(module.named_children())
                mine += [Ffn(name, *s) for s in _SHAPES if all(c in children for c in s if c)]
            if len(mine) != 1:
                what = "no feed-forward network of a known shape" if not mine else f"{len(mine)} feed-forward networks"
                known = "; ".join(" ".join(filter(None, shape)) for shape in _SHAPES)
                raise Unsupported(
                    f"{blocks}.{i} has {what}; experts are made of one with one activation between its layers, as these: "
                    f"{known}. {linears_in(model, f'{blocks}.{i}')}; pruning, quantising and depth need no such network"
                )
            found += mine
    if len({id(model.get_submodule(f"{f.name}.{f.act}")) for f in found}) < len(found):
        raise Unsupported("the feed-forward networks of this model share one activation module, so none can be routed alone")
    return found


class Router(nn.Module):
    """Scores experts as second tanh(first x / |x|) and lets the `k` highest through, each token for itself.

    first: (experts x width). second: (experts x experts). expert: of each neuron, the number of its expert. All fp32 (the
    choice is discrete) and frozen; not in the state dict, since they have a file of their own.
    """

    def __init__(self, first: torch.Tensor, second: torch.Tensor, expert: torch.Tensor, k: int):
        super().__init__()
        self.register_buffer("first", first.float(), persistent=False)
        self.register_buffer("second", second.float(), persistent=False)
        self.register_buffer("expert", expert.long(), persistent=False)
        self.k = k
        self._mask: torch.Tensor | None = None

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., experts) for inputs x (..., width) of the network."""
        unit = F.normalize(x.float(), dim=-1)
        return F.linear(torch.tanh(F.linear(unit, self.first.float())), self.second.float())

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """True at the neurons of the `k` experts that score highest, (..., neurons)."""
        scores = self.scores(x)
        picked = torch.zeros_like(scores, dtype=torch.bool)
        picked.scatter_(-1, scores.topk(self.k, dim=-1).indices, True)
        return picked[..., self.expert]

    # Hooks as methods: a copy of the model gets hooks of its own router.
    def before(self, module: nn.Module, args: tuple) -> None:
        self._mask = self(args[0])

    def after(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        mask, self._mask = self._mask, None
        return output * mask.to(output.dtype)


def install(model: nn.Module, routers: dict[str, Router]) -> None:
    """Put a router into each feed-forward network it is named after. Raises StepFailed where names or shapes differ."""
    networks = {f.name: f for f in feed_forwards(model)}
    if set(networks) != set(routers):
        odd = sorted(set(networks) ^ set(routers))
        raise StepFailed(f"the routers are of another model: {', '.join(odd[:6])} is in one of the two alone")
    for name, router in routers.items():
        network, parent = networks[name], model.get_submodule(name)
        w_in = parent.get_submodule(network.w_in)
        wanted, shape = (router.first.shape[1], len(router.expert)), features(w_in)
        if wanted != shape:
            raise StepFailed(f"the router of {name} is for {wanted[0]} inputs and {wanted[1]} neurons; it has {shape}")
        held = next(w_in.parameters(), None)
        router.to(held.device if held is not None else next(w_in.buffers()).device)
        parent.cpet_router = router
        w_in.register_forward_pre_hook(router.before)
        parent.get_submodule(network.act).register_forward_hook(router.after)


def attach_routers(model: nn.Module, folder: Path) -> None:
    """Put a folder's routers into its model; nothing where the folder has none."""
    from safetensors import safe_open

    if not Path(folder, FILE).is_file():
        return
    with safe_open(Path(folder, FILE), framework="pt") as file:
        k = json.loads(file.metadata()["routers"])["experts_used"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    install(model, {n: Router(*(tensors[f"{n}.{part}"] for part in ("first", "second", "expert")), k) for n in names})


def save_routers(routers: dict[str, Router], folder: Path, about: dict[str, Any]) -> int:
    """Write the routers (`NETWORK.first`, `.second`, `.expert`) with `about` as metadata. Returns bytes."""
    from safetensors.torch import save_file

    tensors = {}
    for name, router in routers.items():
        tensors[f"{name}.first"], tensors[f"{name}.second"] = router.first, router.second
        tensors[f"{name}.expert"] = router.expert.to(torch.int32)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, Path(folder, FILE), metadata={"routers": json.dumps(about)})
    return Path(folder, FILE).stat().st_size


def carry_routers(source: Path, out: Path) -> int:
    """Take the routers of `source` over into `out`, a compression of it that saved the weights alone. Returns bytes added."""
    if not Path(source, FILE).is_file() or Path(out, FILE).exists():
        return 0
    shutil.copyfile(Path(source, FILE), Path(out, FILE))
    return Path(out, FILE).stat().st_size
