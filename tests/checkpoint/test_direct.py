"""Restoring straight into the live tensors: what is in them afterwards, whatever the files and the objects are like."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from ray_tracking.checkpoint import direct, unread
from ray_tracking.checkpoint.inplace import load_into, prepare_load
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.mapping import ALIGNMENT
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.rng import capture_rng
from ray_tracking.errors import CheckpointCorruptError, StorageError
from ray_tracking.storage import Storage

from . import by_hand
from .conftest import open_files

Objects = dict[str, Any]


class Odd(nn.Module):
    """Tensors of many kinds, some of them tied, some not contiguous."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("turned", torch.randn(6, 4).t())
        self.narrow = nn.Parameter(torch.randn(5).bfloat16())
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("complex", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("small", torch.randn(3).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.rand(7) > 0.5)
        self.register_buffer("count", torch.randint(100, ()))
        self.extra = {"seed": seed, "table": torch.full((4,), float(seed))}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x))) @ self.turned.t() + self.narrow.float().sum()


def made(seed: int, steps: int = 2, module: Callable[[int], nn.Module] = Odd) -> Objects:
    model = module(seed)
    optimizer = AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def states(objects: Objects) -> Objects:
    return {name: copy.deepcopy(value.state_dict()) for name, value in objects.items()}


def save(root: Path, objects: Objects, step: int = 5, **options: Any) -> CheckpointInfo:
    own = {"rng": [capture_rng()] * options.get("world_size", 1)}
    return by_hand.write(root, states(objects), own=own, step=step, **options)


