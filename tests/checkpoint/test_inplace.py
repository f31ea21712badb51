from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ray_tracking.checkpoint import inplace
from ray_tracking.checkpoint.codec import encode_state
from ray_tracking.checkpoint.inplace import load_into, restore
from ray_tracking.checkpoint.keys import Key, Keyring
from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.rng import capture_rng
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, UsageError
from ray_tracking.storage import Storage

from . import by_hand

Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda p: Adam(p, lr=0.01),
    "Adam with amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "AdamW foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: SGD(p, lr=0.01),
    "SGD with momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: Adagrad(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, history_size=3),
    "a tensor as lr": lambda p: Adam(p, lr=torch.tensor(0.01)),
}


def net(seed: int, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5, bias=bias), nn.LazyBatchNorm1d()).train()


def trained(make: Make, seed: int, steps: int) -> tuple[nn.Sequential, Optimizer]:
    model = net(seed)
    model(torch.zeros(2, 3, 6, 6))
    optimizer = make(model.parameters())
    train(model, optimizer, steps, seed)
    return model, optimizer


def train(model: nn.Module, optimizer: Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(4, 3, 6, 6, generator=generator)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().sum() + model(inputs).sum()  # noqa: B023
            loss.backward()
            return loss  # type: ignore[no-any-return]

        optimizer.step(closure)


def save(root: Path, model: nn.Module, optimizer: Optimizer, **options: Any) -> CheckpointInfo:
    return by_hand.write(root, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, **options)


def load(root: Path, info: CheckpointInfo, objects: dict[str, Any], **options: Any) -> None:
    with OpenCheckpoint(Storage.open(root), info) as opened:
        load_into(objects, opened, **{"rng": False, **options})


def bits(*values: Any) -> tuple[Any, dict[str, bytes]]:
    """Every bit of the state of each."""
    encoded = encode_state([value.state_dict() for value in values])
    return encoded.tree, {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in encoded.tensors.items()
    }


def state_tensors(optimizer: Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    return {
        (number, key): value
        for number, state in enumerate(optimizer.state.values())
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("way", ["read once", "verified first"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "in use"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_torch_itself_would_have_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: int, world_size: int, way: str
) -> None:
    if way == "verified first":
        monkeypatch.setattr(inplace, "plan_direct", lambda *_: None)
    make = OPTIMIZERS[name]
    source, target, expected = trained(make, 1, 3), trained(make, 2, before), trained(make, 2, before)
    info = save(tmp_path, *source, world_size=world_size)
    expected[0].load_state_dict(copy.deepcopy(source[0].state_dict()))
    expected[1].load_state_dict(copy.deepcopy(source[1].state_dict()))
    load(tmp_path, info, {"model": target[0], "optimizer": target[1]})
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    shutil.rmtree(tmp_path)
    assert bits(*target) == bits(*source) == bits(*expected)
    for one, other in zip(state_tensors(target[1]).values(), state_tensors(expected[1]).values(), strict=True):
        assert (one.device, one.dtype, one.requires_grad) == (other.device, other.dtype, other.requires_grad)
    for pair in (source, target, expected):
        train(*pair, 2, seed=7)
    assert bits(*target) == bits(*source) == bits(*expected)


@pytest.mark.parametrize("name", ["Adam", "AdamW foreach", "AdamW fused", "SGD with momentum"])
def test_tensors_that_are_there_are_filled_and_not_replaced(tmp_path: Path, name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name], 2, 1)
    info = save(tmp_path, *trained(OPTIMIZERS[name], 1, 3))
    before = {key: tensor.data_ptr() for key, tensor in state_tensors(optimizer).items()}
    weights = [parameter.data_ptr() for parameter in model.parameters()]
    load(tmp_path, info, {"model": model, "optimizer": optimizer})
    assert {key: tensor.data_ptr() for key, tensor in state_tensors(optimizer).items()} == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == weights


def test_fresh_tensors_share_no_storage(tmp_path: Path) -> None:
    model, optimizer = trained(OPTIMIZERS["Adam"], 2, 0)
    info = save(tmp_path, *trained(OPTIMIZERS["Adam"], 1, 3))
    load(tmp_path, info, {"model": model, "optimizer": optimizer})
    tensors = state_tensors(optimizer).values()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_a_live_tensor_that_is_the_parameter_is_not_written_through(tmp_path: Path) -> None:
    """Some optimizers keep the parameter itself in their state, or one tensor for several parameters."""
    source, target = trained(OPTIMIZERS["Adam"], 1, 1), trained(OPTIMIZERS["Adam"], 2, 1)
    first, second = list(target[1].state)[:2]
    target[1].state[first]["exp_avg"] = first.detach()
    shared = torch.zeros_like(second)
    target[1].state[second].update(exp_avg=shared, exp_avg_sq=shared)
    info = save(tmp_path, *source)
    load(tmp_path, info, {"model": target[0], "optimizer": target[1]})
    assert bits(*target) == bits(*source)


def test_parameters_of_another_type_get_their_state_as_torch_casts_it(tmp_path: Path) -> None:
    source, target, expected = (trained(OPTIMIZERS["Adam"], seed, 1) for seed in (1, 2, 2))
    for model, optimizer in (target, expected):
        model.double()
        for state in optimizer.state.values():
            state.update({key: value.double() for key, value in state.items() if key != "step"})
    info = by_hand.write(tmp_path, {"optimizer": source[1].state_dict()})
    load(tmp_path, info, {"optimizer": target[1]})
    expected[1].load_state_dict(copy.deepcopy(source[1].state_dict()))
    assert bits(target[1]) == bits(expected[1])
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


class Keeps(Adam):
    """Keeps the very state it is given."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.given = state_dict


class KeepsExtra(nn.Linear):
    """A module that keeps what it is given besides its tensors."""

    extra: Any = torch.arange(3.0)

    def get_extra_state(self) -> Any:
        return {"scale": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["scale"]


class Average:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.shadow: Any = {"w": torch.zeros(4)}

    def state_dict(self) -> Any:
        return self.shadow

    def load_state_dict(self, state: Any) -> None:
        self.shadow = state


def test_what_is_kept_is_private(tmp_path: Path) -> None:
    module, average = KeepsExtra(2, 2), Average()
    optimizer = Keeps(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    module.extra, average.shadow = torch.full((2_000,), 2.0), {"w": torch.full((2_000,), 3.0), "n": [torch.ones(4)]}
    objects = {"model": module, "optimizer": optimizer, "average": average}
    info = by_hand.write(tmp_path, {name: value.state_dict() for name, value in objects.items()})
    module.extra, average.shadow = torch.zeros(1), {}
    load(tmp_path, info, objects)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    shutil.rmtree(tmp_path)
    assert torch.equal(module.extra, torch.full((2_000,), 2.0))
    assert torch.equal(average.shadow["w"], torch.full((2_000,), 3.0))
    assert torch.equal(average.shadow["n"][0], torch.ones(4))
    assert torch.equal(optimizer.given["state"][0]["exp_avg"], optimizer.state[module.weight]["exp_avg"])


class Assigns(nn.Linear):
    """A module that keeps the tensors it is given, as load_state_dict(assign=True) does."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        self.weight = nn.Parameter(state_dict[prefix + "weight"])


def test_a_module_that_keeps_its_tensors_does_not_depend_on_the_file(tmp_path: Path) -> None:
    weight = torch.randn(600, 600)
    info = by_hand.write(tmp_path, {"model": {"weight": weight}})
    module = Assigns(600, 600, bias=False)
    load(tmp_path, info, {"model": module})
    with open(tmp_path / info.folder / "model.safetensors", "r+b") as file:
        file.write(bytes(weight.nbytes))
    assert torch.equal(module.weight, weight)


def test_pre_hooks_of_an_optimizer_still_run(tmp_path: Path) -> None:
    source, target = trained(OPTIMIZERS["Adam"], 1, 2), trained(OPTIMIZERS["Adam"], 2, 1)
    info = save(tmp_path, *source)

    def halve(optimizer: Optimizer, state: Any) -> Any:
        for each in state["state"].values():
            each["exp_avg"] = each["exp_avg"] / 2
        return state

    target[1].register_load_state_dict_pre_hook(halve)
    load(tmp_path, info, {"model": target[0], "optimizer": target[1]})
    for number, state in source[1].state_dict()["state"].items():
        assert torch.equal(target[1].state_dict()["state"][number]["exp_avg"], state["exp_avg"] / 2)


def test_a_checkpoint_in_memory_is_not_used_up() -> None:
    source = trained(OPTIMIZERS["Adam"], 1, 2)
    states = copy.deepcopy({"model": source[0].state_dict(), "optimizer": source[1].state_dict()})
    checkpoint = TrainingCheckpoint(states["model"], step=5, objects=states, rng=capture_rng())
    drawn = torch.rand(1).item()
    for before in (0, 1):
        target = trained(OPTIMIZERS["Adam"], 2, before)
        restore(checkpoint, {"model": target[0], "optimizer": target[1], "scheduler": None})
        assert torch.rand(1).item() == drawn
        assert bits(*target) == bits(*source)
        train(*target, 2, 3)


def test_ddp_and_compiled_modules_are_unwrapped(tmp_path: Path) -> None:
    source = trained(OPTIMIZERS["Adam"], 1, 1)
    info = save(tmp_path, *source)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        inner, _ = trained(OPTIMIZERS["Adam"], 2, 1)
        load(tmp_path, info, {"model": nn.parallel.DistributedDataParallel(inner)})
    finally:
        dist.destroy_process_group()
    assert bits(inner) == bits(source[0])


# -- ranks and random states -------------------------------------------------------------------------


class Holder:
    state: Any = None

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("rank", "world_size", "loader", "rng"),
    [(0, 2, 0, 0), (1, 2, 1, 1), (1, None, 1, 1), (0, 1, 0, 0), (1, 4, 0, 1), (3, 4, 0, None)],
)
def test_who_gets_what_at_another_world_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int, world_size: int | None, loader: int, rng: int | None
) -> None:
    states, drawn = [], []
    for seed in range(2):
        random.seed(seed), torch.manual_seed(seed)
        states.append(capture_rng())
        drawn.append((random.random(), torch.rand(1).item()))
    own = {"loader": [{"position": 0}, {"position": 1}], "rng": states}
    info = by_hand.write(tmp_path, {"ema": {"w": torch.ones(3)}}, own=own, world_size=2)
    holder, ema = Holder(), Holder()
    torch.manual_seed(99)
    left_alone = torch.get_rng_state()
    load(tmp_path, info, {"loader": holder, "ema": ema}, rank=rank, world_size=world_size, rng=True)
    assert holder.state == {"position": loader}
    assert torch.equal(ema.state["w"], torch.ones(3))
    if rng is None:
        assert torch.equal(torch.get_rng_state(), left_alone)
        assert "random states left as they are" in capsys.readouterr().err
    else:
        assert (random.random(), torch.rand(1).item()) == drawn[rng]


# -- what does not fit changes nothing -----------------------------------------------------------------


def test_nothing_changes_before_everything_is_checked(tmp_path: Path) -> None:
    source, target = trained(OPTIMIZERS["Adam"], 1, 1), trained(OPTIMIZERS["Adam"], 2, 1)
    states = {"model": source[0].state_dict(), "optimizer": source[1].state_dict()}
    info = by_hand.write(tmp_path, states, own={"rng": [capture_rng()]})
    objects: dict[str, Any] = {"model": target[0], "optimizer": target[1]}
    wide = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    few = Adam([next(target[0].parameters())])
    two_groups = Adam([{"params": list(target[0].parameters())[:1]}, {"params": list(target[0].parameters())[1:]}])
    before, random_state = bits(*target), torch.get_rng_state()
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"scheduler": Holder()}, CheckpointError, "no state for 'scheduler'; it holds: model, optimizer"),
        ({"second": target[1], "scheduler": None}, CheckpointError, "no state for 'second'"),
        ({"model": wide}, CheckpointError, "0.weight is .* in the checkpoint and .* in the module"),
        ({"optimizer": few}, CheckpointError, r"'optimizer' could not take its state: .* \[6\] parameters in the"),
        ({"optimizer": two_groups}, CheckpointError, r"the groups have \[6\] .* \[1, 5\] here"),
        ({"optimizer": object()}, UsageError, "without load_state_dict"),
    ]
    for change, error, said in cases:
        with pytest.raises(error, match=said):
            load(tmp_path, info, {**objects, **change}, rng=True)
    assert bits(*target) == before
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("how", ["encrypted", "compressed"])
def test_what_is_verified_first_changes_nothing_if_it_is_damaged(tmp_path: Path, how: str) -> None:
    ring = Keyring(Key(bytes(range(32))))
    sealed: dict[str, Any] = {"keyring": ring} if how == "encrypted" else {"compression": "zstd"}
    target = trained(OPTIMIZERS["Adam"], 2, 1)
    info = save(tmp_path, *trained(OPTIMIZERS["Adam"], 1, 1), own={"rng": [capture_rng()]}, **sealed)
    before, random_state = bits(*target), torch.get_rng_state()
    (path,) = (tmp_path / info.folder).glob("state-00000.safetensors.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    objects = {"model": target[0], "optimizer": target[1]}
    with (
        OpenCheckpoint(Storage.open(tmp_path), info, ring) as opened,
        pytest.raises(CheckpointCorruptError, match=r"state-00000\.safetensors") as caught,
    ):
        load_into(objects, opened)
    assert "NaN" not in str(caught.value)
    assert bits(*target) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_state_of_another_kind_is_named(tmp_path: Path) -> None:
    info = by_hand.write(tmp_path, {"model": {"weight": torch.ones(2, 2)}, "optimizer": {"x": 1}, "list": [1]})
    module = nn.Linear(2, 2, bias=False)
    for objects, said in (
        ({"optimizer": SGD(module.parameters(), lr=1)}, "'optimizer' could not take its state: it is not that of an"),
        ({"list": module}, "'list': the stored state is a list, not a module's state"),
        ({"list": torch.optim.lr_scheduler.StepLR(SGD(module.parameters(), lr=1), 1)}, "'list' could not take its"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load(tmp_path, info, objects)


def test_sharded_tensors_become_what_the_caller_makes_of_them(tmp_path: Path) -> None:
    weight = torch.randn(4, 2)
    boxes: list[by_hand.Box | None] = [((0, 0), (2, 2)), ((2, 0), (2, 2))]
    info = by_hand.write(tmp_path, {"model": {"weight": weight}}, cuts={"weight": boxes}, world_size=2)
    module = nn.Linear(2, 4, bias=False)
    load(tmp_path, info, {"model": module})
    assert torch.equal(module.weight, weight)
    half = nn.Linear(2, 2, bias=False)
    with OpenCheckpoint(Storage.open(tmp_path), info) as opened:
        load_into(
            {"model": half},
            opened,
            rng=False,
            local=lambda name, shape, dtype: opened.region("model", name, (2, 0), (2, shape[1]), rank=1),
        )
    assert torch.equal(half.weight, weight[2:])

    def fails(*_: Any) -> torch.Tensor:
        raise ValueError("mine")

    with OpenCheckpoint(Storage.open(tmp_path), info) as opened, pytest.raises(ValueError, match="mine"):
        load_into({"model": half}, opened, rng=False, local=fails)


def test_where_all_is_verified_first_a_large_optimizer_is_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inplace, "plan_direct", lambda *_: None)
    source, target = trained(OPTIMIZERS["Adam"], 1, 1), trained(OPTIMIZERS["Adam"], 2, 1)
    info = save(tmp_path, *source)
    copied: list[int] = []
    real = inplace.private_copies
    monkeypatch.setattr(
        inplace, "private_copies", lambda tensors: real([copied.append(each.nbytes) or each for each in tensors])
    )
    load(tmp_path, info, {"model": target[0], "optimizer": target[1]})
    assert copied == []
    fresh = trained(OPTIMIZERS["Adam"], 2, 0)
    load(tmp_path, info, {"model": fresh[0], "optimizer": fresh[1]})
    assert sum(copied) == sum(tensor.nbytes for tensor in state_tensors(source[1]).values())
