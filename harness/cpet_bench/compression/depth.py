"""Depth pruning: whole blocks go, those that change their input least first (ShortGPT, arXiv 2403.03853), or the last ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import StepFailed, Unsupported
from ..settings import CalibrationSettings, Settings, Share
from .blockwise import grouped
from .masks import check_reload, load_plain, needs_plain, refuse_packed, save
from .sizes import ModelSize, whole

PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of a config that have an entry for every block


class DepthSettings(Settings):
    """Either `ratio` (the share of the blocks that goes, of each list of blocks) or `drop` (the indices of those that go).

    order: bi drops the blocks of least influence, 1 - cos(what enters, what leaves), over the calibration documents; last
        drops from the end.
    """

    ratio: Share | None = None
    drop: list[Annotated[int, Field(ge=0, le=100_000)]] | None = None
    order: Literal["bi", "last"] | None = Field(None, description="with ratio; bi where it is not given")
    calibration: CalibrationSettings | None = Field(None, description="with order bi")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("ratio") is None:
            return given
        given = {**given, "order": given.get("order") or "bi"}
        if given["order"] == "bi" and given.get("calibration") is None:
            given["calibration"] = {}
        return given

    @model_validator(mode="after")
    def _one(self):
        if (self.ratio is None) == (self.drop is None):
            raise ValueError("give either ratio (such as 0.25) or drop (such as [20, 21])")
        if self.drop is not None and (not self.drop or len(set(self.drop)) < len(self.drop)):
            raise ValueError("drop names at least one block, and each once")
        if self.drop is not None and self.order:
            raise ValueError("order says which blocks a ratio drops; drop names them itself")
        if self.calibration and self.order != "bi":
            raise ValueError("calibration belongs to order bi")
        return self


class Depth:
    """A model of fewer blocks, in transformers' own format: size and speed are real."""

    name = "depth"
    version = 1
    packages = ("torch", "transformers")
    min_tokens = 64  # as Wanda's: an influence, too, is a mean over tokens
    tries = ({"ratio": 0.5}, {"ratio": 0.5, "order": "last"}, {"drop": [0]})  # settings that `doctor` tries
    Settings = DepthSettings

    @staticmethod
    def calibrated(settings: DepthSettings) -> bool:
        return settings.order == "bi"

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return settings.model_dump(mode="json")

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        if "moefy" in before:
            return "moefy's routers are of the blocks that it saw; put depth first"
        return refuse_packed(before)

    @staticmethod
    def fits(settings, size: ModelSize) -> None:
        """Unsupported where a model of these sizes cannot be cut so."""
        if size.quantised:
            raise needs_plain("pruning", size.quantised)
        if len(size.lists) == (2 if size.pairs else 1):  # else some of them may be no lists of blocks, as of an image's
            for name, blocks in size.lists.items():
                number_going(name, blocks, settings)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of the whole model in float32; it is loaded again once it is cut."""
        return whole(size, settings.calibration)

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: DepthSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Drop blocks and save. Facts: kept_blocks (by list of blocks), block_influence, parameters, bytes.

        Raises:
            Unsupported: a ratio that drops no block or all of them, blocks that the model does not have, and models whose
                class makes another model of the blocks kept.
        """
        if settings.order == "bi" and not examples:
            raise StepFailed("block influence needs calibration documents, and there are none")
        from ..models.pool import canary
        from ..models.widths import KEY, note_widths

        model, _ = load_plain(source, device, "float32")
        lists = counts(model)
        going = {name: number_going(name, blocks, settings) for name, (_, blocks) in lists.items()}
        facts: dict[str, Any] = {}
        influence = {name: [0.0] * blocks for name, (_, blocks) in lists.items()}
        if settings.order == "bi":
            influence = block_influence(model, list(lists), examples, progress)
            facts["block_influence"] = {name: [round(v, 6) for v in values] for name, values in influence.items()}
            facts |= {"calibration_documents": len(examples), "calibration_tokens": sum(map(len, examples))}
        kept = {}
        for name, (field, blocks) in lists.items():
            spared = 1 if holds_more(model, name) else 0
            # of blocks of equal influence (all are, for `last`) the later goes first
            order = sorted(range(spared, blocks), key=lambda i, values=influence[name]: (values[i], -i))
            gone = set(settings.drop or order[: going[name]])
            kept[name] = [i for i in range(blocks) if i not in gone]
            keep_blocks(model, name, field, kept[name])
        if hasattr(model.config, KEY):  # of blocks that have other numbers now
            note_widths(model)
        facts = {"kept_blocks": kept, "parameters": model.num_parameters(), **facts}
        note = {"backend": "depth", **settings.model_dump(mode="json"), **facts}
        note["blocks"] = {name: blocks for name, (_, blocks) in lists.items()}
        stored = save(model, source, out, note)
        wanted, dtype = canary(model), str(model.dtype).removeprefix("torch.")
        del model
        check_reload(out, wanted, device, dtype)
        return {**facts, "bytes": stored}


