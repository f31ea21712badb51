from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from ray_tracking.checkpoint import regions
from ray_tracking.checkpoint.contents import contents
from ray_tracking.checkpoint.distributed_state import sharded_state
from ray_tracking.checkpoint.inplace import load_into, prepare_load, restore
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.sharding import piece_of
from ray_tracking.checkpoint.state import capture, describe
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, UsageError
from ray_tracking.storage import Storage
from tests import ranks
from tests.ranks import Ranks

Make = Callable[[nn.Module], Optimizer]
Pair = tuple[nn.Module, Optimizer]
BODIES: list[ranks.Body] = []


def body(function: ranks.Body) -> ranks.Body:
    BODIES.append(function)
    return function


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return ranks.run(BODIES, 4, tmp_path_factory.mktemp("ranks"))


# -- what is trained -------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 5)  # 5 rows on 4 ranks: 2, 2, 1 and none
        self.outer = nn.Linear(5, 6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.outer(torch.tanh(self.inner(inputs)))


class Net(nn.Module):
    """Tied weights, a frozen and an unused parameter, buffers, a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(3, 6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(7))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.extra = 0

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.extra += 3
        hidden = self.embedding(words) + self.frozen.sum(0)
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


def adamw(model: nn.Module) -> Optimizer:
    """Two groups, in another order than the model's."""
    parameters = list(model.parameters())
    return AdamW([{"params": parameters[5:], "weight_decay": 0.1}, {"params": parameters[:5]}], lr=0.02)


class World:
    """A way of training on the first `size` ranks: plain, ddp, fsdp or hsdp (two groups of two)."""

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size
        self.group = dist.new_group(list(range(size)))
        shape = torch.arange(size).view(2, 2) if kind == "hsdp" else torch.arange(size)
        self.mesh = DeviceMesh("cpu", shape, mesh_dim_names=("replicas", "shards") if kind == "hsdp" else ("shards",))

    @property
    def inside(self) -> bool:
        return dist.get_rank() < self.size

    def make(self, seed: int, make: Make = adamw, **options: Any) -> Pair:
        torch.manual_seed(seed)
        model: nn.Module = Net()
        if self.kind in ("fsdp", "hsdp"):
            for block in model.blocks:
                fully_shard(block, mesh=self.mesh, **options)
            fully_shard(model, mesh=self.mesh, **options)
        elif self.kind == "ddp":
            model = DistributedDataParallel(model, process_group=self.group, find_unused_parameters=True)
        return model, make(model)

    def barrier(self) -> None:
        dist.barrier(self.group)


def train(pair: Pair, steps: int, seed: int = 0) -> None:
    model, optimizer = pair
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    for _ in range(steps):
        words = torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), words.roll(1)).backward()
        optimizer.step()


def evaluate(pair: Pair) -> None:
    """A forward pass without a backward pass, after which FSDP2 leaves parameters gathered."""
    with torch.no_grad():
        pair[0](torch.arange(4))
    assert not all(isinstance(parameter, DTensor) for parameter in pair[0].parameters())


def save(root: Path, world: World, objects: Mapping[str, Any], step: int = 1) -> None:
    """By the first ranks, one after the other: whoever saves needs no other rank."""
    store = CheckpointStore(Storage.open(root))
    for rank in range(world.size):
        if rank == dist.get_rank():
            snapshot = capture(objects, step=step, rank=rank, world_size=world.size, save_id="s", include_rng=False)
            store.write_snapshot(store.folder_of(step), snapshot)
        world.barrier()


@contextmanager
def opened(root: Path, step: int = 1) -> Iterator[OpenCheckpoint]:
    store = CheckpointStore(Storage.open(root))
    info = store.find(step)
    assert info is not None, store.scan()
    with OpenCheckpoint(store.storage, info) as checkpoint:
        yield checkpoint


def load(root: Path, world: World, objects: Mapping[str, Any], step: int = 1) -> None:
    with opened(root, step) as checkpoint:
        load_into(objects, checkpoint, rank=dist.get_rank(), world_size=world.size, rng=False)


