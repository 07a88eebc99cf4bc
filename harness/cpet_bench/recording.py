"""Records: what a run found out about a cell, gathered from the manifests of its steps. Loads no heavy library."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from .cells import Cell, cell_id
from .errors import StopError
from .failpoints import failpoint
from .keys import plain, version
from .plan import Plan
from .store import Manifest, Store, sha256_file

PACKAGES = ("torch", "transformers", "peft", "lm-eval", "datasets", "bitsandbytes", "accelerate", "cpet-bench")


@cache
def commit() -> str | None:
    """The source's git commit, with `+changes` where the work tree differs; None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def references(cell: Cell, ids: set[str]) -> dict[str, str | None]:
    """Cells of this run that this one is compared with."""
    nothing = cell.matrix.nothing

    def there(other: str | None) -> str | None:
        return other if other in ids and other != cell.id else None

    def at(**changed) -> str | None:
        return there(cell_id({**cell.axes, **changed}))

    untuned = {"pet": nothing["pet"], "restoring": "none", "seed": cell.matrix.seed[0]}
    return {
        "dense": at(compression=nothing["compression"], **untuned),
        "untuned": at(**untuned),
        "dense_pet": there(cell.dense and cell.dense.id),
        "vanilla": at(restoring=nothing["restoring"]) if cell.pet and cell.compression else None,
        "control_of": there(cell.control_of and cell.control_of.id),
    }


def identity(cell: Cell) -> dict[str, Any]:
    """The settings of a cell as its record shows them."""
    return plain(
        {
            "model": cell.model,
            "compression": [{"backend": c.name, **plain(c.settings)} for c in cell.compression],
            "pet": {"method": cell.pet.method, **cell.pet.fields} if cell.pet else None,
            "restoring": cell.restoring,
            "task": {**plain(cell.task), "name": cell.task_name},
            "train": _train(cell),
            "prompt": cell.prompt,
            "probes": cell.probes,
        }
    )


def _train(cell: Cell) -> dict[str, Any] | None:
    """Training settings; of a rate that was chosen (the record's `training` has it) what it was chosen from."""
    if not cell.pet:
        return None
    found = plain(cell.train)
    if cell.select:
        found = {k: v for k, v in found.items() if k != "lr"} | {"select": plain(cell.select)}
    return found


SPENT = ("steps", "tokens", "flops", "seconds", "trainable_parameters")  # on D


