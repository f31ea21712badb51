"""What a run needs to go on, from its record alone, and what has changed since. Pure.

In: a `RunRecord`. Out: its configuration as overrides; differences in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ray_tracking.config import REMOVED
from ray_tracking.errors import RefusedError, UsageError
from ray_tracking.runs.record import Attempt, RunRecord, Status
from ray_tracking.runs.store import sweep_of


def check_resumable(record: RunRecord, *, has_function: bool) -> None:
    """Raises RefusedError for a completed run, UsageError for one whose training function is not known by name, and
    for a sweep's trial.
    """
    if (sweep := sweep_of(record.run_id)) is not None:
        raise UsageError(
            f"The run {record.run_id!r} is a trial of a sweep, which goes on with all of its trials.",
            hint=f"Resume the sweep: ray-tracking resume {sweep}",
        )
    if record.status is Status.COMPLETED:
        raise RefusedError(
            f"The run {record.run_id!r} is completed; there is nothing to resume.",
            hint="Start a new one with `ray-tracking train`.",
        )
    if not has_function and not (record.entrypoint and ":" in record.entrypoint):
        raise UsageError(
            f"The run {record.run_id!r} does not say which function it trained.",
            hint="Name it: ray-tracking resume RUN --target module:function.",
        )


def overrides_of(record: RunRecord, storage: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded configuration as overrides, with `given` (dotted keys) still to be laid over it.

    Raises UsageError naming the values that were left out of the record because they are secret and are not `given`.
    """
    missing = [key for key in hidden_keys(record.config) if not any(_covers(one, key) for one in given)]
    if missing:
        raise UsageError(
            f"The record of {record.run_id!r} does not hold the secret values of: {', '.join(missing)}.",
            hint="Give them again: " + " ".join(f"--set {key}=..." for key in missing),
        )
    return {**record.config, "storage": storage}


def hidden_keys(value: Any, path: str = "") -> Iterator[str]:
    """The dotted keys whose values were removed from a recorded configuration."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from hidden_keys(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from hidden_keys(item, f"{path}.{index}")
    elif isinstance(value, str) and REMOVED in value:
        yield path


def changes(record: RunRecord, *, code_digest: str | None, versions: Mapping[str, str], workers: int) -> list[str]:
    """What is not as it was when the run began, each in words; empty if all is."""
    found = []
    if record.code_digest and code_digest and record.code_digest != code_digest:
        found.append("the file of the training function has changed")
    for package, before in record.versions.items():
        now = versions.get(package)
        if now != before:
            found.append(f"{package} {before} is now {now or 'not installed'}")
    last = record.attempts[-1].world_size if record.attempts else workers
    if last != workers:
        found.append(f"{last} workers are now {workers}: the samples left in the epoch are dealt anew")
    return found


def is_superseded(attempt: int, step: int, attempts: Iterable[Attempt]) -> bool:
    """Whether what `attempt` had at `step` counts no more: a later attempt went on from an earlier step.

    The rule of the journal, for checkpoints: one that became complete after that (its worker was slow, or shut out)
    belongs to another history than the curves show.
    """
    return any(
        later.number > attempt and later.resumed_from_step is not None and later.resumed_from_step < step
        for later in attempts
    )


def _covers(given: str, key: str) -> bool:
    return key == given or key.startswith(f"{given}.")