# -- comparing -------------------------------------------------------------------------------------


def whole(value: Any) -> Any:
    """A state with whole tensors in place of shards. All ranks of a mesh must come here."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [whole(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def everything(pair: Pair) -> Any:
    model, optimizer = pair
    state = whole(model.state_dict())
    return {key.removeprefix("module."): item for key, item in state.items()}, whole(optimizer.state_dict())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), path
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        assert torch.equal(bits(one), bits(other)), path
    elif isinstance(one, Mapping):
        assert list(one) == list(other) or set(one) == set(other), (path, list(one), list(other))
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for number, (mine, its) in enumerate(zip(one, other, strict=True)):
            assert_same(mine, its, f"{path}.{number}")
    else:
        assert one == other, (path, one, other)


# -- bodies ----------------------------------------------------------------------------------------


@body
def from_every_world_to_every_world(place: Ranks) -> None:
    worlds = {
        name: World(name.split("-")[0], int(name.split("-")[1]))
        for name in ("plain-1", "ddp-2", "fsdp-1", "fsdp-2", "fsdp-4", "hsdp-4")
    }
    for name, source in worlds.items():
        expected = None
        if source.inside:
            pair = source.make(1)
            train(pair, 3)
            save(place.folder / name, source, {"model": pair[0], "optimizer": pair[1]})
            expected = everything(pair)
        expected = place.share(expected)
        for other, target in worlds.items():
            if not target.inside:
                continue
            for steps in (0, 1):
                mine = target.make(2)
                train(mine, steps, seed=5)
                load(place.folder / name, target, {"model": mine[0], "optimizer": mine[1]})
                assert_same(everything(mine), expected, f"{name} to {other} after {steps}")
                net = getattr(mine[0], "module", mine[0])
                assert net.head.weight is net.embedding.weight
                assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in Net().parameters()]
                if other == name:
                    again = copy_of_training(source, 3)
                    train(mine, 2, seed=7)
                    train(again, 2, seed=7)
                    assert_same(everything(mine), everything(again), f"{name} goes on")
        place.share(None)


def copy_of_training(world: World, steps: int) -> Pair:
    pair = world.make(1)
    train(pair, steps)
    return pair


@body
def each_part_is_stored_once_and_read_by_those_who_hold_it(place: Ranks) -> None:
    for name, world in {"fsdp": World("fsdp", 4), "hsdp": World("hsdp", 4)}.items():
        pair = world.make(1)
        train(pair, 2)
        with mock.patch.object(DTensor, "full_tensor", side_effect=AssertionError("the whole tensor")):
            save(place.folder / name, world, {"model": pair[0], "optimizer": pair[1]})
        with opened(place.folder / name) as checkpoint:
            found = contents(Storage.open(place.folder / name), checkpoint.info).tensors
        model = {key: value for key, value in pair[0].state_dict().items() if isinstance(value, torch.Tensor)}
        del model["head.weight"]
        stored = sum(entry.items for entry in found if entry.object == "model")
        assert stored == sum(tensor.numel() for tensor in model.values())
        assert {entry.rank for entry in found if entry.object == "model"} == set(range(4))
        assert all(entry.rank == 0 for entry in found if entry.name.endswith("calls"))

        mine = world.make(2)
        train(mine, 1)
        with opened(place.folder / name) as checkpoint:
            with mock.patch.object(regions, "assemble", side_effect=AssertionError("memory for a region")):
                prepared = prepare_load(
                    {"model": mine[0], "optimizer": mine[1]}, checkpoint, rank=place.rank, rng=False
                )
            read = {rank for rank, file in checkpoint._tensors if checkpoint._tensors[rank, file]}
            assert place.rank in read or name == "hsdp"
            if name == "fsdp":
                assert read == {0, place.rank}
            prepared()
        assert_same(everything(mine), everything(pair))
        place.share(None)


@body
def live_tensors_are_filled_and_no_file_is_kept(place: Ranks) -> None:
    world = World("fsdp", 4)
    source, target = world.make(1), world.make(2)
    train(source, 2)
    train(target, 1)
    objects = {"optimizer": target[1], "model": target[0]}
    evaluate(source)
    save(place.folder, world, {"optimizer": source[1], "model": source[0]})

    def addresses() -> list[int]:
        tensors = [*target[0].state_dict().values(), *(t for s in target[1].state.values() for t in s.values())]
        return [
            (t.to_local() if isinstance(t, DTensor) else t).data_ptr() for t in tensors if isinstance(t, torch.Tensor)
        ]

    before = addresses()
    evaluate(target)
    load(place.folder, world, objects)
    assert addresses() == before
    fresh = world.make(3)
    load(place.folder, world, {"model": fresh[0], "optimizer": fresh[1]})
    odd = world.make(5)
    train(odd, 1)
    parameter = odd[0].embedding.weight
    odd[1].state[parameter].update(exp_avg=parameter.detach(), exp_avg_sq=parameter.detach())
    load(place.folder, world, {"model": odd[0], "optimizer": odd[1]})
    assert_same(everything(odd), everything(source))
    in_memory = world.make(4)
    store = CheckpointStore(Storage.open(place.folder))
    loaded = store.load_latest(rank=place.rank, world_size=place.size)
    assert loaded is not None
    kept = copy.deepcopy(loaded.objects)
    restore(loaded, {"model": in_memory[0], "optimizer": in_memory[1]}, rng=False)
    assert_same(everything(in_memory), everything(source))
    train(in_memory, 1)
    assert_same(loaded.objects, kept)
    assert str(place.folder) not in Path("/proc/self/maps").read_text()
    assert_same(everything(fresh), everything(source))


class Factored(Optimizer):
    """State of another shape than its parameter's, the same on all ranks; a list and a number."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                power = parameter.grad.square().sum(0, keepdim=True)
                if isinstance(power, DTensor):
                    power = power.redistribute(placements=[Replicate()] * power.device_mesh.ndim)
                state["power"] = power + state.get("power", 0)
                state["gradients"] = [parameter.grad.clone(), *state.get("gradients", ())][:2]
                state["kept"] = len(state["gradients"])
                change = state["gradients"][-1] / (1 + state["power"])
                parameter.add_(change, alpha=-self.param_groups[0]["lr"])


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    "amsgrad": lambda model: Adam(model.parameters(), lr=0.01, amsgrad=True),
    "foreach": lambda model: AdamW(model.parameters(), lr=0.01, foreach=True),
    "fused": lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
    "lr as a tensor": lambda model: Adam(model.parameters(), lr=torch.tensor(0.01)),
    "factored": lambda model: Factored(model.parameters(), {"lr": 0.01}),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
    "names": lambda model: Adam([(n.removeprefix("module."), p) for n, p in model.named_parameters()], lr=0.01),
}


