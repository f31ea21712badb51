"""Which jobs have run a run: `jobs.json` in its directory, written by each job's driver. No ray.

In: a run's directory. Out: the jobs, oldest first, so that `logs`, `status` and `stop` find them by run id.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray_tracking.storage import Storage

NAME = "jobs.json"


@dataclass(frozen=True, slots=True)
class NotedJob:
    """`address`: of the Jobs API, as whoever submitted it reached it; `started`: Unix seconds."""

    submission_id: str
    number: int
    address: str
    started: float


def noted_jobs(run: Storage) -> list[NotedJob]:
    """Oldest first; empty for a run that no job ran, or if the file can't be understood."""
    try:
        document = json.loads(run.read_bytes(NAME))
        return [_parse(entry) for entry in document["jobs"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def note_job(run: Storage, job: NotedJob) -> None:
    """Add a job, or put it in the place of the one of its id. By the run's driver alone. Raises StorageError."""
    others = [known for known in noted_jobs(run) if known.submission_id != job.submission_id]
    run.write_bytes(NAME, json.dumps({"jobs": [asdict(one) for one in [*others, job]]}, indent=1).encode())


def next_number(run_id: str, submission_ids: Sequence[str]) -> int:
    """The number of a run's next job: one more than the highest of `<run id>-<number>` that is taken."""
    taken = [0]
    for submission_id in submission_ids:
        name, _, number = submission_id.rpartition("-")
        if name == run_id and number.isdecimal():
            taken.append(int(number))
    return max(taken) + 1


def _parse(entry: dict[str, Any]) -> NotedJob:
    return NotedJob(str(entry["submission_id"]), int(entry["number"]), str(entry["address"]), float(entry["started"]))
