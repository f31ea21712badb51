"""Which backends a run has, and how each is reached, found again from what the run left. Pure.

In: the run's record, its cursors, settings given now. Out: the section `experiment_tracking` to fill them by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ray_tracking.config import Config, ExperimentTrackingConfig, section, with_overrides
from ray_tracking.errors import UsageError
from ray_tracking.runs.record import RunRecord
from ray_tracking.runs.resuming import hidden_keys
from ray_tracking.tracking.cursor import Cursor
from ray_tracking.tracking.factory import BACKEND_NAMES

_SECTION = "experiment_tracking"
_NONE: Mapping[str, Any] = {name: {"enabled": False} for name in BACKEND_NAMES}


def tracking_of(
    record: RunRecord, cursors: Iterable[Cursor], given: Mapping[str, Any], only: Sequence[str] = ()
) -> ExperimentTrackingConfig:
    """The section for the backends that the run has or was given, or for those of `only`, wanted or not by the run.

    `given`: dotted keys below experiment_tracking. Raises UsageError, ConfigError.
    """
    _check(given, only)
    found: dict[str, Any] = {**_NONE, **(record.config.get(_SECTION) or {})}
    known = {cursor.backend: cursor for cursor in cursors if cursor.backend in BACKEND_NAMES}
    for name, cursor in known.items():
        options = found.get(name) or {}
        found[name] = {**options, "enabled": True, **_place(name, cursor, record, options)}
    base = Config(experiment_tracking=section(ExperimentTrackingConfig, {**found, "enabled": True}))
    tracking = with_overrides(base, given).experiment_tracking
    wanted = list(only) or [name for name in BACKEND_NAMES if tracking[name].enabled]
    if not wanted:
        raise UsageError(
            f"The run {record.run_id!r} has no backend.",
            hint=f"Name one of {', '.join(BACKEND_NAMES)}: --backend tensorboard",
        )
    switches = {f"{_SECTION}.{name}.enabled": name in wanted for name in BACKEND_NAMES}
    tracking = with_overrides(Config(experiment_tracking=tracking), switches).experiment_tracking
    _refuse_hidden(record.run_id, {name: tracking[name] for name in wanted})
    return tracking


def touched_by(given: Mapping[str, Any]) -> set[str]:
    """The backends that have a setting among the dotted keys of `given`."""
    return {parts[1] for key in given if len(parts := key.split(".")) > 1 and parts[1] in BACKEND_NAMES}


def _check(given: Mapping[str, Any], only: Sequence[str]) -> None:
    for key in given:
        if not key.startswith(f"{_SECTION}."):
            raise UsageError(
                f"--set {key}: the run has ended, only how its backends are reached can still be set.",
                hint=f"Allowed: keys of {_SECTION}, such as {_SECTION}.mlflow.tracking_uri.",
            )
    for name in only:
        if name not in BACKEND_NAMES:
            close = get_close_matches(name.lower(), BACKEND_NAMES, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise UsageError(f"There is no backend {name!r}.{meant}", hint=f"Allowed: {', '.join(BACKEND_NAMES)}.")


def _place(name: str, cursor: Cursor, record: RunRecord, options: Mapping[str, Any]) -> dict[str, Any]:
    """Where the backend was filled, if the record does not say it: an environment variable or an earlier sync did."""
    location = cursor.location
    if not location:
        return {}
    if name == "mlflow":
        is_default = location.startswith("sqlite:") and location.endswith("/mlflow.db")  # moves with the storage
        said = options.get("tracking_uri")
        if (said is None and not is_default) or (said is not None and [*hidden_keys(said)]):
            return {"tracking_uri": location}
    if name == "tensorboard" and options.get("log_dir") is None:
        folder = location.rstrip("/").removesuffix(f"/{record.run_id}")
        if folder != location.rstrip("/") and not folder.endswith("/tensorboard"):  # that one is the default
            return {"log_dir": folder}
    return {}


def _refuse_hidden(run_id: str, sections: Mapping[str, Any]) -> None:
    """Raises UsageError naming values that were left out of the record because they are secret."""
    missing = [f"{_SECTION}.{key}" for key in hidden_keys(sections)]
    if missing:
        raise UsageError(
            f"The record of {run_id!r} does not hold the secret values of: {', '.join(missing)}.",
            hint="Give them again: " + " ".join(f"--set {key}=..." for key in missing),
        )
