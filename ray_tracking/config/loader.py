"""Where a configuration comes from: packaged files, the user's file, environment variables and overrides.

Lowest first: base.yaml, <environment>.yaml, the user's file, RAY_TRACKING_STORAGE, overrides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, BinaryIO, cast

from ray_tracking.config import yaml_text
from ray_tracking.config.merging import nest
from ray_tracking.config.models import Config, Section
from ray_tracking.config.problems import Layer, validate
from ray_tracking.config.redaction import redact_text
from ray_tracking.errors import ConfigError

ENVIRONMENTS = ("development", "production", "testing")
"""The packaged ones. Others are files beside the user's own: `<environment>.yaml`."""
ENVIRONMENT_VARIABLE = "RAY_TRACKING_ENV"
STORAGE_VARIABLE = "RAY_TRACKING_STORAGE"
OVERRIDES = "overrides (--set)"

_ENVIRONMENT_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")


def get_config(
    environment: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    file: str | os.PathLike[str] | None = None,
) -> Config:
    """The validated configuration.

    `environment`: None means $RAY_TRACKING_ENV, else "development". `overrides`: nested, or with dotted keys
    ("training.default.save_steps"). `file`: a YAML file that may say as little as one key.
    Raises ConfigError that tells every problem by file, line and key.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"The overrides are {type(overrides).__name__}, not a mapping.",
            hint='Give {"training.default.save_steps": 10}; parse_assignments makes it of "key=value" texts.',
        )
    own = Path(file).expanduser() if file is not None else None
    layers = [_packaged("base"), _environment(environment or os.environ.get(ENVIRONMENT_VARIABLE), own)]
    if own is not None:
        layers.append(_read(own, str(own)))
    if storage := os.environ.get(STORAGE_VARIABLE):
        layers.append(Layer(f"environment variable {STORAGE_VARIABLE}", {"storage": storage}))
    if overrides:
        layers.append(Layer(OVERRIDES, nest(overrides)))
    return validate(Config, layers)


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A new configuration: `config` with overrides (nested or dotted keys) over it. Raises ConfigError."""
    return validate(Config, [Layer("", _as_dict(config)), Layer(OVERRIDES, nest(overrides))])


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["training.default.mode=max", "params.lr=1e-3"]` as overrides with dotted keys.

    The value is all after the first `=`, read as YAML: `[1, 2]`, `{a: 1}`, `null`, `true`, numbers, text.
    Of a repeated key the last counts. Raises ConfigError.
    """
    result: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"--set {redact_text(assignment)}: not of the form key=value.",
                hint="Write the dotted key, = and the value: --set training.default.save_steps=100",
            )
        result.pop(key, None)  # so that a later assignment also comes later in order
        result[key] = _value(text, f"--set {key}")
    return result


def _value(text: str, source: str) -> Any:
    stripped = text.strip()
    if stripped[:1] in tuple("*&@`%#"):  # YAML's own signs, meaningless on a command line: `*.png`, `#1`
        return stripped
    try:
        document = yaml_text.parse(text, source)
    except ConfigError:
        if stripped[:1] in tuple("[{\"'!|>"):
            raise
        return stripped
    if document.duplicates:
        raise ConfigError(f"{source}: a key stands twice in {redact_text(stripped)}. Keep one of them.")
    starts_comment = " #" in text and stripped[:1] not in tuple("[{\"'")
    return stripped if starts_comment else document.data


def _as_dict(section: Section) -> dict[str, Any]:
    return {key: _as_dict(value) if isinstance(value, Section) else value for key, value in section.items()}


def _environment(name: str | None, own: Path | None) -> Layer:
    name = name or "development"
    if name in ENVIRONMENTS:
        return _packaged(name)
    beside = own.parent / f"{name}.yaml" if own is not None and _ENVIRONMENT_NAME.match(name) else None
    if beside is not None and name != "base" and beside.is_file():
        return _read(beside, str(beside))
    where = f", or a file {beside} (there is none)" if beside else ", or a file <name>.yaml beside the one of --config"
    raise ConfigError(
        f"Unknown environment {name!r}.{_did_you_mean(name)}",
        hint=f"Allowed: {', '.join(ENVIRONMENTS)}{where}. Set it with --env or {ENVIRONMENT_VARIABLE}.",
    )


def _did_you_mean(name: str) -> str:
    begins = [known for known in ENVIRONMENTS if known.startswith(name.lower())]
    close = begins or get_close_matches(name.lower(), ENVIRONMENTS, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _packaged(name: str) -> Layer:
    return _read(_defaults() / f"{name}.yaml", f"{name}.yaml (packaged)")


def _defaults() -> Traversable:
    """The packaged files: in the package if it is a wheel, in the repository's `configs/` if editable."""
    package = files("ray_tracking")
    inside = package / "config" / "defaults"
    if inside.is_dir():
        return inside
    return cast(Traversable, Path(str(package)).parent / "configs")


def _read(path: Traversable | Path, source: str) -> Layer:
    try:
        with cast(BinaryIO, path.open("rb")) as stream:
            raw = stream.read(yaml_text.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"Can't read the configuration file {source}: {error.strerror or error}.",
            hint=f"Give the path of a YAML file that exists and may be read; looked for {path}.",
        ) from error
    if len(raw) > yaml_text.MAX_BYTES:
        raise yaml_text.too_large(source)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}, line {line}: not UTF-8.", hint="Save the file as UTF-8.") from error
    document = yaml_text.parse(text, source)
    if document.data is None:
        return Layer(source, {})
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{source}, line 1: found {_top(document.data)} at the top, allowed: a mapping.",
            hint="A configuration file begins like this:\nname: my-run\nparams: {lr: 0.001}",
        )
    return Layer(source, document.data, document.lines, document.duplicates)


def _top(data: Any) -> str:
    return "a list" if isinstance(data, list) else "a single value"
