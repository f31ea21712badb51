"""A backend that keeps everything in memory, and the test that every backend must pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from ray_tracking.errors import BackendError
from ray_tracking.records import Kind, Record
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo

Point = tuple[str, int, float]
"""(key, step, value) of a scalar."""


class InMemoryBackend(Backend):
    """Keeps the records it is given; `failures` are raised by the next calls of `open` and `write`, one each."""

    name: ClassVar[str] = "memory"
    kinds: ClassVar[frozenset[Kind]] = frozenset(set(Kind) - {Kind.ATTEMPT})
    rewinds: ClassVar[bool] = True

    def __init__(self, failures: Iterable[Exception] = ()) -> None:
        self.failures = list(failures)
        self.records: list[Record] = []
        self.opened: list[BackendIdentity | None] = []
        self.flushes = 0
        self.status: str | None = None
        self._held = -1

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        self._fail()
        self.opened.append(identity)
        self.status = None
        return BackendIdentity(run.run_id, "memory")

    def position(self) -> int | None:
        return self._held

    def write(self, records: Sequence[Record]) -> None:
        self._fail()
        if not self.opened or self.status is not None:
            raise BackendError("The memory backend is not open.")
        self.records += [record for record in records if record.offset < 0 or record.offset > self._held]
        self._held = max([self._held, *(record.offset for record in records)])

    def rewind(self, step: int) -> None:
        lasting = (Kind.PARAM, Kind.TAG, Kind.ARTIFACT)
        self.records = [record for record in self.records if record.step <= step or record.kind in lasting]
        self._held = -1

    def flush(self) -> None:
        self.flushes += 1

    def close(self, status: str) -> None:
        self.status = status

    @property
    def points(self) -> list[Point]:
        return [
            (record.key, record.step, record.value)
            for record in self.records
            if record.kind is Kind.SCALAR and record.value is not None
        ]

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


def check_backend(
    make_backend: Callable[[], Backend],
    read_back: Callable[[Backend, BackendIdentity], list[Point]],
    *,
    local_dir: str,
    rounded: Callable[[float], float] = float,
    run_id: str = "contract",
) -> None:
    """Write with one backend, go on with a second one as a later process would, and compare every point.

    `read_back` reads what the backend shows, with the backend's own client, after it was closed.
    `rounded` is what the backend makes of a value (a 32-bit float, say). Raises AssertionError.
    """
    run = RunInfo(run_id, "contract test", {"width": 3}, {"purpose": "contract"}, local_dir)
    scalars = list(_scalars())
    half = len(scalars) // 2
    # The third batch repeats the second's end, as delivery does when a reply was lost.
    sent = [scalars[:half], scalars[half : half + 300], scalars[half + 100 :]]

    backend = make_backend()
    identity = backend.open(run, None)
    _write(backend, [_param(len(scalars)), *sent[0]])
    backend.flush()
    _write(backend, sent[1])
    backend.close("interrupted")

    backend = make_backend()
    again = backend.open(run, identity)
    assert again == identity, f"{backend.name}: reopened as {again}, not as {identity}"
    position = backend.position()
    assert position in (None, sent[1][-1].offset), (
        f"{backend.name}: says it holds records up to {position}, not {sent[1][-1].offset}"
    )
    for records in (sent[1][100:], sent[2]) if position is not None else (sent[2][200:],):
        _write(backend, records)
    expected: list[Point] = [(r.key, r.step, r.value) for r in scalars if r.value is not None]
    if backend.rewinds:
        backend.rewind(120)
        expected = [point for point in expected if point[1] <= 120]
        late = Record(Kind.SCALAR, "loss", 121, 1_700_000_500.0, 7.0, offset=len(scalars) + 1)
        _write(backend, [late])
        expected.append((late.key, late.step, 7.0))
    backend.flush()
    backend.close("completed")

    _compare(backend.name, expected, read_back(backend, identity), rounded)


def _scalars() -> Iterable[Record]:
    """Steps 1 to 150 of ten keys, with odd values, late steps, repeated points and odd names, offsets from 0."""
    odd_values = [math.nan, math.inf, -math.inf, 0.1, -0.0, 1e-300, 123456789.0]
    odd_keys = [
        "é/ü",
        "🎉 party",
        "new\nline",
        "nul\0",
        "x" * 300,
        "Loss",
        "",
        "a//b",
        "../up",
        "_step",
        "loss@step",
        "a.b",
    ]
    offset = 0
    for step in range(1, 151):
        values = {f"key{i}": step * 10.0 + i for i in range(10)} | {"loss": 1.0 / step}
        if step <= len(odd_values):
            values["odd"] = odd_values[step - 1]
        if step == 75:
            values |= {key: float(i) for i, key in enumerate(odd_keys)}
        rows = [(key, step, value) for key, value in values.items()]
        if step % 40 == 0:
            rows += [
                ("loss", step, 5.0),
                ("loss", step, 5.0),
                ("late", step - 30, float(step)),
                ("key0", step - 3, 1.5),
            ]
        for key, at, value in rows:
            yield Record(Kind.SCALAR, key, at, 1_700_000_000.0 + step, value, seq=step, offset=offset)
            offset += 1


def _param(offset: int) -> Record:
    return Record(Kind.PARAM, "lr", 0, 1_700_000_000.0, None, b"0.001", offset=-1 if offset else 0)


def _write(backend: Backend, records: Sequence[Record]) -> None:
    for i in range(0, len(records), backend.max_records):
        backend.write(records[i : i + backend.max_records])


def _compare(name: str, expected: list[Point], found: list[Point], rounded: Callable[[float], float]) -> None:
    """Every point as often as it was logged, NaN equal to NaN, whatever the order."""
    wanted = Counter((key, step, repr(rounded(value) + 0.0)) for key, step, value in expected)
    shown = Counter((key, step, repr(rounded(value) + 0.0)) for key, step, value in found)
    missing, extra = wanted - shown, shown - wanted
    assert not missing, f"{name}: {missing.total()} points are missing, such as {list(missing.items())[:5]}"
    assert not extra, f"{name}: {extra.total()} points too many, such as {list(extra.items())[:5]}"
