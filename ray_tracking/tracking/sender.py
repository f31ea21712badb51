"""The training side of tracking: log calls cost a copy and an append; two idle threads do the rest.

In: log calls of one rank. Out: batches through a Transport, each kept until the tracker acknowledges it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ray_tracking.errors import MetricError
from ray_tracking.log import get_logger
from ray_tracking.records import Kind
from ray_tracking.tracking import values
from ray_tracking.tracking.outbox import Batch, Outbox
from ray_tracking.tracking.transport import Transport, TransportError, pack

log = get_logger()

_BATCH_EVENTS = 4000
_RETRY_SECONDS = (0.1, 0.3, 1.0, 3.0)


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
        interval: float = 0.25,
        memory_limit: int = 64 << 20,
    ) -> None:
        self.rank = rank
        self.attempt = attempt
        self.rejected = 0
        """Events that could not be packed; counted and said, never silent."""
        self._transport = transport
        self._interval = interval
        self._events: deque[tuple[Any, ...]] = deque()
        self._outbox = Outbox(memory_limit)
        self._packed = 0
        self._acknowledged = 0
        self._failure: str | None = None
        self._latest: dict[str, Any] = {}
        self._last_step = 0
        self._closing = False
        self._pump_lock = threading.Lock()
        self._wake = threading.Event()
        self._state = threading.Condition()
        self._threads = [
            threading.Thread(target=self._pump, name="ray-tracking-pump", daemon=True),
            threading.Thread(target=self._carry, name="ray-tracking-courier", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def metrics_logger(self, clock: Clock) -> LogMetrics:
        """The function behind `log_metrics(metrics, step=None)`: the hot path.

        A closure, not a method, and the sum of all values as the test for "plain numbers only": each measured
        as the fastest way (benchmark P1). If the sum is exactly a float, every value is an immutable number and a
        copy of the dict is enough; tensors, which training may change in place, are read at once.
        """
        append = self._events.append
        now = time.time

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            try:
                if sum(metrics.values()).__class__ is float:
                    append(("scalar", clock.step if step is None else step, now(), metrics.copy()))
                    return
            except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
                pass  # not plain numbers: the careful way below says what is wrong, if anything
            if numbers := values.scalars(metrics, defer_gpu=True):
                append(("scalar", clock.step if step is None else step, now(), numbers))

        return log_metrics

    def put(self, kind: Kind, step: int, payload: dict[str, Any]) -> None:
        """Log anything but scalars: `payload` is {key: bytes}."""
        self._events.append((kind.value, step, time.time(), payload))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was logged before this call is durable. False if the time ran out."""
        self._take()
        target = self._packed
        with self._state:
            return self._state.wait_for(lambda: self._acknowledged >= target, timeout)

    def latest(self) -> dict[str, float]:
        """The last value of every metric logged so far."""
        self._take()
        with self._pump_lock:
            return values.scalars(self._latest)

    def last_step(self) -> int:
        """The step of the last metrics logged, 0 before any."""
        self._take()
        with self._pump_lock:
            return int(self._last_step)

    def close(self, timeout: float = 30.0) -> int:
        """Flush, then end the threads. Returns how many events were not acknowledged in time."""
        self.flush(timeout)
        self._closing = True
        self._wake.set()
        with self._state:
            self._state.notify_all()
        for thread in self._threads:
            thread.join(1.0)
        unsent = self._outbox.events
        if unsent:
            log.error(
                "tracking records lost: the tracker did not take them in time",
                events=unsent,
                rank=self.rank,
                waited_seconds=timeout,
                last_error=self._failure,
            )
        return unsent

    def _pump(self) -> None:
        while not self._wake.wait(self._interval):
            self._take()

    def _take(self) -> None:
        """Move what was logged into the outbox, packed."""
        with self._pump_lock:
            count = len(self._events)
            while count:
                batch = [self._events.popleft() for _ in range(min(count, _BATCH_EVENTS))]
                count -= len(batch)
                for kind, step, _, payload in batch:
                    if kind == "scalar":
                        self._latest.update(payload)
                        self._last_step = step
                first = self._packed + 1
                data, packed = self._pack(batch, first)
                if packed:
                    self._packed += packed
                    self._outbox.put(Batch(first, self._packed, data))
                    with self._state:
                        self._state.notify_all()

    def _pack(self, events: list[tuple[Any, ...]], first: int) -> tuple[bytes, int]:
        numbered = [(first + i, *event) for i, event in enumerate(events)]
        try:
            return pack(numbered), len(numbered)
        except ValueError:  # some value is not plain: a tensor left on its device, a Fraction
            plain = [event for event in map(self._plain, events) if event is not None]
            return pack([(first + i, *event) for i, event in enumerate(plain)]), len(plain)

    def _plain(self, event: tuple[Any, ...]) -> tuple[Any, ...] | None:
        kind, step, when, payload = event
        try:
            numbers = values.scalars(payload) if kind == Kind.SCALAR else payload
            plain = (kind, int(step), when, {str(key): value for key, value in numbers.items()})
            pack([plain])
        except (MetricError, ValueError, TypeError) as error:
            self.rejected += 1
            log.error("a log call could not be sent", error=str(error), rejected=self.rejected)
            return None
        return plain

    def _carry(self) -> None:
        failures = 0
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closing or len(self._outbox) > 0)
            batch = self._outbox.peek()
            if batch is None:
                if self._closing:
                    return
                continue
            try:
                acknowledged = self._transport.append(self.rank, self.attempt, batch.data)
            except TransportError as error:
                if self._closing:
                    return
                if failures == 0:
                    log.warning("the tracker does not answer; records are kept", error=str(error))
                self._failure = str(error)
                time.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
                continue
            if failures:
                log.info("the tracker answers again", attempts=failures)
                failures = 0
            self._outbox.acknowledge(acknowledged)
            with self._state:
                self._acknowledged = max(self._acknowledged, acknowledged)
                self._state.notify_all()