@body
def every_optimizer_goes_on_as_if_nothing_had_happened(place: Ranks) -> None:
    two, ddp, four = World("fsdp", 2), World("ddp", 2), World("fsdp", 4)
    for name, make in OPTIMIZERS.items():
        for source in (two, ddp):
            root = place.folder / f"{name} {source.kind}"
            expected = None
            if source.inside:
                pair = source.make(1, make)
                train(pair, 2)
                save(root, source, {"model": pair[0], "optimizer": pair[1]})
                expected = everything(pair)
            expected = place.share(expected)
            for target in (two, ddp, four):
                if not target.inside:
                    continue
                mine = target.make(2, make)
                load(root, target, {"model": mine[0], "optimizer": mine[1]})
                assert_same(everything(mine), expected, f"{name}: {source.kind} to {target.kind}-{target.size}")
                train(mine, 1, seed=7)
                if target is source:
                    train(pair, 1, seed=7)
                    assert_same(everything(mine), everything(pair), f"{name}: {source.kind} goes on")
            place.share(None)


@body
def saving_before_the_first_step_changes_nothing(place: Ranks) -> None:
    world = World("fsdp", 4)
    saved, other = world.make(1), world.make(1)
    steps: list[int] = []
    saved[1].register_step_post_hook(lambda *_: steps.append(1))
    save(place.folder, world, {"model": saved[0], "optimizer": saved[1]})
    assert not steps
    assert not saved[1].state
    assert all(parameter.grad is None for parameter in saved[0].parameters())
    fresh = world.make(2)
    load(place.folder, world, {"model": fresh[0], "optimizer": fresh[1]})
    for pair in (saved, other, fresh):
        train(pair, 2)
    assert_same(everything(saved), everything(other))
    assert_same(everything(fresh), everything(other))


