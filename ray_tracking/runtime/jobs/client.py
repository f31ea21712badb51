"""Ray's Jobs API over HTTP, with time-outs, and with errors that say what to do.

In: a URL, a token. Out: plain dataclasses. Raises UsageError for what the user can put right: `UnreachableError` while
nothing answers, `UnknownJobError` for a job the cluster does not know. Blocks; one thread at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from ray_tracking.errors import UsageError
from ray_tracking.runtime.capacity import DriverPlace, Node
from ray_tracking.runtime.jobs.access import ADDRESS_VARIABLES, TOKEN_FIX, Token
from ray_tracking.runtime.jobs.request import NUMBER_KEY, RUN_KEY
from ray_tracking.storage import without_credentials

CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 8.0
_UPLOAD_SECONDS = 120.0
_QUIET_SECONDS = 10.0
"""A log that says nothing for so long may have lost its cluster: it is asked."""
_NODES = 10_000

for _name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they tell of every step


class UnreachableError(UsageError):
    """Nothing answers at the address, for now or for good."""


class UnknownJobError(UsageError):
    """The cluster at the address has no such job: it is a new cluster, or the id is wrong."""


class TakenError(UsageError):
    """The submission id was used on this cluster before."""


@dataclass(frozen=True, slots=True)
class Job:
    """One submitted job. Times are Unix seconds; `status` is PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    submission_id: str
    status: str
    message: str = ""
    error_type: str | None = None
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    run_id: str | None = None
    number: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


class _PatientClient(JobSubmissionClient):
    """Ray's client, which else waits for ever, and lets environment variables win over what it is given."""

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
        try:
            super().__init__(address, headers=headers)
        finally:
            os.environ.update(hidden)

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_SECONDS, _UPLOAD_SECONDS if method == "PUT" else ANSWER_SECONDS))
        return super()._do_request(method, endpoint, **options)


