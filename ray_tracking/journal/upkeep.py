"""Merging and compacting: fewer, larger files with the same records, at no moment fewer records.

In: a run's directory. Out: the same journal in fewer files. Each step writes the new file, reads it back,
verifies it, and only then deletes what it replaces; one that was cut off leaves both, and the next tidies up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from ray_tracking.errors import JournalError
from ray_tracking.journal import files
from ray_tracking.journal.segments import NO_TERM, ROOT, Layout, Segment, plan_history, plan_merge
from ray_tracking.storage import Storage


class Upkeep:
    """Merges and compacts one journal; not thread-safe. Touches only segments that end before `end`.

    A segment that doesn't verify raises JournalError once, and from then on is left where and as it is.
    `check` is called before each change; it raises if this process must make none.
    """

    def __init__(self, storage: Storage, check: Callable[[], object] = lambda: None) -> None:
        self._storage = storage
        self._check = check
        self._damaged: set[str] = set()

    def merge(self, end: int) -> int:
        """One round: leftovers deleted, at most one group merged. Returns how many segments it removed."""
        found = self._tidy(end)
        removed = len(found.covered)
        parts = plan_merge(found.live, frozenset(self._damaged))
        if not parts:
            return removed
        self._replace(parts, parts[0].attempt)
        return removed + len(parts) - 1

    def compact(self, end: int) -> None:
        """All segments into the history. Damaged ones stay, and are named by the JournalError at the end."""
        errors = []
        while True:
            found, damaged = self._tidy(end), len(self._damaged)
            try:
                for parts in plan_history(found.live, frozenset(self._damaged)):
                    self._replace(parts, None)
                break
            except JournalError as error:
                if len(self._damaged) == damaged:
                    raise
                errors.append(error)  # that segment is now a barrier: plan again around it
        if errors:
            raise errors[0]

    def remove_empty_folders(self) -> None:
        """Folders without a segment, and what a killed writer left there. No append may run meanwhile."""
        self._check()
        for entry in self._storage.list(ROOT):
            if entry.is_dir and not self._storage.list(f"{ROOT}/{entry.name}"):
                self._storage.delete_dir(f"{ROOT}/{entry.name}")

    def _tidy(self, end: int) -> Layout:
        found = files.find(self._storage)
        live = tuple(segment for segment in found.live if segment.last < end)
        covered = tuple(segment for segment in found.covered if segment.last < end)
        self._delete(covered)
        return Layout(live, covered, found.clashing, found.late)

    def _replace(self, parts: Sequence[Segment], attempt: int | None) -> None:
        table = pa.concat_tables([self._load(part) for part in parts]).unify_dictionaries()
        whole, data = files.pack(table, attempt, NO_TERM if attempt is None else parts[-1].term)
        if (whole.first, whole.last) != (parts[0].first, parts[-1].last) or whole.rows != table.num_rows:
            raise JournalError(
                f"Merging {parts[0].name!r} to {parts[-1].name!r} would lose records; they stay as they are."
            )
        self._check()
        self._storage.write_bytes(whole.name, data)
        try:
            files.load(self._storage, whole, ["offset"])
        except JournalError:
            self._storage.delete(whole.name)
            raise
        self._delete([part for part in parts if part.name != whole.name])

    def _load(self, segment: Segment) -> pa.Table:
        try:
            return files.load(self._storage, segment)
        except JournalError:
            self._damaged.add(segment.name)
            raise

    def _delete(self, segments: Sequence[Segment]) -> None:
        if segments:
            self._check()
        for segment in segments:
            self._storage.delete(segment.name)
