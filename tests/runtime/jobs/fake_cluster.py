"""A cluster that does as it is told, in the place of a `JobsClient`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray_tracking.runtime.capacity import Node
from ray_tracking.runtime.jobs.client import Job, StreamBroken, TakenError, UnreachableError

DEAD = UnreachableError("No Ray cluster answers at http://h:1: refused")


class Cluster:
    """Answers `job` and `stream` with the next of what it was given; an exception is raised."""

    address = "http://h:1"
    ray_version = "2.60.0"

    def __init__(self, answers: list[Any] | None = None, log: str = "one\ntwo\nthree\n", cpus: float = 4.0) -> None:
        self.answers, self.text, self.cpus = answers or [], log, cpus
        self.submitted: list[dict[str, Any]] = []
        self.known: list[Job] = []
        self.stopped: list[str] = []
        self.is_running = True
        """What `stop` answers."""
        self.cuts: list[int] = []
        """After so many characters the log's connection breaks, once each."""

    def job(self, submission_id: str) -> Job:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Job(submission_id, **answer)

    def log(self, submission_id: str) -> str:
        return self.text

    def stream(self, submission_id: str, write: Callable[[str], None], skip: int = 0) -> int:
        end = self.cuts.pop(0) if self.cuts else len(self.text)
        if end > skip:
            write(self.text[skip:end])
        if end < len(self.text):
            raise StreamBroken(max(end, skip), DEAD)
        return end

    def nodes(self) -> list[Node]:
        return [Node("n", "h", {"CPU": self.cpus})]

    def jobs(self) -> list[Job]:
        return self.known

    def stop(self, submission_id: str) -> bool:
        self.stopped.append(submission_id)
        return self.is_running

    def jobs_of(self, run_id: str) -> list[Job]:
        return [job for job in self.known if job.run_id == run_id]

    def submit(self, **given: Any) -> None:
        if given["submission_id"] in [job["submission_id"] for job in self.submitted]:
            raise TakenError("taken")
        self.submitted.append(given)


RUNNING = {"status": "RUNNING"}
DONE = {"status": "SUCCEEDED", "exit_code": 0}
FAILED = {"status": "FAILED", "exit_code": 1}
KILLED = {"status": "FAILED", "message": "Job supervisor actor died", "error_type": "JOB_SUPERVISOR_ACTOR_DIED"}
