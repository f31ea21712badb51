from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from ray_tracking.checkpoint.inplace import restore
from ray_tracking.checkpoint.state import capture
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import CheckpointError, MetricError, UsageError
from ray_tracking.storage import Storage


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(16), nn.Linear(16, 2))


def through_storage(store: CheckpointStore, objects: dict[str, Any], **options: Any) -> Any:
    store.write_snapshot(store.new_folder(1), capture(objects, step=1, **options))
    return store.load(store.checkpoints()[-1])


def test_a_snapshot_does_not_change_with_training(store: CheckpointStore) -> None:
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer_state = {"state": {0: {"step": torch.tensor(1.0)}}, "list": [1, 2]}
    taken = capture({"model": model, "optimizer": optimizer_state}, step=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    optimizer_state["state"][0]["step"].add_(1)  # type: ignore[index, call-overload, union-attr]
    optimizer_state["list"].append(3)  # type: ignore[attr-defined]
    store.write_snapshot("step-000001", taken)
    loaded = store.load(store.checkpoints()[0])
    assert all(torch.equal(loaded.model_state[key], value) for key, value in before.items())
    assert loaded.optimizer_state == {"state": {0: {"step": torch.tensor(1.0)}}, "list": [1, 2]}


def test_random_states(store: CheckpointStore) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1)  # leaves a half-used pair in the state
    loaded = through_storage(store, {"model": net()})
    drawn = [random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(1).item()]
    restore(loaded, {})
    assert [random.gauss(0, 1), random.random(), np.random.rand(), torch.rand(1).item()] == drawn


def test_ddp_is_unwrapped_both_ways(store: CheckpointStore, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(net())
        loaded = through_storage(store, {"model": model})
        assert "0.weight" in loaded.model_state
        other = nn.parallel.DistributedDataParallel(net())
        restore(loaded, {"model": other})
    finally:
        dist.destroy_process_group()
    plain = net()
    restore(loaded, {"model": plain})
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key])
        assert torch.equal(value, other.module.state_dict()[key])


def test_a_ready_state_with_the_ddp_prefix_fits_a_plain_module(store: CheckpointStore) -> None:
    model = net()
    prefixed = {f"module.{key}": value for key, value in model.state_dict().items()}
    loaded = through_storage(store, {"model": prefixed})
    assert list(loaded.model_state) == list(prefixed), "what was given is what comes back"
    other = net()
    restore(loaded, {"model": other})
    assert torch.equal(other[0].weight, model[0].weight)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 2, 4]),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=50),
    "ReduceLROnPlateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "CosineWarm": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
}
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


class Training:
    """A small deterministic training; `ema` stands for any object of the user's own."""

    def __init__(self, optimizer: str = "AdamW", scheduler: str = "StepLR") -> None:
        torch.manual_seed(0)
        self.model = net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu")
        self.plateau = scheduler == "ReduceLROnPlateau"

    def run(self, count: int) -> None:
        for _ in range(count):
            inputs, targets = torch.randn(8, 6), torch.randint(0, 2, (8,))
            loss = nn.functional.cross_entropy(self.model(inputs), targets)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step(loss.item()) if self.plateau else self.scheduler.step()

    @property
    def objects(self) -> dict[str, Any]:
        names = ("model", "optimizer", "scheduler", "scaler")
        return {name: getattr(self, name) for name in names}

    def fingerprint(self) -> str:
        """Every bit of weights, optimizer and scheduler, and the next random number."""
        import hashlib

        from ray_tracking.checkpoint.codec import encode_state

        encoded = encode_state({name: value.state_dict() for name, value in self.objects.items()})
        seen = hashlib.sha256(repr(encoded.tree).encode())
        for name, tensor in encoded.tensors.items():
            seen.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return seen.hexdigest() + str(torch.get_rng_state().sum().item())


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(name, "StepLR") for name in OPTIMIZERS] + [("SGD", name) for name in SCHEDULERS if name != "StepLR"],
)
def test_a_resumed_training_is_bit_identical(store: CheckpointStore, optimizer: str, scheduler: str) -> None:
    straight = Training(optimizer, scheduler)
    straight.run(5)
    loaded = through_storage(store, straight.objects)
    straight.run(5)
    torch.manual_seed(99)
    resumed = Training(optimizer, scheduler)
    resumed.run(2)  # whatever it was before
    restore(loaded, resumed.objects)
    resumed.run(5)
    assert resumed.fingerprint() == straight.fingerprint()
    again = Training(optimizer, scheduler)
    restore(loaded, again.objects)
    again.run(5)
    assert again.fingerprint() == straight.fingerprint(), "restoring does not use the checkpoint up"