@body
def parameters_are_found_by_name(place: Ranks) -> None:
    """Another order of parameters in a group, wrapped blocks, two models."""
    world, ddp = World("fsdp", 4), World("ddp", 4)

    def backwards(model: nn.Module) -> Optimizer:
        return AdamW(list(reversed(list(model.parameters()))), lr=0.01)

    pair = world.make(1, lambda model: AdamW(model.parameters(), lr=0.01))
    train(pair, 2)
    other = World("fsdp", 4).make(4)
    train(other, 1)
    save(place.folder, world, {"model": pair[0], "optimizer": pair[1], "other": other[0], "second": other[1]})
    expected = pair[0].state_dict(), {id(pair[0]): pair[1].state}
    for target in (world, ddp):
        mine = target.make(2, backwards)
        its = target.make(3)
        load(place.folder, target, {"model": mine[0], "optimizer": mine[1], "other": its[0], "second": its[1]})
        assert_same(whole(everything(mine)[0]), whole(expected[0]))
        for one, two in zip(pair[0].parameters(), mine[0].parameters(), strict=True):
            assert_same(whole(dict(pair[1].state.get(one, {}))), whole(dict(mine[1].state.get(two, {}))))
        assert_same(everything(its), everything(other))

    torch.manual_seed(9)
    wrapped = Net()
    wrapped.blocks = nn.ModuleList(checkpoint_wrapper(block) for block in wrapped.blocks)
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0], backend="eager")
    for block in wrapped.blocks:
        fully_shard(block, mesh=world.mesh)
    fully_shard(wrapped, mesh=world.mesh)
    optimizer = AdamW(wrapped.parameters(), lr=0.01)
    load(place.folder, world, {"model": wrapped, "optimizer": optimizer})
    for one, two in zip(pair[0].parameters(), wrapped.parameters(), strict=True):
        assert_same(whole(one.detach()), whole(two.detach()))
        assert_same(whole(dict(pair[1].state.get(one, {}))), whole(dict(optimizer.state.get(two, {}))))
    save(place.folder, world, {"model": wrapped, "optimizer": optimizer}, step=2)
    mine = ddp.make(2, lambda model: AdamW(model.parameters(), lr=0.01))
    load(place.folder, ddp, {"model": mine[0], "optimizer": mine[1]}, step=2)
    assert_same(everything(mine)[1], everything(pair)[1])


