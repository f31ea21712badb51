from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.manager import CheckpointManager, create_checkpoint_manager
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, ConfigError, StorageError, UsageError
from ray_tracking.storage import Storage


def manager(root: Path, **rules: Any) -> CheckpointManager:
    return CheckpointManager(CheckpointStore(Storage.open(root)), CheckpointStrategy(**rules))


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value)}


def test_the_original_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRACKING_STORAGE", str(tmp_path))
    manager = create_checkpoint_manager({"save_steps": 10, "monitor": "val/loss", "checkpoint_dir": None})
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    assert manager.load_latest_checkpoint() is None
    assert manager.load_best_checkpoint() is None
    losses = {10: 0.5, 20: 0.1, 30: 0.3, 40: 0.4, 50: 0.45}
    for step in range(1, 51):
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
        if manager.should_save_checkpoint(step, losses.get(step)):
            manager.save_checkpoint(
                model=model, optimizer=optimizer, scheduler=scheduler, epoch=step // 10, step=step,
                metrics={"loss": losses[step]},
            )  # fmt: skip
    assert [info.step for info in manager.list_checkpoints()] == [20, 40, 50]
    latest, best = manager.load_latest_checkpoint(), manager.load_best_checkpoint()
    assert isinstance(latest, TrainingCheckpoint)
    assert (latest.step, latest.epoch, latest.metrics) == (50, 5, {"loss": 0.45, "val/loss": 0.45})
    assert torch.equal(latest.model_state["weight"], model.weight)
    assert latest.optimizer_state["state"][0]["step"].item() == 50
    assert latest.scheduler_state["last_epoch"] == 50
    assert best is not None
    assert best.step == 20
    assert manager.load_checkpoint(40).step == 40  # type: ignore[union-attr]
    assert manager.load_checkpoint(10) is None
    assert manager.verify() == {20: [], 40: [], 50: []}
    assert manager.verify(50) == {50: []}
    assert (tmp_path / "checkpoints" / "step-000050" / "model.safetensors").exists()


def test_objects_of_any_name_and_ready_states(tmp_path: Path) -> None:
    with manager(tmp_path) as kept:
        kept.save_checkpoint(model=state(1.0), step=5, ema=state(2.0), note={"text": ("a", 1)})
    loaded = manager(tmp_path).load_latest_checkpoint()
    assert loaded is not None
    assert loaded.objects["note"] == {"text": ("a", 1)}
    assert torch.equal(loaded.objects["ema"]["w"], torch.full((3,), 2.0))
    assert loaded.optimizer_state is None
    with pytest.raises(UsageError, match="nothing to save"):
        kept.save_checkpoint(step=6)


def test_best_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(kept: CheckpointManager, values: dict[int, float | None]) -> list[int]:
        saved = []
        for step, value in values.items():
            if kept.should_save_checkpoint(step, value):
                kept.save_checkpoint(model=state(step), step=step, metrics={"val_loss": value})
                saved.append(step)
        kept.wait()
        return saved

    nan = float("nan")
    first = manager(tmp_path, save_steps=1, save_best_only=True)
    assert run(first, {1: 0.5, 2: 0.6, 3: nan, 4: 0.4, 5: None, 6: 0.4, 7: None}) == [1, 4]
    assert capsys.readouterr().err.count("saves nothing without the metric") == 1
    again = manager(tmp_path, save_steps=1, save_best_only=True)
    assert run(again, {8: 0.45, 9: 0.3}) == [9], "a new process knows the best of the old one"


def test_a_step_is_not_saved_twice(tmp_path: Path) -> None:
    kept = manager(tmp_path, save_steps=5)
    assert kept.should_save_checkpoint(5)
    kept.save_checkpoint(model=state(1), step=5)
    assert not kept.should_save_checkpoint(5)


def test_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ray_tracking.checkpoint.manager.time.monotonic", lambda: now)
    kept = manager(tmp_path, save_steps=None, save_every_seconds=30)
    now = 129.0
    assert not kept.should_save_checkpoint(3)
    now = 130.0
    assert kept.should_save_checkpoint(3)
    kept.save_checkpoint(model=state(1), step=3, blocking=True)
    assert not kept.should_save_checkpoint(4)


def test_a_script_started_over_in_an_old_directory(tmp_path: Path) -> None:
    with manager(tmp_path, save_total_limit=2) as kept:
        for step in (100, 200, 300):
            kept.save_checkpoint(model=state(step), step=step)
    with manager(tmp_path, save_total_limit=2) as kept:
        for step in (100, 200):
            kept.save_checkpoint(model=state(-step), step=step)
        assert [info.step for info in kept.list_checkpoints()] == [100, 200]
        latest = kept.load_latest_checkpoint()
    assert latest is not None
    assert torch.equal(latest.model_state["w"], torch.full((3,), -200.0))


class GatedStorage(Storage):
    """Writes wait for `gate`; with `broken` they fail."""

    def __init__(self, root: Path) -> None:
        opened = Storage.open(root)
        super().__init__(opened.filesystem, opened.root, opened.uri)
        self.gate = threading.Event()
        self.broken = False

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        self.gate.wait(10)
        if self.broken:
            raise StorageError("No space left on device")
        super().write_bytes(name, data)


def test_returns_once_copied_and_loading_waits(tmp_path: Path) -> None:
    storage = GatedStorage(tmp_path)
    kept = CheckpointManager(CheckpointStore(storage))
    weights = torch.zeros(3)
    kept.save_checkpoint(model={"w": weights}, step=1)
    weights.fill_(7)  # the training goes on while the write has not even begun
    assert CheckpointStore(Storage.open(tmp_path)).checkpoints() == []
    threading.Timer(0.1, storage.gate.set).start()
    loaded = kept.load_latest_checkpoint()
    assert loaded is not None
    assert torch.equal(loaded.model_state["w"], torch.zeros(3))


