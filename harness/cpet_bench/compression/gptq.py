"""GPTQ (arXiv 2210.17323): integers of 2 to 8 bits, each column's rounding error made up for by the columns after it.

Computed by GPTQModel through optimum, and stored in their format, which other libraries read too. Encoder-decoder models, which
GPTQModel does not take, are computed and packed here (gptq_columns.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..errors import StepFailed, Unsupported
from ..keys import version
from ..settings import CalibrationSettings, Settings
from . import gptq_columns, rounding
from .masks import load_plain, needs_plain, stored_dtype
from .rounding import refuse_packed_again
from .sizes import F32, ModelSize, whole

TOKENS = 4096  # tokens a batch of calibration documents has at most


class GptqSettings(Settings):
    """GPTQ's settings.

    group: inputs that share a scale and a zero; -1 is the whole row, None the largest of 128, 64 and 32 that divides the width
        of every layer.
    desc_act: columns by falling diagonal of the Hessian (act order), each with the group it falls into, which costs speed.
    act_group_aware: the same order, but groups stay of neighbouring columns; None: wherever there are groups without desc_act.
    sym: levels on both sides of zero alike. damp: added to the Hessian's diagonal, as a share of its mean (the paper's 1 %).
    """

    bits: Literal[2, 3, 4, 8] = 4
    group: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] | None = None
    desc_act: bool = False
    act_group_aware: bool | None = None
    sym: bool = True
    damp: float = Field(0.01, gt=0, lt=1)
    calibration: CalibrationSettings = CalibrationSettings()

    @model_validator(mode="after")
    def _one_order(self):
        if self.desc_act and self.act_group_aware:
            raise ValueError("desc_act and act_group_aware are two orders of the columns; give one of them")
        if self.group == -1 and self.act_group_aware:
            raise ValueError("act_group_aware needs groups, and group -1 is the whole row")
        return self


class Gptq:
    """Linear layers of the blocks, one after another: each sees what the layers before it give as they are stored."""

    name = "gptq"
    version = 1
    packages = ("torch", "transformers", "optimum", "gptqmodel")
    calibrated = True
    min_tokens = 128  # with fewer, the Hessian of one block of 128 columns is singular: damping decides, and not the text
    tries = ({"bits": 4}, {"bits": 3, "desc_act": True})  # settings that `doctor` tries
    Settings = GptqSettings

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return settings.model_dump(mode="json", include={"bits", "group", "desc_act", "sym"})

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed_again(before)

    @staticmethod
    def fits(settings, size: ModelSize) -> None:
        """Unsupported where a model of these sizes cannot be quantised so."""
        if size.quantised:
            raise needs_plain("GPTQ", size.quantised)
        if size.shapes:
            (gptq_columns.group_of if size.pairs else group_of)(size.shapes, settings.group)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of the whole model in float32, where its zeros are, its packed weights, and a block's Hessians."""
        packed = size.blocks * (8 + settings.bits + 1) // 8
        return whole(size, settings.calibration) + packed + F32 * (3 * size.width**2 + 3 * size.widest**2)

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: GptqSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Quantise in float32 and save.

        Facts: bits, group, layers, bytes (stored), packed_bytes (of the layers), engine (what computed it), kernel. Of a pruned
        model also zeros_kept, the share of its zeros that are still zero: making up for errors moves pruned weights as well.
        """
        from ..models import gptq
        from ..models.arch import dense_weight, features
        from ..models.loading import load_config, load_tokenizer

        if not examples:
            raise StepFailed("GPTQ needs calibration documents, and there are none")
        if load_config(source).get("is_encoder_decoder"):
            return gptq_columns.compress(source, out, settings, examples, device, progress)
        gptq.require()
        import torch

        model, layers = load_plain(source, device, "float32", "GPTQ")
        group = group_of({name: features(layer) for name, layer in layers.items()}, settings.group)
        zeros = {name: dense_weight(layer) == 0 for name, layer in layers.items()}
        how = quantise(model, layers, examples, settings, group, progress)
        packed = gptq.packed_linears(model)
        pruned = sum(int(z.sum()) for z in zeros.values())
        kept = sum(int((dense_weight(layer)[zeros[name]] == 0).sum()) for name, layer in packed.items())
        for parameter in model.parameters():  # packed layers have none: their scales stay in float16
            parameter.data = parameter.data.to(getattr(torch, stored_dtype(source)))
        how.save(model, out)  # symmetric zeros as auto-gptq has them, less one: config.json must say so
        model.config.quantization_config = how.to_dict()
        model.config.save_pretrained(out)
        load_tokenizer(source).save_pretrained(out)
        more = {"zeros_kept": round(kept / pruned, 6)} if pruned > 0.01 * sum(z.numel() for z in zeros.values()) else {}
        return {
            "bits": settings.bits,
            "group": group,
            "layers": len(packed),
            "left_dense": sorted(layers.keys() - packed.keys()),
            "bytes": sum(p.stat().st_size for p in out.glob("*.safetensors")),
            "packed_bytes": sum(t.nbytes for layer in packed.values() for t in layer.state_dict().values()),
            "engine": f"gptqmodel {version('gptqmodel')}",
            "kernel": gptq.KERNEL,
            "calibration_documents": len(examples),
            "calibration_tokens": sum(map(len, examples)),
            **more,
        }


def group_of(shapes: dict[str, tuple[int, int]], wanted: int | None) -> int:
    """The group for layers with these inputs and outputs (-1: the whole row); Unsupported, with the layer's name, where it
    cannot be."""
    for name, shape in shapes.items():
        if any(width % 32 for width in shape):
            raise Unsupported(
                f"GPTQ packs multiples of 32 inputs and outputs; {name} has {tuple(shape)}: "
                "rtn takes multiples of 8; where structured pruning made these widths, multiple: 32 there helps"
            )
    widths = {name: inputs for name, (inputs, _) in shapes.items()}
    return wanted if wanted == -1 else rounding.group_of(widths, wanted, (16, 32, 64, 128, 256, 512, 1024))


def batches(examples: list[list[int]]) -> list[dict[str, Any]]:
    """Documents of equal length together, at most TOKENS tokens a batch: padding would count in the Hessians."""
    import torch

    by_length: dict[int, list[list[int]]] = {}
    for tokens in examples:
        by_length.setdefault(len(tokens), []).append(tokens)
    found = []
    for length, documents in sorted(by_length.items()):
        rows = max(1, TOKENS // length)
        for start in range(0, len(documents), rows):
            ids = torch.tensor(documents[start : start + rows])
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


def sets_of_layers(model, layers: dict[str, Any], name: str, examples: list[list[int]]) -> list[list[str]] | None:
    """Names inside a block, in the order they run; those that read the same input together, since one pass serves them all.

    None where the blocks of the list `name` differ: then each layer has a pass of its own.
    """
    from ..restoring.compensate import shared_inputs

    sets: dict[str, dict[str, list[str]]] = {}
    for layer, first in shared_inputs(model, layers, examples).items():
        number, _, inner = layer.removeprefix(f"{name}.").partition(".")
        sets.setdefault(number, {}).setdefault(first, []).append(inner)
    by_block = [list(found.values()) for found in sets.values()]
    return by_block[0] if all(found == by_block[0] for found in by_block) else None


def quantise(model, layers: dict[str, Any], examples: list[list[int]], settings: GptqSettings, group: int, progress):
    """Put packed layers in the place of the blocks' own. Returns optimum's quantiser, which can save the model."""
    import torch
    from optimum.gptq import GPTQQuantizer

    from ..models import gptq
    from ..models.arch import block_lists

    name = block_lists(model)[0]
    blocks = model.get_submodule(name)
    device = next(blocks[0].parameters()).device
    if device.type == "cuda" and not hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": device}  # else optimum moves each block to the first GPU
    aware = settings.act_group_aware
    if aware is None:
        aware = group > 0 and not settings.desc_act
    how = GPTQQuantizer(
        bits=settings.bits,
        dataset=batches(examples),
        group_size=group,
        damp_percent=settings.damp,
        desc_act=settings.desc_act,
        act_group_aware=aware,
        sym=settings.sym,
        block_name_to_quantize=name,
        modules_in_block_to_quantize=sets_of_layers(model, layers, name, examples),
        backend=gptq.KERNEL,
    )
    how.quantizeConfig.fallback = None  # else what has too few documents is rounded to nearest, and only a log says so
    hooks = [block.register_forward_pre_hook(_tell(i, len(blocks), progress)) for i, block in enumerate(blocks) if i]
    try:
        with torch.no_grad():
            how.quantize_model(model)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise StepFailed(f"GPTQModel: {' '.join(str(error).split())[:300]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    how.dataset = None
    model.config.quantization_config = how.to_dict()  # what is there holds the documents
    gptq.uncompiled(model)
    progress(len(blocks), len(blocks), f"block {len(blocks)} of {len(blocks)}")
    return how


def _tell(done: int, total: int, progress):
    told = []

    def hook(module, args):
        if not told:
            told.append(True)
            progress(done, total, f"block {done} of {total}")

    return hook
