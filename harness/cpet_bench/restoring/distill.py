"""What distillation compares with: the teacher's hidden states, computed once and kept, or from a teacher run alongside.

They depend on the dense model, its PET module and the training documents alone, so all cells of one teacher share them. They
are kept in the number format that the teacher computes in, which loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import StepFailed
from ..settings import DistillSettings, TrainSettings
from ..training_model import distilled, logits, run, scored, start_token
from ..training_rows import Document, visits
from .layerwise import block_states, blocks_seen, stacks
from .projection import state_width

BUDGET = 4 << 30  # bytes; above it the teacher runs alongside


def same_tokens(student, teacher) -> bool:
    """Whether two tokenizers give every token the same id, so that what one has read can be given to the model of the other."""
    return student.get_vocab() == teacher.get_vocab()


def feature_bytes(tokens: int, width: int, positions: int = 0, top_k: int = 0, item: int = 4) -> int:
    """Bytes that kept features take: `tokens` hidden states of `width` numbers, and top-k logits with their tokens."""
    return tokens * width * item + positions * top_k * (4 + 4)


def teacher_features(
    model,
    pairs: list[dict],
    settings: DistillSettings,
    train: TrainSettings,
    out: Path,
    progress: Callable[[int, int, str], None],
) -> dict:
    """Hidden states of the teacher `model` for every document that training `visits`, written to `out`.

    features.safetensors has `last` (tokens x width), or `encoder` and `decoder`; for `kl` also `kl_values` (fp32) and `kl_ids`
    (int32), (positions x k). features.json says at which rows each document stands.

    With `layers: all` also `PART/BLOCK` for every block; where all of it would be more than BUDGET nothing is kept, and
    features.json says that the teacher is to run `alongside`.

    Returns: facts: documents, tokens, bytes, dtype.
    """
    from safetensors.torch import save_file

    _, by_index = visits(pairs, train, start_token(model))
    visited = sorted(by_index)
    documents = [by_index[i] for i in visited]
    if settings.layers == "all" and (size := kept_bytes(model, documents, settings)) > BUDGET:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "features.json").write_text(json.dumps({"schema": 1, "alongside": True, "bytes": size}) + "\n")
        return {"documents": len(visited), "alongside": True, "bytes_of_features": size}
    found: dict[int, dict[str, torch.Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        for group in batches(documents):
            found |= states_of(model, group, settings)
            progress(len(found), len(documents), "teacher's hidden states")
    finally:
        model.train(was_training)
    parts = list(next(iter(found.values())))
    offsets: dict[str, dict[str, list[int]]] = {str(i): {} for i in visited}
    for part in parts:
        at = 0
        for i in visited:
            length = len(found[i][part])
            offsets[str(i)][part] = [at, at + length]
            at += length
    tensors = {part: torch.cat([found[i][part] for i in visited]) for part in parts}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "features.safetensors")
    text = {"schema": 1, "hidden": settings.hidden, "documents": offsets, "parts": parts}
    (out / "features.json").write_text(json.dumps(text) + "\n")
    main = parts[0]
    return {
        "documents": len(visited),
        "tokens": sum(len(t) for part, t in tensors.items() if not part.startswith("kl_")),
        "bytes": (out / "features.safetensors").stat().st_size,
        "dtype": str(tensors[main].dtype).removeprefix("torch."),
    }


def kept_bytes(model, documents: list[Document], settings: DistillSettings) -> int:
    """Bytes that the features of `documents` take, in the number format of `model`."""
    names, both = stacks(model), model.config.is_encoder_decoder
    total = 0
    for part, name in names.items():
        tokens = sum(len(d.distilled.encoder if part == "encoder" else d.distilled.ids) for d in documents)
        layers = 1 + (len(model.get_submodule(name)) if settings.layers == "all" else 0)
        width = model.config.hidden_size if both else state_width(model, settings.hidden)
        total += layers * feature_bytes(tokens, width, item=model.dtype.itemsize)
    top = settings.kl.top_k if settings.kl else 0
    return total + feature_bytes(0, 0, sum(len(d.distilled.places) for d in documents), top)


def alongside(folder: Path) -> bool:
    """Whether the teacher's features were too many to be kept, and it is to run beside the training."""
    return json.loads(Path(folder, "features.json").read_text()).get("alongside", False)


