"""Parts of the settings of steps: what of a control, a training or a file they depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cells import Cell
from .compression import narrows
from .errors import InputError
from .models.sources import adapter_identity
from .pet.own import plain_name
from .pet.rewriting import as_saved, rewrites
from .settings import CalibrationSettings, PetSettings, TrainSettings

BESIDE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices")  # what LoRA trains beside its factors


def control_settings(cell: Cell, base: Path) -> dict[str, Any]:
    """What a control is matched to: the parts of cell `of` that have parameters, and D's steps where they are added."""
    other = cell.control_of
    recover, inherit = other.restoring.recover, other.restoring.inherit
    found = {
        "control": cell.restoring.control,
        # what is inherited of a start that was taken out of the base has twice the rank
        "pet": {"method": other.pet.method, **(as_saved(other.pet.fields) if inherit else other.pet.fields)},
        "recover": {"r": recover.r} if recover else None,
    }
    if cell.restoring.control == "longer":
        found["extra_steps"] = cell.dense.train.steps
    # Earlier versions left out what is trained beside LoRA's factors, and extended D by the same rows at every seed.
    if cell.restoring.control == "wider":
        found |= {"rows": "by seed"} if cell.seed else {}
    elif any(cell.pet.fields.get(key) for key in BESIDE) or cell.pet.fields.get("bias", "none") != "none":
        found["counts"] = "all"
    if resized(cell):
        found["sized"] = adapter_identity(inherit.from_, base) if inherit.from_ else "as inherited"
    # Earlier versions gave LoRA of a random start the one of `pet`, which packed weights cannot take.
    if rewrites(cell.pet.fields) and cell.restoring.control != "wider":
        found["start"] = "random"
    return found


def probed_control(control: dict[str, Any]) -> dict[str, Any]:
    """What of a control's settings its size follows from. Earlier versions probed `wider` as D, with its ranks not extended."""
    found = {k: v for k, v in control.items() if k not in ("extra_steps", "rows")}
    return found | ({"ranks": "extended"} if control["control"] == "wider" else {})


def resized(cell: Cell) -> bool:
    """Whether the cell a control is matched to inherits a module of another size than its fields say.

    Of virtual tokens, what their encoder gave is kept; of AdaLoRA, the ranks that are left.
    """
    other = cell.control_of
    if cell.restoring.control == "wider" or not other.restoring.inherit:
        return False
    method = plain_name(other.pet.method)
    return method in ("adalora", "p_tuning", "multitask_prompt_tuning") or bool(other.pet.fields.get("prefix_projection"))


def cut_by(cell: Cell) -> tuple[dict[str, int], dict[str, int], bool]:
    """Of a compensation: params (how many compressions' cuts it follows), settings where some may have cut, and whether layers
    may have lost inputs.

    Those are there in the dense model alone, which is where its moments then come from. A student's layers were trained to be
    others, so that none of its errors is that of a cut.
    """
    names = [choice.name for choice in cell.compression]
    if "student" in names:
        return {"compressions": 0}, {}, False
    narrower = any(map(narrows, names))
    return {"compressions": len(names)}, {"cuts": 1} if narrower or "depth" in names else {}, narrower


def calibration_settings(calibration: CalibrationSettings) -> dict[str, Any]:
    """What says which documents a compensated start is calibrated on, of those of its training text."""
    return {"documents": calibration.documents, "max_tokens": calibration.max_tokens, "seed": calibration.seed}


def order_settings(train: TrainSettings) -> dict[str, Any]:
    """What of the training settings says which documents are visited."""
    found = {k: getattr(train, k) for k in ("steps", "batch", "documents", "order_seed", "max_tokens")}
    if train.batch_tokens:
        found["batch_tokens"] = train.batch_tokens
    if train.early_stop:
        found["early_stop"] = {"documents": train.early_stop.documents}
    return found


def content_of(path: Path) -> str:
    """Hash of a file of training rows; InputError where there is none, or no row in it."""
    from .store import sha256_file

    if not path.is_file():
        raise InputError(f"There is no file {path}.", key="jsonl")
    with path.open("rb") as lines:
        if not any(line.strip() for line in lines):  # stops at the first row
            message = f'{path} has no rows; a row is a line such as {{"prompt": ..., "completion": ...}}'
            raise InputError(message, key="jsonl")
    return sha256_file(path)


def adalora_settings(cell: Cell) -> dict[str, Any]:
    """How AdaLoRA trains (pet/allocating.py). InputError where its budget would not be reached just at the end.

    A module that is inherited keeps its ranks, so nothing is asked of it.
    """
    fields, steps = cell.pet.fields, cell.train.steps
    shrinks = fields.get("init_r", 12) > fields.get("target_r", 8)  # PEFT's defaults
    if shrinks and steps and not cell.restoring.inherit:
        total = fields.get("total_step")
        if total is not None and total != steps:
            raise InputError(
                f"AdaLoRA deals out its ranks over {total} steps (total_step), {steps} are trained: write total_step: {steps}"
            )
        if cell.train.early_stop:
            raise InputError(
                "AdaLoRA's ranks are dealt out until the last step, and early_stop may end before it: leave early_stop out, or "
                "keep all ranks with a target_r as large as init_r"
            )
    # 2: a training that left a layer no rank was one that failed
    return {"allocates": shrinks, "penalty": True, "version": 2}


def replaces_weights(pet: PetSettings) -> bool:
    """Whether a PET method trains parameters in the model's own format, which training_masters.py then steps in float32.

    Earlier versions stepped them in the model's format: what those trained must not pass for this, so it is in these keys.
    """
    fields = pet.fields
    own = plain_name(pet.method) in ("ln_tuning", "adaption_prompt")
    return own or bool(fields.get("modules_to_save")) or fields.get("bias", "none") != "none"
