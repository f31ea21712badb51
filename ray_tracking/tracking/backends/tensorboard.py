"""TensorBoard: event files, one event per step with all of the step's values."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from ray_tracking.errors import BackendError, StorageError
from ray_tracking.records import Histogram, Kind, Record
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo, by_step
from ray_tracking.tracking.backends.media import param_of, param_text, png_shape, storable, text_of
from ray_tracking.tracking.backends.names import fitting

if TYPE_CHECKING:
    from ray_tracking.tracking.backends.eventfile import EventFile

_REFUSED = re.compile(r"[\ud800-\udfff]")  # protobuf strings are UTF-8; anything else TensorBoard takes as a tag
_TIMELESS = -1  # the step of params and tags: no rewind purges it
_ROLL_BYTES = 16 << 20  # a remote file is uploaded whole, so it is kept small


class TensorBoardBackend(Backend):
    """Event files in `<log_dir>/<run id>` (default: below the run's local directory), a trial's in its sweep's folder
    there; no torch, no tensorflow.

    Scalars are 32-bit floats there, as TensorBoard's own writers make them. `update_freq` is how many steps are
    gathered before they are written, `flush_secs` how often what was written is forced to disk (or uploaded, if
    `log_dir` is a URI).
    """

    name: ClassVar[str] = "tensorboard"
    kinds: ClassVar[frozenset[Kind]] = frozenset(
        {Kind.SCALAR, Kind.HISTOGRAM, Kind.TEXT, Kind.IMAGE, Kind.PARAM, Kind.TAG}
    )
    rewinds: ClassVar[bool] = True
    max_records: ClassVar[int] = 5000

    def __init__(self, log_dir: str | None = None, update_freq: int = 1, flush_secs: float = 10) -> None:
        self._log_dir = log_dir
        self._update_freq = max(1, update_freq)
        self._flush_secs = flush_secs
        self._file: EventFile | None = None
        self._remote: Storage | None = None
        self._uploaded: dict[str, int] = {}
        self._waiting: list[Record] = []
        self._params: dict[str, Any] = {}
        self._held = -1
        self._position: int | None = None
        self._synced = 0.0
        self._folder = ""
        self._run_id = ""

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        from ray_tracking.tracking.backends.eventfile import EventFile, last_offset

        if self._file is not None:
            open_file, self._file = self._file, None
            open_file.close()
        self._folder, self._remote = self._places(run)
        self._run_id = run.run_id
        self._waiting = []
        try:
            held = last_offset(self._folder)
            # Local copies of uploaded files may be gone while the uploaded ones are there.
            self._position = None if self._remote and identity and held == -1 else held
            self._held = -1 if held is None else held
            self._file = EventFile.create(self._folder, suffix=".v2")
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        self._synced = time.monotonic()
        return BackendIdentity(run.run_id, self._remote.uri if self._remote else self._folder)

    def _places(self, run: RunInfo) -> tuple[str, Storage | None]:
        """Where the event files are written, and the storage they are uploaded to if `log_dir` is a URI."""
        parts = (run.run_id,) if run.sweep is None else (run.sweep, run.run_id)
        if self._log_dir and "://" in self._log_dir:
            remote = Storage.open(self._log_dir).child(*parts)
            if not remote.is_local:
                return os.path.join(run.local_dir, "tensorboard", *parts), remote
            return remote.path(), None
        base = self._log_dir or os.path.join(run.local_dir, "tensorboard")
        return os.path.abspath(os.path.join(os.path.expanduser(base), *parts)), None

    def position(self) -> int | None:
        return self._position

    def write(self, records: Sequence[Record]) -> None:
        known = self._waiting[-1].offset if self._waiting else self._held
        self._waiting += [record for record in records if record.offset < 0 or record.offset > known]
        if self._update_freq == 1 or len({record.step for record in self._waiting}) >= self._update_freq:
            self._write_waiting()
        if time.monotonic() - self._synced >= self._flush_secs:
            self.flush()

    def _write_waiting(self) -> None:
        if not self._waiting:
            return
        file = self._opened()
        offset = max(record.offset for record in self._waiting)
        try:
            for step, records in by_step(self._waiting):
                self._add_step(file, step, records)
            file.commit(offset)
        except OSError as error:
            file.drop()
            raise _unwritable(self._folder, error) from error
        self._waiting = []
        self._held = offset if offset >= 0 else self._held

    def _add_step(self, file: EventFile, step: int, records: list[Record]) -> None:
        summary = file.summary(step, records[0].time)
        lasting: list[Record] = []
        for record in records:
            if record.kind is Kind.SCALAR:
                summary.value.add(tag=shown_tag(record.key), simple_value=record.value)
            elif record.kind in (Kind.PARAM, Kind.TAG):
                lasting.append(record)
            else:
                _add_media(summary, record)
        file.add(summary)
        if lasting:
            self._add_lasting(file, lasting)

    def _add_lasting(self, file: EventFile, records: list[Record]) -> None:
        from ray_tracking.tracking.backends.eventfile import add_hparams, add_text

        summary = file.summary(_TIMELESS, records[0].time)
        for record in records:
            if record.kind is Kind.TAG:
                add_text(summary, f"tags/{shown_tag(record.key)}", text_of(record))
        params = {record.key: param_of(record) for record in records if record.kind is Kind.PARAM}
        if params:
            first = not self._params
            self._params.update(params)
            add_text(summary, "params", _table(self._params))
            if first:  # TensorBoard shows the first it meets
                add_hparams(summary, self._params, group=self._run_id, started=records[0].time)
        file.add(summary)

    def rewind(self, step: int) -> None:
        from ray_tracking.tracking.backends.eventfile import EventFile

        self._write_waiting()
        try:
            if not self._opened().is_empty:
                self._roll(EventFile)
            self._opened().restart(step + 1)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        # What was written past `step` is gone with this, so records that are sent again must be taken again.
        self._held = -1

    def flush(self) -> None:
        from ray_tracking.tracking.backends.eventfile import EventFile

        self._write_waiting()
        file = self._opened()
        try:
            file.sync()
            if self._remote and self._uploaded.get(file.name) != file.size:
                self._remote.upload(file.path, file.name)
                self._uploaded[file.name] = file.size
                if file.size > _ROLL_BYTES:
                    self._roll(EventFile)
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        except StorageError as error:
            raise BackendError(f"TensorBoard: {error.message}", hint=error.hint) from error
        self._synced = time.monotonic()

    def _roll(self, kind: type[EventFile]) -> None:
        old = self._opened()
        old.sync()
        if self._remote and self._uploaded.get(old.name) != old.size:
            self._remote.upload(old.path, old.name)
        self._file = kind.create(self._folder, suffix=".v2")
        old.close()

    def close(self, status: str) -> None:
        if self._file is None:
            return
        self._write_waiting()
        if self._params:
            self._end_session(self._file, status)
        self.flush()
        self._file.close()
        self._file = None

    def _end_session(self, file: EventFile, status: str) -> None:
        """The run's status in the HPARAMS tab."""
        from ray_tracking.tracking.backends.eventfile import add_hparams_end

        now = time.time()
        summary = file.summary(_TIMELESS, now)
        add_hparams_end(summary, status, now)
        try:
            file.add(summary)
            file.commit(-1)
        except OSError as error:
            file.drop()
            raise _unwritable(self._folder, error) from error

    def _opened(self) -> EventFile:
        if self._file is None:
            raise BackendError("TensorBoard: no event file is open.")
        return self._file


@lru_cache(10_000)
def shown_tag(key: str) -> str:
    """The key as a TensorBoard tag: an empty one, or one that is not UTF-8, gets a digest."""
    return fitting(key, replace=_REFUSED, limit=100_000)


def _add_media(summary: Any, record: Record) -> None:
    from ray_tracking.tracking.backends.eventfile import add_text

    tag = shown_tag(record.key)
    if record.kind is Kind.TEXT:
        add_text(summary, tag, text_of(record))
    elif record.kind is Kind.IMAGE:
        shape = png_shape(record.data or b"")
        image = summary.value.add(tag=tag).image
        image.height, image.width, image.colorspace = shape
        image.encoded_image_string = record.data or b""
    elif record.kind is Kind.HISTOGRAM:
        histogram = Histogram.decode(record.data or b"")
        histo = summary.value.add(tag=tag).histo
        histo.min, histo.max = histogram.edges[0], histogram.edges[-1]
        histo.num, histo.sum, histo.sum_squares = (
            sum(histogram.counts),
            histogram.total,
            histogram.total_squares,
        )
        histo.bucket_limit.extend(histogram.edges[1:])
        histo.bucket.extend(histogram.counts)


def _table(params: dict[str, Any]) -> str:
    """A Markdown table; TensorBoard renders it and removes HTML."""
    rows = [f"| {_cell(key)} | {_cell(param_text(value))} |" for key, value in sorted(params.items())]
    return "\n".join(["| param | value |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return storable(text, 6000).replace("|", "\\|").replace("\n", " ")


def _unwritable(folder: str, error: OSError) -> BackendError:
    return BackendError(
        f"TensorBoard's event file in {folder!r} can't be written: {error}",
        hint="Check that the folder is writable and has space, or set experiment_tracking.tensorboard.log_dir.",
    )
