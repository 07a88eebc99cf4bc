"""A model compressed in parts, so that one larger than the device's memory can be: each part's weights are read when its turn
comes, changed, written and let go again. What cannot be had so is loaded whole, and the record says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..devices import give_back
from ..models.arch import block_linears, block_lists, body
from ..models.loading import load_config, load_model, load_tokenizer
from ..models.routers import FILE as ROUTERS
from ..models.tensors import Files, Place, places, read
from .masks import refuse_quantised, save, stored_dtype
from .notes import write_note


def open_plain(source: Path, out: Path, device: str, what: str = "pruning", forward: bool = True) -> Whole | Streamed:
    """The model of a folder with plain weights in float32, to be changed part by part and saved in `out`.

    device: torch's name, or several joined by `+`: then the first, except for models that are loaded whole.
    forward: whether its blocks will be run; then what lies before them is on the device from the start.

    Raises:
        Unsupported: the model is quantised; `what` needs plain weights.
    """
    refuse_quantised(source, what)
    try:
        return Streamed(source, out, device.split("+")[0], forward)
    except NotStreamed as why:
        return Whole(load_model(source, device=device, dtype="float32"), source, out, str(why))


class NotStreamed(Exception):
    """Why a model has to be loaded whole."""


class Whole:
    """A model that is in memory as a whole.

    model, layers: it, and the linear layers of its blocks by name. device: where to bring what a part reads (None: it is
    there). facts: for the record.
    """

    device: str | None = None

    def __init__(self, model: nn.Module, source: Path, out: Path, why: str):
        self.model, self.source, self.out = model, source, out
        self.layers = block_linears(model)
        self.facts = {"streamed": False, "loaded_whole": why}

    @contextmanager
    def held(self, name: str, layer: nn.Module | None = None) -> Iterator[nn.Module]:
        """Submodule `name` with its weights, to be changed or replaced. layer: what they are read into where it is replaced."""
        yield layer or self.model.get_submodule(name)

    @contextmanager
    def passed(self, names: Iterable[str]) -> Iterator[None]:
        """Within this the submodules `names` can be run as they are."""
        yield

    def home(self) -> str | None:
        """Where hidden states that wait for the next block are kept (None: where they are)."""
        return None

    def save(self, note: dict[str, Any]) -> int:
        """Write the model as changed, in the number format of its source, with `note`. Returns bytes stored."""
        return save(self.model, self.source, self.out, note)


class Streamed(Whole):
    """A model on the meta device, of which a part has its weights while it is held. Written as `Whole` would be, to the byte.

    Raises:
        NotStreamed: the weights that the model has are not the tensors that its files have.
    """

    def __init__(self, source: Path, out: Path, device: str, forward: bool):
        self.source, self.out, self.device = source, out, device
        if forward and Path(source, ROUTERS).is_file():
            raise NotStreamed("it has routers (moefy)")
        self.model = skeleton(source)
        self._places = matched(self.model, source)
        self.layers = block_linears(self.model)
        self.facts = {"streamed": True}
        self._format = getattr(torch, stored_dtype(source))
        self._files: Files | None = None
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        if forward:
            self._fill_outside()
        self.model.requires_grad_(False).eval()

    def _fill_outside(self) -> None:
        """Read what comes before, between and after the blocks: embeddings and norms, but no head of its own."""
        head = self.model.get_output_embeddings()
        wanted = {id(p) for p in body(self.model).parameters()}
        wanted -= {id(p) for p in (head.parameters() if head is not None else ())}
        wanted |= {id(p) for p in self.model.get_input_embeddings().parameters()}
        blocks = tuple(f"{name}." for name in block_lists(self.model))
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if id(parameter) in wanted and name not in self.model.all_tied_weights_keys and not name.startswith(blocks):
                _put(self.model, name, self._read(name))
        for name in self._places.keys() & dict(self.model.named_buffers()).keys():
            if not name.startswith(blocks):
                _put(self.model, name, self._read(name))
        self.model.tie_weights()

    def _read(self, name: str) -> torch.Tensor:
        tensor = read(self._places[name])
        return tensor.to(self.device, torch.float32 if tensor.is_floating_point() else None)

    def _fill(self, name: str, module: nn.Module) -> None:
        for inner in module.state_dict():
            _put(module, inner, self._read(f"{name}.{inner}"))

    def _empty(self, module: nn.Module) -> None:
        for inner, tensor in module.state_dict().items():
            _put(module, inner, torch.empty_like(tensor, device="meta"))

    @contextmanager
    def held(self, name: str, layer: nn.Module | None = None) -> Iterator[nn.Module]:
        if self._files is None:  # every part that will be written is in its place by now
            state = {n: self._stored(t.to("meta")) for n, t in saved_state(self.model).items()}
            self._files = Files(self.out, state)
        module = layer or self.model.get_submodule(name)
        self._fill(name, module)
        yield module
        now = self.model.get_submodule(name)
        for inner, tensor in now.state_dict().items():
            self._files.write(f"{name}.{inner}", self._stored(tensor))
        self._empty(now)
        self._empty(module)
        give_back()

    @contextmanager
    def passed(self, names: Iterable[str]) -> Iterator[None]:
        with ExitStack() as stack:
            for name in names:
                module = self.model.get_submodule(name)
                before = module.register_forward_pre_hook(lambda m, args, name=name: self._fill(name, m))
                after = module.register_forward_hook(lambda m, args, output: self._empty(m))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def home(self) -> str | None:
        """The device while half of its memory is free, which leaves room for the statistics of a block; else the CPU."""
        if not self.device.startswith("cuda"):
            return self.device
        free, total = torch.cuda.mem_get_info(self.device)
        return self.device if free > total / 2 else "cpu"

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """As it is written: in the source's number format, except for what is not in float32 (a packed layer's scales)."""
        return tensor.to(self._format) if tensor.dtype == torch.float32 else tensor

    def save(self, note: dict[str, Any]) -> int:
        for name in list(self._files.left):  # what was never held is as it was
            self._files.write(name, self._stored(self._read(name)))
        config = self.model.config
        config.dtype = str(self._format).removeprefix("torch.")
        config.architectures = [type(self.model).__name__]
        config.save_pretrained(self.out)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(self.out)
        load_tokenizer(self.source).save_pretrained(self.out)
        write_note(self.source, self.out, note)
        return self._files.close()


def skeleton(source: Path) -> nn.Module:
    """The model of a folder with parameters on the meta device and buffers as its class computes them, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from ..models.widths import narrowed

    given = load_config(source)
    if given.get("auto_map"):
        raise NotStreamed("it runs code of its own")
    auto = narrowed(AutoModelForSeq2SeqLM if given.get("is_encoder_decoder") else AutoModelForCausalLM, given)
    config = AutoConfig.from_pretrained(source)
    with _no_weights():
        make = auto._from_config if isinstance(auto, type) and issubclass(auto, nn.Module) else auto.from_config
        model = make(config, dtype=torch.float32)
    model.tie_weights()  # putting parameters on the meta device made two of each tied one
    if model.can_generate():
        none = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        how = {"force_download": False, "local_files_only": True, "subfolder": "", "trust_remote_code": False}
        model.adjust_generation_fn(None, True, None, str(source), **none, **how)
    return model.eval()


