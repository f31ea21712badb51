"""A TensorBoard event file that a killed process leaves readable, and that says how far it goes.

In: summaries. Out: a file of framed `Event` protos. Each `commit` appends its events and, as the last one, a mark:
a session-log event that TensorBoard ignores, with the journal offset up to which the file is filled.
"""

from __future__ import annotations

import errno
import io
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog, SourceMetadata
from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT, DT_STRING
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.text import metadata as text_metadata

from ray_tracking.tracking.backends.crc import masked_crc32c

_NAME = re.compile(r"^events\.out\.tfevents\.(\d+)\.")
_NOTHING = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))
_MARK = "ray_tracking offset "
_WRITER = "ray_tracking"


class EventFile:
    """One open event file. Not thread-safe. Events are kept in memory until `commit` appends them with one write."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self.is_empty = True
        self.size = 0
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._buffer = io.BytesIO()
        self._put(
            Event(
                wall_time=time.time(),
                file_version="brain.Event:2",
                source_metadata=SourceMetadata(writer=_WRITER),
            )
        )
        try:
            self._append()
        except OSError:  # a full disk, tried again and again: leave neither an open nor an empty file each time
            self.close()
            os.unlink(path)
            raise

    @classmethod
    def create(cls, folder: str, *, suffix: str = "") -> EventFile:
        """A new file that TensorBoard reads after all others in the folder: it orders them by name."""
        os.makedirs(folder, exist_ok=True)
        newest = max((_second(name) for name in event_files(folder)), default=0)
        second = max(int(time.time()), newest + 1)
        return cls(
            os.path.join(folder, f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}{suffix}")
        )

    def summary(self, step: int, wall_time: float) -> Any:
        """An empty summary for `add`; its event's step and time are kept with it."""
        self._event = Event(wall_time=wall_time, step=step)
        return self._event.summary

    def add(self, summary: Any) -> None:
        if summary.value:
            self._put(self._event)

    def commit(self, offset: int) -> None:
        """Append what was added since the last commit; `offset`, if not negative, is what the file is filled up to.

        Raises OSError if the file can't be written, or is not in its place any more: it would reach nobody.
        """
        if not os.path.samestat(os.stat(self.path), os.fstat(self._handle)):
            raise FileNotFoundError(errno.ENOENT, "another file is in its place", self.path)
        if offset >= 0:
            self._put(Event(session_log=SessionLog(status=SessionLog.CHECKPOINT, msg=f"{_MARK}{offset}")))
        self._append()
        self.is_empty = False

    def restart(self, step: int) -> None:
        """Make TensorBoard forget what earlier files hold at `step` and later."""
        self._put(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
        self._append()
        self.is_empty = False

    def drop(self) -> None:
        """Forget what was added but not committed."""
        self._buffer.seek(0)
        self._buffer.truncate()

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    def _put(self, event: Event) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._buffer.write(b"".join((length, masked_crc32c(length), data, masked_crc32c(data))))

    def _append(self) -> None:
        data = memoryview(self._buffer.getvalue())
        written = 0
        try:
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError:
            # A full disk takes a part: without this, what is written next would stand behind a torn event.
            os.ftruncate(self._handle, self.size)
            raise
        self.size += written
        self.drop()


def event_files(folder: str) -> list[str]:
    """Names of the event files in a folder, oldest first; empty if there is no such folder."""
    try:
        return sorted(name for name in os.listdir(folder) if _NAME.match(name))
    except FileNotFoundError:
        return []


def _second(name: str) -> int:
    match = _NAME.match(name)
    return int(match.group(1)) if match else 0


def last_offset(folder: str) -> int | None:
    """The journal offset up to which the folder's files are filled, -1 if they hold nothing, None if they don't say.

    Cuts off what a killed process left behind its last mark, so that records sent again stand there once.
    """
    for name in reversed(event_files(folder)):
        path = os.path.join(folder, name)
        ours, offset, end = _last_mark(path)
        if not ours:
            return None
        if end < os.path.getsize(path):
            os.truncate(path, end)
        if offset is not None:
            return offset
    return -1


def _last_mark(path: str) -> tuple[bool, int | None, int]:
    """(whether the file is one of ours with nothing but marked events, offset of its last mark, where that ends)."""
    ours, end = False, 0
    offset: int | None = None
    with open(path, "rb") as file:
        for event, position in _events(file):
            if event.source_metadata.writer == _WRITER:
                ours, end = True, position
            elif event.session_log.msg.startswith(_MARK):
                offset, end = int(event.session_log.msg[len(_MARK) :]), position
            elif event.session_log.status == SessionLog.START:
                end = position
    return ours, offset, end


def _events(file: io.BufferedReader) -> Iterator[tuple[Event, int]]:
    """The file's short events (marks and headers are) with the position behind each; ends at a torn one."""
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        data = file.read(length + 4)
        if len(data) < length + 4:
            return
        if length < 256:
            yield Event.FromString(data[:length]), file.tell()


def add_text(summary: Any, tag: str, text: str) -> None:
    """A value for TensorBoard's TEXT tab; it is rendered as Markdown, HTML removed."""
    summary.value.add(
        tag=tag,
        metadata=text_metadata.create_summary_metadata(display_name="", description=""),
        tensor=TensorProto(dtype=DT_STRING, string_val=[text.encode("utf-8", "replace")]),
    )


def add_hparams(summary: Any, params: Mapping[str, Any], *, group: str, started: float) -> None:
    """The run's row in TensorBoard's HPARAMS tab."""
    info = SessionStartInfo(group_name=group, start_time_secs=started)
    for key, value in params.items():
        key = key.encode("utf-8", "backslashreplace").decode()
        if isinstance(value, bool):
            info.hparams[key].bool_value = value
        elif isinstance(value, int | float):
            info.hparams[key].number_value = value
        else:
            info.hparams[key].string_value = str(value).encode("utf-8", "backslashreplace").decode()
    metadata: SummaryMetadata = hparams_metadata.create_summary_metadata(HParamsPluginData(session_start_info=info))
    summary.value.add(tag=hparams_metadata.SESSION_START_INFO_TAG, metadata=metadata, tensor=_NOTHING)


def add_hparams_end(summary: Any, status: str, ended: float) -> None:
    """How the run of `add_hparams` ended: `status` is completed, failed, aborted or interrupted."""
    shown = {"completed": Status.STATUS_SUCCESS, "failed": Status.STATUS_FAILURE}.get(status, Status.STATUS_UNKNOWN)
    info = SessionEndInfo(status=shown, end_time_secs=ended)
    metadata: SummaryMetadata = hparams_metadata.create_summary_metadata(HParamsPluginData(session_end_info=info))
    summary.value.add(tag=hparams_metadata.SESSION_END_INFO_TAG, metadata=metadata, tensor=_NOTHING)
