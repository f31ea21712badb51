"""A sealed save, from the copy in memory to the commit, against a raw write; a restore, against memcpy and others.

Save: the time from the return of `save_checkpoint`, when the state is staged, until the checkpoint is committed: sealed
(digest and AES-256-GCM), plain and with zstd, each by its own manager and writer process. The base writes the same
bytes from memory to a new file on the same file system, by the calls that are the fastest for it, and waits for fsync.
What a side wrote is deleted after its time, so that all of them find the same free blocks.

Restore: finding the newest checkpoint, verifying all of it, and putting it into a live model and optimizer; the files
are in the page cache on all sides. Once where the optimizer has stepped and is filled in place, and once where it is
new, as it is after a restart, and has no tensors yet. Each side has objects of its own.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ray_tracking.checkpoint import CheckpointManager, CheckpointStore
from ray_tracking.checkpoint.inplace import restore
from ray_tracking.checkpoint.keys import Key, Keyring
from ray_tracking.checkpoint.mapping import room
from ray_tracking.checkpoint.writer import WriterOptions
from ray_tracking.examples.gpt_model import optimizer_for
from ray_tracking.storage import Storage
from tests.bench import fresh_process
from tests.bench.fresh_process import DCP_LOAD, RESTORE, TORCH_LOAD, restore_newest
from tests.bench.measures import Measurement, Setup, Side, at_least, at_most, ratio, speedup
from tests.bench.other_savers import DCP, SAVERS, TORCH, dcp_load, dcp_load_anew, dcp_save_by_name, torch_load
from tests.bench.report import quantity
from tests.bench.state_workload import SIZE, Memcpy, Workload, fastest, megabytes, timed

_ROUNDS, _QUICK_ROUNDS = 11, 3
_FRESH, _QUICK_FRESH = 3, 1
_TRIALS = 3
_KEYRING = Keyring(Key(bytes(range(32))))
_OPTIONS: Mapping[str, WriterOptions] = {
    "sealed": WriterOptions(keyring=_KEYRING),
    "plain": WriterOptions(),
    "zstd": WriterOptions(compression="zstd"),
}
_RAW, _MEMCPY = "write + fsync", "memcpy"
_SEALED, _MANAGER = "load_into, sealed", "load_latest_checkpoint + restore"
_ANEW = " anew"
"""After a side's name: into a new optimizer."""

Samples = Mapping[str, Sequence[float]]


def measure(setup: Setup) -> list[Measurement]:
    workload = Workload.build(SIZE)
    saves, way = _saves(workload, setup)
    loads = _loads(workload, setup)
    fresh = _fresh(setup)
    return measurements(saves, loads, fresh, workload.bytes, way)


# -- saving ------------------------------------------------------------------------------------------


def _saves(workload: Workload, setup: Setup) -> tuple[Samples, str]:
    """Seconds by side, and how the base writes."""
    samples: dict[str, list[float]] = defaultdict(list)
    raw = RawWrite(workload.tensors, setup.folder / "raw")
    managers = {
        name: CheckpointManager(CheckpointStore(Storage.open(setup.folder / name)), options=options)
        for name, options in _OPTIONS.items()
    }
    for number in range(-1, _QUICK_ROUNDS if setup.quick else _ROUNDS):
        pair = (_RAW, "sealed") if number % 2 else ("sealed", _RAW)  # side by side: what disturbs one disturbs both
        for name in (*pair, "plain", "zstd"):
            seconds = raw() if name == _RAW else _save(managers[name], number + 2, workload)
            if number >= 0:
                samples[name].append(seconds)
    for manager in managers.values():
        manager.close()
    return samples, raw.way


def _save(manager: CheckpointManager, step: int, workload: Workload) -> float:
    folder = manager.save_checkpoint(step=step, **workload.objects)
    seconds = timed(manager.wait)
    assert folder is not None
    shutil.rmtree(folder)
    return seconds


class RawWrite:
    """The same bytes written to a new file and made durable, by the fastest of the `ways`, tried when it is made."""

    def __init__(self, tensors: Sequence[torch.Tensor], path: Path) -> None:
        self.data = room(sum(tensor.nbytes for tensor in tensors))
        begin = 0
        for tensor in tensors:
            torch.frombuffer(self.data, dtype=tensor.dtype, count=tensor.numel(), offset=begin).copy_(tensor.flatten())
            begin += tensor.nbytes
        self._path = path
        self.ways: Mapping[str, int] = {"one write": len(self.data), "writes of 4 MiB": 4 << 20}
        self.way = fastest({way: [self._write(block) for _ in range(_TRIALS)] for way, block in self.ways.items()})

    def __call__(self) -> float:
        """Seconds, without the deletion of the file."""
        return self._write(self.ways[self.way])

    def _write(self, block: int) -> float:
        seconds = timed(lambda: self.create(block))
        self._path.unlink()
        return seconds

    def create(self, block: int) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        rest = self.data
        while rest:
            rest = rest[os.write(file, rest[:block]) :]
        os.fsync(file)
        os.close(file)


