"""The matrix a user writes: read, checked, every error with its file, line and key. Imports no torch, PEFT or lm-eval."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SerializeAsAny

from . import registry
from .compression.calibration import too_little
from .errors import InputError
from .matrix_files import merged, there
from .pet.needs import refuse_alone
from .settings import (
    DeviceSettings,
    LimitSettings,
    ModelSettings,
    PetSettings,
    ProbeSettings,
    PromptSettings,
    RestoringSettings,
    SelectSettings,
    Settings,
    TaskSettings,
    TrainSettings,
)
from .validation import Reader
from .yamlpos import Document, Path_

AXES = ("model", "compression", "pet", "restoring", "task", "seed")
PARTS = {
    "train": TrainSettings,
    "prompt": PromptSettings,
    "probes": ProbeSettings,
    "device": DeviceSettings,
    "limits": LimitSettings,
    "select": SelectSettings,
}
Rule = dict[str, list[str]]


class Choice(BaseModel):
    """One compression step: a backend by its registered name, with its own settings."""

    model_config = ConfigDict(frozen=True)
    name: str
    settings: SerializeAsAny[BaseModel]


class Matrix(Settings):
    """A checked matrix. An axis is a mapping of the user's names to settings; seeds name themselves."""

    name: str
    model: dict[str, ModelSettings]
    compression: dict[str, tuple[Choice, ...]]
    pet: dict[str, PetSettings | None]
    restoring: dict[str, RestoringSettings]
    task: dict[str, TaskSettings]
    seed: tuple[int, ...]
    train: TrainSettings = TrainSettings()
    prompt: PromptSettings = PromptSettings()
    probes: ProbeSettings = ProbeSettings()
    device: DeviceSettings = DeviceSettings()
    limits: LimitSettings = LimitSettings()
    select: SelectSettings | None = None
    allow_code: bool = False
    include: tuple[Rule, ...] = ()
    exclude: tuple[Rule, ...] = ()
    only: tuple[Rule, ...] = Field((), description="what the command line's --only leaves")

    _document: Document = PrivateAttr()
    _path: Path = PrivateAttr()
    _nothing: dict[str, str] = PrivateAttr()
    _others: dict[tuple, Any] = PrivateAttr(default_factory=dict)

    @property
    def others(self) -> dict[tuple, Any]:
        """Cells that others refer to, by the values of their axes (see cells.Cell)."""
        return self._others

    @property
    def path(self) -> Path:
        """The file it was read from; relative paths in it start at that file's folder."""
        return self._path

    @property
    def nothing(self) -> dict[str, str]:
        """By axis, the name this matrix has for no compression, no PET, and nothing restored."""
        return self._nothing

    @property
    def document(self) -> Document:
        """What the file says, with what it extends merged in."""
        return self._document

    def locate(self, *path: str | int) -> tuple[Path | None, int | None]:
        """File and line of a key, or of the nearest thing around it."""
        return self._document.locate(path)

    def place(self, error: InputError, *path: str | int) -> InputError:
        """`error` with the file, line and whole key of `path` (and of the error's own key below it)."""
        own = tuple(error.key.split(".")) if error.key and not error.key.startswith("-") else ()
        while own and path and own[0] in (path[0], path[-1]):
            own = own[1:]
        file, line = self.locate(*path, *own)
        error.key = ".".join(map(str, (*path, *own)))
        return error.at(file, line)


def load_matrix(path: Path, only: list[str] | None = None) -> Matrix:
    """Read, merge with what it extends, and check a matrix. Raises InputError with file, line and key."""
    path = there(Path(path))
    document = merged(path)
    reader = Reader(document)
    raw = reader.mapping((), document.data, "a matrix is a mapping (model: ..., task: ...)")
    known = {*AXES, *PARTS, "name", "extends", "include", "exclude", "allow_code"}
    reader.known((), raw, known)
    found: dict[str, Any] = {"name": _name(reader, raw, path)}
    found |= {axis: _axis(reader, raw, axis) for axis in AXES if axis != "seed"}
    found["restoring"] = _ablated(reader, found["restoring"])
    found["seed"] = _seeds(reader, raw)
    for part, cls in PARTS.items():
        if raw.get(part) is not None:
            found[part] = reader.model((part,), cls, raw[part])
    if not isinstance(raw.get("allow_code", False), bool):
        raise reader.error(("allow_code",), "it must be true or false")
    found["allow_code"] = raw.get("allow_code", False)
    names = {axis: [str(n) for n in found[axis]] for axis in AXES}
    for part in ("include", "exclude"):
        found[part] = _rules(reader, part, raw.get(part), names)
    found["only"] = tuple(_only(text, names) for text in only or ())
    matrix = Matrix.model_construct(**{**found, "seed": tuple(found["seed"])})
    matrix._document, matrix._path = document, path
    matrix._nothing = {
        "compression": next((n for n, chain in matrix.compression.items() if not chain), "none"),
        "pet": next((n for n, pet in matrix.pet.items() if pet is None), "none"),
        "restoring": next((n for n, r in matrix.restoring.items() if not r.parts), "vanilla"),
    }
    _check(matrix, reader)
    return matrix


