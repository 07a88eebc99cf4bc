"""Checking a document against settings models, with errors a person can act on."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .errors import InputError
from .settings import PetSettings
from .wording import sentence
from .yamlpos import Document, Path_

NAME = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9_.+])*")
_WORDS = {
    "gt": "greater than",
    "ge": "at least",
    "lt": "less than",
    "le": "at most",
    "multiple_of": "a multiple of",
}


class Reader:
    """Checks parts of one document and knows where they stand."""

    def __init__(self, document: Document):
        self.document = document

    def error(self, path: Path_, message: str, *, given: object = None, allowed: Iterable[str] | None = None) -> InputError:
        """An InputError about what stands at `path`."""
        file, line = self.document.locate(path)
        key = ".".join(map(str, path))[:300] or None
        return InputError(message[:600], file=file, line=line, key=key, given=given, allowed=allowed)

    def placed(self, error: InputError, path: Path_) -> InputError:
        return self.error(path, error.message, given=error.given, allowed=error.allowed)

    def mapping(self, path: Path_, value: Any, message: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(path, f"{message}, not {_shown(value)}")
        return value

    def known(self, path: Path_, value: dict, allowed: Iterable[str], what: str = "key") -> None:
        allowed = list(allowed)
        for key in value:
            if key not in allowed:
                raise self.error((*path, key), f"there is no {what} of this name", given=key, allowed=allowed)

    def name(self, path: Path_, name: str) -> str:
        """A name that can stand in a cell's id and in a file's name."""
        if len(name) > 64 or not NAME.fullmatch(name):
            rule = "up to 64 letters, digits and _ . + or single - (it becomes part of ids and files)"
            raise self.error(path, f"{name[:80]!r} cannot be a name: {rule}")
        return name

    def model(self, path: Path_, cls: type[BaseModel], value: Any, more: Iterable[str] = ()) -> Any:
        """`value` as settings of class `cls`. more: keys allowed beside those of the class (for the message)."""
        if not isinstance(value, (dict, bool)) or isinstance(value, bool):
            raise self.error(path, f"a mapping of settings is expected, not {_shown(value)}", given="", allowed=names_of(cls))
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        except RecursionError:
            raise self.error(path, "it is nested too deep") from None
        first = min(problems, key=lambda p: p["type"] != "extra_forbidden")
        at = self._existing((*path, *first["loc"]))
        inner = first["loc"]
        # One mistake is a problem for each member of a union.
        more_of = {self._existing((*path, *p["loc"])) for p in problems} - {at}
        rest = f" (and {len(more_of)} more problem{'s' * (len(more_of) > 1)})" if more_of else ""
        if first["type"] == "extra_forbidden":
            allowed = [*names_of(_class_at(cls, inner[:-1])), *(more if len(inner) == 1 else ())]
            raise self.error(at, f"there is no setting of this name{rest}.", given=inner[-1], allowed=allowed)
        text, allowed = first["msg"].removeprefix("Value error, "), None
        if first["type"] == "literal_error":
            allowed = re.findall(r"'([^']*)'", first["ctx"]["expected"])
            text = f"{_shown(first['input'])} is not one of these"
            if not allowed:  # numbers
                text, allowed = f"{_shown(first['input'])} is not one of {first['ctx']['expected']}", None
            elif other := _class_at(cls, inner):  # a mapping can stand there as well
                allowed.append("{" + ", ".join(f"{name}: ..." for name in names_of(other)) + "}")
        elif first["type"] == "missing":
            at = (*at, str(inner[-1])) if at[-1:] != (inner[-1],) else at
            bounds = _bounds(_field_at(cls, inner))
            text, allowed = "it is missing" + (f": {bounds}" if bounds else ""), _literals(_field_at(cls, inner))
        elif first["type"] != "value_error":
            bounds = _bounds(_field_at(cls, inner))
            if " and " in bounds and first["type"].startswith(("greater_than", "less_than", "multiple_of")):
                text = f"input should be {bounds}"
            shown = _shown(first["input"])
            text = sentence(first, _field_at(cls, inner), shown) or f"{text[0].lower()}{text[1:]}, not {shown}"
        raise self.error(at, text + rest + ("." if allowed else ""), given=first["input"], allowed=allowed)

    def _existing(self, path: Path_) -> Path_:
        """`path` without what pydantic adds to it (names of validators and of a union's members)."""
        found: Path_ = ()
        for part in path:
            if (*found, part) in self.document.places:
                found = (*found, part)
        return found or path

    def pet(self, path: Path_, settings: PetSettings) -> PetSettings:
        """The method and its fields against what the installed PEFT has, or a method of our own takes."""
        from .pet.catalogue import peft_fields, pet_methods
        from .pet.own import OWN, plain_name
        from .pet.values import wrong

        methods = pet_methods()
        method = plain_name(settings.method)
        if method not in methods:
            message = f"there is no PET method {settings.method[:80]!r}"
            raise self.error((*path, "method"), message, given=settings.method, allowed=methods)
        fields = peft_fields().get(method, {})
        for key in settings.fields:
            if key not in methods[method]:
                whose = method if method in OWN else f"PEFT's {method}"
                message = f"{whose} has no field of this name"
                raise self.error((*path, key), message, given=key, allowed=[*methods[method], "train"])
            if key in fields and (refused := wrong(method, key, settings.fields[key], fields[key])):
                shown = _shown(refused.given)
                message = f"it must be {refused.must_be}, not {shown}" if refused.must_be else f"{shown} is not one of these"
                raise self.error((*path, key, *refused.where), message, given=refused.given, allowed=refused.allowed)
        if method in OWN:
            self.model(path, OWN[method], settings.fields)
        if "init_text" in settings.fields:
            self._start(path, settings.fields)
        return settings

    def _start(self, path: Path_, fields: dict[str, Any]) -> None:
        """A prefix that starts from a text: some text, and keys and values that are the weights themselves."""
        text = fields["init_text"]
        if not isinstance(text, str) or not text.strip():
            message = "what the virtual tokens start from should be a text, such as the task's question"
            raise self.error((*path, "init_text"), f"{message}, not {_shown(text)}", given=text)
        if fields.get("prefix_projection"):
            message = "a text gives keys and values, which are not the weights with prefix_projection: leave one of the two out"
            raise self.error((*path, "prefix_projection"), message)


def names_of(cls: type[BaseModel] | None) -> list[str]:
    """The keys a settings class reads."""
    return [] if cls is None else [f.alias or name for name, f in cls.model_fields.items()]


def _class_at(cls: type[BaseModel] | None, loc: tuple) -> type[BaseModel] | None:
    """The settings class that stands at `loc` below `cls`."""
    for part in loc:
        if cls is None:
            return None
        field = next((f for name, f in cls.model_fields.items() if part in (name, f.alias)), None)
        if field is not None:
            cls = _model_of(field.annotation)
    return cls


def _field_at(cls: type[BaseModel] | None, loc: tuple) -> FieldInfo | None:
    """The field that `loc` names below `cls`."""
    owner = _class_at(cls, loc[:-1])
    return next((f for name, f in owner.model_fields.items() if loc[-1] in (name, f.alias)), None) if owner and loc else None


def _bounds(field: FieldInfo | None) -> str:
    """What a number must be: `greater than 0 and at most 1`; empty where anything goes."""
    found = [] if field is None else list(field.metadata)
    for part in () if field is None else get_args(field.annotation):  # of `Share | None`
        found += [m for given in getattr(part, "__metadata__", ()) for m in getattr(given, "metadata", ())]
    return " and ".join(f"{word} {getattr(m, name)}" for name, word in _WORDS.items() for m in found if hasattr(m, name))


def _literals(field: FieldInfo | None) -> list[str] | None:
    """The names that a field takes, where it takes names of a list alone."""
    there = field is not None and get_origin(field.annotation) is Literal
    return list(map(str, get_args(field.annotation))) if there else None


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if get_origin(annotation) is Annotated:
        return _model_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next((m for m in map(_model_of, get_args(annotation)) if m), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _shown(value: Any) -> str:
    text = {dict: "a mapping", list: "a list", type(None): "nothing"}.get(type(value)) or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
