"""Layers of plain data laid over each other. Pure; knows nothing of files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from ray_tracking.config.models import Section
from ray_tracking.config.schema import field_of, without_null
from ray_tracking.errors import ConfigError


def plain(value: Any) -> Any:
    """A copy in plain dicts and lists; paths become text, other libraries' numbers (numpy) Python's own."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`: mappings are merged, everything else (lists too) is replaced. Neither is changed."""
    result = dict(low)
    for key, value in high.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = merge(below, value)
        else:
            result[key] = plain(value)
    return result


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Spread the top level's dotted keys: `{"a.b": 1}` is `{"a": {"b": 1}}`. Later ones win.

    Keys further down are taken as they stand, so that a parameter may have a dot in its name.
    Raises ConfigError for a key that is not text or has an empty part.
    """
    result: dict[str, Any] = {}
    key: object
    for key, value in flat.items():
        parts = key.split(".") if isinstance(key, str) else []
        if not all(parts) or not parts:
            raise ConfigError(
                f"The override key {key!r} is not a dotted key.",
                hint="Allowed: names joined by single dots, such as training.default.save_steps.",
            )
        for part in reversed(parts):
            value = {part: value}
        result = merge(result, value)
    return result


def drop_empty(layer: Mapping[str, Any], kind: type[Section]) -> dict[str, Any]:
    """Leave out sections that are null but can't be.

    A YAML section with all its lines commented out is null and means "nothing to say here".
    """
    result: dict[str, Any] = {}
    for key, value in layer.items():
        annotation, _ = field_of(kind, key)
        inner, nullable = without_null(annotation)
        is_section = isinstance(inner, type) and issubclass(inner, Section)
        is_mapping = is_section or getattr(inner, "__origin__", None) is dict
        if value is None and is_mapping and not nullable:
            continue
        result[key] = drop_empty(value, inner) if is_section and isinstance(value, Mapping) else value
    return result
