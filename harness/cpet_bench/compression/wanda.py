"""Wanda (arXiv 2306.11695): pruning by |W_ij| ||X_j||, within each output row, layer by layer, without an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import StepFailed, Unsupported
from ..settings import CalibrationSettings
from .masks import PatternSettings, check_zeros, keep_mask, load_plain, refuse_packed, save, weight_out_in

TOKENS = 4096  # padded tokens a batch of calibration documents has at most


class WandaSettings(PatternSettings):
    """As magnitude's, with the documents whose activations weigh the inputs."""

    calibration: CalibrationSettings = CalibrationSettings()


class Wanda:
    """Blocks in order: each sees what the blocks before it give after their pruning (as the authors' code does)."""

    name = "wanda"
    version = 1
    packages = ("torch", "transformers")
    calibrated = True
    tries = ({"pattern": "2:4"}, {"sparsity": 0.5})  # settings that `doctor` tries
    Settings = WandaSettings

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return {}

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed(before)

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings: WandaSettings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Prune and save. Facts: sparsity, calibration documents and tokens, bytes; speed stays the dense kernels'."""
        if not examples:
            raise StepFailed("Wanda needs calibration documents, and there are none")
        model, layers = load_plain(source, device, "float32")
        if model.config.is_encoder_decoder:
            raise Unsupported("Wanda goes through the blocks of decoder-only models here; this one has an encoder")
        prune(model, layers, examples, settings, progress)
        facts = check_zeros(layers, settings)
        facts |= {"calibration_documents": len(examples), "calibration_tokens": sum(map(len, examples))}
        note = {"backend": "wanda", **settings.model_dump(mode="json"), **facts}
        return {**facts, "bytes": save(model, source, out, note), "simulated": ["size", "speed"]}


def prune(model, layers: dict[str, Any], examples: list[list[int]], settings: WandaSettings, progress) -> None:
    """Prune `layers` of `model` in place. Only one block's inputs are kept at a time; padding is not counted."""
    import torch

    from ..models.arch import block_lists

    name = block_lists(model)[0]
    blocks = model.get_submodule(name)
    with torch.no_grad():
        batches = first_inputs(model, blocks, examples)
        for i, block in enumerate(blocks):
            mine = {n: m for n, m in layers.items() if n.startswith(f"{name}.{i}.")}
            squares: dict[str, Any] = dict.fromkeys(mine, 0.0)
            keep: dict[str, Any] = {}
            hooks = [m.register_forward_pre_hook(_square(n, squares, keep)) for n, m in mine.items()]
            for batch in batches:
                keep["mask"] = batch["real"]
                run_block(block, batch)
            for hook in hooks:
                hook.remove()
            for n, module in mine.items():
                weight = weight_out_in(module)
                score = weight.abs().float() * squares[n].sqrt()
                weight.mul_(keep_mask(score, settings, per_row=True))
            for batch in batches:
                batch["hidden"] = run_block(block, batch)
            progress(i + 1, len(blocks), f"block {i + 1} of {len(blocks)}")


def _square(name: str, squares: dict[str, Any], keep: dict[str, Any]):
    def hook(module, args):
        x = args[0][keep["mask"]].float()
        squares[name] = squares[name] + x.square().sum(0)

    return hook


def first_inputs(model, blocks, examples: list[list[int]]) -> list[dict[str, Any]]:
    """What enters the first block, batch by batch, with the other arguments the model gives its blocks."""
    import torch

    from ..models.arch import body

    class Caught(Exception):
        pass

    found: list[dict[str, Any]] = []

    def hook(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "past_key_values", "use_cache")}
        found.append({"hidden": hidden, "args": args[1:], "kwargs": rest})
        raise Caught

    handle = blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    device = model.get_input_embeddings().weight.device
    try:
        for group in grouped(examples):
            longest = max(map(len, group))
            ids = torch.zeros(len(group), longest, dtype=torch.long)
            real = torch.zeros(len(group), longest, dtype=torch.bool)
            for row, tokens in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                real[row, : len(tokens)] = True
            try:
                body(model)(input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False)
            except Caught:
                found[-1]["real"] = real.to(device)
    finally:
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


def run_block(block, batch: dict[str, Any]) -> Any:
    """The block's output hidden states for one batch."""
    found = block(batch["hidden"], *batch["args"], **batch["kwargs"])
    return found[0] if isinstance(found, tuple) else found
