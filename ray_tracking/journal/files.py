"""Segments on storage: packed, listed, loaded and verified. The only code that knows their file formats.

In: tables and segments. Out: bytes and verified tables. What doesn't verify is a JournalError that names it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow import ipc

from ray_tracking.errors import JournalError
from ray_tracking.journal.schema import SCHEMA, VERSION, VERSION_KEY
from ray_tracking.journal.segments import NO_TERM, ROOT, Layout, Segment, Term, layout, parse
from ray_tracking.storage import Storage


def pack(table: pa.Table, attempt: int | None, term: Term = NO_TERM) -> tuple[Segment, memoryview]:
    """A table of `SCHEMA` as one file: Parquet for the history (`attempt` None), else Arrow."""
    sink = pa.BufferOutputStream()
    if attempt is None:
        pq.write_table(table, sink, compression="zstd", row_group_size=1 << 17, write_page_checksum=True)
    else:
        # Small and many: zstd's set-up for each column would cost more than the rest of an append.
        options = ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        with ipc.new_file(sink, SCHEMA, options=options) as writer:
            writer.write_table(table.unify_dictionaries().combine_chunks())
    data = memoryview(sink.getvalue())
    offsets = table.column("offset")
    digest = xxhash.xxh3_64_hexdigest(data)
    return Segment(offsets[0].as_py(), offsets[-1].as_py(), digest, attempt, data.nbytes, term), data


def find(storage: Storage) -> Layout:
    """The journal of the run whose directory `storage` is. Files with other names are none of it."""
    found = (parse(name, size) for name, size in storage.walk(ROOT))
    return layout(segment for segment in found if segment is not None)


def load(storage: Storage, segment: Segment, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a segment (only `columns` if given). The whole file is verified first.

    Raises JournalError if it is not what was written, FileNotFoundError if a merge has replaced it.
    """
    content = storage.read_bytes(segment.name)
    where = f"{storage.path(segment.name)!r}"
    digest = xxhash.xxh3_64_hexdigest(content)
    if digest != segment.digest:
        raise _damaged(where, f"its digest is {digest}, its name says {segment.digest} ({len(content)} bytes)")
    data = pa.py_buffer(content)
    try:
        table = _parquet(data, columns) if segment.attempt is None else _arrow(data, columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise _damaged(where, f"it is no segment: {error}") from error
    if (version := (table.schema.metadata or {}).get(VERSION_KEY)) != VERSION:
        raise JournalError(
            f"The journal's segment {where} has the format {version!r}; this version reads {VERSION!r}.",
            hint="It was written by another version: pip install --upgrade ray-tracking",
        )
    if table.num_rows != segment.rows:
        raise _damaged(where, f"it holds {table.num_rows} rows, its name says {segment.rows}")
    return table if columns is None else table.select(list(columns))


def newest_attempt(storage: Storage, segment: Segment) -> int:
    """The newest attempt with records in a file of the history, from its footer alone."""
    column = SCHEMA.get_field_index("attempt")
    with storage.open_input(segment.name) as stream:
        try:
            footer = pq.read_metadata(stream)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(f"{storage.path(segment.name)!r}", f"it has no footer: {error}") from error
    groups = (footer.row_group(number) for number in range(footer.num_row_groups))
    return max(int(group.column(column).statistics.max) for group in groups)


def _arrow(data: pa.Buffer, columns: Sequence[str] | None) -> pa.Table:
    fields = None if columns is None else [SCHEMA.get_field_index(name) for name in columns]
    options = ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    with ipc.open_file(data, options=options) as reader:
        return reader.read_all()


def _parquet(data: pa.Buffer, columns: Sequence[str] | None) -> pa.Table:
    return pq.read_table(pa.BufferReader(data), columns=None if columns is None else list(columns), use_threads=False)


def _damaged(where: str, reason: str) -> JournalError:
    return JournalError(
        f"The journal's segment {where} is damaged: {reason}.",
        hint="Restore the file from a backup. The records of all other segments can still be exported.",
    )