# -- restoring ---------------------------------------------------------------------------------------


def _loads(workload: Workload, setup: Setup) -> Samples:
    """Seconds by side: into what has stepped, and into what is new."""
    folder = setup.folder
    for name in ("sealed", "plain"):
        with CheckpointManager(CheckpointStore(Storage.open(folder / name)), options=_OPTIONS[name]) as manager:
            manager.save_checkpoint(step=1, **workload.objects)
    SAVERS[TORCH](workload, folder / TORCH)
    SAVERS[DCP](workload, folder / DCP)
    dcp_save_by_name(workload, folder / "dcp-by-name")
    copy = Memcpy(workload.tensors)
    ways: dict[str, Callable[[Workload], object]] = {
        _MEMCPY: lambda _: copy(),
        RESTORE: lambda own: restore_newest(own, folder / "plain"),
        _SEALED: lambda own: restore_newest(own, folder / "sealed", keyring=_KEYRING),
        _MANAGER: lambda own: by_manager(own, folder / "plain"),
        DCP_LOAD: lambda own: dcp_load(own, folder / DCP),
        TORCH_LOAD: lambda own: torch_load(own, folder / TORCH),
    }
    anew = ways | {DCP_LOAD: lambda own: dcp_load_anew(own, folder / "dcp-by-name")}
    ours, dcp, torchs = (Workload.build(SIZE, seed=1) for _ in range(3))  # torch.load leaves its own tensors in it
    objects = {DCP_LOAD: dcp, TORCH_LOAD: torchs}
    samples: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, _QUICK_ROUNDS if setup.quick else _ROUNDS):
        turn = number % len(ways)
        names = list(ways)
        for name in names[turn:] + names[:turn]:
            stepped = objects.get(name, ours)
            new = Workload(stepped.model, optimizer_for(stepped.model, 1e-3))
            taken = {name: _timed(ways[name], stepped), name + _ANEW: _timed(anew[name], new)}
            del new
            if number >= 0:
                for key, seconds in taken.items():
                    samples[key].append(seconds)
    return samples


def _timed(load: Callable[[Workload], object], workload: Workload) -> float:
    return timed(lambda: load(workload))


def by_manager(workload: Workload, folder: Path) -> None:
    """As a plain script resumes."""
    with CheckpointManager(CheckpointStore(Storage.open(folder))) as manager:
        found = manager.load_latest_checkpoint()
        assert found is not None
        restore(found, workload.objects)


def _fresh(setup: Setup) -> Samples:
    """Seconds of the first restore of a process."""
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(_QUICK_FRESH if setup.quick else _FRESH):
        for side in (RESTORE, DCP_LOAD, TORCH_LOAD):
            samples[side].append(fresh_process.start("restore", side, setup.folder, SIZE)["seconds"])
    return samples


# -- what they come to -------------------------------------------------------------------------------


def measurements(saves: Samples, loads: Samples, fresh: Samples, size: int, way: str) -> list[Measurement]:
    """Seconds by side, of saves, of restores into what has stepped and (`_ANEW`) is new, of those of new processes.

    Pure.
    """

    def side(samples: Samples, key: str, name: str) -> Side:
        return Side(name, tuple(samples[key]))

    raw = side(saves, _RAW, _RAW)
    found = [
        speedup("P4", f"{how} save, speed against {_RAW}", "s", side(saves, how, how), raw, at_least(0.8))
        for how in ("sealed", "plain")
    ]
    found[0] = replace(found[0], note=_save_note(saves, size, way))
    for end, where in (("", "in place"), (_ANEW, "into a new optimizer")):
        ours = side(loads, RESTORE + end, RESTORE)
        base, dcp = side(loads, _MEMCPY + end, _MEMCPY), side(loads, DCP_LOAD + end, DCP_LOAD)
        found.append(ratio("P4", f"restore {where}, against memcpy", "s", ours, base, at_most(3.0)))
        found.append(speedup("P4", f"restore {where}, against {DCP_LOAD}", "s", ours, dcp, at_least(5.0)))
    found[-1] = replace(found[-1], note=_restore_note(loads, fresh))
    return found


def _save_note(saves: Samples, size: int, way: str) -> str:
    raw, zstd = (size / statistics.median(saves[name]) / 1e9 for name in (_RAW, "zstd"))
    return (
        f"a state of {megabytes(size)}; the base, with {way}, runs at {raw:.2f} GB/s, the save with zstd at {zstd:.2f} "
        "GB/s of plain bytes."
    )


def _restore_note(loads: Samples, fresh: Samples) -> str:
    def times(samples: Samples, names: Sequence[str], end: str = "") -> str:
        return ", ".join(f"{name} {quantity(statistics.median(samples[name + end]), 's')}" for name in names)

    others = (_SEALED, _MANAGER, TORCH_LOAD)
    return (
        f"For information, in place: {times(loads, others)}. Into a new optimizer: {times(loads, others, _ANEW)}. "
        f"As the first of a new process, into a new optimizer: {times(fresh, (RESTORE, DCP_LOAD, TORCH_LOAD))}."
    )
