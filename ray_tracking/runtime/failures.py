"""Why training failed, in words: the user's own exception and traceback out of what Ray raises."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import NamedTuple

from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ray_tracking.config import redact_text
from ray_tracking.errors import StorageError, UsageError


class Reason(NamedTuple):
    """`summary` is one line that names the rank; `traceback` the training function's part of it, "" if unknown."""

    summary: str
    traceback: str = ""


_NOTE = "Traceback of the training function:\n"
_DEAD_PROCESS = re.compile(r"actor is dead because its worker process has died|actor died unexpectedly", re.IGNORECASE)
_LOST_PEER = re.compile(r"gloo|NCCL|Connection (reset|closed) by peer|process group", re.IGNORECASE)


def is_hopeless(error: Exception) -> bool:
    """Whether starting the workers again can't help: a value that can't be, not a storage that is away for now."""
    return isinstance(error, UsageError) and not isinstance(error, StorageError)


def note_traceback(error: Exception) -> None:
    """Give the exception its traceback as text, which Ray does not carry to the driver. Called on the worker."""
    below_us = error.__traceback__.tb_next if error.__traceback__ else None
    error.add_note(_NOTE + "".join(traceback.format_tb(below_us)))


def reason_of(error: TrainingFailedError) -> Reason:
    """The cause of a failed fit, secrets removed."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return reason_of_ranks(error.worker_failures)
    return Reason(_last_line(str(error)) or type(error).__name__)


def reason_of_ranks(failures: Mapping[int, Exception]) -> Reason:
    """The exception of the lowest rank that failed by itself; ranks that only lost their peers come last."""
    rank, failure = min(failures.items(), key=lambda item: (bool(_LOST_PEER.search(str(item[1]))), item[0]))
    notes = [note.removeprefix(_NOTE) for note in getattr(failure, "__notes__", []) if note.startswith(_NOTE)]
    if _DEAD_PROCESS.search(str(failure)):
        return Reason(f"rank {rank}: the worker process died: killed, out of memory, or crashed")
    kind = type(failure).__name__
    text = _last_line(str(failure))
    summary = text if text.startswith(kind) else f"{kind}: {text}" if text else kind
    return Reason(f"rank {rank}: {summary}", redact_text(notes[0]).rstrip() if notes else "")


def _last_line(text: str) -> str:
    lines = redact_text(text).strip().splitlines()
    return lines[-1].strip() if lines else ""