def test_a_failed_write_is_said_and_the_previous_one_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = GatedStorage(tmp_path)
    storage.gate.set()
    kept = CheckpointManager(CheckpointStore(storage), CheckpointStrategy(save_steps=1, save_best_only=True))
    kept.save_checkpoint(model=state(1), step=1, metrics={"val_loss": 0.5}, blocking=True)
    storage.broken = True
    kept.save_checkpoint(model=state(2), step=2, metrics={"val_loss": 0.1})
    with pytest.raises(CheckpointError, match="No space left"):
        kept.save_checkpoint(model=state(3), step=3)
    assert "checkpoint not saved" in capsys.readouterr().err
    kept.wait()  # said once
    storage.broken = False
    assert kept.load_latest_checkpoint().step == 1  # type: ignore[union-attr]
    assert kept.should_save_checkpoint(4, 0.3), "0.1 was never saved"
    kept.save_checkpoint(model=state(4), step=4, blocking=True)
    assert kept.load_latest_checkpoint().step == 4  # type: ignore[union-attr]
    storage.broken = True
    with pytest.raises(CheckpointError, match="No space left"):
        kept.save_checkpoint(model=state(5), step=5, blocking=True)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    kept = manager(tmp_path / "dir")
    with pytest.raises(CheckpointError, match=r"scheduler\.fn"):
        kept.save_checkpoint(model=state(1), scheduler={"fn": print}, step=1)
    assert not (tmp_path / "dir").exists()


def test_damaged_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with manager(tmp_path) as kept:
        for step, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
            kept.save_checkpoint(model=state(step), step=step, metrics={"val_loss": loss})
    for step in (2, 3):
        path = tmp_path / f"step-{step:06d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert kept.load_latest_checkpoint().step == 1  # type: ignore[union-attr]
    assert kept.load_best_checkpoint().step == 1  # type: ignore[union-attr]
    assert capsys.readouterr().err.count("checkpoint skipped") == 4
    with pytest.raises(CheckpointCorruptError, match=r"step-000003/model\.safetensors"):
        kept.load_checkpoint(3)
    assert [len(problems) for problems in kept.verify().values()] == [0, 1, 1]


def test_a_wrong_monitor_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with manager(tmp_path, monitor="val/acc") as kept:
        kept.save_checkpoint(model=state(1), step=1, metrics={"val_loss": 0.1})
        assert kept.load_best_checkpoint() is None
    assert "val/acc" in (said := capsys.readouterr().err)
    assert "val_loss" in said


def test_two_ranks(tmp_path: Path) -> None:
    managers = [
        CheckpointManager(CheckpointStore(Storage.open(tmp_path), "attempt-001"), rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    for rank, kept in enumerate(managers):
        kept.save_checkpoint(model=state(1), loader={"rank": rank}, step=7)
    for kept in managers:
        kept.wait()
    for rank, kept in enumerate(managers):
        loaded = kept.load_latest_checkpoint()
        assert loaded is not None
        assert loaded.objects["loader"] == {"rank": rank}
        assert torch.equal(loaded.model_state["w"], torch.ones(3))


@pytest.mark.parametrize("key", ["compression", "encryption"])
def test_what_this_version_cannot_do_is_refused(key: str) -> None:
    section = {"compression": "zstd", "encryption": {"key_command": "echo secret"}}
    with pytest.raises(ConfigError, match=f"{key} is set, but this version can't") as caught:
        create_checkpoint_manager({key: section[key]})
    assert "secret" not in str(caught.value)


def test_any_kind_of_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_TRACKING_STORAGE", raising=False)
    assert create_checkpoint_manager(None).store.storage.root == str(tmp_path / "runs" / "checkpoints")
    pydantic_like = SimpleNamespace(model_dump=lambda: {"save_steps": 3, "checkpoint_dir": str(tmp_path / "x")})
    made = create_checkpoint_manager(pydantic_like)
    assert made.strategy.save_steps == 3
    assert made.store.storage.root == str(tmp_path / "x")
    with pytest.raises(ConfigError, match="save_total_limit"):
        create_checkpoint_manager({"save_total_limit": 0})
    with pytest.raises(ConfigError, match="not a mapping"):
        create_checkpoint_manager([1])


SCRIPT = """
import sys, torch
from ray_tracking.checkpoint import create_checkpoint_manager
manager = create_checkpoint_manager({"checkpoint_dir": sys.argv[1], "save_total_limit": 5})
for step in range(1, 1000):
    manager.save_checkpoint(model={"w": torch.full((2000,), float(step))}, step=step)
    print(step, flush=True)
    if len(sys.argv) > 2 and step == int(sys.argv[2]):
        break
assert "ray" not in sys.modules
"""


def test_a_normal_exit_waits(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), "3"], check=True, cwd=root, stdout=subprocess.DEVNULL)
    assert [info.step for info in manager(tmp_path).list_checkpoints()] == [1, 2, 3]


def test_killed_for_real_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL in the middle of saves and retention: what was complete stays, all that is listed is whole."""
    reached = 0
    for after in (2, 5, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                process.kill()
                break
        process.stdout.close()
        process.wait()
        kept = manager(tmp_path)
        infos = kept.list_checkpoints()
        assert infos, "the saves before the last one had returned, so they were complete"
        assert all(problems == [] for problems in kept.verify().values())
        loaded = kept.load_latest_checkpoint()
        assert loaded is not None
        assert loaded.step >= after - 1
        assert torch.equal(loaded.model_state["w"], torch.full((2000,), float(loaded.step)))
        assert infos[-1].sequence > reached
        reached = infos[-1].sequence
