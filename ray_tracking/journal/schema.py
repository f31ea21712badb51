"""The journal's columns, and records to and from them.

In: records. Out: Arrow tables with the columns of `SCHEMA`, and back. Columnar both ways, for speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa

from ray_tracking.errors import JournalError
from ray_tracking.records import Kind, Record

VERSION = b"1"
VERSION_KEY = b"ray_tracking.journal"
_NAMES = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("kind", _NAMES, nullable=False),
        pa.field("key", _NAMES, nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("data", pa.binary()),
    ],
    metadata={VERSION_KEY: VERSION},
)


def number(records: Sequence[Record], first: int) -> list[Record]:
    """The records with the offsets `first`, `first + 1`, ..."""
    if not records:
        return []
    *columns, _ = zip(*records, strict=True)
    return list(map(Record._make, zip(*columns, range(first, first + len(records)), strict=True)))


def table_of(records: Sequence[Record]) -> pa.Table:
    """Numbered records as a table of `SCHEMA`. Raises JournalError for a value that its column can't hold."""
    columns: Iterable[Sequence[Any]] = zip(*records, strict=True) if records else repeat((), 10)
    kind, key, step, time, value, data, rank, attempt, seq, offset = columns
    plain = {
        "offset": offset,
        "attempt": attempt,
        "rank": rank,
        "seq": seq,
        "kind": kind,
        "key": key,
        "step": step,
        "time": time,
        "value": value,
        "data": data,
    }
    return pa.table([_array(field, plain[field.name]) for field in SCHEMA], schema=SCHEMA)


def _array(field: Any, values: Sequence[Any]) -> Any:
    try:
        if field.type == _NAMES:
            array = pa.array(values, pa.string()).dictionary_encode()
        else:
            array = pa.array(values, field.type)
        if array.null_count and not field.nullable:
            raise ValueError("it is None")
        return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise JournalError(
            f"A record can't be journaled: its {field.name} is not a {field.type}: {error}",
            hint="Nothing of this batch was written.",
        ) from error


def records_of_table(table: pa.Table) -> list[Record]:
    """The rows of a table of `SCHEMA` as records. Raises JournalError for a kind unknown to this version."""
    if not table.num_rows:
        return []
    return list(
        map(
            Record,
            _names(table, "kind", _kind),
            _names(table, "key", str),
            _numbers(table, "step"),
            _numbers(table, "time"),
            _optional(table, "value"),
            _optional(table, "data"),
            _numbers(table, "rank"),
            _numbers(table, "attempt"),
            _numbers(table, "seq"),
            _numbers(table, "offset"),
        )
    )


def _kind(value: str) -> Kind:
    try:
        return Kind(value)
    except ValueError as error:
        raise JournalError(
            f"The journal holds a record of kind {value!r}; this version knows {', '.join(Kind)}.",
            hint="It was written by a newer version: pip install --upgrade ray-tracking",
        ) from error


def _numbers(table: pa.Table, name: str) -> list[Any]:
    numbers: list[Any] = table.column(name).to_numpy().tolist()
    return numbers


def _names(table: pa.Table, name: str, convert: Any) -> list[Any]:
    found: list[Any] = []
    for chunk in table.column(name).chunks:
        words = [convert(word) for word in chunk.dictionary.to_pylist()]
        found.extend(map(words.__getitem__, chunk.indices.to_numpy(zero_copy_only=False).tolist()))
    return found


def _optional(table: pa.Table, name: str) -> Iterable[Any]:
    column = table.column(name)
    if column.null_count == len(column):
        return repeat(None, len(column))
    if column.null_count == 0 and name == "value":
        return _numbers(table, name)
    values: list[Any] = column.to_pylist()
    return values
