"""The training side of tracking: log calls cost a copy and an append; two idle threads do the rest.

In: log calls of one rank. Out: batches through a Transport, each kept until the tracker acknowledges it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from ray_tracking.errors import LeaseError, MetricError
from ray_tracking.log import get_logger
from ray_tracking.records import NUMERIC, Kind
from ray_tracking.tracking import values
from ray_tracking.tracking.outbox import Batch, Outbox
from ray_tracking.tracking.transport import Transport, TransportError, pack

log = get_logger()

_BATCH_EVENTS = 4000
_BATCH_BYTES = 4 << 20
"""About how large a batch grows; one event may exceed it."""
_NUMBER_BYTES = 24
_RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0)
_NUMERIC = frozenset(kind.value for kind in NUMERIC)

_Raw = tuple[str, Any, float, dict[Any, Any]]
"""A log call as it waits: kind, step, time, payload."""


class Clock(Protocol):
    """Whoever counts the steps: `step` is where metrics that name none go, `here` where text and images do."""

    @property
    def step(self) -> int: ...

    @property
    def here(self) -> int: ...


LogMetrics = Callable[..., None]


class Sender:
    """Buffers, batches and sends the events of one (attempt, rank). Thread-safe.

    The pump thread packs what was logged every `interval` seconds; the courier thread sends it and waits for the
    acknowledgement, so that a slow tracker delays neither training nor packing.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        rank: int,
        attempt: int,
        interval: float = 1.0,
        memory_limit: int = 64 << 20,
    ) -> None:
        self.rank = rank
        self.attempt = attempt
        self.rejected = 0
        """Events that could not be packed; counted and said, never silent."""
        self._transport = transport
        self._interval = interval
        self._events: deque[_Raw] = deque()
        self._outbox = Outbox(memory_limit)
        self._packed = 0
        self._acknowledged = 0
        self._failure: str | None = None
        self._refused: LeaseError | None = None
        self._dropped = 0
        self._latest: dict[Any, Any] = {}
        self._last_step: int | None = None
        self._pump_lock = threading.Lock()
        self._pump_ends = threading.Event()
        self._courier_ends = threading.Event()
        self._state = threading.Condition()
        self._closing = threading.Lock()
        self._unsent: int | None = None
        self._pumper = threading.Thread(target=self._pump, name="ray-tracking-pump", daemon=True)
        self._courier = threading.Thread(target=self._carry, name="ray-tracking-courier", daemon=True)
        self._pumper.start()
        self._courier.start()

    def metrics_logger(self, clock: Clock, kind: Kind = Kind.SCALAR) -> LogMetrics:
        """The function behind `log_metrics(metrics, step=None)`: the hot path.

        A closure, not a method, and the sum of all values as the test for "plain numbers only", begun with a float
        to save its first addition by the slow way: each measured as the fastest (benchmark P1). If the sum is exactly
        a float, every value is an immutable number and a copy of the dict is enough; tensors, which training may
        change in place, are read at once.
        """
        append = self._events.append
        now = time.time
        name = kind.value

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            try:
                if metrics and type(sum(metrics.values(), 0.0)) is float:
                    if step is None:
                        append((name, clock.step, now(), metrics.copy()))
                        return
                    if type(step) is int:
                        append((name, step, now(), metrics.copy()))
                        return
            except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
                pass  # not plain numbers: the careful way below says what is wrong, if anything
            at = clock.step if step is None else step
            if numbers := values.scalars(metrics, defer_gpu=True):
                append((name, values.step(at), now(), numbers))

        return log_metrics

    def put(self, kind: Kind, step: int, payload: dict[str, Any]) -> None:
        """Log anything but numbers: `payload` is {key: bytes}. Raises MetricError for a step that is none."""
        self._events.append((kind.value, values.step(step), time.time(), payload))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was logged before this call is durable. False if the time ran out.

        Raises LeaseError if another process writes the run: then it never will be.
        """
        self._take()
        target = self._packed
        with self._state:
            done = self._state.wait_for(lambda: self._refused or self._acknowledged >= target, timeout)
        if self._refused is not None:
            raise self._refused
        return bool(done)

    @property
    def logged(self) -> int:
        """About how many log calls there were so far: another number after another call."""
        return self._packed + len(self._events)

    def latest(self) -> dict[str, float]:
        """The last value of every metric logged so far."""
        self._take()
        with self._pump_lock:
            return values.scalars(self._latest)

    def last_step(self) -> int | None:
        """The step of the last metrics logged, None before any."""
        try:
            kind, step, _, _ = self._events[-1]
            if kind == Kind.SCALAR:  # in a plain script every call without a step comes here: no packing then
                return int(step)
        except IndexError:
            pass
        self._take()
        return self._last_step

    def close(self, timeout: float = 30.0) -> int:
        """Flush, then end the threads. Returns how many events were not acknowledged in time. May be repeated."""
        with self._closing:
            if self._unsent is None:
                self._pump_ends.set()
                with suppress(LeaseError):  # said when it came
                    self.flush(timeout)
                self._courier_ends.set()
                with self._state:
                    self._state.notify_all()
                self._courier.join(1.0)
                self._unsent = self._outbox.events + len(self._events) + self._dropped
                if self._unsent and self._refused is None:
                    log.error(
                        "tracking records lost: the tracker did not take them in time",
                        events=self._unsent,
                        rank=self.rank,
                        waited_seconds=timeout,
                        last_error=self._failure,
                    )
            return self._unsent

    # --- the pump: packs --------------------------------------------------------------------------------------

    def _pump(self) -> None:
        while not self._pump_ends.wait(self._interval):
            self._take()

    def _take(self) -> None:
        """Move what was logged into the outbox, packed."""
        with self._pump_lock:
            if self._refused is not None:
                self._dropped += len(self._events)
                self._events.clear()
            count = len(self._events)
            while count > 0:
                batch = self._gather(count)
                count -= len(batch)
                first = self._packed + 1
                data, packed = self._pack(batch, first)
                if not packed:
                    continue
                for kind, step, _, payload in packed:
                    if kind == Kind.SCALAR:
                        self._latest.update(payload)
                        self._last_step = step
                self._outbox.put(Batch(first, first + len(packed) - 1, data))
                with self._state:
                    self._packed += len(packed)
                    self._state.notify_all()

    def _gather(self, most: int) -> list[_Raw]:
        """The oldest events, as many as make a batch."""
        batch: list[_Raw] = []
        size = 0
        while len(batch) < min(most, _BATCH_EVENTS) and size < _BATCH_BYTES:
            event = self._events.popleft()
            batch.append(event)
            payload = event[3]
            size += len(payload) * _NUMBER_BYTES if event[0] in _NUMERIC else sum(map(len, payload.values()))
        return batch

    def _pack(self, events: list[_Raw], first: int) -> tuple[bytes, list[_Raw]]:
        """The batch, and which events are in it."""
        if all(values.is_step(event[1]) for event in events):
            try:
                return pack([(first + i, *event) for i, event in enumerate(events)]), events
            except ValueError:  # some value is not plain: a tensor left on its device, a Fraction
                pass
        plain = [event for event in map(self._plain, events) if event is not None]
        return pack([(first + i, *event) for i, event in enumerate(plain)]), plain

    def _plain(self, event: _Raw) -> _Raw | None:
        kind, step, when, payload = event
        try:
            numbers = values.scalars(payload) if kind in _NUMERIC else payload
            plain = (kind, values.step(step), when, {str(key): value for key, value in numbers.items()})
            pack([plain])
        except Exception as error:  # noqa: BLE001 - a value is the user's own object: reading it may raise anything
            self.rejected += 1
            reason = error.message if isinstance(error, MetricError) else f"{type(error).__name__}: {error}"
            log.error(
                "a log call could not be sent", error=reason, keys=list(payload)[:5], rejected_so_far=self.rejected
            )
            return None
        return plain

    # --- the courier: sends -----------------------------------------------------------------------------------

    def _carry(self) -> None:
        failures = 0
        while True:
            with self._state:
                self._state.wait_for(lambda: self._courier_ends.is_set() or len(self._outbox) > 0)
            try:
                batch = self._outbox.peek()
                if batch is None:
                    if self._courier_ends.is_set():
                        return
                    continue
                self._deliver(batch)
            except LeaseError as error:
                self._give_up(error)
                return
            except Exception as error:  # noqa: BLE001 - this thread must outlive whatever a transport raises
                self._failure = str(error) or type(error).__name__
                if self._courier_ends.is_set():
                    return
                if failures == 0:
                    log.warning("the tracker does not take records; they are kept and sent again", error=self._failure)
                self._courier_ends.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
                continue
            if failures:
                log.info("the tracker takes records again", tries=failures + 1)
                failures = 0

    def _give_up(self, error: LeaseError) -> None:
        log.error("the run is written by another process: what is logged here is not kept", error=str(error))
        with self._state:
            self._refused = error
            self._state.notify_all()

    def _deliver(self, batch: Batch) -> None:
        acknowledged = self._transport.append(self.rank, self.attempt, batch.data)
        self._outbox.acknowledge(acknowledged)
        with self._state:
            self._acknowledged = max(self._acknowledged, acknowledged)
            self._state.notify_all()
        if acknowledged < batch.last:
            raise TransportError(f"only {acknowledged} of {batch.last} log calls are journaled")
