"""What a sweep leaves on storage of its trials: `trial.json` beside each trial's `run.json`, `sweep.json` in its own.

In: what the sweep's driver knows. Out: records from which a sweep is shown, and goes on after its driver has died.
One small file per trial, written when the trial is proposed, changed or ended: the cost of a trial does not grow with
their number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple

from ray_tracking.errors import RayTrackingError, UsageError
from ray_tracking.runs.store import RunStore, sweep_of, trial_run_id

SCHEMA = 1
_SWEEP, _TRIAL = "sweep.json", "trial.json"
_READERS = 16


class TrialStatus(StrEnum):
    """How a trial stands. `stopped`: ended before its time by a scheduler or a stop rule; its result counts."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"

    @property
    def is_over(self) -> bool:
        """Whether a resumed sweep leaves it as it is."""
        return self in (TrialStatus.COMPLETED, TrialStatus.STOPPED, TrialStatus.FAILED)


class Milestone(NamedTuple):
    """A trial has come to one of HyperBand's. `event`: place among all that the searcher was asked and told."""

    event: int
    reports: int
    value: float


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """The whole of `trial.json`. Numbers count from 1, times are Unix seconds."""

    number: int
    params: Mapping[str, Any]
    """Those that are searched, nested as in the space."""
    status: TrialStatus = TrialStatus.PENDING
    reason: str | None = None
    """Why it ended, or ended so."""
    suggested: int = 0
    """Place among all that the searcher was asked and told, from 1."""
    told: int | None = None
    """Place of what the searcher was told of its end; None: nothing yet."""
    told_value: float | None = None
    told_error: bool = False
    value: float | None = None
    """The best finite value of the metric that it has reached."""
    reports: int = 0
    started: float | None = None
    ended: float | None = None
    tune_id: str = ""
    """Ray Tune's name of it in the newest session."""
    takeovers: tuple[Mapping[str, Any], ...] = ()
    """Of a population: each time that it took over another trial's state. {number, run_id, step, reports: whose, and
    how far that was; at_step, at_reports: how far this trial was; before: its params until then; time}."""
    milestones: tuple[Milestone, ...] = ()
    """Of HyperBand: what the searcher was told on the way."""

    @property
    def proposed(self) -> Mapping[str, Any]:
        """The params that the searcher proposed, before any takeover changed them."""
        found: Mapping[str, Any] = self.takeovers[0]["before"] if self.takeovers else self.params
        return found

    def to_json(self) -> bytes:
        return json.dumps({**asdict(self), "schema": SCHEMA}, indent=1, default=str).encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> TrialRecord:
        """Raises RayTrackingError naming `source`."""
        try:
            found = json.loads(data)
            names = {each.name for each in fields(cls)}
            known: dict[str, Any] = {key: value for key, value in found.items() if key in names}
            takeovers = tuple(known.get("takeovers", ()))
            milestones = tuple(Milestone(*each) for each in known.get("milestones", ()))
            status = TrialStatus(known["status"])
            return cls(**{**known, "status": status, "takeovers": takeovers, "milestones": milestones})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RayTrackingError(
                f"{source} is damaged: {type(error).__name__}: {error}",
                hint="Delete the file: the trial is then left out of the sweep.",
            ) from error


def ranking(trials: Iterable[TrialRecord], mode: str) -> list[TrialRecord]:
    """The trials with a value, best first; of equal ones the earlier. Failed ones come last, whatever they reached."""
    valued = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    sign = 1.0 if mode == "min" else -1.0
    return sorted(valued, key=lambda t: (t.status is TrialStatus.FAILED, sign * (t.value or 0.0), t.number))


def best_of(trials: Iterable[TrialRecord], mode: str) -> TrialRecord | None:
    """The first of the ranking, if it did not fail."""
    first = next(iter(ranking(trials, mode)), None)
    return None if first is None or first.status is TrialStatus.FAILED else first


class SweepStore:
    """The records of one sweep."""

    def __init__(self, runs: RunStore, sweep_id: str) -> None:
        self.runs = runs
        self.sweep_id = sweep_id
        self.directory = runs.directory(sweep_id)

    def exists(self) -> bool:
        return self.directory.exists(_SWEEP)

    def create(self, metric: str, mode: str, config: Mapping[str, Any]) -> None:
        """Say that this run is a sweep. `config`: the whole, its secrets removed, from which it goes on."""
        document = {"schema": SCHEMA, "sweep_id": self.sweep_id, "metric": metric, "mode": mode, "config": config}
        self.directory.write_bytes(_SWEEP, json.dumps(document, indent=1, default=str).encode())

    def aim(self) -> tuple[str, str]:
        """(metric, mode). Raises as `config` does."""
        document = self._document()
        return str(document["metric"]), str(document["mode"])

    def config(self) -> dict[str, Any]:
        """The recorded configuration. Raises UsageError for a run that is no sweep, RayTrackingError for a damaged or
        newer file."""
        return dict(self._document()["config"])

    def _document(self) -> dict[str, Any]:
        try:
            document = json.loads(self.directory.read_bytes(_SWEEP))
            schema = int(document["schema"])
            document["metric"], document["mode"], document["config"]
        except FileNotFoundError:
            raise UsageError(
                f"The run {self.sweep_id!r} is no sweep.", hint="See it with `ray-tracking runs show`."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise RayTrackingError(
                f"{self.directory.path(_SWEEP)} is damaged: {type(error).__name__}: {error}"
            ) from error
        if schema > SCHEMA:
            raise RayTrackingError(f"The sweep {self.sweep_id!r} is a newer version's.", hint="Upgrade ray-tracking.")
        return dict(document)

    def run_id(self, number: int) -> str:
        return trial_run_id(self.sweep_id, number)

    def save(self, trial: TrialRecord) -> None:
        self.directory.child(self.run_id(trial.number)).write_bytes(_TRIAL, trial.to_json())

    def load(self) -> list[TrialRecord]:
        """All trials, by number. Raises RayTrackingError for a damaged record."""
        names = [
            entry.name for entry in self.directory.list() if entry.is_dir and sweep_of(entry.name) == self.sweep_id
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._read, names))
        return sorted((trial for trial in found if trial is not None), key=lambda trial: trial.number)

    def _read(self, name: str) -> TrialRecord | None:
        try:
            return TrialRecord.from_json(self.directory.read_bytes(f"{name}/{_TRIAL}"), self.directory.path(name))
        except FileNotFoundError:
            return None
