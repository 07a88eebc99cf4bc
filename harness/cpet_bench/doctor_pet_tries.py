"""What `doctor --pet` really tries, in processes of their own: `python -m cpet_bench.doctor_pet_tries STAGE FOLDER [SKIP ...]`.

Stage `tune CLASS` trains each wanted pair of PET method and restoring for two steps with the loop that runs use, and saves
it; stage `load CLASS`, another process, loads each from its files and compares what it computes. Messages are those of
`doctor_tries`. FOLDER/wanted.json lists the pairs.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import InputError, Unsupported
from .pet.capability import CLASSES

SAME = 1e-4  # of the largest logit: what a fresh process may differ by
# Every token that a method's fields name in `doctor_tries.FIELDS` is read, or its gradient would be zero.
PAIRS = [{"context_ids": [1, 2, 5 + i, 9, 7], "choice_ids": [], "gold": 0, "target_ids": [20 + i, 31, 8]} for i in range(4)]
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v"]}


class Bench:
    """Tiny models of one class of layer, and what is tuned on them, below one folder."""

    def __init__(self, layer: str, folder: Path, device: str):
        from .models.pool import ModelPool

        self.layer, self.folder, self.device = layer, folder, device
        self.pool = ModelPool()

    def lend(self, which: str, purpose: str):
        """The model of the class (`own`), or the dense one it was made of (`dense`)."""
        machine = {"device": self.device, "owns": [self.device], "dtype": "float32", "attention": "auto"}
        return self.pool.lend(which, self.own if which == "own" else self.dense, machine, purpose)

    @cached_property
    def dense(self) -> Path:
        from .models import tiny

        made = self.folder / "dense"
        if not (made / "config.json").is_file():
            tiny.make(CLASSES[self.layer].arch, tiny.DEFAULTS, made)
        return made

    @property
    def own(self) -> Path:
        layer = CLASSES[self.layer]
        return self.dense if layer.backend is None else self._compressed

    @cached_property
    def _compressed(self) -> Path:
        import torch

        from . import registry
        from .compression import calibrated

        layer, out, refused = CLASSES[self.layer], self.folder / "own", self.folder / "refused"
        if refused.is_file():
            raise Unsupported(refused.read_text())
        if (out / "made").is_file():
            return out
        backend = registry.get("compression", layer.backend)
        settings = backend.Settings.model_validate(layer.settings)
        draw = torch.Generator().manual_seed(0)
        examples = torch.randint(3, 200, (32, 24), generator=draw).tolist() if calibrated(backend, settings) else None
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        how = {"device": self.device, "dtype": "float32", "progress": lambda *_: None}
        try:
            backend.compress(self.dense, out, settings, examples=examples, **how)
        except (Unsupported, ImportError) as error:
            refused.write_text(str(error))
            raise
        (out / "made").touch()
        return out

    def tuned(self, method: str, part: str) -> Path:
        return self.folder / "tuned" / f"{method}-{part}"

    def tune(self, method: str, part: str) -> str:
        """Two steps of the training loop, which fails where a tensor gets no finite gradient or does not move; saved."""
        if part in ("vanilla", "recover"):
            return self._train("own", method, part, self.tuned(method, part))
        dense = self.tuned(method, "vanilla" if CLASSES[self.layer].backend is None else "dense")
        if not (dense / "output.safetensors").is_file():
            self._train("dense", method, "dense", dense)
        if part == "inherit":
            return self._train("own", method, part, self.tuned(method, part), start=dense / "adapter")
        from .deployment import deploy

        with self.lend("teacher" if self.own == self.dense else "dense", "eval") as model, deploy(model, [dense]) as teacher:
            return self._train("own", method, part, self.tuned(method, part), teacher=teacher)

    def _train(self, which: str, method: str, part: str, out: Path, start: Path | None = None, teacher=None) -> str:
        from safetensors.torch import save_file

        from .pet import methods
        from .restoring import recover
        from .restoring.fairness import trainable_count
        from .settings import DistillSettings, RecoverSettings, TrainSettings
        from .training import train

        recovery = RecoverSettings(r=4) if part == "recover" else None
        settings = TrainSettings(steps=2, batch=4, documents=4, lr=1e-2, warmup=0)
        scratch = out.with_name(f"{out.name}-scratch")
        with self.lend(which, "train") as model:
            try:
                if start:
                    methods.attach_saved(model, start, trainable=True)
                else:
                    _attach(model, method, CLASSES[self.layer].arch)
                if recovery:
                    recover.attach_recovery(model, recovery, seed=0)
                count = trainable_count(model)
                train(
                    model,
                    PAIRS,
                    settings,
                    distill=DistillSettings() if teacher is not None else None,
                    teacher=teacher,
                    scratch=scratch,
                    progress=lambda *_: None,
                    should_stop=lambda: False,
                )
                methods.save(model, out / "adapter")
                if recovery:
                    recover.save_recovery(model, out / "recovery", recovery)
                save_file({"logits": answer(model.eval())}, out / "output.safetensors")
            finally:
                recover.detach_recovery(model)
                methods.detach(model)
        return f"two steps, {count} trainable parameters"

    def load(self, method: str, part: str) -> str:
        """What `tune` saved, put on the model in this process, computes the same."""
        from safetensors.torch import load_file

        from .deployment import deploy

        out = self.tuned(method, part)
        wanted = load_file(out / "output.safetensors")["logits"]
        with self.lend("own", "eval") as model, deploy(model, [out]) as deployed:
            found = answer(deployed)
        apart = float((found - wanted).abs().max() / wanted.abs().max())
        if not apart <= SAME:
            text = f"logits differ by {apart:.1e} of the largest"
            raise Unsupported(f"loaded in a new process it computes something else: {text}")
        return "loaded in a new process, it computes the same"


def _attach(model, method: str, arch: str) -> None:
    """The method with its defaults; where PEFT knows no layers of this architecture for it, on those named here."""
    from .doctor_tries import FIELDS
    from .pet import methods
    from .settings import PetSettings

    fields = FIELDS.get(method, {})
    try:
        methods.attach(model, PetSettings(method=method, **fields), seed=0)
    except InputError as error:
        if error.key != "pet.target_modules":
            raise
        methods.attach(model, PetSettings(method=method, **{**fields, "target_modules": TARGETS[arch]}), seed=0)


def answer(model) -> Any:
    """Logits (float32, on the CPU) at the scored positions of the training documents, by the pass that training uses."""
    import torch

    from .training_model import logits, run, scored, start_token
    from .training_rows import document

    start = start_token(model)
    with torch.no_grad():
        states = run(model, [document(i, pair, 64, start) for i, pair in enumerate(PAIRS)])
        return logits(model, scored(states)).cpu().clone()


def stages(stage: str, layer: str, folder: Path) -> Iterator[tuple[str, Any]]:
    wanted = json.loads((folder / "wanted.json").read_text())
    bench = Bench(layer, folder, wanted["device"])
    for method, part in wanted["cells"]:
        if stage == "tune" or (bench.tuned(method, part) / "output.safetensors").is_file():
            yield f"{method} {part}", lambda method=method, part=part: getattr(bench, stage)(method, part)


def attempt(call) -> dict[str, Any]:
    """ok, or unsupported with the exception as the reason."""
    from .worker import describe

    started = time.perf_counter()
    try:
        found = {"state": "ok", "reason": call()}
    except Exception as error:
        found = {"state": "unsupported", "reason": describe(error)["message"]}
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def main(stage: str, folder: str, *skip: str) -> None:
    private = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes where errors go
    import peft  # noqa: F401  (with it come torch and transformers)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection each time a model is lent would else walk all that the libraries made, for most of a second
    verb, _, layer = stage.partition(" ")
    failed: dict[str, dict[str, Any]] = {}  # methods that cannot be tuned at all: nothing beside them is tried
    for name, call in stages(verb, layer, Path(folder)):
        method, _, part = name.partition(" ")
        if name in skip:
            continue
        print(json.dumps({"begin": [stage, name]}), file=private)
        row = {**failed[method], "seconds": 0.0} if method in failed else attempt(call)
        if part == "vanilla" and row["state"] != "ok":
            failed[method] = row
        print(json.dumps({"row": {"part": stage, "name": name, **row}}), file=private)
    print(json.dumps({"end": stage}), file=private)


if __name__ == "__main__":
    main(*sys.argv[1:])
