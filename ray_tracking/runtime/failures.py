"""Why training failed, in words: the user's own exception and traceback out of what Ray raises."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ray_tracking.config import redact_text


class Reason(NamedTuple):
    """`summary` is one line that names the rank; `traceback` the user's part of it, "" if there is none."""

    summary: str
    traceback: str


_LOST_PEER = re.compile(r"gloo|NCCL|ncclRemoteError|Connection (reset|closed) by peer|process group", re.IGNORECASE)
_INTERNAL = re.compile(r'^  File ".*/(ray|ray_tracking)/[^"]*", line \d+.*\n(?:    .*\n)*', re.MULTILINE)


def reason_of(error: TrainingFailedError) -> Reason:
    """The first failed rank's exception, secrets removed."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return reason_of_ranks(error.worker_failures)
    text = redact_text(str(error)).strip()
    return Reason(text.splitlines()[-1].strip() if text else type(error).__name__, "")


def reason_of_ranks(failures: Mapping[int, Exception]) -> Reason:
    """The exception of the lowest rank that failed by itself; ranks that only lost their peers come last."""
    rank, failure = min(failures.items(), key=lambda item: (bool(_LOST_PEER.search(str(item[1]))), item[0]))
    text = redact_text(str(failure)).strip()
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(failure).__name__
    traceback = _INTERNAL.sub("", text + "\n").strip() if len(lines) > 1 else ""
    return Reason(f"rank {rank}: {last}", traceback)
