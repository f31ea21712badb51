"""The tracker as a Ray actor: one per run, without a CPU of its own, restarted when it dies."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_tracking.errors import LeaseError, RayTrackingError, RefusedError
from ray_tracking.log import configure
from ray_tracking.tracking.priority import stand_back
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import TransportError

_FORWARDED = ("WANDB_", "MLFLOW_", "AWS_", "GOOGLE_", "RAY_TRACKING_", "DO_NOT_TRACK")


def forwarded_environment(*further: str) -> dict[str, str]:
    """The driver's variables that backends and storage need on other nodes (Ray forwards none of them), and `further`.

    They go as an argument: what is in a runtime_env stands on the dashboard.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED) or name in further}


class TrackerActor:
    """The TrackerService of one run in a process of its own. Methods run on several threads.

    What keeps the service from starting is raised by the calls, not here: an actor that fails to be made is dead for
    good, and its callers are not told why in a form that they could act upon.
    """

    def __init__(self, spec: str, environment: dict[str, str]) -> None:
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        self._idle = stand_back()
        self._spec = TrackerSpec.from_json(spec)
        configure(self._spec.log_level, json=self._spec.log_json)
        self._service: Any = None
        self._refused: RefusedError | None = None
        self._starting = threading.Lock()
        with suppress(RayTrackingError):
            self._started()

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        return int(self._started().append(rank, attempt, batch))

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._started(), method)(*arguments)

    def _started(self) -> Any:
        """The service. A storage that failed at its start is tried again; a refusal is final."""
        if self._service is None:
            from ray_tracking.tracking.service import TrackerService

            with self._starting:
                if self._refused is not None:
                    raise self._refused
                if self._service is None:
                    try:
                        self._service = TrackerService(self._spec, idle=self._idle)
                    except RefusedError as error:
                        self._refused = error
                        raise
        return self._service


def start_actor(spec: TrackerSpec) -> Any:
    """Start the actor on this node if it can be, and wait until it serves. Raises what the service raises."""
    here = ray.get_runtime_context().get_node_id()
    actor: Any = (
        ray.remote(TrackerActor)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=32,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
        )
        .remote(spec.to_json(), forwarded_environment())
    )
    try:
        ActorTransport(actor).call("last_step")
    except BaseException:
        ray.kill(actor)
        raise
    return actor


class ActorTransport:
    """Transport to the actor; Ray itself repeats calls that an actor's restart interrupted."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        try:
            return int(ray.get(self._actor.append.remote(rank, attempt, batch)))
        except RayTaskError as error:
            if isinstance(error.cause, LeaseError):
                raise error.cause from None
            raise TransportError(_reason(error)) from error
        except RayError as error:
            raise TransportError(_reason(error)) from error

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        try:
            return ray.get(self._actor.call.remote(method, *arguments), timeout=timeout)
        except GetTimeoutError as error:
            raise TransportError(f"the tracker did not answer within {timeout} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, RayTrackingError):
                raise error.cause from None
            raise TransportError(_reason(error)) from error
        except RayError as error:
            raise TransportError(_reason(error)) from error

    def close(self) -> None:
        """Nothing to let go of: the actor ends with its driver."""


def _reason(error: RayError) -> str:
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, RayTrackingError) else error).strip().splitlines()[-1]
