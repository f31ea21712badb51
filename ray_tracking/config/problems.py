"""From layers of data to a validated section, or to one ConfigError that tells every problem. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ray_tracking.config import schema
from ray_tracking.config.merging import drop_empty, merge, plain
from ray_tracking.config.models import CheckpointConfig, Config, Section, TrainingConfig
from ray_tracking.config.redaction import redact
from ray_tracking.config.sweep import NOT_ALLOWED
from ray_tracking.errors import ConfigError

S = TypeVar("S", bound=Section)
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """Data from one source: a file, an environment variable, the overrides. `lines`: the line by path."""

    source: str
    data: dict[str, Any]
    lines: Mapping[Path, int] = field(default_factory=dict)
    duplicates: Sequence[tuple[int, Path, int]] = ()


def validate(kind: type[S], layers: Sequence[Layer], prefix: Path = ()) -> S:
    """Merge the layers, lowest first, and validate. Raises one ConfigError with all problems.

    `prefix` is where the section stands in the whole configuration: it is put before each key named.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge(merged, drop_empty(layer.data, kind))
    problems = [
        f"{layer.source}, line {line}: {_dotted((*prefix, *path))} stands there twice, "
        f"first in line {first}. Keep one of them."
        for layer in layers
        for line, path, first in dict.fromkeys(layer.duplicates)
    ]
    try:
        section = kind.model_validate(merged)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=True)
        problems += dict.fromkeys(_sentence(kind, layers, prefix, one) for one in errors)
    else:
        if not problems:
            return section
    raise _config_error(problems)


def section(kind: type[S], value: Mapping[str, Any] | None, *, key: str | None = None) -> S:
    """`value` as a validated section: a section as it is, of a whole Config the part of that kind,
    a mapping with defaults filled in, None as the defaults.

    `key` is the dotted key that errors name; None: where such a section stands in the configuration.
    Raises ConfigError.
    """
    prefix = schema.path_of(kind) if key is None else tuple(key.split("."))
    if isinstance(value, kind):
        return value
    if isinstance(value, Config):
        found: Any = value
        for part in schema.path_of(kind):
            found = found[part] if found is not None else None
        return section(kind, found, key=key)
    if value is None:
        return validate(kind, [], prefix)
    if isinstance(value, Section) or not isinstance(value, Mapping):
        raise _config_error([f"{_dotted(prefix)}: found {_shown('', value)}, allowed: {schema.describe(kind)}."])
    return validate(kind, [Layer("", plain(value))], prefix)


def _config_error(problems: Sequence[str]) -> ConfigError:
    count = "" if len(problems) == 1 else f" ({len(problems)} problems)"
    return ConfigError("\n".join([f"The configuration is not valid{count}:", *(f"  {one}" for one in problems)]))


def _sentence(kind: type[Section], layers: Sequence[Layer], prefix: Path, error: ErrorDetails) -> str:
    path = tuple(str(part) for part in error["loc"] if part != "[key]")
    is_key = error["type"] == "invalid_key" or error["loc"][-1:] == ("[key]",)
    if is_key:  # the location has true as 1
        path = (*path[:-1], str(error["input"]))
    where = _origin(layers, path)
    name = _dotted((*prefix, *path))
    if _is_unknown(kind, path, error):
        return f"{where}{name} is not a known key.{_suggestion(kind, path, prefix)}"
    allowed = schema.describe(*schema.at(kind, path))
    if error["type"] == "missing":
        return f"{where}{name} is missing, allowed: {allowed}."
    if is_key:
        return f"{where}the key {name} is not text, allowed: text. Quote it{_SWITCHES.get(path[-1], '')}."
    if error["type"] == "value_error" and issubclass(_kind_at(kind, path), Section):
        allowed = str(error.get("ctx", {}).get("error", error["msg"]))
    found = _shown(path[-1] if path else "", error["input"])
    if error["type"] == NOT_ALLOWED:
        allowed = str(error.get("ctx", {}).get("allowed"))
    quote = " Quote it to make it text." if error["type"] == "string_type" and _quotable(error["input"]) else ""
    end = "" if allowed.endswith("?") else "."
    return f"{where}{name}: found {found}, allowed: {allowed}{end}{quote}"


def _is_unknown(kind: type[Section], path: Path, error: ErrorDetails) -> bool:
    if error["type"] == "extra_forbidden":
        return True
    # `training: {save_steps: 10}`: any name is allowed under training, but this one belongs one level down.
    parent = _kind_at(kind, path[:-1])
    return bool(path) and parent is TrainingConfig and path[-1] in CheckpointConfig.model_fields


def _suggestion(kind: type[Section], path: Path, prefix: Path) -> str:
    meant = schema.nearest(kind, path)
    did = f" Did you mean {_dotted((*prefix, *meant))}?" if meant else ""
    keys = ", ".join(schema.keys_of(kind, path[:-1]))
    if "." in path[-1]:
        nested = path[-1].replace(".", ": {") + ": ..." + "}" * path[-1].count(".")
        return f" Dotted keys are for --set; in a file write {nested}."
    return f"{did} Allowed here: {keys}."


def _kind_at(kind: type[Section], path: Path) -> type:
    annotation, _ = schema.without_null(schema.at(kind, path)[0])
    return annotation if isinstance(annotation, type) else object


def _origin(layers: Sequence[Layer], path: Path) -> str:
    """`file, line n: ` of the highest layer that has the path, or else the longest part of it."""
    for length in range(len(path), 0, -1):
        for layer in reversed(layers):
            if _has(layer.data, path[:length]):
                lines = (layer.lines.get(path[:shorter]) for shorter in range(length, 0, -1))
                line = next((line for line in lines if line), None)
                where = f"{layer.source}, line {line}" if line else layer.source
                return f"{where}: " if where else ""
    return ""


def _has(data: Any, path: Path) -> bool:
    for part in path:
        if isinstance(data, Mapping):
            match = next((key for key in data if str(key) == part), None)
            if match is None:
                return False
            data = data[match]
        elif isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            return False
    return True


def _quotable(value: Any) -> bool:
    return isinstance(value, int | float)


def _dotted(path: Path) -> str:
    return ".".join(path) or "the configuration"


_SWITCHES = {"True": "; YAML reads on and yes as true", "False": "; YAML reads off and no as false"}
_KINDS = (
    (bool, ""),
    (int, " (a whole number)"),
    (float, " (a number)"),
    (str, " (text)"),
    (list, " (a list)"),
)


def _shown(key: str, value: Any) -> str:
    """A value as a person would write it, short and without secrets."""
    if isinstance(value, Section):
        return f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return "a mapping with the keys " + ", ".join(map(str, value)) if value else "an empty mapping"
    if value is None:
        return "null"
    clean = redact({key: value})[key]
    try:
        text = json.dumps(clean, ensure_ascii=False)
    except (TypeError, ValueError):
        text = f"{clean} ({type(value).__name__})"
    if len(text) > 80:
        text = text[:77] + "..."
    return text + next((word for kind, word in _KINDS if isinstance(value, kind)), "")
