"""How long a checkpoint of a 500 MB state stops training, against a memcpy of the same bytes and against other savers.

The stall is the time inside `save_checkpoint`: describing the state, copying it, handing it over. In the steady part
each save is written before the next one begins, as it is where the save interval is longer than the writing; saves
back to back, which then wait for the disk, are in the notes. The base is copied right before or after ours, each round
of samples several times; other savers take their turns in between. What they wrote is made durable and deleted outside
of the times, so that no side meets the disk writes of another.

The first save is taken in a process of its own, one for each repetition and side, after as many steps of training as
the manager needs to provide its buffers in the background, which it does by itself. The base there is of that process.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ray_tracking.checkpoint import CheckpointManager, CheckpointStore, CheckpointStrategy
from ray_tracking.storage import Storage
from tests.bench.fresh_process import OURS, UNPREPARED, start
from tests.bench.measures import Goal, Measurement, Setup, Side, at_least, at_most, ratio, speedup
from tests.bench.other_savers import ASYNC, ASYNC_KEPT, DCP, DURABLE, SAFETENSORS, SAVERS, TORCH, clear
from tests.bench.report import quantity
from tests.bench.state_workload import SIZE, Memcpy, Workload, megabytes, timed

_ROUNDS, _QUICK_ROUNDS = 15, 3
_PAIRS = 3
"""Ours and the base in a round; its sample is their median."""
_FIRSTS, _QUICK_FIRSTS = 5, 2
_ROW = 6
"""Saves back to back. The first two find a free buffer, the others wait until one is written."""
_BUFFERS = 2
_MEMCPY = "memcpy"

_GOALS: Mapping[str, Goal] = {
    TORCH: at_least(10.0),
    DURABLE: at_least(10.0),
    SAFETENSORS: at_least(1.0),
    DCP: at_least(1.0),
    ASYNC: at_least(1.0),
    ASYNC_KEPT: at_least(1.0),
}
"""The design has one for torch.save; no other saver should hold training up for less time than ours."""
_FIRST_SIDES = (OURS, UNPREPARED, TORCH, SAFETENSORS, DCP, ASYNC)

Samples = Mapping[str, Sequence[float]]
Firsts = Mapping[str, Sequence[Mapping[str, float]]]


def measure(setup: Setup) -> list[Measurement]:
    workload = Workload.build(SIZE)
    steady, row, way = _steady(workload, setup)
    what = f"a state of {megabytes(workload.bytes)}, memcpy by {way}"
    return measurements(steady, row, _first(setup), what)


# -- taking the samples ------------------------------------------------------------------------------


def _steady(workload: Workload, setup: Setup) -> tuple[Samples, list[float], str]:
    """Stalls by side, stalls of saves back to back, and how the base copies."""
    samples: dict[str, list[float]] = defaultdict(list)
    copy = Memcpy(workload.tensors)
    store = CheckpointStore(Storage.open(setup.folder / "ours"))
    with CheckpointManager(store, CheckpointStrategy(save_total_limit=1)) as manager:
        manager.prepare(**workload.objects)
        saver = _Saver(manager, workload)
        others = list(SAVERS)
        for number in range(-1, _QUICK_ROUNDS if setup.quick else _ROUNDS):
            turn = number % len(others)
            taken = _pair(saver, copy, number)
            taken |= {name: _other(name, workload, setup.folder) for name in others[turn:] + others[:turn]}
            if number >= 0:  # the first of everything is another measure
                for name, seconds in taken.items():
                    samples[name].append(seconds)
        row = [saver.stall() for _ in range(_ROW)]
        manager.wait()
    shutil.rmtree(setup.folder / "ours")
    return samples, row[_BUFFERS:], copy.way


class _Saver:
    """Ours, a new step each time."""

    def __init__(self, manager: CheckpointManager, workload: Workload) -> None:
        self.manager = manager
        self._workload = workload
        self._step = 0

    def stall(self) -> float:
        self._step += 1
        return timed(lambda: self.manager.save_checkpoint(step=self._step, **self._workload.objects))


def _pair(saver: _Saver, copy: Memcpy, number: int) -> dict[str, float]:
    ours, base = [], []
    for i in range(_PAIRS):
        first_is_ours = (number + i) % 2 == 0
        if not first_is_ours:
            base.append(timed(copy))
        ours.append(saver.stall())
        if first_is_ours:
            base.append(timed(copy))
        saver.manager.wait()
    return {OURS: statistics.median(ours), _MEMCPY: statistics.median(base)}


def _other(name: str, workload: Workload, folder: Path) -> float:
    path = folder / "other"
    begin = time.perf_counter()
    wait = SAVERS[name](workload, path)
    seconds = time.perf_counter() - begin
    wait()
    clear(path)
    return seconds


def _first(setup: Setup) -> Firsts:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for number in range(_QUICK_FIRSTS if setup.quick else _FIRSTS):
        turn = number % len(_FIRST_SIDES)
        for side in _FIRST_SIDES[turn:] + _FIRST_SIDES[:turn]:
            folder = setup.folder / "first"
            folder.mkdir()
            found[side].append(start("first-save", side, folder, SIZE))
            shutil.rmtree(folder)
    return found


# -- what they come to -------------------------------------------------------------------------------


def measurements(steady: Samples, row: Sequence[float], first: Firsts, what: str) -> list[Measurement]:
    """`steady`: seconds by side and round; `row`: of saves back to back; `first`: by side and process. Pure."""
    stalls = {side: [each["stall"] for each in records] for side, records in first.items()}
    copies = [each["memcpy"] for each in first[OURS]]
    found = [
        ratio("P3", "stall per save, against memcpy", "s", _side(OURS, steady), _side(_MEMCPY, steady), at_most(1.3)),
        ratio(
            "P3", "stall of the first save, against memcpy", "s", _side(OURS, stalls), Side(_MEMCPY, tuple(copies)),
            at_most(1.5),
        ),
    ]  # fmt: skip
    for when, samples in (("per save", steady), ("of the first save", stalls)):
        for other, goal in _GOALS.items():
            if other in samples:
                text = f"stall {when}, against {other}"
                found.append(speedup("P3", text, "s", _side(OURS, samples), _side(other, samples), goal))
    notes = (_steady_note(steady, row, what), _first_note(first))
    return [*(replace(one, note=note) for one, note in zip(found, notes, strict=False)), *found[len(notes) :]]


def _side(name: str, samples: Samples) -> Side:
    return Side(name, tuple(samples[name]))


def _steady_note(steady: Samples, row: Sequence[float], what: str) -> str:
    gap = statistics.median(row)
    return (
        f"{what}. Each save is on disk before the next one begins. Back to back, with {_BUFFERS} buffers, a save takes "
        f"{quantity(gap, 's')}: the time until one is written and made durable."
    )


def _first_note(first: Firsts) -> str:
    ours, early = first[OURS], first[UNPREPARED]
    prepared, steps = (statistics.median(each[key] for each in ours) for key in ("prepared", "steps"))
    stall = statistics.median(each["stall"] for each in early)
    times = statistics.median(each["stall"] / each["memcpy"] for each in early)
    return (
        f"Before the first save training went on for {quantity(prepared, 's')} after the optimizer's second step (to "
        f"step {steps:.0f}), until the buffers were provided. Saved at once, with no time to provide any, it takes "
        f"{quantity(stall, 's')}, {quantity(times, 'x')} the memcpy."
    )
