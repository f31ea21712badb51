"""Which rows count: the effective history of a run over all its attempts. Pure.

In: the columns kind, key, step, rank, attempt (journal order). Out: a mask of the rows that survive.

A row of attempt `a` survives if no later attempt resumed before its step. Where two attempts logged the same
(kind, key, step, rank), the later attempt's rows win; repeats within one attempt stay. Params, tags and
artifacts don't belong to a step: the last one of a key wins. ATTEMPT rows are no part of the history.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_tracking.records import Kind, Record

COLUMNS = ("offset", "attempt", "rank", "kind", "key", "step")
"""The columns that the functions on tables need."""

STEPLESS = frozenset({Kind.PARAM, Kind.TAG, Kind.ARTIFACT})

Point = tuple[Kind, str, int, int]
"""(kind, key, step, rank)"""

_Mask = npt.NDArray[np.bool_]
_Integers = npt.NDArray[np.int64]
_NO_LIMIT = np.iinfo(np.int64).max


def resumes(rows: pa.Table | Iterable[Record]) -> dict[int, int]:
    """attempt -> the step it resumed from, -1 for a fresh start, from the ATTEMPT rows among `rows` (its last one)."""
    if isinstance(rows, pa.Table):
        began = rows.filter(pc.equal(rows.column("kind").cast(pa.string()), Kind.ATTEMPT.value))
        steps = began.column("step").to_pylist()
        return dict(zip(began.column("attempt").to_pylist(), steps, strict=True))
    return {row.attempt: row.step for row in rows if row.kind is Kind.ATTEMPT}


def limits(resumed: Mapping[int, int], attempts: Iterable[int]) -> dict[int, int | None]:
    """attempt -> its last step that counts: the earliest that a later one resumed from, None if all do."""
    return {
        attempt: min((step for later, step in resumed.items() if later > attempt), default=None) for attempt in attempts
    }


def effective_mask(table: pa.Table) -> _Mask:
    """[N] bool: which rows of a table (journal order, at least `COLUMNS`) the effective history holds."""
    kind, kinds = _codes(table, "kind")
    key, _ = _codes(table, "key")
    step, rank, attempt = (_integers(table, name) for name in ("step", "rank", "attempt"))
    stepless = np.isin(kind, [code for code, name in enumerate(kinds) if name in STEPLESS])
    marks = np.isin(kind, [code for code, name in enumerate(kinds) if name == Kind.ATTEMPT])
    keep: _Mask = ~marks & (stepless | (step <= _last_steps(attempt, resumes(table))))

    contested = np.flatnonzero(keep & ~stepless & _contested(step, attempt, keep & ~stepless))
    keep[_beaten(contested, attempt, kind, key, step, rank)] = False
    once = np.flatnonzero(stepless)
    keep[_beaten(once, once, kind, key, by_position=True)] = False
    return keep


def effective_records(records: Iterable[Record]) -> list[Record]:
    """The effective history of records in journal order, row by row: for journals small enough."""
    rows = list(records)
    last_steps = limits(resumes(rows), {row.attempt for row in rows})
    newest: dict[tuple[Any, ...], int] = {}
    kept = []
    for position, row in enumerate(rows):
        if row.kind in STEPLESS:
            newest[row.kind, row.key] = position
        elif row.kind is not Kind.ATTEMPT:
            last = last_steps[row.attempt]
            if last is not None and row.step > last:
                continue
            point = (row.kind, row.key, row.step, row.rank)
            newest[point] = max(newest.get(point, 0), row.attempt)
        else:
            continue
        kept.append((position, row))
    return [
        row
        for position, row in kept
        if (
            newest[row.kind, row.key] == position
            if row.kind in STEPLESS
            else newest[row.kind, row.key, row.step, row.rank] == row.attempt
        )
    ]


def _codes(table: pa.Table, name: str) -> tuple[_Integers, list[str]]:
    """[N] int64 codes of a dictionary or string column, and the words they stand for."""
    column = table.column(name)
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    whole = pa.chunked_array(column).unify_dictionaries().combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    return whole.indices.to_numpy(zero_copy_only=False).astype(np.int64), whole.dictionary.to_pylist()


def _integers(table: pa.Table, name: str) -> _Integers:
    return np.asarray(table.column(name).to_numpy(), np.int64)


def _last_steps(attempt: _Integers, resumed: Mapping[int, int]) -> _Integers:
    """[N] the last step that counts, by each row's attempt."""
    attempts, inverse = np.unique(attempt, return_inverse=True)
    bound = limits(resumed, attempts.tolist())
    last = np.array([_NO_LIMIT if bound[one] is None else bound[one] for one in attempts.tolist()], np.int64)
    return np.asarray(last[inverse] if len(last) else attempt)


def _contested(step: _Integers, attempt: _Integers, among: _Mask) -> _Mask:
    """[N] rows whose step both an earlier and a later attempt may hold: few, and all that needs sorting."""
    attempts = np.unique(attempt[among])
    if len(attempts) < 2:
        return np.zeros(len(step), np.bool_)
    order = np.searchsorted(attempts, attempt).clip(max=len(attempts) - 1)
    lowest = np.full(len(attempts), _NO_LIMIT)
    highest = np.full(len(attempts), -_NO_LIMIT)
    np.minimum.at(lowest, order[among], step[among])
    np.maximum.at(highest, order[among], step[among])
    later_lowest = np.append(np.minimum.accumulate(lowest[::-1])[::-1][1:], _NO_LIMIT)
    earlier_highest = np.append(-_NO_LIMIT, np.maximum.accumulate(highest)[:-1])
    return np.asarray((step >= later_lowest[order]) | (step <= earlier_highest[order]))


def _beaten(rows: _Integers, rival: _Integers, *group: _Integers, by_position: bool = False) -> _Integers:
    """Those of `rows` whose `rival` is not the highest among the rows that share all of `group`."""
    strength = rows if by_position else rival[rows]
    keys = [column[rows] for column in group]
    order = np.lexsort((strength, *keys))
    if not len(order):
        return rows[:0]
    ends = np.zeros(len(order), np.bool_)  # the last of each group: the strongest
    ends[-1] = True
    for column in keys:
        ends[:-1] |= column[order][1:] != column[order][:-1]
    best = np.flatnonzero(ends)
    strongest = strength[order][best[np.searchsorted(best, np.arange(len(order)))]]
    return np.asarray(rows[order[strength[order] != strongest]])
