"""Run directories as a run leaves them, made without Ray: the real record, journal, summary, cursors, manifests."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ray_tracking.checkpoint.manifest import (
    FileEntry,
    Manifest,
    digest,
    encode_manifest,
    rank_file,
    state_file,
)
from ray_tracking.journal import JournalWriter
from ray_tracking.records import Kind, Record
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.storage import Storage
from ray_tracking.tracking.cursor import Cursor


def scalars(steps: Iterable[int], attempt: int = 1, key: str = "val/loss", scale: float = 1.0) -> list[Record]:
    """`key` = scale / step at each step, each a call of its own."""
    return [
        Record(Kind.SCALAR, key, step, 1000.0 + step, scale / step, None, 0, attempt, seq)
        for seq, step in enumerate(steps, 1)
    ]


def attempt_row(attempt: int, step: int) -> Record:
    return Record(Kind.ATTEMPT, "attempt", step, 999.0, attempt=attempt)


class RunBuilder:
    """One run below a storage. Each method writes at once, as the real parts do."""

    def __init__(self, store: RunStore, run_id: str, **fields: Any) -> None:
        now = time.time()
        self.store = store
        self.directory: Storage = store.directory(run_id)
        options = {"name": run_id, "created": now, "monitor": "val/loss", "mode": "min", **fields}
        self.record = RunRecord(run_id, **options).begin_attempt(options["created"], 2).resumed(1, -1)
        self.summary = Summary()
        self._writer = JournalWriter(self.directory, 1)
        self._save()
        self.log([attempt_row(1, -1)])

    def _save(self) -> None:
        self.store.save(self.record)

    def log(self, records: list[Record], *, summarised: bool = True) -> RunBuilder:
        """Append to the journal; with `summarised=False` as if the process died before it saved the summary."""
        appended = self._writer.append(records)
        if summarised:
            self.summary.add(appended)
            self.alive(time.time())
        return self

    def alive(self, when: float) -> RunBuilder:
        """The last sign of life."""
        self.summary.updated = when
        self.summary.save(self.directory)
        return self

    def resume(self, step: int) -> RunBuilder:
        number = len(self.record.attempts) + 1
        self.record = self.record.begin_attempt(time.time(), 2).resumed(number, step)
        self._save()
        self._writer.begin_attempt(number)
        return self.log([attempt_row(number, step)])

    def finish(
        self, status: Status = Status.COMPLETED, reason: str = "completed", at: float | None = None
    ) -> RunBuilder:
        self.record = self.record.finish(time.time() if at is None else at, status, reason)
        self._save()
        return self

    def backend(self, name: str, **fields: Any) -> RunBuilder:
        Cursor(name, **fields).save(self.directory)
        return self

    def config(self, config: Mapping[str, Any]) -> RunBuilder:
        self.record = replace(self.record, config=config)
        self._save()
        return self

    def checkpoint(
        self, step: int, metrics: Mapping[str, float], *, complete: bool = True, pinned: bool = False
    ) -> None:
        """Two ranks' manifests over one small file each; an incomplete one lacks rank 1's."""
        folder = f"attempt-{len(self.record.attempts):03d}/step-{step:06d}"
        for rank in range(2 if complete else 1):
            data = b"{}" * 50
            self.directory.write_bytes(f"{folder}/{state_file(rank)}", data)
            files = {state_file(rank): FileEntry(len(data), digest(data), len(data))}
            manifest = Manifest(step, 0, rank, 2, step, 0.0, dict(metrics), (), files, "save")
            self.directory.write_bytes(f"{folder}/{rank_file(rank, 2)}", encode_manifest(manifest))
        if pinned:
            self.directory.write_bytes(f"{folder}/pinned", b"")
