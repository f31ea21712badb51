"""What every backend is: a reader of the journal that shows it somewhere.

In: journal records in journal order. Out: calls to the backend's own client. A backend runs in the tracker process,
on a thread of its own, and may block, raise or hang there without harm to training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar

from ray_tracking.records import Kind, Record
from ray_tracking.runs.store import sweep_of


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a backend may know of a run. Secrets are already removed from `config`."""

    run_id: str
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    local_dir: str = "."
    """A local directory that outlives the run, for backends that write files (`<storage>` itself if it is local)."""
    artifacts: str = ""
    """URI of the run's `artifacts/` folder, where ARTIFACT records' paths lie."""
    started: float | None = None
    """Unix time; None: now."""
    ended: float | None = None
    """Unix time, if the run had ended before it is shown here; None: when `close` is called."""

    @property
    def sweep(self) -> str | None:
        """Run id of the sweep that the run is a trial of, None for any other run."""
        return sweep_of(self.run_id)


@dataclass(frozen=True, slots=True)
class BackendIdentity:
    """How the run is found again in a backend: its id there, and where (a directory, a tracking URI)."""

    run_id: str
    location: str


class Backend(ABC):
    """One backend for one run. The calls come in this order, from one thread: open, (write | rewind | flush)*, close.

    Any of them may raise BackendError ("not now", retried with the same records), BackendRefusedError ("never",
    the backend is disabled) or anything else (taken as BackendError). `open` is called again after a failure,
    and by a later process with the identity it returned the first time.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[Kind]]
    """What it can show; other kinds are said once at the start and not passed to `write`."""
    rewinds: ClassVar[bool] = False
    """Whether `rewind` makes it forget points; otherwise a resumed attempt's repeated points are held back."""
    max_records: ClassVar[int] = 1000
    """The most records for one `write`."""

    @abstractmethod
    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        """Start or reopen (`identity` of an earlier open) the run in the backend."""

    def position(self) -> int | None:
        """Journal offset of the last record the backend itself is known to hold, asked after `open`.

        -1: it holds nothing; None: it can't tell. A client may lose what it took when its process is killed:
        delivery goes on behind this if its cursor is further. Records up to it that are sent again are ignored.
        """
        return None

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Show the records. Returning means the backend has them, as far as its client can know."""

    def rewind(self, step: int) -> None:
        """A new attempt resumed at `step`: points past it are no longer part of the run (only if `rewinds`)."""
        raise AssertionError(f"{self.name} does not rewind")

    def flush(self) -> None:  # noqa: B027 - most backends have nothing to do here
        """Make what was written visible to the backend's readers."""

    @abstractmethod
    def close(self, status: str) -> None:
        """End the run there: `status` is completed, failed, aborted or interrupted."""


def by_step(records: Sequence[Record]) -> Iterator[tuple[int, list[Record]]]:
    """Runs of neighbouring records that share a step, in order."""
    for step, group in groupby(records, key=lambda record: record.step):
        yield step, list(group)
