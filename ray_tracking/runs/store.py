"""Where runs lie: one folder per run below the storage root, found by its `run.json`."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterator

from ray_tracking.errors import NameRefusedError, UsageError
from ray_tracking.runs.record import RunRecord
from ray_tracking.storage import Storage, check_name

STORAGE_VARIABLE = "RAY_TRACKING_STORAGE"
DEFAULT_STORAGE = "./runs"
RESERVED = frozenset({"tensorboard", "wandb", "mlflow-artifacts", "checkpoints", "latest", "best"})
"""Names beside the runs that belong to backends, or words with a meaning of their own."""

_RECORD = "run.json"


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


class RunStore:
    """The runs below one storage root."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def directory(self, run_id: str) -> Storage:
        return self.storage.child(check_run_id(run_id))

    def exists(self, run_id: str) -> bool:
        return self.directory(run_id).exists(_RECORD)

    def save(self, record: RunRecord) -> None:
        self.directory(record.run_id).write_bytes(_RECORD, record.to_json())

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
        """The ids of all runs, sorted by name."""
        for entry in self.storage.list():
            if entry.is_dir and _may_be_run(entry.name) and self.storage.exists(f"{entry.name}/{_RECORD}"):
                yield entry.name


def _may_be_run(name: str) -> bool:
    """Whether a folder can be a run's; others, such as .ipynb_checkpoints, are none of ours."""
    try:
        return bool(check_run_id(name))
    except NameRefusedError:
        return False
