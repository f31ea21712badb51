"""Where runs lie: one folder per run below the storage root, found by its `run.json`."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator

from ray_tracking.errors import NameRefusedError, UsageError
from ray_tracking.runs.record import RunRecord
from ray_tracking.storage import Storage, check_name

STORAGE_VARIABLE = "RAY_TRACKING_STORAGE"
DEFAULT_STORAGE = "./runs"
RESERVED = frozenset({"tensorboard", "wandb", "mlflow-artifacts", "checkpoints", "latest", "best"})
"""Names beside the runs that belong to backends, or words with a meaning of their own."""

_RECORD = "run.json"
_TRIAL = re.compile(r"(?P<sweep>.+)\.trial-[0-9]{3,}")


def default_storage() -> str:
    """The storage when none is given: `RAY_TRACKING_STORAGE`, else `./runs`."""
    return os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE


def new_run_id(name: str) -> str:
    """`<name>-<date>-<time>-<random>`, sorted by time for one name; unsafe characters of the name become `-`."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "run"
    return f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def check_run_id(run_id: str) -> str:
    """`run_id` itself if it may be one. Raises NameRefusedError."""
    check_name(run_id, "run id")
    if run_id in RESERVED or run_id.endswith((".db", ".json")):
        raise NameRefusedError(f"The run id {run_id!r} is reserved.", hint="Choose another --run-id.")
    return run_id


def trial_run_id(sweep_id: str, number: int) -> str:
    """The run id of a sweep's trial; trials are counted from 1."""
    return f"{sweep_id}.trial-{number:03d}"


def sweep_of(run_id: str) -> str | None:
    """The sweep that a run is a trial of, by its name; None for any other run."""
    match = _TRIAL.fullmatch(run_id)
    return match["sweep"] if match else None


def free_run_id(run_id: str, is_taken: Callable[[str], bool]) -> str:
    """`run_id` itself if nobody has it, else the first of `<run_id>-2`, `<run_id>-3` and so on that is free. Pure."""
    number, found = 1, run_id
    while is_taken(found):
        number += 1
        found = f"{run_id}-{number}"
    return check_run_id(found)


class RunStore:
    """The runs below one storage root. Those that are trials lie in the folder of their sweep, which is a run too."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def directory(self, run_id: str) -> Storage:
        sweep = sweep_of(check_run_id(run_id))
        return self.storage.child(run_id) if sweep is None else self.storage.child(check_run_id(sweep), run_id)

    def exists(self, run_id: str) -> bool:
        return self.directory(run_id).exists(_RECORD)

    def is_taken(self, run_id: str) -> bool:
        """Whether there is anything of this id: also a run that has only just been begun."""
        return self.directory(run_id).exists()

    def save(self, record: RunRecord) -> None:
        self.directory(record.run_id).write_bytes(_RECORD, record.to_json())

    def holds(self, record: RunRecord) -> bool:
        """Whether run.json is exactly this record."""
        try:
            return self.directory(record.run_id).read_bytes(_RECORD) == record.to_json()
        except FileNotFoundError:
            return False

    def load(self, run_id: str) -> RunRecord:
        """Raises UsageError that lists the newest runs if there is none of this id."""
        directory = self.directory(run_id)
        try:
            data = directory.read_bytes(_RECORD)
        except FileNotFoundError:
            known = ", ".join(list(self.ids())[-5:]) or "none"
            raise UsageError(
                f"No run {run_id!r} in {self.storage.uri}. Runs there: {known}.",
                hint="List them with `ray-tracking runs ls`; another place with --storage or RAY_TRACKING_STORAGE.",
            ) from None
        return RunRecord.from_json(data, directory.path(_RECORD))

    def ids(self) -> Iterator[str]:
        """The ids of all runs, sorted by name; trials are not among them."""
        for entry in self.storage.list():
            if entry.is_dir and _may_be_run(entry.name) and self.storage.exists(f"{entry.name}/{_RECORD}"):
                yield entry.name

    def trials(self, sweep_id: str) -> list[str]:
        """The run ids of a sweep's trials that have begun, sorted; none for a run that is no sweep."""
        if sweep_of(sweep_id) is not None:
            return []
        below = self.directory(sweep_id)
        names = [entry.name for entry in below.list() if entry.is_dir and sweep_of(entry.name) == sweep_id]
        return sorted(name for name in names if below.exists(f"{name}/{_RECORD}"))


def _may_be_run(name: str) -> bool:
    """Whether a folder can be a run's; others, such as .ipynb_checkpoints, are none of ours."""
    try:
        return bool(check_run_id(name))
    except NameRefusedError:
        return False