def counts(model) -> dict[str, tuple[str, int]]:
    """By list of blocks: the field of the config that says how many there are, and their number. Unsupported: none says it."""
    from ..models.arch import block_lists

    found = {}
    for name in block_lists(model):
        fields = ["num_hidden_layers"]
        if model.config.is_encoder_decoder:
            stack = "decoder" if "decoder" in name else "encoder"
            fields = [f"num_{stack}_layers", f"{stack}_layers", *(["num_layers"] if stack == "encoder" else [])]
        blocks = len(model.get_submodule(name))
        field = next((f for f in fields if getattr(model.config, f, None) == blocks), None)
        if field is None:
            raise Unsupported(f"{type(model).__name__}: no field of its config says how many blocks {name} has ({blocks})")
        found[name] = field, blocks
    return found


def number_going(name: str, blocks: int, settings: DepthSettings) -> int:
    """How many of the list's blocks go; Unsupported where that is none, all, or some that are not there."""
    if settings.drop is not None:
        missing = [i for i in settings.drop if i >= blocks]
        if missing:
            raise Unsupported(f"{name} has blocks 0 to {blocks - 1}; there is no block {missing[0]} to drop")
        found = len(settings.drop)
    else:
        found = round(settings.ratio * blocks)
    if not 0 < found < blocks:
        what = f"ratio {settings.ratio}" if settings.drop is None else f"drop {settings.drop}"
        raise Unsupported(f"{what} drops {found} of the {blocks} blocks of {name}; it must be 1 to {blocks - 1}")
    return found


def holds_more(model, name: str) -> bool:
    """Whether the first block has parameters that the others do not: T5's position biases, which all blocks read."""
    blocks = model.get_submodule(name)
    return len(blocks) > 1 and set(dict(blocks[0].named_parameters())) > set(dict(blocks[1].named_parameters()))


def block_influence(model, lists: list[str], examples: list[list[int]], progress) -> dict[str, list[float]]:
    """ShortGPT's block influence, 1 - mean over tokens of cos(x_in, x_out), of every block; padding is left out."""
    import torch

    from ..models.arch import body
    from ..models.passes import text_inputs

    sums = {name: [0.0] * len(model.get_submodule(name)) for name in lists}
    now: dict[str, torch.Tensor] = {}

    def hook(name: str, i: int):
        def look(module, args, kwargs, out):
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = out[0] if isinstance(out, tuple) else out
            cosine = torch.cosine_similarity(entering.double(), leaving.double(), dim=-1)
            sums[name][i] += float(cosine[now["real"].to(cosine.device)].sum())

        return look

    hooks = [
        block.register_forward_hook(hook(name, i), with_kwargs=True)
        for name in lists
        for i, block in enumerate(model.get_submodule(name))
    ]
    groups = grouped(examples)
    try:
        with torch.no_grad():
            for done, group in enumerate(groups):
                arguments, now["real"] = text_inputs(model, group)
                body(model)(**arguments)
                progress(done + 1, len(groups), "block influence")
    finally:
        for handle in hooks:
            handle.remove()
    tokens = sum(map(len, examples))
    return {name: [1 - value / tokens for value in values] for name, values in sums.items()}


def keep_blocks(model, name: str, field: str, kept: list[int]) -> None:
    """Leave `kept` of the list of blocks, numbered anew (their place in the cache), and say so in the config."""
    from torch import nn

    parent, _, last = name.rpartition(".")
    blocks = model.get_submodule(name)
    for place, i in enumerate(kept):
        for module in blocks[i].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    for other in PER_BLOCK:
        entries = getattr(model.config, other, None)
        if isinstance(entries, (list, tuple)) and len(entries) == len(blocks):
            setattr(model.config, other, [entries[i] for i in kept])
    setattr(model.get_submodule(parent), last, nn.ModuleList([blocks[i] for i in kept]))
    setattr(model.config, field, len(kept))
