"""What every section of a configuration is made of: the frozen model that reads as a mapping, and common types."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any

from annotated_types import Ge, Gt, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict


@dataclass(frozen=True, slots=True)
class Allowed:
    """In a field's annotation: what an error says is allowed, where the type alone does not say it."""

    text: str


def whole(value: Any) -> Any:
    """1e3 in YAML is a float; where a whole number is asked for it means 1000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(whole)]
Positive = Annotated[int, BeforeValidator(whole), Ge(1)]
Seconds = Annotated[float, Gt(0)]
Text = Annotated[str, MinLen(1)]
Texts = Annotated[tuple[str, ...], Strict(False)]
"""A YAML list arrives as a list; kept as a tuple, so that a config can't be changed by accident."""


class Section(BaseModel, Mapping[str, Any]):
    """One section: a frozen pydantic model that also reads as a mapping (`section["key"]`, `**section`).

    Free-form values (`params`, `tags`, `args`, `space`) are plain dicts and lists, copied on the way in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __getitem__(self, key: str) -> Any:
        if key in type(self).model_fields or key in (self.__pydantic_extra__ or {}):
            return getattr(self, key)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]
        yield from type(self).model_fields
        yield from self.__pydantic_extra__ or {}

    def __len__(self) -> int:
        return len(type(self).model_fields) + len(self.__pydantic_extra__ or {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `json.dumps`: dicts, lists, text, numbers, bool, None. Secrets are still in it."""
        return {key: _jsonable(value) for key, value in self.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, Enum):
        return _jsonable(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, date):
        return value.isoformat()
    return os.fspath(value) if isinstance(value, PurePath) else str(value)
