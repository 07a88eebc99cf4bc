"""The model card of an exported cell: what it is, how it loads, what was measured."""

from __future__ import annotations

import json
from typing import Any

import yaml

from ..pet.own import plain_name


def card(
    record: dict[str, Any], auto: str, *, recovery: bool, ours: str | None, base: bool, merged: bool, odd: str | None
) -> str:
    """README.md of an exported folder: the hub's YAML header, loading code with transformers' class `auto`, the figures.

    ours: the module of `pet.own` that wrote what is exported; None for PEFT's. odd: what of the model transformers alone does
    not read (`models.formats.beyond_transformers`).
    """
    settings = record["settings"]
    library = "transformers" if ours else "peft"
    method = _method(record)
    header: dict[str, Any] = {"library_name": library, "tags": ["cpet-bench", method]}
    if settings["model"]["source"].startswith("hf:"):
        header = {"base_model": settings["model"]["source"].removeprefix("hf:"), **header}
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", f"# {record['id']}", ""]
    what = f"{method} on {settings['model']['source']}"
    lines += [f"{what}, {_compression(record)}; {_restoring(record)}.", ""]
    lines += ["## Loading", "", "```python", *_loading(record, auto, recovery, ours, base, odd), "```", ""]
    if odd:
        lines += [f"The model has {odd}, which transformers alone does not read: it fails, or computes another model.", ""]
    if recovery:
        lines += ["The adapter alone is not what was measured: the recovery modules belong to it.", ""]
    if merged:
        filled = recovery or ours != "whole" or settings["pet"].get("zeros") == "train"
        how = "; it is loaded as the model above" if odd else ""
        text = f"`merged/` holds the model with the modules in its weights, in float32{_zeros(record, filled)}{how}."
        lines += [text, ""]
    lines += ["## Measured", "", "| metric | value | 95 % interval | documents |", "|---|---|---|---|"]
    for name, m in record["metrics"].items():
        low, high = (_figure(m[end]) for end in ("low", "high"))
        lines.append(f"| {_cell(name)} | {_figure(m['value'])} | {low} to {high} | {m['n']} |")
    task, device = settings["task"], record["provenance"]["device"]
    where = f"seed {record['axes']['seed']}; {device['name']}, {device['dtype']}"
    lines += ["", f"Task {_cell(task['name'])}, split {task['split']}, {where}."]
    training = record["training"] or {}
    lines += [f"Trained parameters {training.get('trainable_parameters', 0):,}, steps {training.get('steps', 0)}."]
    lines += ["`record.json` is the whole record: settings, versions, probes, costs.", ""]
    return "\n".join(lines)


def _method(record: dict[str, Any]) -> str:
    settings = record["settings"]
    return "lora" if (settings["restoring"] or {}).get("control") else settings["pet"]["method"]  # a control is LoRA


def _compression(record: dict[str, Any]) -> str:
    steps = record["settings"]["compression"]
    if not steps:
        return "not compressed"
    return "compressed by " + ", then ".join(f"`{json.dumps({k: v for k, v in s.items() if v is not None})}`" for s in steps)


def _restoring(record: dict[str, Any]) -> str:
    restoring = record["settings"]["restoring"] or {}
    parts = [name for name in ("inherit", "recover", "distill") if restoring.get(name)]
    if restoring.get("control"):
        parts.append(f"control {restoring['control']}")
    return f"restored by {', '.join(parts)}" if parts else "trained from a random start"


def _loading(record: dict[str, Any], auto: str, recovery: bool, ours: str | None, base: bool, odd: str | None) -> list[str]:
    source = record["settings"]["model"]["source"]
    place = '"base"' if base else f'"{source.removeprefix("hf:")}"' if source.startswith("hf:") else '"FOLDER OF THE MODEL"'
    lines = ["from cpet_bench.models.loading import load_model"] if odd else []
    lines += ([] if ours else ["from peft import PeftModel"]) + ([] if odd else [f"from transformers import {auto}"])
    lines += [f"from load_{ours} import attach_{ours}"] if ours else []
    lines += ["from load_recovery import attach_recovery"] if recovery else []
    how = "" if base or not record["settings"]["compression"] else "  # compressed as above"
    put = f'model = attach_{ours}(base, ".")' if ours else 'model = PeftModel.from_pretrained(base, ".")'
    lines += ["", f"base = {'load_model' if odd else f'{auto}.from_pretrained'}({place}){how}", put]
    if plain_name(_method(record)) == "multitask_prompt_tuning":
        lines += ["# one task was trained: model(..., task_ids=torch.zeros(rows, dtype=torch.long))"]
    return lines + (['attach_recovery(base, ".")'] if recovery else [])


def _zeros(record: dict[str, Any], filled: bool) -> str:
    pruned = any(s["backend"] in ("magnitude", "wanda", "sparsegpt") for s in record["settings"]["compression"])
    return f"; the pruned weights are {'no longer' if filled else 'still'} zero" if pruned else ""


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|")
