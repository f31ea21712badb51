"""Drivers and writers in random orders, stopped and killed anywhere, on a storage whose clock jumps.

Each storage operation is one step; which process takes the next one, a seed decides. Fencing is what must hold: after a
holder has written, no one that it shuts out may write again.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from ray_tracking.errors import RefusedError
from ray_tracking.runs import lease as leases
from ray_tracking.runs.lease_rules import Seat
from ray_tracking.runs.process import Process
from ray_tracking.storage import Entry


class Over(BaseException):
    """The process is killed, or the simulation has ended."""


class World:
    """One thread runs at a time: `step` gives the turn back, and returns when it comes again."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.time = self.offset = 0.0
        self.files: dict[str, tuple[bytes, float]] = {}
        self.writes: list[Seat] = []
        self.broken: list[str] = []
        self.taken: list[Seat] = []
        self._ready: dict[str, float] = {}
        self._turns: dict[str, threading.Event] = {}
        self._back = threading.Event()
        self._over = False
        self._threads: list[threading.Thread] = []

    def start(self, name: str, work: Callable[[], None]) -> None:
        turn = self._turns[name] = threading.Event()
        self._ready[name] = self.time

        def run() -> None:
            turn.wait()
            try:
                if not self._over:
                    work()
            except Over:
                pass
            except BaseException as error:
                self.broken.append(f"{name}: {error!r}")
            del self._ready[name]
            self._back.set()

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def step(self, name: str, seconds: float | None = None) -> None:
        """The next step of `name` comes after so long: of an operation a moment, or a long stop."""
        if seconds is None:
            quick = self.random.random() < 0.97
            seconds = self.random.choice([0.01, 0.1, 0.3] if quick else [5.0, 20.0, 70.0])
        self._ready[name] = self.time + seconds
        self._turns[name].clear()
        self._back.set()
        self._turns[name].wait()
        if self._over:
            raise Over

    def run(self, seconds: float) -> None:
        while self._ready and self.time < seconds:
            name = min(self._ready, key=lambda each: self._ready[each])
            self.time = max(self.time, self._ready[name])
            if self.random.random() < 0.01:
                self.offset = self.random.choice([0.0, 3600.0, -3600.0, 40.0, -40.0])
            self._turn(name)
        self._over = True
        while self._ready:
            self._turn(next(iter(self._ready)))
        for thread in self._threads:
            thread.join()

    def _turn(self, name: str) -> None:
        self._back.clear()
        self._turns[name].set()
        self._back.wait()

    def write(self, seat: Seat) -> None:
        self.writes.append(seat)
        later = [done for done in self.writes if done.shuts_out(seat)]
        if later:
            self.broken.append(f"{seat} wrote at {self.time} after {later[0]}")


class Place:
    """The storage of the run as one process reaches it, and its clock."""

    is_local = True
    root = "/runs/r"

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name

    def now(self) -> float:
        return self.world.time

    def wait(self, seconds: float) -> None:
        self.world.step(self.name, seconds)

    def path(self, name: str) -> str:
        return name

    def write_bytes(self, name: str, data: bytes) -> None:
        self.world.step(self.name)
        self.world.files[name] = data, self.world.time + self.world.offset

    def create_new(self, name: str, data: bytes) -> bool:
        self.world.step(self.name)
        return self.world.files.setdefault(name, (data, self.world.time + self.world.offset))[0] is data

    def read_bytes(self, name: str) -> bytes:
        self.world.step(self.name)
        if name not in self.world.files:
            raise FileNotFoundError(name)
        return self.world.files[name][0]

    def list(self, folder: str) -> list[Entry]:
        self.world.step(self.name)
        found = [(name.partition("/")[2], *held) for name, held in sorted(self.world.files.items())]
        return [Entry(name, len(data), False, modified) for name, data, modified in found]

    def delete(self, name: str) -> None:
        self.world.step(self.name)
        self.world.files.pop(name, None)


def driver(world: World, name: str) -> None:
    """Starts again and again; each time it may start a writer, and ends in order, or just stops."""
    place = Place(world, name)
    for attempt in range(8):
        try:
            lease = leases.acquire(
                place, clock=place, patience=world.random.choice([0, 0, 50]), process=Process(name, 1)
            )
        except RefusedError:
            world.step(name, world.random.uniform(0, 40))
            continue
        world.taken.append(lease.seat)
        if world.random.random() < 0.5:
            for number in range(2):  # the second as after a restart elsewhere, the first being cut off
                worker = f"{name}.{attempt}.{number}"
                world.start(worker, lambda worker=worker, ticket=lease.ticket: writer(world, worker, ticket))
        work(world, name, lease)


def writer(world: World, name: str, ticket: str) -> None:
    place = Place(world, name)
    world.step(name, world.random.uniform(0, 30))
    try:
        lease = leases.join(place, ticket, clock=place, process=Process(name, 1))
    except RefusedError:
        return
    work(world, name, lease)


def work(world: World, name: str, lease: leases.Lease) -> None:
    """Write for some time, renewing or not, then give the lease back or not."""
    try:
        for _ in range(world.random.randrange(30)):
            lease.check()
            world.write(lease.seat)
            world.step(name, world.random.choice([0.1, 1.0, 5.0, 12.0, 50.0]))
            if world.random.random() < 0.7:
                lease.renew()
    except RefusedError:
        return
    if world.random.random() < 0.5:
        lease.release()


def simulate(seed: int) -> World:
    world = World(seed)
    for name in "abc":
        world.start(name, lambda name=name: driver(world, name))
    world.run(2000.0)
    return world


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_nobody_writes_after_who_shuts_it_out(start):
    writes, takings = 0, 0
    for seed in range(start, start + 20):
        world = simulate(seed)
        assert world.broken == [], seed
        assert len(world.taken) == len(set(world.taken)), seed
        writes += len(world.writes)
        takings += len(world.taken)
    assert writes > 1000
    assert takings > 60


def test_the_simulation_finds_a_newcomer_that_does_not_wait(monkeypatch):
    monkeypatch.setattr(leases, "silence_left", lambda before: 0.0)
    assert any(simulate(seed).broken for seed in range(40))