def _name(reader: Reader, raw: dict, path: Path) -> str:
    name = raw.get("name", path.stem)
    return reader.name(("name",), name if isinstance(name, str) else str(name))


# -- axes ------------------------------------------------------------------------------------------------------------
DEFAULTS: dict[str, dict] = {"compression": {"none": "none"}, "pet": {"none": "none"}, "restoring": {"vanilla": {}}}


def _axis(reader: Reader, raw: dict, axis: str) -> dict[str, Any]:
    given = raw.get(axis, DEFAULTS.get(axis))
    if given is None:
        raise reader.error((axis,), f"a matrix needs at least one {axis}")
    entries = reader.mapping((axis,), given, f"{axis} is a mapping of your own names to settings")
    if not entries:
        raise reader.error((axis,), f"the axis {axis} is empty")
    return {reader.name((axis, name), name): _VALUES[axis](reader, (axis, name), v) for name, v in entries.items()}


def _model(reader: Reader, path: Path_, value: Any) -> ModelSettings:
    if isinstance(value, str):
        value = {"source": value}
    settings = reader.model(path, ModelSettings, value)
    try:
        registry.get("source", settings.source.partition(":")[0])
    except InputError as error:
        raise reader.placed(error, (*path, "source")) from None
    return settings


def _compression(reader: Reader, path: Path_, value: Any) -> tuple[Choice, ...]:
    if value in (None, "none"):
        return ()
    chain: list[Choice] = []
    several = isinstance(value, list)
    for i, one in enumerate(value if several else [value]):
        at = (*path, i) if several else path
        if isinstance(one, str):
            one = {"backend": one}
        one = dict(reader.mapping(at, one, "a compression is `none`, a mapping with `backend`, or a list of those"))
        name = one.pop("backend", None)
        if not isinstance(name, str):
            raise reader.error(at, "it names no backend", given="", allowed=registry.names("compression"))
        try:
            backend = registry.get("compression", name)
        except InputError as error:
            raise reader.placed(error, (*at, "backend")) from None
        settings = reader.model(at, backend.Settings, one, more=["backend"])
        refused = backend.refuse(settings, [c.name for c in chain])
        if refused:
            raise reader.error(at, refused)
        short = too_little(backend, settings)
        if short:
            raise reader.error((*at, "calibration"), short)
        chain.append(Choice.model_construct(name=name, settings=settings))
    if not chain:
        raise reader.error(path, "the list of compression steps is empty (write none for no compression)")
    return tuple(chain)


def _pet(reader: Reader, path: Path_, value: Any) -> PetSettings | None:
    if value in (None, "none"):
        return None
    if isinstance(value, str):
        value = {"method": value}
    settings = reader.model(path, PetSettings, value)
    return reader.pet(path, settings)


def _restoring(reader: Reader, path: Path_, value: Any) -> RestoringSettings:
    if path[1] == "none":
        raise reader.error(path, "a restoring cannot be named none: cells without a PET method show that")
    return reader.model(path, RestoringSettings, {} if value is None else value)


def _ablated(reader: Reader, restorings: dict[str, RestoringSettings]) -> dict[str, RestoringSettings]:
    """The axis with every combination of the parts of those that say `ablate`, fewer parts first."""
    found: dict[str, RestoringSettings] = {}
    for name, whole in restorings.items():
        whole, ablate = whole.model_copy(update={"ablate": False}), whole.ablate
        parts = whole.named_parts if ablate else []
        for kept in (c for n in range(len(parts)) for c in combinations(parts, n)):
            own = f"{name}-{'+'.join(kept) or 'vanilla'}"
            if own in restorings:
                raise reader.error(("restoring", own), f"{name} (ablate) makes a restoring of this name, too")
            found[own] = whole.model_copy(update={part: None for part in parts if part not in kept})
        found[name] = whole
    return found


def _task(reader: Reader, path: Path_, value: Any) -> TaskSettings:
    return reader.model(path, TaskSettings, {} if value is None else value)


_VALUES = {"model": _model, "compression": _compression, "pet": _pet, "restoring": _restoring, "task": _task}


