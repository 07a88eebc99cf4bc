"""What structural compression took out of a model: blocks, and inputs and outputs of layers, as its notes have it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..compression.notes import every_note
from ..errors import StepFailed


@dataclass(frozen=True)
class Cut:
    """What is left of a layer's outputs and inputs, as places in the dense layer (None: all).

    runs: how many like runs the outputs are made of (3 where one layer makes q, k and v), each cut alike; outputs, of:
    places in one run and its length, or of inputs; `of` is None where the compression did not note it.
    """

    outputs: tuple[int, ...] | None = None
    inputs: tuple[int, ...] | None = None
    runs: int = 1
    of: int | None = None

    def over_runs(self, kept: tuple[int, ...], total: int, what: str) -> tuple[int, ...]:
        """Places among `total` of what is `kept` of each run. StepFailed where `what` has others than the dense model."""
        if total % self.runs:
            raise StepFailed(f"{what} has {total} entries, which are no {self.runs} like runs")
        length = total // self.runs
        if length != (self.of or length) or max(kept) >= length:
            wanted = f"{self.of * self.runs}" if self.of else f"more than {max(kept) * self.runs}"
            raise StepFailed(f"{what} has {total} entries where the dense model has {wanted}")
        return tuple(run * length + i for run in range(self.runs) for i in kept)


@dataclass
class Cuts:
    """blocks: by list of blocks, dense index → index here; before: how many the dense model has, where it was noted.
    layers: by their names here, those that lost inputs or outputs."""

    blocks: dict[str, dict[int, int]] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    layers: dict[str, Cut] = field(default_factory=dict)

    @property
    def renames(self) -> bool:
        """Whether some block is gone."""
        return bool(self.blocks)

    def renamed(self, name: str) -> str | None:
        """The name here of a module or tensor of the dense model; None where its block is gone."""
        for blocks, places in self.blocks.items():
            if name.startswith(f"{blocks}."):
                number, _, rest = name[len(blocks) + 1 :].partition(".")
                if blocks in self.before and int(number) >= self.before[blocks]:
                    raise StepFailed(f"it has {name}, and the dense model {self.before[blocks]} blocks in {blocks}")
                return f"{blocks}.{places[int(number)]}.{rest}" if int(number) in places else None
        return name

    def layer(self, name: str) -> tuple[str, str] | None:
        """The layer that a tensor of this name belongs to, and the rest of its name; None where that layer is whole."""
        parts = name.split(".")
        for i in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:i]) in self.layers:
                return ".".join(parts[:i]), ".".join(parts[i:])
        return None


def read_cuts(model: nn.Module, folder: Path, steps: int) -> Cuts | None:
    """What the last `steps` compressions took out of `model`, the model of `folder`; None where all of it is still there.

    Raises StepFailed where the notes of the folder do not describe this model.
    """
    from ..models.arch import block_lists
    from ..models.widths import parts

    did: list[tuple[str, dict, dict]] = []  # what each did: blocks first, then groups within those left
    for note in every_note(folder)[-steps:] if steps else []:
        if note.get("kept_blocks"):
            did.append(("blocks", note["kept_blocks"], note.get("blocks", {})))
        if note.get("kept"):
            did.append(("groups", note["kept"], note.get("groups", {})))
    if not did:
        return None
    cuts = Cuts()
    for blocks in block_lists(model) if any(kind == "blocks" for kind, *_ in did) else []:
        places = list(range(len(model.get_submodule(blocks))))
        for kind, kept, before in reversed(did):
            if kind == "blocks" and blocks in kept:
                places = _earlier(places, kept[blocks], blocks)
                cuts.before |= {blocks: before[blocks]} if blocks in before else {}
        cuts.blocks[blocks] = {dense: here for here, dense in enumerate(places)}
    seen = set()
    for part in parts(model, plain=False):
        label, groups, of, touched = part.label, list(range(part.groups)), None, False
        for number, (kind, kept, before) in reversed(list(enumerate(did))):
            if kind == "blocks":
                label = _name_before(label, kept)
            elif label in kept:
                groups, of, touched = _earlier(groups, kept[label], label), before.get(label), True
                seen.add((number, label))
        if touched and of != part.groups:
            for layer, (starts, run) in part.rows.items():
                kept = tuple(g * run + i for g in groups for i in range(run))
                cuts.layers[f"{part.name}.{layer}"] = Cut(kept, None, len(starts), of and of * run)
            cuts.layers[f"{part.name}.{part.reader}"] = Cut(None, tuple(part.inputs(groups)), 1, of and of * part.columns)
    for number, (kind, kept, _) in enumerate(did):
        later = [k for other, k, _ in did[number + 1 :] if other == "blocks"]
        odd = [label for label in kept if kind == "groups" and (number, label) not in seen and not _gone(label, later)]
        if odd:
            raise StepFailed(f"the compression notes what it kept of {odd[0]}, which the compressed model does not have")
    return cuts


def _earlier(places: list[int], kept: list[int], what: str) -> list[int]:
    """Where `places` in what was kept were before."""
    if len(places) > len(kept):
        raise StepFailed(f"the compression notes {len(kept)} groups kept of {what}, and the model has more")
    return [kept[i] for i in places]


def _name_before(name: str, kept: dict[str, list[int]]) -> str:
    for blocks, indices in kept.items():
        if name.startswith(f"{blocks}."):
            number, _, rest = name[len(blocks) + 1 :].partition(".")
            return f"{blocks}.{indices[int(number)]}.{rest}"
    return name


def _gone(label: str, later: list[dict[str, list[int]]]) -> bool:
    """Whether one of the cuts of blocks that came later took the block of a part."""
    for kept in later:
        for blocks, indices in kept.items():
            if label.startswith(f"{blocks}."):
                number, _, rest = label[len(blocks) + 1 :].partition(".")
                if int(number) not in indices:
                    return True
                label = f"{blocks}.{indices.index(int(number))}.{rest}"
                break
    return False
