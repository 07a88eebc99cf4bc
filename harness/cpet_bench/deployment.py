"""A base model with the modules that were tuned for it, for as long as it is evaluated or probed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import StepFailed


@contextmanager
def deploy(model, adapters: Sequence[Path]) -> Iterator:
    """`model` (the same object, in evaluation mode) with each tuned artifact on it, in order; all taken off at the end.

    An artifact folder has `adapter/` (PEFT's format), `recovery/`, or both; the parts of several add up. PET modules go on
    first, since recovery sits beside the whole of a layer.

    Raises:
        StepFailed: a folder holds neither, or does not fit the model.
    """
    if not adapters:
        yield model
        return
    from .pet import methods
    from .restoring import recover

    folders = [Path(a) for a in adapters]
    try:
        for folder in folders:
            if not any((folder / part).is_dir() for part in ("adapter", "recovery")):
                raise StepFailed(f"{folder} holds no tuned modules")
        with_pet = [f for f in folders if (f / "adapter").is_dir()]
        for number, folder in enumerate(with_pet):
            name = f"a{number}" if number else "default"
            methods.attach_saved(model, folder / "adapter", trainable=False, name=name)
        for folder in folders:
            if (folder / "recovery").is_dir():
                recover.attach_saved_recovery(model, folder / "recovery", trainable=False)
        model.eval()
        yield model
    finally:
        recover.detach_recovery(model)
        methods.detach(model)
