"""Tuned modules merged into the weights of their model, where that is the same function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..compression.rounding import PACKING
from ..errors import InputError
from ..pet import own
from ..pet.prompts import IN_FRONT, PREFIX


def refuse(record: dict[str, Any], tuned: Path) -> str | None:
    """Why a cell's modules cannot be merged; None where they can, as far as its record and files tell."""
    backends = [step["backend"] for step in record["settings"]["compression"]]
    packed = [name for name in backends if name in PACKING]
    if packed:
        return f"the weights are packed by {packed[-1]}, and rounding them anew would change what was tuned"
    ours = own.saved_in(tuned / "adapter")
    why = own.implementation(ours).cannot_merge(tuned / "adapter") if ours else None
    if why:
        return why
    kind = "" if ours else json.loads((tuned / "adapter" / "adapter_config.json").read_text())["peft_type"]
    if kind in (*PREFIX, *IN_FRONT):
        return "virtual tokens are no weights of the model"
    if (tuned / "recovery").is_dir():
        act = json.loads((tuned / "recovery" / "recovery.json").read_text())["settings"]["act"]
        if act != "identity":
            return f"its recovery modules are not linear (act: {act})"
    return None


def merge(folder: Path, tuned: Path, out: Path) -> None:
    """Write the model of `folder` with the adapter and the (linear) recovery modules of `tuned` in its weights, in fp32.

    A pruned model's zeros fill up, where the method does not keep them. Raises InputError where PEFT has no way to merge this
    method.
    """
    import torch
    from peft import PeftModel

    from ..compression.masks import weight_out_in
    from ..models.loading import load_model, load_tokenizer
    from ..models.routers import carry_routers

    model = load_model(folder)
    ours = own.saved_in(tuned / "adapter")
    try:
        if ours:
            own.implementation(ours).merge(model, tuned / "adapter")
        else:
            model = PeftModel.from_pretrained(model, str(tuned / "adapter")).merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise InputError(f"PEFT cannot merge this method: {' '.join(str(error).split())[:200]}", key="--merged") from error
    if (tuned / "recovery").is_dir():
        from safetensors.torch import load_file

        from ..settings import RecoverSettings

        about = json.loads((tuned / "recovery" / "recovery.json").read_text())
        weights, scale = load_file(tuned / "recovery" / "recovery.safetensors"), RecoverSettings(**about["settings"]).scale
        with torch.no_grad():
            for name in about["layers"]:
                weight = weight_out_in(model.get_submodule(name))
                weight.add_((scale * weights[f"{name}.U2"] @ weights[f"{name}.U1"]).to(weight))
    model.save_pretrained(out, safe_serialization=True)
    carry_routers(folder, out)
    load_tokenizer(folder).save_pretrained(out)