class JobsClient:
    """A connection that was tried: the address answers, is Ray, and lets us in. `ray_version` is the cluster's."""

    def __init__(self, address: str, token: Token) -> None:
        self.address = without_credentials(address)
        self._token = token
        with self._explained():
            self._client = _PatientClient(address, token.headers)
        self.ray_version = str(self._client._server_ray_version)

    def nodes(self) -> list[Node]:
        """The living nodes with all that they have."""
        with self._explained():
            answer = self._client._do_request("GET", f"/api/v0/nodes?limit={_NODES}&timeout={int(ANSWER_SECONDS)}")
            answer.raise_for_status()
            rows = answer.json()["data"]["result"]["result"]
        return [
            Node(row["node_id"], row["node_ip"], row.get("resources_total") or {}, row.get("labels") or {})
            for row in rows
            if row["state"] == "ALIVE"
        ]

    def jobs_of(self, run_id: str) -> list[Job]:
        """The jobs of a run on this cluster, by number."""
        return [job for job in self.jobs() if job.run_id == run_id]

    def jobs(self) -> list[Job]:
        """The jobs of all runs on this cluster, by run and number."""
        with self._explained():
            every = [_view(details) for details in self._client.list_jobs()]
        return sorted((job for job in every if job.run_id), key=lambda job: (job.run_id or "", job.number))

    def job(self, submission_id: str) -> Job:
        with self._explained(submission_id):
            return _view(self._client.get_job_info(submission_id))

    def log(self, submission_id: str) -> str:
        """All of the driver's output so far."""
        with self._explained(submission_id):
            return str(self._client.get_job_logs(submission_id))

    def submit(
        self,
        *,
        entrypoint: str,
        submission_id: str,
        runtime_env: dict[str, Any],
        metadata: dict[str, str],
        driver: DriverPlace,
    ) -> None:
        """Upload the working directory, unless the cluster has it already, and start the job."""
        with self._explained():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=runtime_env,
                metadata=metadata,
                entrypoint_num_cpus=driver.cpus or None,
                entrypoint_resources=dict(driver.resources) or None,
                entrypoint_label_selector=dict(driver.labels) or None,
            )

    def stop(self, submission_id: str) -> bool:
        """End it at once: SIGTERM, and SIGKILL 3 s later. False if it was not running any more."""
        with self._explained(submission_id):
            return bool(self._client.stop_job(submission_id))

    def stream(self, submission_id: str, write: Callable[[str], None], skip: int = 0) -> int:
        """Pass on the log as it grows, without its first `skip` characters, until the job is over.

        Returns how many characters it has now. Raises `StreamBroken` with that number when the connection breaks.
        """
        position = _Position(skip, write)
        try:
            with self._explained(submission_id):
                asyncio.run(self._stream(submission_id, position))
        except UnreachableError as error:
            raise StreamBroken(position.passed, error) from error
        return position.passed

    async def _stream(self, submission_id: str, position: _Position) -> None:
        async with aclosing(cast(AsyncGenerator[str], self._client.tail_job_logs(submission_id))) as chunks:
            await self._take(submission_id, chunks, position)

    async def _take(self, submission_id: str, chunks: AsyncGenerator[str], position: _Position) -> None:
        waiting: asyncio.Future[str] | None = None
        try:
            while True:
                waiting = waiting or asyncio.ensure_future(anext(chunks))
                done, _ = await asyncio.wait({waiting}, timeout=_QUIET_SECONDS)
                if done:
                    try:
                        position.take(waiting.result())
                    except StopAsyncIteration:
                        return
                    waiting = None
                elif (await asyncio.to_thread(self.job, submission_id)).is_over:
                    return
        finally:
            if waiting is not None:
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await waiting

    @contextmanager
    def _explained(self, submission_id: str | None = None) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise self._refused() from error
        except aiohttp.WSServerHandshakeError as error:
            raise self._of_handshake(error, submission_id) from error
        except (ConnectionError, requests.ConnectionError, requests.Timeout, aiohttp.ClientError) as error:
            raise self._unreachable(error) from error
        except requests.exceptions.InvalidURL as error:
            raise UsageError(f"{self.address} is no address: {error}", hint="Give http://HOST:8265.") from error
        except (requests.RequestException, KeyError) as error:  # another server's answer
            raise self._other_server(error) from error
        except RuntimeError as error:
            raise self._of_server(error, submission_id) from error

    def _of_handshake(self, error: aiohttp.WSServerHandshakeError, submission_id: str | None) -> UsageError:
        if error.status in (401, 403):
            return self._refused()
        return self._unknown(submission_id) if error.status == 404 else self._unreachable(error)

    def _refused(self) -> UsageError:
        if self._token.value:
            return UsageError(f"{self.address} refuses our token (from {self._token.source}).", hint=TOKEN_FIX)
        return UsageError(f"{self.address} wants a token, and we sent none: {self._token.source}.", hint=TOKEN_FIX)

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"No Ray cluster answers at {self.address}: {_first_line(error)}",
            hint="Check the address and that the cluster's dashboard runs: `ray start --head --dashboard-host=0.0.0.0` "
            "has it at port 8265.",
        )

    def _unknown(self, submission_id: str | None) -> UnknownJobError:
        return UnknownJobError(
            f"The cluster at {self.address} knows no job {submission_id!r}.",
            hint="It may be a new cluster: `ray-tracking resume RUN` or `submit` go on with the run.",
        )

    def _other_server(self, error: Exception) -> UsageError:
        return UsageError(
            f"{self.address} answers, but not as Ray's dashboard does: {_first_line(error)}",
            hint="Give the address of the cluster's dashboard, http://HOST:8265 by default.",
        )

    def _of_server(self, error: RuntimeError, submission_id: str | None) -> UsageError:
        text = str(error)
        if text.startswith("Version check"):
            return self._other_server(error)
        if "status code 404" in text or "does not exist" in text:
            return self._unknown(submission_id)
        if "already exists" in text:
            return TakenError(f"The cluster at {self.address} has had a job of this id.", hint="Submit again.")
        if "WebSocket" in text or "No available agent" in text or "status code 5" in text:
            return self._unreachable(error)
        return UsageError(f"The cluster at {self.address} refused: {_last_line(text)}")


class StreamBroken(Exception):
    """The log's connection broke after `passed` characters."""

    def __init__(self, passed: int, error: UnreachableError) -> None:
        super().__init__(str(error))
        self.passed, self.error = passed, error


class _Position:
    """A log read from its beginning each time: passes on what is new."""

    def __init__(self, skip: int, write: Callable[[str], None]) -> None:
        self.passed = skip
        self._seen = 0
        self._write = write

    def take(self, chunk: str) -> None:
        new = self._seen + len(chunk) - self.passed
        self._seen += len(chunk)
        if new > 0:
            self._write(chunk[-new:])
            self.passed = self._seen


def _view(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    number = metadata.get(NUMBER_KEY, "")
    return Job(
        submission_id=details.submission_id or "",
        status=str(details.status),
        message=details.message or "",
        error_type=details.error_type,
        exit_code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        run_id=metadata.get(RUN_KEY),
        number=int(number) if number.isdecimal() else 0,
        metadata=metadata,
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" .\n")]
    return lines[-1][:300] if lines else "no message"
