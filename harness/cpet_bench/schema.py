"""JSON Schemas: of a matrix, for editors (with every registered compression backend's own settings), and of a record."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from . import registry
from .matrix import AXES, PARTS
from .settings import ModelSettings, PetSettings, RestoringSettings, TaskSettings

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_NAME = {"pattern": r"^[A-Za-z0-9](-?[A-Za-z0-9_.+])*$", "maxLength": 64}


def matrix_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a matrix file. A file that extends another need not have every axis itself."""
    backends = {name: registry.get("compression", name) for name in registry.names("compression")}
    classes: list[type[BaseModel]] = [ModelSettings, PetSettings, RestoringSettings, TaskSettings, *PARTS.values()]
    wanted = [(cls, "validation") for cls in [*classes, *(b.Settings for b in backends.values())]]
    refs, defs = models_json_schema(wanted, ref_template="#/$defs/{model}")
    steps = [_step(name, b, refs, defs["$defs"]) for name, b in backends.items()]
    defs["$defs"]["CompressionStep"] = {"anyOf": [*steps, {"enum": sorted(backends)}]}
    step = {"$ref": "#/$defs/CompressionStep"}
    nothing: dict[str, Any] = {"enum": ["none", None]}

    def of(cls: type[BaseModel]) -> dict[str, Any]:
        return refs[cls, "validation"]

    rule = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": False,
        "properties": {axis: {"anyOf": [_SCALAR, {"type": "array", "items": _SCALAR, "minItems": 1}]} for axis in AXES},
    }
    seed = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    properties = {
        "name": {"type": "string", **_NAME, "description": "of the run (default: the file's name)"},
        "extends": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            "description": "matrix files this one adds to, relative to it",
        },
        "model": _axis(of(ModelSettings), {"type": "string"}),
        "compression": _axis(nothing, step, {"type": "array", "items": step, "minItems": 1}),
        "pet": _axis(nothing, {"type": "string"}, of(PetSettings)),
        "restoring": _axis({"type": "null"}, of(RestoringSettings)),
        "task": _axis({"type": "null"}, of(TaskSettings)),
        "seed": {"anyOf": [seed, {"type": "array", "items": seed, "minItems": 1, "uniqueItems": True}]},
        **{part: of(cls) for part, cls in PARTS.items()},
        "include": {"type": "array", "items": rule, "description": "rules one of which a cell must match"},
        "exclude": {"type": "array", "items": rule, "description": "rules none of which a cell may match"},
        "allow_code": {"type": "boolean", "default": False, "description": "run Python that task files or models name"},
    }
    head = {"$schema": DRAFT, "title": "cpet-bench matrix", "type": "object", "additionalProperties": False}
    return {**head, "properties": properties, **defs}


_SCALAR = {"type": ["string", "integer"]}


def _axis(*values: dict[str, Any]) -> dict[str, Any]:
    one = {"anyOf": list(values)} if len(values) > 1 else values[0]
    return {"type": "object", "minProperties": 1, "propertyNames": _NAME, "additionalProperties": one}


def _step(name: str, backend, refs: dict, defs: dict[str, Any]) -> dict[str, Any]:
    """One backend's settings with the key `backend` that names it."""
    found = dict(defs[refs[backend.Settings, "validation"]["$ref"].rpartition("/")[2]])
    found["properties"] = {"backend": {"const": name}, **found.get("properties", {})}
    found["required"] = ["backend", *found.get("required", [])]
    found["title"] = name
    return found