def batches(documents: Sequence[Document], tokens: int = 1024) -> list[list[Document]]:
    """Documents of like length together, at most about `tokens` padded tokens a batch."""
    order = sorted(documents, key=lambda d: (-d.length, d.index))
    groups: list[list[Document]] = []
    for d in order:
        rows = sum(len(x.rows) for x in groups[-1]) if groups else 0
        if not groups or (rows + len(d.rows)) * groups[-1][0].length > tokens:
            groups.append([])
        groups[-1].append(d)
    return groups


@torch.no_grad()
def states_of(model, documents: list[Document], settings: DistillSettings) -> dict[int, dict[str, torch.Tensor]]:
    """By document index: hidden states (tokens x width) by part, and with `kl` the top-k logits; on the CPU."""
    alone = [Document(d.index, d.kind, (d.distilled,), d.choices, d.answer) for d in documents]
    with blocks_seen(model, active=settings.layers == "all") as seen:
        states = run(model, alone, settings.hidden)
    found: dict[int, dict[str, torch.Tensor]] = {d.index: {} for d in alone}

    def share_out(name: str, values: torch.Tensor, lengths: list[int]) -> None:
        for d, mine in zip(alone, values.cpu().split(lengths), strict=True):
            found[d.index][name] = mine.clone()

    for part in states.layers:
        lengths = [len(d.distilled.encoder if part == "encoder" else d.distilled.ids) for d in alone]
        share_out(part, distilled(states, part), lengths)
        for name, values in block_states(states, {part: seen.get(part, [])}).items():
            share_out(name, values, lengths)
    if settings.kl:
        lengths = [len(d.distilled.places) for d in alone]
        every = logits(model, scored(states))
        values, ids = every.topk(min(settings.kl.top_k, every.shape[1]), dim=-1)
        share_out("kl_values", values, lengths)
        share_out("kl_ids", ids.int(), lengths)
    return found


class Kept:
    """Features that `teacher_features` wrote, read a batch at a time."""

    def __init__(self, folder: Path, settings: DistillSettings):
        from safetensors import safe_open

        text = json.loads(Path(folder, "features.json").read_text())
        self.where, self.parts = text["documents"], text["parts"]
        blocks = any("/" in part for part in self.parts)
        other = text["hidden"] != settings.hidden or blocks != (settings.layers == "all")
        if other or (settings.kl and "kl_ids" not in self.parts):
            raise StepFailed("the teacher's features were made for other distillation settings")
        self._file = safe_open(Path(folder, "features.safetensors"), framework="pt")
        self._slices = {part: self._file.get_slice(part) for part in self.parts}
        self.widths = {part: s.get_shape()[1] for part, s in self._slices.items() if not part.startswith("kl_")}
        self.maps: dict[str, torch.nn.Parameter] = {}  # what a student of another width is compared through
        self.origins: dict[str, list[int]] = {}  # by part, which of the teacher's blocks each of the student's came from
        if settings.kl:
            k = self._slices["kl_ids"].get_shape()[1]
            self.top_k = min(k, settings.kl.top_k)

    def __call__(self, documents: list[Document]) -> dict[str, torch.Tensor]:
        """By part, the features of `documents` one after the other."""
        missing = [d.index for d in documents if str(d.index) not in self.where]
        if missing:
            raise StepFailed(f"the teacher's features lack training document {missing[0]} (and {len(missing) - 1} more)")
        found = {}
        for part in self.parts:
            spans = [self.where[str(d.index)][part] for d in documents]
            found[part] = torch.cat([self._slices[part][a:b] for a, b in spans])
            if part.startswith("kl_"):
                found[part] = found[part][:, : self.top_k]
        return found


class Alongside:
    """The same from a teacher model that is run when its states are needed."""

    def __init__(self, teacher, settings: DistillSettings):
        self.teacher, self.settings = teacher.eval(), settings
        parts = ("encoder", "decoder") if teacher.config.is_encoder_decoder else ("last",)
        self.widths = dict.fromkeys(parts, state_width(teacher, settings.hidden))
        self.maps: dict[str, torch.nn.Parameter] = {}
        self.origins: dict[str, list[int]] = {}

    def __call__(self, documents: list[Document]) -> dict[str, torch.Tensor]:
        found = states_of(self.teacher, documents, self.settings)
        return {part: torch.cat([found[d.index][part] for d in documents]) for part in found[documents[0].index]}
