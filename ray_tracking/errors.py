"""What goes wrong, and what to do about it: one tree of errors under `RayTrackingError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray_tracking.runs.process import Process


class RayTrackingError(Exception):
    """Base of every error this package raises on purpose.

    `str(error)` is the whole message for a person: what was found, where, what is allowed,
    and, as its last line when there is one, `hint`: the command or key that fixes it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.__dict__)


def _rebuild(
    kind: type[RayTrackingError], message: str, hint: str | None, state: dict[str, object]
) -> RayTrackingError:
    error = kind.__new__(kind)
    RayTrackingError.__init__(error, message, hint=hint)
    error.__dict__.update(state)
    return error


class UsageError(RayTrackingError):
    """Wrong usage: a target, argument or call that can't work. Exit status 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that is not valid. Exit status 2."""


class NameRefusedError(UsageError):
    """A run id, checkpoint, metric or artifact name that could leave its directory or can't be stored."""


class MetricError(UsageError):
    """A logged value that can't be turned into what the call promises; names the key."""


class StorageError(UsageError):
    """The shared storage can't be read or written."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed; the hint names the extra."""


class RunFailedError(RayTrackingError):
    """The training function, or what runs it, failed. Exit status 1."""


class RunStoppedError(RayTrackingError):
    """Somebody asked the run to end early. Its state is saved, it can be resumed. Exit status 1."""


class RefusedError(RayTrackingError):
    """Refused to protect what is there: a held lease, a failed verification, no access. Exit status 3."""

    exit_code = 3


class LeaseError(RefusedError):
    """Another process writes the run `run`: `process`, None if not known, with the lease number `epoch`."""

    def __init__(
        self, message: str, *, run: str = "", epoch: int = 0, process: Process | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.run, self.epoch, self.process = run, epoch, process


class LeaseHeldError(LeaseError):
    """The run is being written by another process. Its lease runs out in `expires_in` seconds unless it is renewed."""

    def __init__(
        self,
        message: str,
        *,
        run: str = "",
        epoch: int = 0,
        process: Process | None = None,
        expires_in: float = 0.0,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, run=run, epoch=epoch, process=process, hint=hint)
        self.expires_in = expires_in


class LeaseLostError(LeaseError):
    """This process must not write the run any more."""


class JournalError(RayTrackingError):
    """The journal can't be appended to or read."""


class CheckpointError(RayTrackingError):
    """A checkpoint can't be saved or loaded."""


class CheckpointCorruptError(RefusedError):
    """A checkpoint is not what was saved: names the file and the reason."""


class BackendError(RayTrackingError):
    """A backend failed for now: delivery is retried. `retry_after` is the wait it asked for, in seconds."""

    def __init__(self, message: str, *, hint: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class BackendRefusedError(BackendError):
    """A backend refuses for good (bad credentials, no such project): it is disabled with one warning."""