@body
def other_precisions(place: Ranks) -> None:
    two, four = World("fsdp", 2), World("fsdp", 4)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    expected = None

    def make(world: World, seed: int) -> Pair:
        model, _ = world.make(seed, mp_policy=policy)
        return model, AdamW(model.parameters(), lr=0.01)

    if two.inside:
        pair = make(two, 1)
        train(pair, 2)
        save(place.folder / "mixed", two, {"model": pair[0], "optimizer": pair[1]})
        expected = everything(pair)
    expected = place.share(expected)
    assert expected[0]["embedding.weight"].dtype == torch.float32
    mine = make(four, 2)
    load(place.folder / "mixed", four, {"model": mine[0], "optimizer": mine[1]})
    assert_same(everything(mine), expected)

    torch.manual_seed(3)
    half = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    fully_shard(half, mesh=four.mesh)
    optimizer = AdamW(half.parameters(), lr=0.01)
    half(torch.randn(2, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    save(place.folder / "half", four, {"model": half, "optimizer": optimizer})
    plain = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    its = AdamW(plain.parameters(), lr=0.01)
    load(place.folder / "half", World("plain", 1), {"model": plain, "optimizer": its})
    assert_same(
        (whole(plain.state_dict()), whole(its.state_dict())), (whole(half.state_dict()), whole(optimizer.state_dict()))
    )
    wide = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    load(place.folder / "half", World("plain", 1), {"model": wide})
    assert_same(whole(wide.state_dict()), {key: whole(item).float() for key, item in half.state_dict().items()})


class Average:
    """Keeps weights of its own, as an average of a model's does."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors: dict[str, Any] = dict(tensors)
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        return {"nested": [OrderedDict(self.tensors)], "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tensors, self.updates = dict(state["nested"][0]), state["updates"]


@body
def every_placement(place: Ranks) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    pair = DeviceMesh("cpu", [1, 2])
    world, alone = World("fsdp", 4), World("plain", 1)
    torch.manual_seed(0)
    values = {
        "rows": torch.randn(10, 3),
        "few rows": torch.randn(2, 3),
        "one": torch.randn(1),
        "columns": torch.randn(3, 7),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "cube": torch.randn(5, 3, 6),
        "half": torch.randn(9, 5).bfloat16(),
        "whole": torch.arange(11),
        "flags": torch.arange(9) % 2 == 0,
        "eighth": torch.randn(6, 8).to(torch.float8_e4m3fn),
        "complex": torch.randn(6, 3, dtype=torch.complex64),
        "words": torch.arange(12).to(torch.uint16),
    }
    layouts = (
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (square, [Shard(0), Replicate()]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Shard(0)]),
        (line, [Shard(1)]),
        (square, [Shard(0), Shard(1)]),
        (square, [Shard(1), Shard(0)]),
        (pair, [Shard(0)]),
    )

    def spread(number: int, source: Mapping[str, torch.Tensor]) -> Average:
        mesh, placements = layouts[number]

        def distributed(tensor: torch.Tensor) -> torch.Tensor:
            can = all(isinstance(each, Replicate) or each.dim < tensor.dim() for each in placements)
            where = placements if can else [Replicate()] * mesh.ndim
            return distribute_tensor(tensor.clone(), mesh, where, src_data_rank=None)  # all ranks have it

        return Average(**{name: distributed(tensor) for name, tensor in source.items()})

    empty = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    for number in range(len(layouts)):
        saved = spread(number, values)
        saved.updates = number
        save(place.folder, world, {"average": saved}, step=number)
        place.share(None)
        for other in ((number + 1) % len(layouts), (number + 4) % len(layouts)):
            target = spread(other, empty)
            load(place.folder, world, {"average": target}, step=number)
            assert target.updates == number
            for name, expected in spread(other, values).tensors.items():
                found = target.tensors[name]
                assert (found.placements, found.device_mesh) == (expected.placements, layouts[other][0]), name
                if layouts[other][0].get_coordinate() is not None:
                    assert_same(piece_of(found, "").local, piece_of(expected, "").local, name)
        plain = Average(**empty)
        load(place.folder, alone, {"average": plain}, step=number)
        assert_same(plain.tensors, values)
        absent = Average()
        load(place.folder, alone, {"average": absent}, step=number)
        assert_same(absent.tensors, values)
    partial = Average(sum=DTensor.from_local(torch.ones(2), line, [Partial()]))
    with pytest.raises(CheckpointError, match=r"average\.nested\.0\.sum is a DTensor placed as .*Partial"):
        capture({"average": partial}, step=1, rank=place.rank, world_size=4)
    wide = Average(wide=distribute_tensor(torch.randn(4, dtype=torch.complex128), line, [Shard(0)]))
    with pytest.raises(CheckpointError, match=r"sharded tensor of torch\.complex128"):
        capture({"average": wide}, step=1, rank=place.rank, world_size=4)


@body
def what_does_not_fit_is_said_before_anything_changes(place: Ranks) -> None:
    world = World("fsdp", 4)
    pair, second = world.make(1), world.make(2)
    train(pair, 1)
    objects = {"model": pair[0], "optimizer": pair[1]}
    save(place.folder, world, objects)
    for given in ({"optimizer": pair[1]}, {"model": second[0], "optimizer": pair[1]}):
        with pytest.raises(UsageError, match="'optimizer' are sharded, and no object"):
            sharded_state("optimizer", pair[1], given)

    mine = world.make(3)
    train(mine, 1)
    before = copy.deepcopy(everything(mine))
    fewer = AdamW([p for n, p in mine[0].named_parameters() if n != "unused"], lr=0.1)
    swapped = AdamW([{"params": [p]} for p in list(mine[0].parameters())[:2]], lr=0.1)
    for optimizer, said in (
        (fewer, "groups have"),
        (swapped, "groups have"),
        (adamw_other(mine[0]), "groups hold other"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(place.folder, world, {"model": mine[0], "optimizer": optimizer})
    larger = nn.Sequential(nn.Linear(3, 3))
    fully_shard(larger, mesh=world.mesh)
    with pytest.raises(CheckpointError, match=r"0\.weight is not in the checkpoint"):
        load(place.folder, world, {"model": larger})
    with torch.device("meta"):
        ghost = Net()
    fully_shard(ghost, mesh=world.mesh)
    with pytest.raises(CheckpointError, match="to_empty"):
        load(place.folder, world, {"model": ghost})

    place.share(None)
    # One bit of the last rank's weights: whoever holds a part of them refuses.
    if place.rank == 0:
        file = place.folder / "step-000001" / "model-00003-of-00004.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 4
        file.write_bytes(data)
    place.share(None)
    found = ""
    try:
        load(place.folder, world, {"model": mine[0], "optimizer": mine[1]})
    except CheckpointCorruptError as error:
        found = str(error)
    assert ("model-00003-of-00004.safetensors is not what was saved" in found) == (place.rank == 3), found
    if place.rank == 3:
        local = piece_of(dict(mine[0].named_parameters())["embedding.weight"], "").local
        assert torch.equal(local, before[0]["embedding.weight"][9:])


def adamw_other(model: nn.Module) -> Optimizer:
    """The groups of `adamw` with one parameter in the place of another."""
    parameters = list(model.parameters())
    parameters[4], parameters[5] = parameters[5], parameters[4]
    return AdamW([{"params": parameters[5:]}, {"params": parameters[:5]}], lr=0.1)


@pytest.mark.parametrize("name", [each.__name__ for each in BODIES])
def test_on_four_ranks(name: str, failures: Mapping[str, str]) -> None:
    assert not failures[name], failures[name]


# -- by one rank -----------------------------------------------------------------------------------


def test_what_is_not_sharded_is_left_to_others() -> None:
    model = nn.Linear(2, 2)
    objects = {"model": model, "optimizer": Adam(model.parameters()), "other": {"a": 1}}
    assert [sharded_state(name, value, objects) for name, value in objects.items()] == [None, None, None]


def test_buffers_are_those_of_rank_0() -> None:
    """The others' are overwritten with them at the next forward pass of DistributedDataParallel."""
    model = nn.Sequential(nn.BatchNorm1d(4000), nn.Linear(4000, 2))
    objects = {"model": model, "average": nn.BatchNorm1d(3)}
    for rank in range(3):
        files = describe(objects, step=1, rank=rank, world_size=3, include_rng=False).files
        names = {name for file in files.values() for name in file.tensors}
        buffers = {name for name in names if "running" in name or "num_batches" in name}
        assert len(buffers) == (6 if rank == 0 else 0)
        assert names - buffers
