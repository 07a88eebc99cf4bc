"""`export`: a tuned cell as files that others can load without this package."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import InputError, StopError
from ..models.formats import PACKED, ROUTED, UNEVEN, beyond_transformers
from ..models.loading import load_config
from ..pet import own
from ..records import read_record
from ..results.clean import clean_record
from ..store import Damaged, Store
from .card import card

LOADER = Path(__file__).with_name("load_recovery.py")


def export(run: Path, cell: str, to: Path, *, store: str | None = None, base: bool = False, merged: bool = False) -> list[str]:
    """Write the modules tuned in a cell to a folder, with a model card; returns the names written, sorted.

    At the top lies an ordinary PEFT adapter (plain PEFT loads it). Recovery modules lie beside it with a loader of a few
    lines, `load_recovery.py`, which needs torch and safetensors only; methods that PEFT has not, with such a loader too.

    Args:
        run: the run's folder. cell: the id of a cell that is done and tuned. to: a folder that is new or empty.
        store: where the artifacts are (default: the user's cache). base: write the compressed model too, as `base/`.
        merged: write the model with the modules merged into its weights too, as `merged/`.

    Raises InputError for a cell that has no modules, is not in the store, or cannot be merged; StopError for the disk. Nothing
    is left in `to` then.
    """
    record = clean_record(_record(Path(run), cell))  # what is exported goes to others: no paths of this machine
    found, to = Store(store), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} is there already and is not empty.", key="--to")
    keys = record["provenance"]["keys"]
    tuned = _artifact(found, keys["tune"], cell)
    if merged:
        from .merge import refuse

        why = refuse(record, tuned)
        if why:
            raise InputError(f"{cell} cannot be merged: {why}", key="--merged")
    model = _model(found, keys.get("compress", keys["model"]), cell, needed=base or merged)
    odd = beyond_transformers(model, load_config(model)) if model else _by_backend(record, _pairs(tuned / "adapter"))
    there = to.exists()
    try:
        to.mkdir(parents=True, exist_ok=True)
        for file in sorted((tuned / "adapter").iterdir()):
            shutil.copyfile(file, to / file.name)
        ours = own.saved_in(to)
        if ours:
            shutil.copyfile(LOADER.with_name(f"load_{ours}.py"), to / f"load_{ours}.py")
        else:
            _name_base(to / "adapter_config.json", record)
        if (tuned / "recovery").is_dir():
            for name in ("recovery.safetensors", "recovery.json"):
                shutil.copyfile(tuned / "recovery" / name, to / name)
            shutil.copyfile(LOADER, to / LOADER.name)
        if base:
            shutil.copytree(model, to / "base", ignore=shutil.ignore_patterns("manifest.json"))
        if merged:
            from .merge import merge

            merge(model, tuned, to / "merged")
        (to / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        (to / "README.md").write_text(_card(to, record, base=base, merged=merged, odd=odd))
    except BaseException as error:
        _clear(to, there)
        if isinstance(error, OSError):
            raise StopError(f"Cannot write {to}: {error.strerror or error}.") from error
        raise
    return sorted(p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file())


def _clear(to: Path, there: bool) -> None:
    """Take away what was written to `to`, which was empty; and itself, unless it was there before."""
    with suppress(OSError):  # what went wrong before is what is said
        for path in to.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if not there:
            to.rmdir()


def _card(to: Path, record: dict[str, Any], **parts: Any) -> str:
    ours, auto = own.saved_in(to), "AutoModelForSeq2SeqLM" if _pairs(to) else "AutoModelForCausalLM"
    return card(record, auto, recovery=(to / "recovery.json").exists(), ours=ours, **parts)


def _pairs(adapter: Path) -> bool:
    """Whether an adapter is of a model with an encoder and a decoder."""
    ours = own.saved_in(adapter)
    about = adapter / (own.FILES[ours][0] if ours else "adapter_config.json")
    return json.loads(about.read_text())["task_type"] == "SEQ_2_SEQ_LM"


def _record(run: Path, cell: str) -> dict[str, Any]:
    path = run / "records" / f"{cell}.json"
    if not path.is_file():
        allowed = [p.stem for p in (run / "records").glob("*.json")]
        raise InputError(f"There is no cell {cell!r} in {run}.", given=cell, allowed=allowed)
    record = read_record(path)
    if record["status"] != "done":
        raise InputError(f"{cell} is {record['status']}: there is nothing to export.", file=path)
    if "tune" not in record["provenance"]["keys"]:
        raise InputError(f"{cell} has no tuned modules (its pet is {record['axes']['pet']}).", file=path)
    return record


def _artifact(store: Store, key: str, cell: str) -> Path:
    try:
        return store.materialise(key)
    except Damaged as error:
        raise InputError(
            f"What {cell} needs is not in the store at {store.url} ({error}); run its matrix again.", key="--store"
        ) from error


def _model(store: Store, key: str, cell: str, needed: bool) -> Path | None:
    """The folder of a cell's compressed model; None where it is neither there nor needed."""
    if needed:
        return _artifact(store, key, cell)
    try:
        return store.materialise(key, verify=False) if store.local else None
    except Damaged:
        return None


def _by_backend(record: dict[str, Any], pairs: bool) -> str | None:
    """`beyond_transformers` as far as a record tells it. pairs: of a model with an encoder and a decoder."""
    odd = {"rtn": PACKED, "moefy": ROUTED, "structured": UNEVEN} | ({"gptq": PACKED} if pairs else {})
    return next((odd[s["backend"]] for s in reversed(record["settings"]["compression"]) if s["backend"] in odd), None)


def _name_base(path: Path, record: dict[str, Any]) -> None:
    """A hub model is named as the adapter's base, as PEFT does; a folder of this machine would mean nothing elsewhere."""
    source = record["settings"]["model"]["source"]
    if source.startswith("hf:"):
        config = json.loads(path.read_text()) | {"base_model_name_or_path": source.removeprefix("hf:")}
        config["revision"] = record["settings"]["model"]["revision"]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
