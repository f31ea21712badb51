"""Why training failed, in words: the user's own exception and traceback out of what Ray raises."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from typing import NamedTuple

from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from ray_tracking.config import redact_text
from ray_tracking.errors import LeaseError, StorageError, UsageError
from ray_tracking.runtime.hangs import RankHungError


class Reason(NamedTuple):
    """`summary` is one line that names the rank; `traceback` the training function's part of it, "" if unknown."""

    summary: str
    traceback: str = ""


_NOTE = "Traceback of the training function:\n"
_DEAD_PROCESS = re.compile(r"actor is dead because its worker process has died|actor died unexpectedly", re.IGNORECASE)
_DEAD_NODE = re.compile(r"its node has died|node it was running on is dead|node was preempted", re.IGNORECASE)
_LOST_PEER = re.compile(r"gloo|NCCL|Connection (reset|closed) by peer|process group", re.IGNORECASE)
_LOW_MEMORY = re.compile(r"node running low on memory|Memory on the node \(IP", re.IGNORECASE)
_MEMORY_USED = re.compile(r"Memory on the node \(IP: ([^,]+),.*?was ([\d.]+)GB used / ([\d.]+)GB limit")
_HOST = re.compile(r"node_ip='([^']+)'|^\s*ip: (\S+)", re.MULTILINE)
_MORE_MEMORY = (
    "use smaller batches, fewer workers per node (scaling.resources_per_worker with more CPU or memory each) "
    "or nodes with more memory"
)


def is_hopeless(error: BaseException) -> bool:
    """Whether starting the workers again can't help: a value that can't be, or another process writes the run by now.
    A storage may only be away for a while.
    """
    return isinstance(error, UsageError | LeaseError) and not isinstance(error, StorageError)


def hopeless_of(error: BaseException) -> Exception | None:
    """What a rank was refused, if that is why a fit failed."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return next((failure for _, failure in sorted(failures.items()) if is_hopeless(failure)), None)


def note_traceback(error: Exception) -> None:
    """Give the exception its traceback as text, which Ray does not carry to the driver. Called on the worker."""
    below_us = error.__traceback__.tb_next if error.__traceback__ else None
    error.add_note(_NOTE + "".join(traceback.format_tb(below_us)))


def reason_of(error: TrainingFailedError, *, kernel_killed_on: str | None = None) -> Reason:
    """The cause of a failed fit or attempt, secrets removed.

    `kernel_killed_on`: the address of a host whose kernel is known to have killed a process for want of memory.
    """
    if isinstance(error, PreemptionError):
        nodes = ", ".join(node[:8] for node in error.preemption_info.preempted_node_ids)
        ranks = ", ".join(map(str, error.preemption_info.preempted_ranks))
        return Reason(f"preempted: node {nodes} with rank {ranks} is taken away")
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return reason_of_ranks(error.worker_failures, kernel_killed_on=kernel_killed_on)
    if isinstance(error, ControllerError):
        text = redact_text(str(error.controller_failure))
        why = _short_of_memory(text) if _LOW_MEMORY.search(text) else _first_sentence(text)
        return Reason(f"the workers could not be started: {why}")
    return Reason(_last_line(str(error)) or type(error).__name__)


def reason_of_ranks(failures: Mapping[int, Exception], *, kernel_killed_on: str | None = None) -> Reason:
    """The exception of the lowest rank that failed by itself; ranks that only lost their peers come last."""
    rank, failure = min(failures.items(), key=lambda item: (_remoteness(item[1]), item[0]))
    text = redact_text(str(failure))
    if isinstance(failure, RankHungError):
        return Reason(failure.message)
    if _LOW_MEMORY.search(text):
        return Reason(f"rank {rank}: {_short_of_memory(text)}")
    if _DEAD_NODE.search(text):
        return Reason(f"rank {rank}: its node {_host(text)}died or was taken away")
    if _DEAD_PROCESS.search(text):
        return Reason(f"rank {rank}: {_died(text, kernel_killed_on)}")
    notes = [note.removeprefix(_NOTE) for note in getattr(failure, "__notes__", []) if note.startswith(_NOTE)]
    kind = type(failure).__name__
    line = _last_line(text)
    summary = line if line.startswith(kind) else f"{kind}: {line}" if line else kind
    return Reason(f"rank {rank}: {summary}", redact_text(notes[0]).rstrip() if notes else "")


def _remoteness(failure: Exception) -> int:
    """How far a rank's failure is from the cause: 0 says it itself."""
    text = str(failure)
    if isinstance(failure, RankHungError) or _LOW_MEMORY.search(text):
        return 0
    return 2 if _LOST_PEER.search(text) else 1


def _short_of_memory(text: str) -> str:
    found = _MEMORY_USED.search(text)
    used = f" ({found[2]} of {found[3]} GB used on {found[1]})" if found else ""
    return f"out of memory: Ray ended the worker before the node ran out of it{used}; {_MORE_MEMORY}"


def _died(text: str, kernel_killed_on: str | None) -> str:
    host = _HOST.search(text)
    where = next(filter(None, host.groups()), None) if host else None
    if where is not None and where == kernel_killed_on:
        return f"out of memory: the kernel of {where} killed the worker; {_MORE_MEMORY}"
    place = f" on {where}" if where else ""
    return f"the worker process{place} died: killed, out of memory, or crashed"


def _host(text: str) -> str:
    found = _HOST.search(text)
    return f"{next(filter(None, found.groups()))} " if found else ""


def _first_sentence(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].strip().partition(". ")[0] if lines else ""


def _last_line(text: str) -> str:
    lines = redact_text(text).strip().splitlines()
    return lines[-1].strip() if lines else ""