class Recorder:
    """Builds the records of one run and writes them, with their outcomes beside them."""

    def __init__(self, plan: Plan, store: Store, folder: Path, machine: dict[str, Any], run: str, matrix: str, estimates):
        self.plan, self.store, self.folder, self.machine = plan, store, folder, machine
        self.run, self.matrix, self.estimates = run, matrix, estimates
        self.ids = {cell.id for cell in plan.cells}

    def _base(self, cell: Cell) -> dict[str, Any]:
        machine = {k: v for k, v in self.machine.items() if k != "devices"}
        return {
            "schema": 1,
            "id": cell.id,
            "matrix": self.matrix,
            "run": self.run,
            "axes": cell.axes,
            "settings": identity(cell),
            "references": references(cell, self.ids),
            "provenance": {
                "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
                "device": {**machine, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
                "commit": commit(),
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "keys": self.plan.roles[cell.id],
            },
        }

    def pending(self, cell: Cell, why: str | None = None) -> dict[str, Any]:
        """A cell that this run did not come to; `why` it was left out on purpose."""
        reason = {"type": "LeftOut", "message": why, "step": "", "log": ""} if why else None
        return {**self._base(cell), "status": "pending", "reason": reason, **_EMPTY, "costs": self._costs(cell, {})}

    def failed(self, cell: Cell, status: str, reason: dict[str, Any]) -> dict[str, Any]:
        """A cell that a step kept from its end; `status` is failed or unsupported."""
        return {**self._base(cell), "status": status, "reason": reason, **_EMPTY, "costs": self._costs(cell, {})}

    def done(self, cell: Cell) -> dict[str, Any]:
        roles = self.plan.roles[cell.id]
        found = {role: self.store.manifest(key) for role, key in roles.items()}
        metrics = found["metrics"].facts["metrics"]
        probes = dict(found["probe"].facts["probes"]) if "probe" in found else {}
        simulated = sorted({s for _, m in self._chain(cell) for s in m.facts.get("simulated", [])})
        dense = "kernel" in (found["model"].facts.get("quantised") or {})  # a model that came packed, and is run unpacked
        simulated += ["speed"] if dense and "speed" not in simulated else []
        for name in ("prefill", "decode"):
            if name in probes:
                probes[name] = {**probes[name], "simulated": "speed" in simulated}
        if dense and "resident" in probes:
            probes["resident"] = {**probes["resident"], "simulated": True}
        base = found.get("compress", found["model"])
        stored = base.facts.get("bytes") or base.bytes
        adapter = _adapter_bytes(found.get("tune"))
        probes["disk"] = {"value": stored + adapter, "unit": "bytes", "model": stored, "adapter": adapter}
        record = {
            **self._base(cell),
            "status": "done",
            "reason": None,
            "metrics": metrics,
            "primary": primary(metrics),
            "probes": probes,
            "compression": self._compression(cell),
            "training": self._training(cell, found),
            "costs": self._costs(cell, found),
            "simulated": simulated,
        }
        record["provenance"]["device"]["attention_used"] = found["responses"].facts.get("attention")
        return record

    def _chain(self, cell: Cell) -> list[tuple[str, Manifest]]:
        """Backend and manifest of the compression steps, first to last."""
        chain, key = [], self.plan.roles[cell.id].get("compress")
        while key and self.plan.steps[key].kind == "compress":
            manifest = self.store.manifest(key)
            if manifest:
                chain.insert(0, (self.plan.steps[key].settings["backend"], manifest))
            key = self.plan.steps[key].needs["source"]
        return chain

    def _compression(self, cell: Cell) -> dict[str, Any] | None:
        chain = self._chain(cell)
        if not chain:  # nothing was done here, but the model may have come quantised
            given = self.store.manifest(self.plan.roles[cell.id]["model"]).facts.get("quantised")
            return {"given": given} if given else None
        last = chain[-1][1]
        found = {
            **last.facts,
            "bytes": last.bytes,
            "seconds": sum(m.costs["seconds"] for _, m in chain),
            "peak_memory": max(m.costs["peak_memory"] for _, m in chain),
        }
        if len(chain) > 1:  # of a mixture, what each step found out
            found["steps"] = [{"backend": name, **m.facts, **_spent(m)} for name, m in chain]
        return found

    def _training(self, cell: Cell, found: dict[str, Manifest]) -> dict[str, Any] | None:
        if "tune" not in found:
            return None
        facts = dict(found["tune"].facts)
        inherited = facts.get("inherited")
        if cell.restoring.inherit and inherited:
            facts["inherited"] = {"id": cell.dense.id, **inherited}
        else:
            facts["inherited"] = None
        if cell.restoring.distill:  # what was spent on the teacher's D, also where the cell starts from something else
            teacher, role = (cell.teacher, "teacher_tune") if cell.teacher else (cell.dense, "dense_tune")
            facts["taught_by"] = {"id": teacher.id, **{k: found[role].facts.get(k) for k in SPENT}}
        facts["peak_memory"] = self._trained(cell).costs["peak_memory"]
        return facts

    def _trained(self, cell: Cell) -> Manifest:
        """Manifest of the step that trained the cell's module: of a choice, the trial that won."""
        key = self.plan.roles[cell.id]["tune"]
        manifest = self.store.manifest(key)
        if self.plan.steps[key].kind == "select":
            selection = manifest.facts["selection"]
            won = self.plan.steps[key].settings["grid"].index(selection["chosen"])
            return self.store.manifest(self.plan.steps[key].needs[f"trial{won}"]) or manifest  # it may have been pruned
        return manifest

    def _costs(self, cell: Cell, found: dict[str, Manifest]) -> dict[str, Any]:
        roles = self.plan.roles[cell.id]
        keys = self.plan.closure(roles.values())
        steps = [self.plan.steps[k] for k in keys]
        seconds: dict[str, float] = {}
        peak = 0
        for step in steps:
            manifest = self.store.manifest(step.key)
            if manifest:
                seconds[step.kind] = round(seconds.get(step.kind, 0.0) + manifest.costs["seconds"], 3)
                peak = max(peak, manifest.costs["peak_memory"])
        own = found.get("tune")
        return {
            "seconds": round(sum(seconds.values()), 3),
            "estimated_seconds": round(sum(self.estimates.get(s.key, 0.0) for s in steps), 3),
            "flops": own.facts.get("flops", 0) if own else 0,
            "peak_memory": peak,
            "steps": seconds,
        }

    def outcomes(self, cell: Cell) -> None:
        """Copy the outcomes by document beside the record. Damaged where the store's are, StopError for the disk."""
        self._beside(cell, "metrics", "outcomes")

    def losses(self, cell: Cell) -> None:
        """The same for the loss curve of a cell whose training had any steps."""
        key = self.plan.roles[cell.id].get("tune")
        manifest = key and self.store.manifest(key)
        if manifest and "losses.parquet" in manifest.files:
            self._beside(cell, "tune", "losses")
        else:
            (self.folder / "losses" / f"{cell.id}.parquet").unlink(missing_ok=True)  # of settings it had before

    def _beside(self, cell: Cell, role: str, what: str) -> None:
        key = self.plan.roles[cell.id][role]
        wanted = self.store.manifest(key).files[f"{what}.parquet"]
        target = self.folder / what / f"{cell.id}.parquet"
        if target.exists() and target.stat().st_size == wanted["bytes"] and sha256_file(target) == wanted["sha256"]:
            return
        source = self.store.materialise(key) / f"{what}.parquet"
        fresh = target.with_name(f"{target.name}.{os.getpid()}.new")
        try:
            failpoint(f"{what}.before")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, fresh)
            failpoint(f"{what}.written", path=fresh)
            os.replace(fresh, target)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StopError(f"Cannot write {target}: {error.strerror or error}.") from error
        failpoint(f"{what}.after")


def _spent(manifest: Manifest) -> dict[str, Any]:
    return {name: manifest.costs[name] for name in ("seconds", "peak_memory")}


_EMPTY: dict[str, Any] = {
    "metrics": {},
    "primary": None,
    "probes": {},
    "compression": None,
    "training": None,
    "simulated": [],
}


def primary(metrics: dict[str, Any]) -> str | None:
    """The metric a ladder is sorted by: accuracy where there is one, else the first."""
    for name in metrics:
        if name.rsplit("/", 1)[-1].partition(",")[0] in ("acc", "exact_match", "f1"):
            return name
    return next(iter(metrics), None)


def _adapter_bytes(tune: Manifest | None) -> int:
    if tune is None:
        return 0
    return sum(f["bytes"] for name, f in tune.files.items() if name.endswith(".safetensors"))