def test_a_resume_in_a_new_process_is_bit_identical(store: CheckpointStore) -> None:
    straight = Training()
    straight.run(5)
    store.write_snapshot("step-000005", capture(straight.objects, step=5))
    straight.run(5)
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "import torch; torch.set_num_threads(1)\n"
        "from checkpoint.test_state import Training\n"
        "from ray_tracking.checkpoint import CheckpointStore, restore\n"
        "from ray_tracking.storage import Storage\n"
        "training = Training()\n"
        "restore(CheckpointStore(Storage.open(sys.argv[1])).load_latest(), training.objects)\n"
        "training.run(5)\n"
        "print(training.fingerprint())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, store.storage.root, str(Path(__file__).parents[1])],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == straight.fingerprint(), done.stderr


def test_what_does_not_fit_is_named_and_nothing_is_changed(store: CheckpointStore) -> None:
    loaded = through_storage(store, {"model": net()})
    with pytest.raises(CheckpointError, match="no state for 'optimizer'; it holds: model"):
        restore(loaded, {"model": net(), "optimizer": torch.optim.SGD(net().parameters(), lr=1)})
    wider = nn.Sequential(nn.Linear(6, 17), nn.Linear(17, 2))
    before = wider[0].weight.clone()
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError) as caught:
        restore(loaded, {"model": wider})
    message = str(caught.value)
    assert "0.weight is [16, 6] in the checkpoint and [17, 6] in the module" in message
    assert "1.weight is not in the checkpoint" in message
    assert "and 6 more" in message
    assert torch.equal(wider[0].weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_foreign_optimizer_state_is_named(store: CheckpointStore) -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    loaded = through_storage(store, {"optimizer": optimizer})
    with pytest.raises(CheckpointError, match="'optimizer' could not take its state"):
        restore(loaded, {"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)})


def test_other_ranks_take_only_what_is_their_own() -> None:
    objects = {"model": net(), "loader": {"position": 3}, "scheduler": None}
    assert capture(objects, step=1, rank=0, world_size=2).manifest.objects == ("loader", "model", "rng")
    assert capture(objects, step=1, rank=1, world_size=2).manifest.objects == ("loader", "rng")


def test_wrong_use() -> None:
    with pytest.raises(MetricError, match="'loss'"):
        capture({"model": {}}, step=1, metrics={"loss": "low"})
    with pytest.raises(UsageError, match="rank 2 of 2"):
        capture({"model": {}}, step=1, rank=2, world_size=2)
    with pytest.raises(UsageError, match="'rng'"):
        capture({"rng": {}}, step=1)
    with pytest.raises(CheckpointError, match=r"scheduler\.fn is a function"):
        capture({"scheduler": {"fn": net}}, step=1)
    assert capture({"model": {}}, step=1, metrics={"loss": torch.tensor(0.5)}).manifest.metrics == {"loss": 0.5}


def test_listing_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy, apply_retention\n"
        "from ray_tracking.storage import Storage\n"
        "store = CheckpointStore(Storage.open(sys.argv[1]))\n"
        "assert [info.step for info in store.checkpoints()] == [1]\n"
        "assert store.verify(store.checkpoints()[0]) == []\n"
        "apply_retention(store, CheckpointStrategy())\n"
        "sys.exit('torch' in sys.modules or 'ray' in sys.modules)\n"
    )
    store = CheckpointStore(Storage.open(tmp_path))
    store.write_snapshot("step-000001", capture({"model": net()}, step=1))
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, cwd=root).returncode == 0
