"""CPET's recovery modules (arXiv 2307.07705, section 3.2): a small bottleneck beside every linear layer of the blocks.

y = layer(x) + s U2 act(U1 x), s = alpha / r, U1 (r x in) Kaiming-uniform with a = sqrt 5, U2 (out x r) zero, no bias. They
are forward hooks on the outermost module of each layer, so that they sit beside any class of linear layer (quantised
ones, Conv1D, PEFT's wrappers) and add up with a PET module there. Weights are fp32; the product runs in the input's dtype.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..errors import StepFailed
from ..models.arch import block_linears, features
from ..pet.methods import differences
from ..pet.rank_limits import refuse_recovery
from ..settings import RecoverSettings

ACTIVATIONS = {"gelu": F.gelu, "sigmoid": torch.sigmoid, "identity": lambda z: z}
_HOOKS = "_cpet_recovery_hooks"


class _Beside(torch.autograd.Function):
    """y + s U2 act(U1 x) with its gradients written out: as the same in plain operations, in half of the time on a CPU."""

    @staticmethod
    def forward(ctx, x, y, u1, u2, act, scale):
        flat = x.reshape(-1, x.shape[-1])
        v1, v2 = u1.to(x.dtype), u2.to(x.dtype)
        z = flat @ v1.t()
        a = ACTIVATIONS[act](z)
        if scale != 1.0:
            a = a * scale
        ctx.save_for_backward(flat, z, a, v1, v2)
        ctx.act, ctx.scale, ctx.shape = act, scale, x.shape
        out = (a @ v2.t()).view(y.shape)
        return out.add_(y) if out.dtype == y.dtype else y + out.to(y.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        flat, z, a, v1, v2 = ctx.saved_tensors
        needs_x, needs_y, needs_u1, needs_u2 = ctx.needs_input_grad[:4]
        g = grad.reshape(-1, grad.shape[-1]).to(v2.dtype)
        grad_x = grad_u1 = grad_u2 = None
        if needs_u2:
            grad_u2 = (a.t() @ g).t().float()
        if needs_x or needs_u1:
            gz = g @ v2
            if ctx.scale != 1.0:
                gz = gz * ctx.scale
            if ctx.act == "gelu":
                gz = torch.ops.aten.gelu_backward(gz, z)
            elif ctx.act == "sigmoid":
                gz = torch.ops.aten.sigmoid_backward(gz, torch.sigmoid(z))
            if needs_u1:
                grad_u1 = (gz.t() @ flat).float()
            if needs_x:
                grad_x = (gz @ v1).view(ctx.shape)
        return grad_x, grad if needs_y else None, grad_u1, grad_u2, None, None


class Recovery(nn.Module):
    """U1 (r x in) and U2 (out x r) of one layer, in fp32."""

    def __init__(self, u1: torch.Tensor, u2: torch.Tensor, act: str, scale: float):
        super().__init__()
        self.U1, self.U2 = nn.Parameter(u1), nn.Parameter(u2)
        self.act, self.scale = act, scale

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + s U2 act(U1 x) in y's dtype; x is (..., in), y is what the layer gives for it, (..., out)."""
        return _Beside.apply(x, y, self.U1, self.U2, self.act, self.scale)


