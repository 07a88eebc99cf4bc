"""NOLA (arXiv 2310.02556) beside linear layers of any class: LoRA from random matrices, with trained coefficients alone.

y = layer(x) + s B A x, s = lora_alpha / r, A = A0 + sum_i alpha_i M_i (r x in), B = sum_j beta_j N_j (out x r). M and N are
uniform in +-1 / sqrt k, A0 Kaiming-uniform (a = sqrt 5); alpha = beta = 0 at the start. What is frozen is drawn from the stored
seed on the CPU and then moved, so that it is the same on any device, and is never saved. As with recovery modules, hooks
on the outermost module of a layer do the work, since PEFT takes no method whose name its list has not.

Layers of one width share their matrices (the paper has both variants): k r (sum of the distinct widths) numbers in all,
11 MB for k 256, r 8 on q and v of SmolLM2-135M (width 576), where matrices of their own for these 60 layers would take
470 MB; 36 MB on all its linear layers. A layer whose coefficients are fixed keeps A and B, and then costs what LoRA costs.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError, StepFailed
from ..models.arch import block_linears, features
from ..restoring.recover import _Beside, _device, _key, _name, linears
from ..settings import PetSettings
from .layer_limits import kinds
from .methods import differences
from .own import FILES as ALL_FILES
from .own import NolaSettings, own_settings

_KEPT = "_cpet_nola"  # attribute of the model: hooks, and which weights required a gradient before
FILES = ALL_FILES["nola"]


def draw(seed: int, part: str, count: int, rows: int, columns: int) -> torch.Tensor:
    """Matrices with entries uniform in [-1, 1), (count x rows columns, fp32, on the CPU), from a generator of their own.

    part: `A0`, `M` or `N`; each part and shape has a stream of its own. The values are multiples of 2^-23, so that no
    platform can round them otherwise.
    """
    text = f"{seed} {part} {count} {rows} {columns}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))
    return torch.empty(count, rows * columns).uniform_(-1, 1, generator=generator)


class Bases:
    """The frozen matrices of a model, by factor, width and device; drawn when they are first asked for."""

    def __init__(self, settings: NolaSettings, seed: int):
        self.k, self.r, self.seed = settings.k, settings.r, seed
        self._held: dict[tuple, tuple[torch.Tensor | None, torch.Tensor]] = {}

    def of_a(self, n_in: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """A0 (r x in) and M (k x r in)."""
        if ("A", n_in, device) not in self._held:
            start = draw(self.seed, "A0", 1, self.r, n_in).view(self.r, n_in) / math.sqrt(n_in)
            found = draw(self.seed, "M", self.k, self.r, n_in) / math.sqrt(self.k)
            self._held["A", n_in, device] = (start.to(device), found.to(device))
        return self._held["A", n_in, device]

    def of_b(self, n_out: int, device: torch.device) -> torch.Tensor:
        """N (k x out r)."""
        if ("B", n_out, device) not in self._held:
            found = draw(self.seed, "N", self.k, n_out, self.r) / math.sqrt(self.k)
            self._held["B", n_out, device] = (None, found.to(device))
        return self._held["B", n_out, device][1]

    def release(self) -> None:
        """Give the memory back; they are drawn again if they are asked for."""
        self._held.clear()


class Nola(nn.Module):
    """The coefficients of one layer, fp32. Buffers A and B hold the factors while nothing is trained; else they are None.

    A pass with gradients, another mode, or a write to the coefficients makes them anew. (A write alone would not do: fused
    optimisers leave a tensor's version as it is.)
    """

    def __init__(self, bases: Bases, n_in: int, n_out: int, scale: float, device: torch.device):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(bases.k, device=device))
        self.beta = nn.Parameter(torch.zeros(bases.k, device=device))
        self.register_buffer("A", None, persistent=False)
        self.register_buffer("B", None, persistent=False)
        self.n_in, self.n_out, self.scale = n_in, n_out, scale
        self._bases, self._made_of = bases, None

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r x in) and B (out x r), fp32; gradients go to the coefficients."""
        start, of_a = self._bases.of_a(self.n_in, self.alpha.device)
        of_b = self._bases.of_b(self.n_out, self.beta.device)
        return start + (self.alpha @ of_a).view_as(start), (self.beta @ of_b).view(self.n_out, -1)

    @torch.no_grad()
    def settled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors, computed once for the coefficients as they are."""
        now = (self.alpha._version, self.beta._version)
        if self.A is None or self._made_of != now:
            with torch.inference_mode(False):
                self.A, self.B = self.factors()
            self._made_of = now
        return self.A, self.B

    def train(self, mode: bool = True) -> Nola:
        if mode != self.training:
            self.A = self.B = None
        return super().train(mode)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + s B A x in y's dtype; x is (..., in), y is what the layer gives for it, (..., out)."""
        if torch.is_grad_enabled() and self.alpha.requires_grad:
            self.A = self.B = None
            a, b = self.factors()
        else:
            a, b = self.settled()
        return _Beside.apply(x, y, a, b, "identity", self.scale)


def attach(model: nn.Module, pet: PetSettings, seed: int = 0) -> nn.Module:
    """Put untrained NOLA modules beside the target layers of `model` (in place) and return it; other weights are frozen.

    With beta = 0 the outputs stay those of the model. seed: of the random matrices where the settings name none.
    Raises: InputError for a field, a target that no layer has, or a rank above a layer's width.
    """
    from .rank_limits import refuse_ranks

    settings = own_settings("nola", pet.fields)
    targets = _targets(model, settings)
    refuse_ranks("nola", ((name, settings.r, features(module)) for name, module in targets.items()))
    seed = seed if settings.seed is None else settings.seed
    _install(model, targets, settings.model_copy(update={"seed": seed}), trainable=True)
    return model


def attach_saved(model: nn.Module, folder: Path, *, trainable: bool) -> nn.Module:
    """Put saved NOLA modules beside the layers they were trained on and return `model`; several folders add up.

    Raises: StepFailed where names or widths differ from what the model has.
    """
    from safetensors.torch import load_file

    saved = json.loads(Path(folder, FILES[0]).read_text())
    settings = NolaSettings.model_validate(saved["settings"])
    coefficients = load_file(Path(folder, FILES[1]))
    here = linears(model)
    given = {name: tuple(shape) for name, shape in saved["layers"].items()}
    wanted = {f"{name}.{c}": (settings.k,) for name in given for c in _COEFFICIENTS}
    problems = [
        differences(given, {name: features(here[name]) for name in given if name in here}),
        differences({key: tuple(v.shape) for key, v in coefficients.items()}, wanted),
    ]
    if any(problems):
        raise StepFailed(f"The NOLA modules do not fit this model: {'; '.join(filter(None, problems))}")
    added = _install(model, {name: here[name] for name in given}, settings, trainable)
    with torch.no_grad():
        for name in given:
            for c in _COEFFICIENTS:
                getattr(added[_key(name)], c).copy_(coefficients[f"{name}.{c}"])
    if not trainable:
        for module in added.values():
            module.settled()
        next(iter(added.values()))._bases.release()
    return model


_COEFFICIENTS = ("alpha", "beta")


def save(model: nn.Module, folder: Path) -> None:
    """Write nola.safetensors (`LAYER.alpha`, `LAYER.beta`: k numbers each, fp32) and nola.json (settings, seed, widths)."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = {_name(key): module for key, module in model.cpet_nola["0"].items()}
    tensors = {f"{name}.{c}": getattr(m, c) for name, m in sorted(modules.items()) for c in _COEFFICIENTS}
    tensors = {key: v.detach().to("cpu", torch.float32, copy=True).contiguous() for key, v in tensors.items()}
    save_file(tensors, folder / FILES[1], metadata={"format": "pt"})
    settings = model.__dict__[_KEPT]["settings"].model_dump(mode="json")
    text = {
        "schema": 1,
        "settings": settings,
        "layers": {name: [m.n_in, m.n_out] for name, m in modules.items()},
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    }
    (folder / FILES[0]).write_text(json.dumps(text, indent=1) + "\n")


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """What a saved module adds to each layer's weight: s B A (out x in, fp32) by layer."""
    from safetensors.torch import load_file

    saved, coefficients = json.loads(Path(folder, FILES[0]).read_text()), load_file(Path(folder, FILES[1]))
    settings = NolaSettings.model_validate(saved["settings"])
    bases, found = Bases(settings, settings.seed), {}
    for name, (n_in, n_out) in saved["layers"].items():
        module = Nola(bases, n_in, n_out, settings.lora_alpha / settings.r, torch.device("cpu"))
        with torch.no_grad():
            module.alpha.copy_(coefficients[f"{name}.alpha"])
            module.beta.copy_(coefficients[f"{name}.beta"])
        a, b = module.settled()
        found[name] = module.scale * b @ a
    return found


def merge(model: nn.Module, folder: Path) -> None:
    """Add what a saved module adds to the weights of `model` to these."""
    from ..compression.masks import weight_out_in

    with torch.no_grad():
        for name, update in updates(folder).items():
            weight_out_in(model.get_submodule(name)).add_(update)


def cannot_merge(folder: Path) -> str | None:
    """Why what is saved cannot be merged into a model's weights: it always can."""


def costs(model: nn.Module) -> dict[str, tuple[int, int]]:
    """By layer (as named in the model) the numbers a token is multiplied with, and those that get a gradient by token.

    Both are those of A and B, not the coefficients.
    """
    found = {}
    for added in model.cpet_nola.values():
        for key, m in added.items():
            if m.alpha.requires_grad:
                found[_name(key)] = (m._bases.r * (m.n_in + m.n_out),) * 2
    return found


def detach(model: nn.Module) -> None:
    """Take NOLA modules off; the layers were never changed."""
    kept = model.__dict__.pop(_KEPT, None)
    if kept is None:
        return
    for hook in kept["hooks"]:
        hook.remove()
    del model.cpet_nola
    for weight, wanted in kept["grad"]:
        weight.requires_grad_(wanted)
        weight.grad = None


def _targets(model: nn.Module, settings: NolaSettings) -> dict[str, nn.Module]:
    """The layers named by `target_modules`, matched as PEFT matches them, among the linear layers of the blocks."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual

    here, wanted = linears(model), settings.target_modules
    if wanted is None:
        wanted = usual.get(model.config.model_type)
    every = kinds(block_linears(model))
    if not wanted:
        message = f"Models of type {model.config.model_type} have no usual target layers: name them."
        raise InputError(message, key="pet.target_modules", given="", allowed=every)
    if wanted == "all-linear":
        return here
    if isinstance(wanted, str):
        found = {wanted: [name for name in here if re.fullmatch(wanted, name)]}
    else:
        found = {w: [name for name in here if name == w or name.endswith(f".{w}")] for w in wanted}
    missing = [w for w, names in found.items() if not names]
    if missing:
        message = f"No linear layer of the blocks is named {', '.join(map(repr, missing))}."
        raise InputError(message, key="pet.target_modules", given=missing[0], allowed=every)
    chosen = {name for names in found.values() for name in names}
    return {name: module for name, module in here.items() if name in chosen}


def _install(model: nn.Module, targets: dict[str, nn.Module], settings: NolaSettings, trainable: bool) -> nn.ModuleDict:
    kept = model.__dict__.get(_KEPT)
    if kept is None:
        kept = model.__dict__[_KEPT] = {"hooks": [], "grad": [(p, p.requires_grad) for p in model.parameters()]}
        kept["settings"] = settings
        model.requires_grad_(False)
        model.cpet_nola = nn.ModuleDict()
    bases, added = Bases(settings, settings.seed), nn.ModuleDict()
    for name, module in targets.items():
        nola = Nola(bases, *features(module), settings.lora_alpha / settings.r, _device(module))
        added[_key(name)] = nola
        kept["hooks"].append(module.register_forward_hook(_beside(nola)))
    added.requires_grad_(trainable)
    added.train(model.training)
    model.cpet_nola[str(len(model.cpet_nola))] = added
    return added


def _beside(nola: Nola):
    def hook(module, args, output):
        return nola(args[0], output)

    return hook
