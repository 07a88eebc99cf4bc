"""safetensors files tensor by tensor: what is in them, one of their tensors, and files of which tensors come one at a time.

The library reads files by mapping them and writes them whole; here no more than one tensor is in memory. Importing this loads
no torch, so that a plan can ask for the shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# The format's names of torch's number formats, in the order in which its library has them (files begin with the last).
_FORMATS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
}


class Place(NamedTuple):
    """Where a tensor lies: its file, the first byte in it, how many bytes, the format's name of its numbers, its shape."""

    file: Path
    start: int
    size: int
    format: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        found = 1
        for n in self.shape:
            found *= n
        return found


def places(folder: Path) -> dict[str, Place]:
    """The tensors of a model folder by name, from the headers alone of model.safetensors or of the files that an index names.

    Raises: FileNotFoundError where there are neither.
    """
    files = {"model.safetensors"}
    if not Path(folder, "model.safetensors").is_file():
        files = set(json.loads(Path(folder, "model.safetensors.index.json").read_text())["weight_map"].values())
    found = {}
    for path in sorted(Path(folder, name) for name in files):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                first, end = about["data_offsets"]
                found[name] = Place(path, 8 + length + first, end - first, about["dtype"], tuple(about["shape"]))
    return found


def read(place: Place) -> torch.Tensor:
    """The tensor at `place`, in memory of its own."""
    import torch

    tensor = torch.empty(place.shape, dtype=getattr(torch, _FORMATS[place.format]))
    if place.size:
        with place.file.open("rb") as file:
            file.seek(place.start)
            if file.readinto(_bytes(tensor)) != place.size:
                raise OSError(f"{place.file} ends before its last tensor")
    return tensor


def _bytes(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU as a numpy array of bytes."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


class Files:
    """safetensors files of a model folder whose tensors are written in any order: the very bytes that save_pretrained gives."""

    def __init__(self, out: Path, state: dict[str, torch.Tensor]):
        """state: all tensors that will come, on the meta device; their shapes and number formats are what counts."""
        from huggingface_hub import split_torch_state_dict_into_shards

        out.mkdir(parents=True, exist_ok=True)
        names = {name: i for i, name in enumerate(_FORMATS.values())}
        short = {long: name for name, long in _FORMATS.items()}
        pattern = {"filename_pattern": "model{suffix}.safetensors", "max_shard_size": "50GB"}
        split = split_torch_state_dict_into_shards(state, **pattern)
        self.left: dict[str, Place] = {}
        self._index = None
        if split.is_sharded:
            total = sum(t.numel() for t in state.values())
            metadata = {"total_parameters": total, **split.metadata}
            self._index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        self._out = out
        for file, inside in split.filename_to_tensors.items():
            kinds = {name: str(state[name].dtype).removeprefix("torch.") for name in inside}
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            at, here = 0, []
            for name in sorted(inside, key=lambda n: (-names[kinds[n]], n)):
                shape, end = list(state[name].shape), at + state[name].nbytes
                header[name] = {"dtype": short[kinds[name]], "shape": shape, "data_offsets": [at, end]}
                here.append((name, at, end - at))
                at = end
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            with Path(out, file).open("wb") as written:
                written.write(len(text).to_bytes(8, "little") + text)
                written.truncate(8 + len(text) + at)
            for name, start, size in here:
                about = header[name]
                place = Place(Path(out, file), 8 + len(text) + start, size, about["dtype"], tuple(about["shape"]))
                self.left[name] = place

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor in its place; each comes once."""
        place = self.left.pop(name)
        if tuple(tensor.shape) != place.shape or str(tensor.dtype) != f"torch.{_FORMATS[place.format]}":
            raise ValueError(f"{name} comes as {tensor.dtype} {tuple(tensor.shape)}, and is to be {place.format} {place.shape}")
        with place.file.open("r+b") as file:
            file.seek(place.start)
            file.write(_bytes(tensor.detach().cpu().contiguous()))

    def close(self) -> int:
        """Write the index where there are several files. Returns bytes of all files of weights."""
        if self.left:
            raise ValueError(f"{len(self.left)} tensors did not come, {next(iter(self.left))} among them")
        if self._index:
            text = json.dumps(self._index, indent=2, sort_keys=True) + "\n"
            Path(self._out, "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return sum(p.stat().st_size for p in self._out.glob("*.safetensors"))