def load(root: Path, info: CheckpointInfo, objects: Objects, **options: Any) -> None:
    with OpenCheckpoint(Storage.open(root), info) as opened:
        load_into(objects, opened, **options)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def same(one: Objects, other: Objects) -> bool:
    pairs = zip(tensors(states(one)), tensors(states(other)), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b) for a, b in pairs)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every reading straight into tensors, how many files."""
    seen: list[int] = []
    real = unread.read_all
    monkeypatch.setattr(unread, "read_all", lambda readings: (seen.append(len(readings)), real(readings))[1])
    return seen


def damage(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# -- what is loaded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("steps", [0, 2], ids=["new", "in use"])
def test_all_kinds_of_tensors(tmp_path: Path, reads: list[int], steps: int, world_size: int) -> None:
    source, target, expected = made(1), made(2, steps), made(2, steps)
    info = save(tmp_path, source, world_size=world_size)
    for name, state in states(source).items():
        expected[name].load_state_dict(state)
    drawn = torch.rand(3)
    load(tmp_path, info, target)
    assert len(reads) == 1
    assert same(target, source)
    assert same(target, expected)
    assert target["model"].extra["seed"] == 1
    assert torch.equal(target["model"].extra["table"], torch.ones(4))
    assert target["model"].second.weight is target["model"].first.weight
    assert torch.equal(torch.rand(3), drawn)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_new_tensors_are_aligned_as_torch_aligns_them(tmp_path: Path, reads: list[int]) -> None:
    target = made(2, steps=0)
    load(tmp_path, save(tmp_path, made(1)), target)
    moments = list(tensors(target["optimizer"].state_dict()["state"]))
    assert len(moments) > 10
    assert all(moment.data_ptr() % ALIGNMENT == 0 for moment in moments if moment.numel())
    assert len(reads) == 1


class Two(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)
        self.two = nn.Linear(6, 6, bias=False)
        if tied:
            self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_tied_weights(tmp_path: Path, stored: bool, live: bool) -> None:
    source, target, expected = Two(stored), Two(live), Two(live)
    expected.load_state_dict(copy.deepcopy(source.state_dict()))
    load(tmp_path, save(tmp_path, {"model": source}), {"model": target})
    assert same({"m": target}, {"m": expected})
    assert (target.one.weight is target.two.weight) is live


@pytest.mark.parametrize("overlap", [0, 6, 35, 36])
def test_parameters_that_are_views_of_one_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: int) -> None:
    """What a module loads last stays where two of its parameters meet, in whichever order they lie in the file."""
    monkeypatch.setattr(direct, "spoil", lambda tensors: pytest.fail("read twice into the same memory"))

    def flat(seed: int, overlap: int) -> nn.Module:
        memory = torch.randn(72, generator=torch.Generator().manual_seed(seed))
        module = nn.Module()
        module.last_in_the_file = nn.Parameter(memory[:36])
        module.first_in_the_file = nn.Parameter(memory[36 - overlap : 72 - overlap])
        return module

    source, target, expected = flat(1, 0), flat(2, overlap), flat(2, overlap)
    expected.load_state_dict(copy.deepcopy(source.state_dict()))
    load(tmp_path, save(tmp_path, {"model": source}), {"model": target})
    assert same({"m": target}, {"m": expected})


def test_modules_that_load_in_ways_of_their_own(tmp_path: Path, reads: list[int]) -> None:
    class Halved(nn.Linear):
        def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
            old = self.weight.detach().clone()
            super()._load_from_state_dict(state, prefix, *others)
            with torch.no_grad():
                self.weight.copy_((self.weight + old) / 2)

    def hooked(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        module = nn.Linear(6, 6)
        module.register_load_state_dict_pre_hook(lambda module, state, *_: state["weight"].add_(module.weight.detach()))
        return module

    def halved(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Halved(6, 6)

    for make in (hooked, halved):
        source, target, expected = make(1), make(2), make(2)
        expected.load_state_dict(copy.deepcopy(source.state_dict()))
        load(tmp_path, save(tmp_path, {"model": source}), {"model": target})
        assert same({"m": target}, {"m": expected})
    assert reads == []


def test_channels_last_stays(tmp_path: Path) -> None:
    def conv(seed: int) -> Objects:
        torch.manual_seed(seed)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = AdamW(model.parameters())
        model(torch.randn(1, 3, 5, 5)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    source, target = conv(1), conv(2)
    load(tmp_path, save(tmp_path, source), target)
    assert same(source, target)
    moment = target["optimizer"].state[target["model"].weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)


def test_a_graph_from_before_is_noticed(tmp_path: Path, reads: list[int]) -> None:
    target = made(2)
    loss = target["model"](torch.randn(4, 6)).sum()
    load(tmp_path, save(tmp_path, made(1)), target)
    assert len(reads) == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- what is damaged ---------------------------------------------------------------------------------


def is_spoilt(objects: Objects) -> bool:
    """Nothing that was read into could pass for a good one."""
    model = objects["model"]
    floats = [each for each in (*model.parameters(), *model.buffers()) if each.is_floating_point() and each.numel()]
    plain = [each for each in floats if each is not model.turned and each.dtype != torch.float8_e4m3fn]
    moments = [each for each in tensors(objects["optimizer"].state_dict()["state"]) if each.is_contiguous()]
    return all(each.isnan().all() for each in (*plain, *(each for each in moments if each.numel()))) and bool(
        model.count == torch.iinfo(torch.int64).min
    )


@pytest.mark.parametrize("file", ["model.safetensors", "state-00000.safetensors"])
@pytest.mark.parametrize("at", [-1, -100, -300])
def test_a_damaged_file_spoils_what_it_was_read_into(tmp_path: Path, reads: list[int], file: str, at: int) -> None:
    target, source = made(2), made(1)
    older, newer = save(tmp_path, source, step=5), save(tmp_path, made(3), step=6)
    state = torch.get_rng_state()
    options = copy.deepcopy(target["optimizer"].param_groups[0]["lr"])
    damage(tmp_path / newer.folder / file, at)
    with pytest.raises(CheckpointCorruptError) as caught:
        load(tmp_path, newer, target)
    assert len(reads) == 1
    assert f"{tmp_path}/{newer.folder}/{file} is not what was saved: its digest does not match" in str(caught.value)
    assert "model, optimizer" in str(caught.value)
    assert "hold NaN now" in str(caught.value)
    assert is_spoilt(target)
    assert torch.equal(torch.get_rng_state(), state)
    assert target["optimizer"].param_groups[0]["lr"] == options
    load(tmp_path, older, target)
    assert same(target, source)
    assert math.isfinite(target["model"](torch.randn(4, 6)).sum().item())


@pytest.mark.parametrize("how", ["header", "cut", "gone", "state file", "first byte"])
def test_what_is_noticed_before_leaves_everything_as_it_was(tmp_path: Path, reads: list[int], how: str) -> None:
    target, before = made(2), made(2)
    info = save(tmp_path, made(1))
    path = tmp_path / info.folder / "state-00000.safetensors"
    if how == "header":
        damage(path, 9)
    elif how == "first byte":
        damage(path, 0)
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "gone":
        path.unlink()
    else:
        path = path.with_name("state-00000.json")
        damage(path)
    with pytest.raises(CheckpointCorruptError, match=path.name):
        load(tmp_path, info, target)
    assert reads == []
    assert same(target, before)


def test_a_header_altered_so_that_it_still_reads(tmp_path: Path) -> None:
    """Names swapped: the tensors would go to the wrong places."""
    target, source = made(2), made(1)
    older, info = save(tmp_path, source, step=5), save(tmp_path, source, step=6)
    path = tmp_path / info.folder / "state-00000.safetensors"
    data = path.read_bytes()
    assert b'state.0.exp_avg"' in data
    for old, new in ((b'state.0.exp_avg"', b'state.X.exp_avg"'), (b'state.1.exp_avg"', b'state.0.exp_avg"')):
        data = data.replace(old, new)
    path.write_bytes(data.replace(b'state.X.exp_avg"', b'state.1.exp_avg"'))
    with pytest.raises(CheckpointCorruptError, match=path.name):
        load(tmp_path, info, target)
    load(tmp_path, older, target)
    assert same(target, source)


def test_a_damaged_copy_in_memory_is_no_loss(tmp_path: Path, reads: list[int]) -> None:
    source, target = made(1), made(2)
    info = save(tmp_path / "storage", source)
    shutil.copytree(tmp_path / "storage", tmp_path / "nearby")
    damage(tmp_path / "nearby" / info.folder / "state-00000.safetensors")
    with OpenCheckpoint(Storage.open(tmp_path / "storage"), info, None, Storage.open(tmp_path / "nearby")) as opened:
        load_into(target, opened)
        damaged = info.manifests[0].files["state-00000.safetensors"].size
        assert opened.from_nearby == info.size - damaged
    assert len(reads) == 1
    assert same(target, source)


def test_a_copy_in_memory_is_read_straight(tmp_path: Path, reads: list[int]) -> None:
    source, target = made(1), made(2)
    info = save(tmp_path / "storage", source)
    shutil.copytree(tmp_path / "storage", tmp_path / "nearby")
    with OpenCheckpoint(Storage.open(tmp_path / "storage"), info, None, Storage.open(tmp_path / "nearby")) as opened:
        prepared = prepare_load(target, opened)
        for path in (tmp_path / "storage" / info.folder).glob("*.safetensors"):
            damage(path)
        prepared()
        assert opened.from_nearby == info.size
    assert len(reads) == 1
    assert same(target, source)


def test_an_error_of_the_disk(tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be read is read anew; if that fails too, the tensors are spoilt and it is said."""
    source, target = made(1), made(2)
    info = save(tmp_path, source)
    real, calls = os.preadv, [0]

    def fails(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] == 6:  # two for each header, and the first block
            raise OSError(5, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", fails)
    load(tmp_path, info, target)
    assert (len(reads), calls[0]) == (1, 6)
    assert same(target, source)

    def gone(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    calls[0] = 0
    with OpenCheckpoint(Storage.open(tmp_path), info) as opened:
        prepared = prepare_load(target, opened)
        monkeypatch.setattr("ray_tracking.checkpoint.mapping._advise", gone)
        with pytest.raises(StorageError, match=r"(?s)Input/output error.*NaN"):
            prepared()
    assert is_spoilt(target)


def test_an_interrupt_leaves_nothing_half_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = made(2)
    info = save(tmp_path, made(1))

    def interrupted(_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(unread, "read_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, info, target)
    assert is_spoilt(target)


def test_files_are_closed_whether_they_are_read_or_not(tmp_path: Path) -> None:
    info = save(tmp_path, made(1))
    target = made(2)
    load(tmp_path, info, target)
    with OpenCheckpoint(Storage.open(tmp_path), info) as opened:
        prepare_load(target, opened)
        assert open_files(tmp_path) != []
    assert open_files(tmp_path) == []