def kaiming_(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Kaiming-uniform with a = sqrt 5: uniform in +-1 / sqrt(in), from a generator of its own."""
    return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost module of each linear layer of the blocks, by the name it has in the bare model."""
    names = dict.fromkeys(name.replace(".base_layer", "") for name in block_linears(model))
    return {name: model.get_submodule(name) for name in names}


def attach_recovery(
    model: nn.Module,
    settings: RecoverSettings,
    *,
    seed: int,
    init: Path | None = None,
    layers: list[str] | None = None,
) -> None:
    """Put untrained recovery modules beside the linear layers of `model`; with U2 = 0 its outputs stay bit-identical.

    Args:
        seed: of U1, drawn on the CPU from a generator of its own.
        init: a folder that `compensate.compensation` wrote; its U2 U1 is divided by the scale s, so that s U2 U1 is the
            reconstruction whatever alpha is.
        layers: names (as `block_linears` has them) to put modules beside; None: all.
    Raises:
        InputError: a rank above the width of a layer.
        StepFailed: `init` does not fit the model, or is missing where the settings ask for one.
    """
    targets = linears(model)
    if layers is not None:
        targets = {name: targets[name] for name in layers}
    refuse_recovery(settings.r, {name: features(module) for name, module in targets.items()})
    if init is None:
        if settings.init != "zero":
            raise StepFailed(f"recovery with init {settings.init} needs the compensation that it starts from")
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, module in targets.items():
            n_in, n_out = features(module)
            weights[f"{name}.U1"] = kaiming_(torch.empty(settings.r, n_in), generator)
            weights[f"{name}.U2"] = torch.zeros(n_out, settings.r)
    else:
        weights = _read(Path(init), targets, settings.r)
        for name in targets:
            weights[f"{name}.U2"] = weights[f"{name}.U2"] / settings.scale
    _install(model, targets, weights, settings, trainable=True)


def attach_saved_recovery(model: nn.Module, folder: Path, trainable: bool = False) -> None:
    """Put saved recovery modules beside the layers they were trained on; several folders add up.

    Raises:
        StepFailed: names or shapes differ from what the model has.
    """
    saved = json.loads(Path(folder, "recovery.json").read_text())
    settings = RecoverSettings.model_validate(saved["settings"])
    here = linears(model)
    unknown = [name for name in saved["layers"] if name not in here]
    if unknown:
        raise StepFailed(f"The recovery does not fit this model, which has no layer {', '.join(unknown[:6])}")
    targets = {name: here[name] for name in saved["layers"]}
    _install(model, targets, _read(Path(folder), targets, settings.r), settings, trainable)


def save_recovery(model: nn.Module, folder: Path, settings: RecoverSettings) -> None:
    """Write recovery.safetensors (`LAYER.U1`, `LAYER.U2`, fp32) and recovery.json (settings, layers) into `folder`."""
    state = {}
    for key, module in model.cpet_recovery["0"].items():
        state[_name(key) + ".U1"], state[_name(key) + ".U2"] = module.U1, module.U2
    write(Path(folder), state, settings)


def write(folder: Path, weights: dict[str, torch.Tensor], settings: RecoverSettings, **more) -> None:
    """Write recovery weights (by `LAYER.U1` and `LAYER.U2`) in the format that the functions above read."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", torch.float32, copy=True).contiguous() for k, v in weights.items()}
    save_file(tensors, folder / "recovery.safetensors", metadata={"format": "pt"})
    layers = list(dict.fromkeys(k.rpartition(".")[0] for k in weights))
    text = {"schema": 1, "settings": settings.model_dump(mode="json"), "layers": layers, **more}
    (folder / "recovery.json").write_text(json.dumps(text, indent=1) + "\n")


def detach_recovery(model: nn.Module) -> None:
    """Take the recovery modules off; the model's own layers were never changed."""
    for hook in model.__dict__.pop(_HOOKS, []):
        hook.remove()
    if "cpet_recovery" in model._modules:
        del model.cpet_recovery


def recovery_parameters(model: nn.Module) -> int:
    """How many weights the recovery modules on `model` have."""
    return sum(p.numel() for p in model.cpet_recovery.parameters()) if hasattr(model, "cpet_recovery") else 0


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch takes no dots in the name of a module


def _name(key: str) -> str:
    return key.replace("/", ".")


def _read(folder: Path, targets: dict[str, nn.Module], r: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    weights = load_file(folder / "recovery.safetensors")
    expected = {}
    for name, module in targets.items():
        n_in, n_out = features(module)
        expected[f"{name}.U1"], expected[f"{name}.U2"] = (r, n_in), (n_out, r)
    problems = differences({k: tuple(v.shape) for k, v in weights.items()}, expected)
    if problems:
        raise StepFailed(f"The recovery does not fit this model: {problems}")
    return weights


def _install(model, targets, weights, settings: RecoverSettings, trainable: bool) -> None:
    sets = getattr(model, "cpet_recovery", None)
    if sets is None:
        sets = model.cpet_recovery = nn.ModuleDict()
    added = nn.ModuleDict()
    hooks = model.__dict__.setdefault(_HOOKS, [])
    for name, module in targets.items():
        device = _device(module)
        u1, u2 = (weights[f"{name}.{u}"].to(device, torch.float32) for u in ("U1", "U2"))
        recovery = Recovery(u1, u2, settings.act, settings.scale)
        added[_key(name)] = recovery
        hooks.append(put_beside(module, recovery))
    added.requires_grad_(trainable)
    added.train(model.training)
    sets[str(len(sets))] = added


def _device(module: nn.Module) -> torch.device:
    held = next(module.parameters(), None)
    return held.device if held is not None else next(module.buffers()).device


def put_beside(module: nn.Module, recovery: Recovery) -> RemovableHandle:
    """Add what `recovery` gives to what `module` gives, until the handle is removed."""
    return module.register_forward_hook(lambda module, args, output: recovery(args[0], output))
