"""How points become W&B rows without losing one, and what a W&B run file holds already.

In: points in journal order; a `.wandb` file. Out: rows whose `_step` only grows; a journal offset.
"""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from glob import escape, glob
from typing import Any

OFFSET = "_offset"
"""The journal offset of a row's last point, kept in the row: W&B hides keys that begin with `_`."""
COMPANION = "@step"
_BLOCK = 32768
_TAIL_BLOCKS = 32
_FULL, _FIRST, _LAST = 1, 2, 4


class Rows:
    """Places points in rows. W&B takes a row only if its `_step` is not below the last one's.

    `position` is the last row's `_step`. A point of a later step opens a new row there. One of that step joins the row.
    Any other, and one whose key the row has, stands as `key` beside `key@step`, its real step, in the open row
    or, where these are taken, in a new one.
    """

    def __init__(self, position: int = -1, taken: Iterable[str] = ()) -> None:
        self.position = position
        self._taken = set(taken)

    def copy(self) -> Rows:
        return Rows(self.position, self._taken)

    def reached(self, position: int, keys: Iterable[str]) -> Rows:
        """How rows stand once `keys` are in the row at `position`, the last one W&B took."""
        return Rows(position, {*keys, *(self._taken if position == self.position else ())})

    def place(self, key: str, step: int) -> tuple[int, str | None]:
        """The row for a point, and the name of the companion that must hold its step (None: `_step` says it)."""
        if step > self.position:
            self._begin(step)
        elif step < self.position or key in self._taken:
            companion = key + COMPANION
            if self.position < 0 or key in self._taken or companion in self._taken:
                self._begin(max(self.position, -1) + 1)
            self._taken |= {key, companion}
            return self.position, companion
        self._taken.add(key)
        return self.position, None

    def _begin(self, position: int) -> None:
        self.position = position
        self._taken = set()


def run_files(folder: str, run_id: str) -> list[str]:
    """The run's `.wandb` files below `folder`, oldest first.

    W&B numbers the folders of a run that is opened twice within a second (`...-ID-1`), which another run's id may look
    like: only the file's own name tells.
    """
    paths = glob(os.path.join(escape(folder), f"*run-*-{escape(run_id)}*", f"run-{escape(run_id)}.wandb"))
    return sorted(paths, key=os.path.dirname)


def held_offset(folder: str, run_id: str) -> int | None:
    """The journal offset up to which the run's files below `folder` hold rows; -1: no row, None: no file."""
    paths = run_files(folder, run_id)
    for path in reversed(paths):
        blocks = os.path.getsize(path) // _BLOCK
        for start in sorted({max(0, blocks - _TAIL_BLOCKS), 0}, reverse=True):
            offset = _last_row_offset(path, start)
            if offset is not None:
                return offset
    return -1 if paths else None


def _last_row_offset(path: str, start: int) -> int | None:
    from wandb.proto import wandb_internal_pb2 as protos

    for data in reversed(deque(_entries(path, start), maxlen=10_000)):
        record = protos.Record.FromString(data)  # type: ignore[attr-defined]  # chosen by protobuf's version
        for item in record.history.item:
            if (item.key or "/".join(item.nested_key)) == OFFSET:
                return int(json.loads(item.value_json))
    return None


def _entries(path: str, start: int) -> Iterator[bytes]:
    """The records of a `.wandb` file from block `start` on: LevelDB's log format, in blocks of 32 KiB.

    Ends at the first record that is not there whole, which is how a killed process leaves the file.
    """
    with open(path, "rb") as file:
        file.seek(start * _BLOCK)
        position = start * _BLOCK or len(file.read(7))
        parts: list[bytes] | None = None
        while True:
            left = _BLOCK - position % _BLOCK
            if left < 7:
                position += len(file.read(left))
                continue
            header = file.read(7)
            if len(header) < 7:
                return
            _, length, kind = struct.unpack("<IHB", header)
            data = file.read(length)
            if len(data) < length or not 0 < kind <= _LAST:
                return
            position += 7 + length
            if kind in (_FULL, _FIRST):
                parts = []
            if parts is None:  # began before `start`
                continue
            parts.append(data)
            if kind in (_FULL, _LAST):
                yield b"".join(parts)
                parts = None


def value_of(item: dict[str, Any], key: str) -> tuple[int, Any]:
    """(step, value) of a point in a row that was read back."""
    return int(item.get(key + COMPANION, item["_step"])), item[key]
