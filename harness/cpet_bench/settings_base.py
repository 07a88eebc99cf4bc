"""What all settings are made of: the closed model, bounded numbers, parts that `true` and `false` switch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer
from pydantic.fields import FieldInfo


class Settings(BaseModel):
    """Closed and immutable: an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=())


class Grown(Settings):
    """Leaves out its later fields where they have their defaults, so that keys and records of before stay the same."""

    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _as_before(self, handler):
        unset = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return {k: v for k, v in handler(self).items() if k not in unset}


Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
Natural = Annotated[int, Field(ge=0, le=1_000_000_000)]
Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(gt=0, lt=1)]


def _switch(value):
    """`true` stands for the part with its defaults, `false` and `null` for no such part."""
    return {} if value is True else None if value is False else value


def switched(cls: type[Settings]) -> Any:
    return Annotated[cls | None, BeforeValidator(_switch, json_schema_input_type=cls | bool | None)]


def _not_null(value):
    if value is None:
        raise ValueError("null is no value here; leave it out for the one that it has without this")
    return value


def named(kind: Any) -> Any:
    """A setting that is unset unless it is named, and then is of this kind: null in a file is refused."""
    return Annotated[kind | None, BeforeValidator(_not_null, json_schema_input_type=kind)]


def is_switched(field: FieldInfo) -> bool:
    """Whether a field takes `true` and `false` for a part."""
    return any(getattr(m, "func", None) is _switch for m in field.metadata)
