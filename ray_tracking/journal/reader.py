"""Reading the journal, while it is written: in order from an offset, or as the effective history.

In: a run's directory. Out: records and tables. Needs no other state than the offset to go on from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_tracking.errors import JournalError
from ray_tracking.journal import files, lineage
from ray_tracking.journal.schema import SCHEMA, records_of_table
from ray_tracking.journal.segments import Layout, Segment, gaps
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage

_log = logging.getLogger(__name__)
_TRIES = 5  # a merge can replace files between the listing and the read: each time a new listing is needed


class JournalReader:
    """Reads the journal of the run whose directory `storage` is. One per thread: it keeps its last segment.

    A damaged or missing segment raises JournalError that names it; with `strict=False` its records are left
    out, a warning is logged, and its name (or the missing offsets) is in `skipped`.

    `end`: for readers beside the writer, the offset it has come to; segments from there on are not its own. A writer
    that was shut out may write late, and only the next segment of the one after it shows what that was.
    """

    def __init__(self, storage: Storage, *, strict: bool = True, end: Callable[[], int] | None = None) -> None:
        self.storage = storage
        self.strict = strict
        self.skipped: list[str] = []
        self._end = end
        self._layout: Layout | None = None
        self._last: tuple[Segment, pa.Table] | None = None

    @property
    def next_offset(self) -> int:
        """The offset that the next record appended will have, from the names on storage."""
        self._layout = files.find(self.storage)
        return self._layout.next_offset

    def read(self, start: int = 0, limit: int = 10_000) -> list[Record]:
        """Up to `limit` records from offset `start` on, in journal order; [] at the end."""
        known = self._layout
        found = self._read(start, limit)
        if not found and known is self._layout:  # all that the old listing has from `start` on was skipped
            self._layout = None
            found = self._read(start, limit)
        return found

    def _read(self, start: int, limit: int) -> list[Record]:
        found: list[Record] = []
        for table in self._scan(start, None, keep=True):
            found.extend(records_of_table(table.slice(0, limit - len(found))))
            if len(found) >= limit:
                break
        return found

    def tables(self, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The records from offset `start` on, a table of `SCHEMA` (or `columns` of it) per segment."""
        yield from self._scan(start, columns)

    def effective(self) -> pa.Table:
        """The scalars of the effective history, by offset: key, step, value, time, rank, attempt."""
        rows = self._table((*lineage.COLUMNS, "value", "time"))
        scalar = pc.equal(rows.column("kind"), Kind.SCALAR.value).to_numpy()
        rows = rows.filter(pa.array(lineage.effective_mask(rows) & scalar))
        columns = {name: rows.column(name) for name in ("key", "step", "value", "time", "rank", "attempt")}
        return pa.table({**columns, "key": columns["key"].cast(pa.string())})

    def effective_records(self, kinds: Collection[Kind] | None = None) -> Iterator[Record]:
        """The effective history of all `kinds` (all but ATTEMPT if None), by offset, a segment at a time."""
        rows = self._table(lineage.COLUMNS)
        mask = lineage.effective_mask(rows)
        if kinds is not None:
            mask &= pc.is_in(rows.column("kind").cast(pa.string()), pa.array(sorted(kinds), pa.string())).to_numpy()
        offsets = rows.column("offset").to_numpy()[mask]
        if not len(offsets):
            return
        for table in self._scan(int(offsets[0]), None):
            kept = np.isin(table.column("offset").to_numpy(), offsets, assume_unique=True)
            yield from records_of_table(table.filter(pa.array(kept)))

    def resumes(self) -> dict[int, int]:
        """attempt -> the step it resumed from, -1 for a fresh start."""
        return lineage.resumes(self._table(("attempt", "kind", "step")))

    def _table(self, columns: Sequence[str]) -> pa.Table:
        tables = list(self._scan(0, columns))
        if not tables:
            return pa.table(
                [pa.array([], SCHEMA.field(name).type) for name in columns],
                schema=pa.schema([SCHEMA.field(name) for name in columns]),
            )
        return pa.concat_tables(tables).unify_dictionaries()

    def _scan(self, start: int, columns: Sequence[str] | None, *, keep: bool = False) -> Iterator[pa.Table]:
        """Tables from offset `start` on. Segments that end before it are not read.

        With `keep`, the last listing is used as long as it reaches past `start`, and so is the last segment.
        """
        if self._layout is None or self._layout.next_offset <= start or not keep:
            self._layout = self._list(start)
        tries = 0
        while True:
            try:
                for segment, table in self._pass(self._layout, start, columns, keep):
                    yield table
                    start, tries = segment.last + 1, 0
                return
            except FileNotFoundError as error:
                tries += 1
                if tries >= _TRIES:
                    raise JournalError(
                        f"The journal of {self.storage.uri!r} changes faster than it can be read: {error}"
                    ) from error
                self._layout = self._list(start)

    def _list(self, start: int) -> Layout:
        """A listing taken during a merge may show neither parts nor whole: a gap is looked at again."""
        end = None if self._end is None else self._end()  # before the listing, which has all up to it then
        for _ in range(_TRIES):
            found = files.find(self.storage)
            if end is not None:
                found = found.up_to(end)
            if not gaps(found.live, start):
                break
        return found

    def _pass(
        self, found: Layout, start: int, columns: Sequence[str] | None, keep: bool
    ) -> Iterator[tuple[Segment, pa.Table]]:
        self._report_clashes(found, start)
        for first, last in gaps(found.live, start):
            self._report_gap(first, last)
        for segment in found.live:
            if segment.last < start:
                continue
            table = self._load(segment, columns, keep)
            if table is not None:
                yield segment, table.slice(max(0, start - segment.first))

    def _load(self, segment: Segment, columns: Sequence[str] | None, keep: bool) -> pa.Table | None:
        if keep and self._last is not None and self._last[0] == segment:
            return self._last[1]
        try:
            table = files.load(self.storage, segment, columns)
        except JournalError as error:
            self._report(segment.name, error)
            return None
        if keep:
            self._last = segment, table
        return table

    def _report_gap(self, first: int, last: int) -> None:
        missing = f"offsets {first} to {last}"
        error = JournalError(
            f"The journal of {self.storage.uri!r} lacks the {missing}, though later ones are there.",
            hint="A file was removed from the run's journal/ folder: restore it from a backup.",
        )
        self._report(missing, error)

    def _report_clashes(self, found: Layout, start: int) -> None:
        for segment in found.clashing:
            if segment.last >= start:
                error = JournalError(
                    f"The journal's segment {self.storage.path(segment.name)!r} overlaps another: "
                    "two writers wrote at once.",
                    hint="Move one of the two out of the run's journal/ folder.",
                )
                self._report(segment.name, error)

    def _report(self, what: str, error: JournalError) -> None:
        if self.strict:
            raise error
        if what not in self.skipped:
            self.skipped.append(what)
            _log.warning("journal records skipped: %s", error.message)
