"""The log calls of one rank over a Sender: shared by the training function's `run` and the plain-script trackers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ray_tracking.errors import MetricError
from ray_tracking.records import Artifact, Kind, encode_params
from ray_tracking.storage import Storage
from ray_tracking.tracking import values as payloads
from ray_tracking.tracking.sender import Clock, Sender


class RunLogger:
    """`clock.step` is the step of a call that names none. `artifacts` is the run's folder for files."""

    def __init__(self, sender: Sender, clock: Clock, artifacts: Storage) -> None:
        self.log_metrics = sender.metrics_logger(clock)
        self.log_rank_metrics = sender.metrics_logger(clock, Kind.RANK_SCALAR)
        """Numbers of this rank, which every rank logs: `key/mean`, `key/min` and `key/max` over the ranks are shown."""
        self._sender = sender
        self._clock = clock
        self._artifacts = artifacts

    def _put(self, kind: Kind, key: str, data: bytes, step: int | None) -> None:
        self._sender.put(kind, self._clock.here if step is None else step, {key: data})

    def log_params(self, params: Mapping[str, Any]) -> None:
        if not isinstance(params, Mapping):
            raise MetricError(f"log_params takes a mapping, not {type(params).__name__}.")
        from ray_tracking.config.redaction import redact

        if params:
            self._sender.put(Kind.PARAM, 0, encode_params(redact(dict(params))))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        if tags:
            self._sender.put(Kind.TAG, 0, {str(key): payloads.text(value) for key, value in tags.items()})

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        self._put(Kind.HISTOGRAM, key, payloads.histogram(key, values), step)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        self._put(Kind.TEXT, key, payloads.text(text), step)

    def log_image(self, key: str, image: Any, step: int | None = None) -> None:
        self._put(Kind.IMAGE, key, payloads.image(key, image), step)

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Copy the file, or every file below the folder, to the run's artifacts, then log each."""
        source = Path(path)
        if not source.exists():
            raise MetricError(f"The artifact {os.fspath(path)!r} does not exist.")
        shown = name or source.name
        files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
        for file in files:
            below = shown if source.is_file() else f"{shown}/{file.relative_to(source).as_posix()}"
            self._artifacts.upload(file, below)
            artifact = Artifact(below, file.stat().st_size, _digest(file))
            self._put(Kind.ARTIFACT, below, artifact.encode(), None)

    def begin_attempt(self, resumed_from_step: int) -> None:
        """The first record of an attempt: what it goes on from, -1 for a fresh start."""
        self._sender.put(Kind.ATTEMPT, resumed_from_step, {"attempt": b""})


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as reader:
        while block := reader.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
