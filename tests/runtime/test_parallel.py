from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ray_tracking.errors import UsageError
from ray_tracking.runtime.parallel import Parallel, blocks_of, parallelize, without_exchange
from tests import ranks
from tests.ranks import Ranks

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.ModuleList(nn.Sequential(nn.Linear(5, 3), nn.Tanh()) for _ in range(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        return inputs + sum(each(hidden) for each in self.second)


class Net(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5)
        self.register_buffer("scale", torch.rand(1))
        if tied:
            self.head.weight = self.blocks[1].first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        logits: torch.Tensor = self.head(self.norm(inputs)) * self.scale
        return logits


def model(seed: int, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {key.removeprefix("module."): value for key, value in module.state_dict().items()}
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}


def assert_close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], **options: Any) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], msg=lambda text, key=key: f"{key}: {text}", **options)


def all_start_from_the_weights_of_rank_0(place: Ranks) -> None:
    expected = model(0).state_dict()
    for parallel in ("ddp", "fsdp"):
        prepared = parallelize(model(place.rank), CPU, place.size, parallel)
        assert_close(state(prepared), expected, rtol=0, atol=0)
    sharded = parallelize(model(place.rank), CPU, place.size, "fsdp")
    assert [isinstance(each, FSDPModule) for each in (sharded, *sharded.blocks, sharded.head)] == [True] * 4 + [False]
    assert sum(p.to_local().numel() for p in sharded.parameters()) < 0.7 * sum(p.numel() for p in sharded.parameters())
    alone = parallelize(model(place.rank), CPU, place.size, None)
    assert type(alone) is Net
    assert_close(alone.state_dict(), model(place.rank).state_dict(), rtol=0, atol=0)


def sharded_training_is_that_of_copies(place: Ranks) -> None:
    """Also with gradients gathered over two passes; tied weights stay tied."""
    found = []
    for parallel in ("ddp", "fsdp"):
        prepared = parallelize(model(place.rank, tied=True), CPU, place.size, parallel)
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(place.rank)
        for _ in range(3):
            inputs = torch.randn(2, 4, 3, generator=generator)
            optimizer.zero_grad()
            with without_exchange(prepared):
                prepared(inputs[0]).square().sum().backward()
            prepared(inputs[1]).square().sum().backward()
            optimizer.step()
        inner = getattr(prepared, "module", prepared)
        assert inner.head.weight is inner.blocks[1].first.weight
        found.append(state(prepared))
    assert_close(found[0], found[1])


def without_exchange_each_rank_has_its_own_gradients(place: Ranks) -> None:
    for parallel in ("ddp", "fsdp"):
        prepared = parallelize(model(place.rank), CPU, place.size, parallel)
        for first in (without_exchange(prepared), without_exchange(prepared)):
            with first:
                prepared(torch.full((1, 3), float(place.rank))).sum().backward()
        grads = [p.grad for p in prepared.parameters()]
        assert parallel == "fsdp" or all(grad is not None for grad in grads)
        assert parallel == "ddp" or all(grad is None for grad in grads), "kept unsharded until the exchange"


def options_reach_what_spreads(place: Ranks) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    sharded = parallelize(model(0), CPU, place.size, "fsdp", mp_policy=policy)
    seen: list[torch.dtype] = []
    sharded.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    sharded(torch.ones(1, 3))
    assert seen == [torch.bfloat16]
    assert all(value.dtype == torch.float32 for value in sharded.state_dict().values())
    copies = parallelize(model(0), CPU, place.size, "ddp", find_unused_parameters=True)
    assert isinstance(copies, DistributedDataParallel)
    assert copies.find_unused_parameters
    with torch.device("meta"):
        ghost = Net()
    with pytest.raises(UsageError, match="meta device"):
        parallelize(ghost, CPU, place.size, "fsdp")
    dist.barrier()


BODIES: list[ranks.Body] = [
    all_start_from_the_weights_of_rank_0,
    sharded_training_is_that_of_copies,
    without_exchange_each_rank_has_its_own_gradients,
    options_reach_what_spreads,
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return ranks.run(BODIES, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [each.__name__ for each in BODIES])
def test_on_two_ranks(name: str, failures: Mapping[str, str]) -> None:
    assert not failures[name], failures[name]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", None])
def test_one_rank_without_a_group_trains_the_model_itself(parallel: Parallel | None) -> None:
    given = model(0)
    assert parallelize(given, CPU, 1, parallel) is given
    with without_exchange(given):
        pass


def test_a_word_that_is_none() -> None:
    with pytest.raises(UsageError, match='Use "ddp", "fsdp" or None'):
        parallelize(model(0), CPU, 1, "FSDP")  # type: ignore[arg-type]


def test_blocks() -> None:
    net = model(0)
    assert blocks_of(net) == list(net.blocks)
    assert blocks_of(nn.Sequential(net.norm, net.head, nn.Linear(5, 5), nn.Linear(5, 5))) == []
    assert blocks_of(nn.Sequential(net, net.head)) == list(net.blocks), "one of a kind is none, what is in it may be"
    assert blocks_of(nn.Sequential(net.blocks[0], net.blocks[0])) == []
    stages = nn.ModuleDict({"a": nn.Sequential(*net.blocks[:2]), "b": nn.Sequential(net.blocks[2], Block())})
    assert blocks_of(stages)[:3] == list(net.blocks)
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4), 2, enable_nested_tensor=False)
    assert blocks_of(layers) == list(layers.layers)
