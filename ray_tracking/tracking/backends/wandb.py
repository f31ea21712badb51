"""Weights & Biases: one row per step, online or into offline run files."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any, ClassVar

from ray_tracking.errors import BackendError
from ray_tracking.log import get_logger
from ray_tracking.records import Artifact, Histogram, Kind, Record
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo
from ray_tracking.tracking.backends.media import artifact_file, param_of, png_shape, storable, text_of
from ray_tracking.tracking.backends.names import fitting
from ray_tracking.tracking.backends.wandb_errors import answers, check_login, forget_service
from ray_tracking.tracking.backends.wandb_file import FileWatch, check_writable, stopped
from ray_tracking.tracking.backends.wandb_rows import COMPANION, OFFSET, Rows, held_offset
from ray_tracking.tracking.backends.wandb_stream import Row, Stream, is_plain

log = get_logger()

_RUN_ID_REFUSED = re.compile(r"[^A-Za-z0-9_.-]")
_KEY_REFUSED = re.compile(rf"^_|{re.escape(COMPANION)}$|[\ud800-\udfff]")
_FILE_SECONDS = 10.0
_TEXT_LIMIT = 65_536
_TAG_LIMIT = 64
_KEY_LIMIT = 1000
_NO_IMAGE = "[not a PNG image]"


class WandbBackend(Backend):
    """One W&B run with our run id. Files go to `<local_dir>/wandb/`; nothing about code, git or machine is collected.

    A text is a plain string in the row. A row reaches an offline file within a second; the last one waits here for
    more points of its step, until a later step's come.
    """

    name: ClassVar[str] = "wandb"
    kinds: ClassVar[frozenset[Kind]] = frozenset(set(Kind) - {Kind.ATTEMPT})
    max_records: ClassVar[int] = 2000

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] | None = None,
        mode: str = "offline",
    ) -> None:
        self._project = project
        self._entity = entity
        self._tags = list(tags or ())
        self._mode = mode
        self._run: Any = None
        self._stream: Stream | None = None
        self._rows = Rows()
        self._waiting: Row | None = None
        self._held = -1
        self._sent = -1
        self._watch: FileWatch | None = None
        self._files: tuple[str, str] | None = None
        self._position: int | None = None
        self._companions: set[str] = set()
        self._renamed: dict[str, str] = {}
        self._run_tags: dict[str, str] = {}
        self._artifacts = ""

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        if "wandb" not in sys.modules:
            # Left by a parent process that uses W&B: its service would keep our run's id after we were killed.
            os.environ.pop("WANDB_SERVICE", None)
            # For its service, which else keeps several cores awake for work that one does in passing.
            os.environ.setdefault("GOMAXPROCS", "1")
        import wandb

        run_id = fitting(run.run_id, replace=_RUN_ID_REFUSED, limit=64)
        folder = os.path.join(os.path.abspath(run.local_dir), "wandb")
        if self._mode == "online":
            check_login(wandb)
        if self._run is not None:  # still up: only the call failed that made delivery open it again
            self._position = self._held
            return BackendIdentity(run_id, folder)
        check_writable(folder)
        self._position = held_offset(folder, run_id) if self._mode == "offline" else None
        self._artifacts, self._run_tags, self._companions = run.artifacts, dict(run.tags), set()
        with answers():
            self._run = wandb.init(
                id=run_id,
                name=run.name,
                project=self._project or fitting(run.name, replace=_RUN_ID_REFUSED, limit=128),
                entity=self._entity,
                group=run.sweep,
                job_type="trial" if run.sweep else None,
                tags=self._shown_tags(),
                config=dict(run.config),
                mode=self._mode,  # type: ignore[arg-type]  # the config allows these only
                dir=os.path.dirname(folder),
                resume="allow",
                reinit="create_new",
                settings=_settings(wandb),
            )
        if self._mode == "online" and self._run.resumed:
            self._position = _as_offset(self._run.summary.get(OFFSET))
        self._held = -1 if self._position is None else self._position
        self._files = (folder, run_id) if self._mode == "offline" else None
        self._watch, self._sent = FileWatch(*self._files) if self._files else None, -1
        self._rows, self._waiting = Rows(self._run.step - 1), None
        self._stream = Stream.of(self._run)
        return BackendIdentity(run_id, folder)

    def position(self) -> int | None:
        return self._position

    def write(self, records: Sequence[Record]) -> None:
        rows: dict[int, dict[str, Any]] = {}
        params: dict[str, Any] = {}
        tags: dict[str, str] = {}
        plan = self._rows.copy()
        if self._waiting is not None:
            rows[self._waiting[0]] = self._waiting[1].copy()
        with self._calls():
            for record in records:
                if record.kind is Kind.PARAM:
                    params[record.key] = param_of(record)
                elif record.kind is Kind.TAG:
                    tags[record.key] = text_of(record)
                elif record.kind is Kind.ARTIFACT:
                    self._save_artifact(record)
                elif record.offset < 0 or record.offset > self._held:
                    self._add(rows, plan, record)
            if params:
                self._run.config.update(params, allow_val_change=True)
            if tags:
                self._run_tags |= tags
                self._run.tags = self._shown_tags()
                self._run.config.update({"tags": self._run_tags}, allow_val_change=True)
            if rows:
                *whole, waiting = rows.items()
                self._send(whole)
                self._reached(*waiting)
                self._waiting = waiting

    def _send(self, rows: Sequence[Row]) -> None:
        """Whole rows to W&B: neighbours of plain values together, one with media by `run.log`, which takes these."""
        for stream, group in groupby(rows, key=lambda row: self._stream if is_plain(row) else None):
            if stream is not None:
                part = list(group)
                stream.send(part)
                for position, row in part:
                    self._reached(position, row)
                self._waiting = None
            else:
                for position, row in group:
                    self._run.log(row, step=position, commit=True)
                    self._reached(position, row)
                    self._waiting = None
        if rows:
            self._sent = self._held

    def flush(self) -> None:
        """Look whether what was sent is written. If not, the next `open` begins another file."""
        if self._watch is not None and self._files is not None and not self._watch.is_written(self._sent):
            with self._calls():
                self._run.finish(exit_code=1)
            self._run = self._watch = None
            raise stopped(self._files[0])

    def _reached(self, position: int, row: dict[str, Any]) -> None:
        self._rows = self._rows.reached(position, row)
        self._held = max(self._held, row.get(OFFSET, -1))

    def _add(self, rows: dict[int, dict[str, Any]], plan: Rows, record: Record) -> None:
        key = shown_key(record.key)
        if key != record.key and key not in self._renamed:
            self._renamed[key] = storable(record.key, _TEXT_LIMIT)
            self._run.config.update({"shown_names": self._renamed}, allow_val_change=True)
        position, companion = plan.place(key, record.step)
        row = rows.get(position)
        if row is None:
            row = rows[position] = {"_timestamp": record.time}
        row[key] = record.value if record.kind is Kind.SCALAR else _media(record)
        if companion:
            if companion not in self._companions:
                # Not made the key's step_metric: W&B would then draw only the points that have a companion.
                self._run.define_metric(companion.replace(".", "\\."), hidden=True)
                self._companions.add(companion)
            row[companion] = record.step
        if record.offset >= 0:
            row[OFFSET] = record.offset

    def _shown_tags(self) -> tuple[str, ...]:
        """W&B's tags are bare words of at most 64 characters; the whole values stand in the run's config."""
        pairs = (f"{key}:{value}" if value else key for key, value in self._run_tags.items())
        return tuple(dict.fromkeys(storable(tag, _TAG_LIMIT) for tag in (*self._tags, *pairs) if tag))

    def _save_artifact(self, record: Record) -> None:
        path = Artifact.decode(record.data or b"").path
        with artifact_file(self._artifacts, record) as source:
            if source is None:
                log.warning("artifact is no longer on storage", backend=self.name, artifact=record.key, path=path)
                return
            target = os.path.join(self._run.dir, "artifacts", *path.split("/"))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(source, target)
        self._run.save(target, base_path=self._run.dir, policy="now")

    @contextmanager
    def _calls(self) -> Iterator[None]:
        """Calls to the open run. If W&B's service process has ended, the next `open` starts another one."""
        if self._run is None:
            raise BackendError("W&B: no run is open.")
        try:
            with answers():
                yield
        except ConnectionError as error:
            self._run = None
            forget_service()
            raise BackendError(f"W&B's service process has ended: {error}") from error

    def close(self, status: str) -> None:
        if self._run is None:
            return
        with self._calls():
            self._send([] if self._waiting is None else [self._waiting])
            self._run.finish(exit_code=0 if status == "completed" else 1)
        self._run = None
        self._await_file()

    def _in_file(self, folder: str, run_id: str) -> bool:
        found = held_offset(folder, run_id)
        return found is not None and found >= self._held

    def _await_file(self) -> None:
        """W&B's service may return from `finish` a moment before the last row is in the offline file."""
        end = time.monotonic() + _FILE_SECONDS
        while self._files is not None and not self._in_file(*self._files):
            if time.monotonic() > end:
                raise BackendError(f"W&B has not written its last rows within {_FILE_SECONDS:.0f} s.")
            time.sleep(0.02)


def _settings(wandb: Any) -> Any:
    return wandb.Settings(
        silent=True,
        console="off",
        symlink=False,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=30,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1.0,
    )


def _media(record: Record) -> Any:
    import numpy
    import wandb

    if record.kind is Kind.TEXT:
        return storable(text_of(record), _TEXT_LIMIT)
    if record.kind is Kind.HISTOGRAM:
        histogram = Histogram.decode(record.data or b"")
        counts, edges = numpy.asarray(histogram.counts), numpy.asarray(histogram.edges)
        return wandb.Histogram(np_histogram=(counts, edges))
    if not any(png_shape(record.data or b"")):
        return _NO_IMAGE
    from PIL import Image

    try:
        with Image.open(io.BytesIO(record.data or b"")) as image:
            image.load()
            return wandb.Image(image)
    except (OSError, SyntaxError, ValueError):  # what pillow raises for a torn or broken PNG
        return _NO_IMAGE


@lru_cache(10_000)
def shown_key(key: str) -> str:
    """The key in W&B: what it keeps for itself, or can't store, gets a digest."""
    return fitting(key, replace=_KEY_REFUSED, limit=_KEY_LIMIT)


def _as_offset(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None