def _seeds(reader: Reader, raw: dict) -> list[int]:
    given = raw.get("seed", 0)
    seeds = given if isinstance(given, list) else [given]
    if not seeds:
        raise reader.error(("seed",), "the axis seed is empty")
    for i, seed in enumerate(seeds):
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
            raise reader.error(("seed", i), f"a seed is a whole number from 0 to {2**31 - 1}, not {seed!r}"[:200])
        if seed in seeds[:i]:
            raise reader.error(("seed", i), f"the seed {seed} stands here twice")
    return seeds


# -- rules -----------------------------------------------------------------------------------------------------------
def _rules(reader: Reader, part: str, given: Any, names: dict[str, list[str]]) -> tuple[Rule, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise reader.error((part,), f"{part} is a list of rules such as {{compression: nf4, restoring: [a, b]}}")
    found = []
    for i, rule in enumerate(given):
        rule = reader.mapping((part, i), rule, "a rule is a mapping of axes to names")
        reader.known((part, i), rule, AXES, what="axis")
        if not rule:
            raise reader.error((part, i), "the rule names no axis")
        found.append({axis: _wanted(reader, (part, i, axis), v, names[axis], axis) for axis, v in rule.items()})
    return tuple(found)


def _wanted(reader: Reader, path: Path_, value: Any, known: list[str], axis: str) -> list[str]:
    wanted = [str(v) for v in (value if isinstance(value, list) else [value])]
    if not wanted:
        raise reader.error(path, "the rule has no names")
    for name in wanted:
        if not _known(name, known, axis):
            raise reader.error(path, f"there is no {axis} {name[:80]!r} in this matrix", given=name, allowed=known)
    return wanted


def _known(name: str, known: list[str], axis: str) -> bool:
    if name in known or (axis == "restoring" and name == "none"):
        return True
    if not any(c in name for c in "*?["):
        return False
    from fnmatch import fnmatchcase

    return any(fnmatchcase(k, name) for k in known)


def _only(text: str, names: dict[str, list[str]]) -> Rule:
    axis, equals, value = text.partition("=")
    if not equals or not value:
        raise InputError(f"{text!r} is not AXIS=NAME.", key="--only", given=axis, allowed=AXES)
    if axis not in AXES:
        raise InputError(f"There is no axis {axis!r}.", key="--only", given=axis, allowed=AXES)
    wanted = value.split(",")
    for name in wanted:
        if not _known(name, names[axis], axis):
            raise InputError(f"There is no {axis} {name!r}.", key="--only", given=name, allowed=names[axis])
    return {axis: wanted}


# -- what only the whole matrix can tell -----------------------------------------------------------------------------
def _check(matrix: Matrix, reader: Reader) -> None:
    tuned = any(pet is not None for pet in matrix.pet.values())
    for name, restoring in matrix.restoring.items():
        path = ("restoring", name)
        if restoring.of is not None:
            if restoring.of not in matrix.restoring:
                message = f"there is no restoring {restoring.of!r}"
                raise reader.error((*path, "of"), message, given=restoring.of, allowed=matrix.restoring)
            other = matrix.restoring[restoring.of]
            if other.control:
                raise reader.error((*path, "of"), f"{restoring.of} is a control itself")
        other = getattr(restoring.distill and restoring.distill.teacher, "model", None)
        if other is not None and other not in matrix.model:
            message = f"there is no model {other[:80]!r} in this matrix"
            raise reader.error((*path, "distill", "teacher", "model"), message, given=other, allowed=matrix.model)
        if restoring.parts and not tuned:
            raise reader.error(path, "nothing is tuned: the matrix has no PET method to restore")
    if not any(r.inherit and r.inherit.from_ for r in matrix.restoring.values()):  # else each cell is asked, see fitting
        for name, pet in matrix.pet.items():
            try:
                if pet is not None:
                    refuse_alone(pet, _steps(matrix, pet))
            except InputError as error:
                raise matrix.place(error, "pet", name) from None
    for name, settings in matrix.model.items():
        source = registry.get("source", settings.source.partition(":")[0])
        try:
            source().check(settings, matrix.path.parent)
        except InputError as error:
            raise matrix.place(error, "model", name) from None


def _steps(matrix: Matrix, pet: PetSettings) -> int:
    """The steps of every training of `pet`; 0 where they differ."""
    found = {r.train.steps for r in matrix.restoring.values() if r.train.steps is not None}
    found |= {pet.train.steps} if pet.train.steps is not None else {t.train.steps for t in matrix.task.values()}
    found = {matrix.train.steps if steps is None else steps for steps in found}
    return found.pop() if len(found) == 1 else 0
