"""Following a job to its end, through broken connections, and what its end means.

In: a client, a job. Out: the job as it ended, None if the cluster at the address does not know it any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_tracking.errors import UsageError
from ray_tracking.runtime.jobs.client import Job, JobsClient, StreamBroken, UnknownJobError, UnreachableError
from ray_tracking.runtime.jobs.request import CHECKED, STOPPED
from ray_tracking.runtime.retrying import Ending

_POLL_SECONDS = 1.0
_SHORTEST_WAIT = 1.0
_LONGEST_WAIT = 10.0
_REFUSED = (2, 3)
_INTERRUPTED = (STOPPED, 143)

Say = Callable[[str], None]
"""Tells the user something, a line at a time."""


@dataclass(slots=True)
class Follower:
    """Follows one job. `write` gets its log as it grows (None: nothing is fetched); `passed` counts what it got.

    `patience`: seconds without an answer after which `UnreachableError` is raised.
    """

    client: JobsClient
    submission_id: str
    write: Callable[[str], None] | None
    say: Say
    patience: float = 60.0
    passed: int = 0

    def to_the_end(self) -> Job | None:
        """Blocks. None: the cluster at the address is another one, the job is lost."""
        silent_since: float | None = None
        wait = _SHORTEST_WAIT
        while True:
            try:
                if self.write is not None:
                    self.passed = self.client.stream(self.submission_id, self.write, self.passed)
                job = self.client.job(self.submission_id)
            except UnknownJobError:
                return None
            except (StreamBroken, UnreachableError) as error:
                if isinstance(error, StreamBroken):
                    self.passed = error.passed
                if silent_since is None:
                    silent_since = time.monotonic()
                    self.say(f"Lost the connection to {self.client.address}; trying again.")
                elif time.monotonic() - silent_since > self.patience:
                    raise (error.error if isinstance(error, StreamBroken) else error) from error
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
                continue
            if silent_since is not None:
                self.say(f"{self.client.address} answers again.")
                silent_since, wait = None, _SHORTEST_WAIT
            if job.is_over:
                return job
            time.sleep(_POLL_SECONDS)


def until_checked(client: JobsClient, submission_id: str, seconds: float) -> Job:
    """Wait until the job's driver has found the cluster fit, or has ended, or the time is over."""
    end = time.monotonic() + seconds
    while True:
        job = client.job(submission_id)
        if job.is_over or time.monotonic() > end or CHECKED in client.log(submission_id):
            return job
        time.sleep(0.5)


def ending_of(job: Job | None, run_status: str | None = None) -> Ending:
    """What the end of a job means for a retry. `run_status`: of the run's record after it, if that can be read."""
    if run_status == "completed":
        return Ending.COMPLETED  # whatever became of its driver after that
    if job is None:
        return Ending.LOST
    if job.status == "STOPPED" or run_status == "aborted" or job.exit_code in _INTERRUPTED:
        return Ending.STOPPED
    if job.status == "SUCCEEDED":
        return Ending.COMPLETED
    if job.exit_code is None:
        return Ending.LOST
    return Ending.REFUSED if job.exit_code in _REFUSED else Ending.FAILED


def own_words(log: str) -> list[str]:
    """The lines of a job's log that its command wrote, without what Ray put before them."""
    lines = log.splitlines()
    begins = [index for index, line in enumerate(lines) if line.startswith("Running entrypoint for job ")]
    return lines[begins[-1] + 1 :] if begins else lines


def refusal(job: Job, log: str, python: str) -> UsageError | None:
    """Why the job could not even begin, in its own words, if that is how it ended."""
    words = own_words(log)
    text = "\n".join(words)
    if job.exit_code == 127 or (job.exit_code == 126 and not text.count("\n")):
        return UsageError(
            f"The cluster has no {python!r} to run: {text.strip()}",
            hint="Name the Python of its environment: --python /path/to/bin/python.",
        )
    if job.exit_code == 1 and _lacks_package(words):
        return UsageError(
            f"{python!r} on the cluster has no ray_tracking: {words[-1].strip()}",
            hint='Install "ray-tracking[ray]" on its nodes, or name the Python that has it with --python.',
        )
    return None


def _lacks_package(words: Sequence[str]) -> bool:
    return bool(words) and "No module named" in words[-1] and "ray_tracking" in words[-1]