@contextmanager
def _no_weights() -> Iterator[None]:
    """Within this modules are made with parameters on the meta device (as accelerate does it; importing that takes seconds)."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        plain(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = plain


def saved_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model as it is saved: of tensors that are tied, one."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = model._keys_to_ignore_on_save or ()
    return remove_tied_weights_from_state_dict({k: v for k, v in model.state_dict().items() if k not in ignored}, model)


def matched(model: nn.Module, source: Path) -> dict[str, Place]:
    """By name in the model's state, where in the folder's files its tensor lies.

    Raises:
        NotStreamed: a tensor has no place there under its name (with or without the prefix of the base model) and of its shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model, add_legacy=False):
        raise NotStreamed(f"{type(model).__name__} is put together from other tensors than those in its files")
    try:
        there = places(source)
    except FileNotFoundError as error:
        raise NotStreamed("its files are not named model*.safetensors") from error
    base, state = model.base_model_prefix, model.state_dict()
    found = {}
    for name, place in there.items():
        names = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        mine = next((n for n in names if n in state), None)
        if mine:
            found[mine] = place
    for target, kept in model.all_tied_weights_keys.items():
        if target in found and kept in found:
            if not torch.equal(read(found[target]), read(found[kept])):
                raise NotStreamed(f"{target} and {kept} are to be one tensor, and its files have two")
        elif target in found:
            found[kept] = found[target]
    saved = saved_state(model)
    for name, tensor in saved.items():
        if name not in found or found[name].shape != tuple(tensor.shape):
            raise NotStreamed(f"{name} is not in its files")
    if any(name not in saved and name.startswith(f"{blocks}.") for blocks in block_lists(model) for name in state):
        raise NotStreamed("its blocks share tensors")
    return found


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter or buffer `name` of `module`."""
    owner, _, last = name.rpartition(".")
    owner = module.get_submodule(owner)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[last] = tensor
