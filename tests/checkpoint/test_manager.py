from __future__ import annotations

import base64
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ray_tracking.checkpoint.keys import generate_key
from ray_tracking.checkpoint.loaded import TrainingCheckpoint
from ray_tracking.checkpoint.manager import CheckpointManager, create_checkpoint_manager
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.checkpoint.writer import WriterOptions
from ray_tracking.errors import CheckpointCorruptError, CheckpointError, ConfigError, RefusedError, UsageError
from ray_tracking.storage import Storage
from tests.tracking.fakes import wait_until


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
    monkeypatch.setattr("ray_tracking.checkpoint.manager.time", SimpleNamespace(monotonic=lambda: now))
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


def writer_pid(kept: CheckpointManager) -> int:
    process = kept._writer._process
    assert process is not None
    return process.pid


def block(root: Path) -> None:
    """From now on nothing can be written below `root`: for root too, whom permissions do not stop."""
    root.rename(root.with_name("away"))
    root.write_bytes(b"a file where a folder should be")


def unblock(root: Path) -> None:
    root.unlink()
    root.with_name("away").rename(root)


def test_returns_once_copied_and_loading_waits(tmp_path: Path) -> None:
    with manager(tmp_path) as kept:
        kept.save_checkpoint(model=state(9), step=1, blocking=True)
        os.kill(writer_pid(kept), signal.SIGSTOP)
        weights = torch.zeros(3)
        kept.save_checkpoint(model={"w": weights}, step=2)
        weights.fill_(7)  # the training goes on while the write has not even begun
        assert [info.step for info in CheckpointStore(Storage.open(tmp_path)).checkpoints()] == [1]
        threading.Timer(0.2, os.kill, (writer_pid(kept), signal.SIGCONT)).start()
        loaded = kept.load_latest_checkpoint()
        assert loaded is not None
        assert loaded.step == 2
        assert torch.equal(loaded.model_state["w"], torch.zeros(3))


@pytest.mark.parametrize("when_busy", ["wait", "skip", "queue"])
def test_saves_that_come_faster_than_they_are_written(
    tmp_path: Path, when_busy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(Storage.open(tmp_path))
    options = WriterOptions(when_busy=when_busy)
    with CheckpointManager(store, CheckpointStrategy(save_total_limit=None), options=options) as kept:
        kept.save_checkpoint(model=state(1), step=1, blocking=True)
        pid = writer_pid(kept)
        os.kill(pid, signal.SIGSTOP)
        paths: list[str | None] = []
        done_before: list[int] = []

        def free() -> None:
            done_before.append(len(paths))
            os.kill(pid, signal.SIGCONT)

        freed = threading.Timer(0.5 if when_busy == "wait" else 60.0, free)
        freed.start()
        for step in range(2, 6):
            paths.append(kept.save_checkpoint(model=state(step), step=step))
        if when_busy != "wait":
            freed.cancel()
            free()
        freed.join()
    saved = [info.step for info in store.checkpoints()]
    if when_busy == "skip":
        assert saved == [1, 2, 3]
        assert [path is None for path in paths] == [False, False, True, True]
        assert capsys.readouterr().err.count("checkpoint skipped") == 2
    else:
        assert saved == [1, 2, 3, 4, 5]
    assert done_before[0] <= 2 if when_busy == "wait" else done_before == [4]
    assert all(torch.equal(store.load(info).model_state["w"], state(info.step)["w"]) for info in store.checkpoints())


def test_a_writer_that_dies_is_started_again_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with manager(tmp_path) as kept:
        kept.save_checkpoint(model=state(1), step=1, blocking=True)
        os.kill(writer_pid(kept), signal.SIGSTOP)
        kept.save_checkpoint(model=state(2), step=2)
        asked = kept._writer._process._answers  # type: ignore[union-attr]
        wait_until(lambda: ("number", 2) in asked, 60)
        os.kill(writer_pid(kept), signal.SIGKILL)
        kept.wait()
        assert kept.load_latest_checkpoint().step == 2  # type: ignore[union-attr]
    assert "starting it again" in capsys.readouterr().err


def test_an_overdue_save_is_written_by_the_thread_that_hurries(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the writing thread held up for good, only the other one can finish."""
    code = (
        "import sys, threading; sys.path[:] = {path!r}\n"
        "from ray_tracking.checkpoint import writer_process\n"
        "drive = writer_process._Job.drive\n"
        "held = lambda self, hurry=False: drive(self, hurry=True) if hurry else self._written.wait()\n"
        "writer_process._Job.drive = held\n"
        "writer_process.main()"
    )
    store = CheckpointStore(Storage.open(tmp_path))
    with pytest.MonkeyPatch.context() as patched:
        real = subprocess.Popen

        def popen(command: list[str], **options: Any) -> Any:
            return real([command[0], "-c", code.format(path=sys.path), command[3]], **options)

        patched.setattr("ray_tracking.checkpoint.writer_handle.subprocess.Popen", popen)
        with CheckpointManager(store, options=WriterOptions(deadline=0.2)) as kept:
            kept.save_checkpoint(model=state(1), step=1)
    assert [info.step for info in store.checkpoints()] == [1]
    assert "overdue" in capfd.readouterr().err


def test_a_failed_write_is_said_and_the_previous_one_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    kept = manager(root, save_steps=1, save_best_only=True)
    kept.save_checkpoint(model=state(1), step=1, metrics={"val_loss": 0.5}, blocking=True)
    os.kill(writer_pid(kept), signal.SIGSTOP)
    kept.save_checkpoint(model=state(2), step=2, metrics={"val_loss": 0.1})
    block(root)
    os.kill(writer_pid(kept), signal.SIGCONT)
    with pytest.raises(CheckpointError, match="Not a directory"):
        kept.wait()
    assert "checkpoint not saved" in capsys.readouterr().err
    assert kept.failed == 1
    kept.wait()  # said once
    unblock(root)
    assert kept.load_latest_checkpoint().step == 1  # type: ignore[union-attr]
    assert kept.should_save_checkpoint(4, 0.3), "0.1 was never saved"
    kept.save_checkpoint(model=state(4), step=4, blocking=True)
    assert kept.load_latest_checkpoint().step == 4  # type: ignore[union-attr]
    kept.close()


@pytest.mark.parametrize("fail", [False, True])
def test_a_failure_stops_a_script_only_if_it_is_told_to(tmp_path: Path, fail: bool) -> None:
    root = tmp_path / "root"
    kept = CheckpointManager(CheckpointStore(Storage.open(root)), fail_on_error=fail)
    kept.save_checkpoint(model=state(1), step=1, blocking=True)
    os.kill(writer_pid(kept), signal.SIGSTOP)
    kept.save_checkpoint(model=state(2), step=2)
    block(root)
    os.kill(writer_pid(kept), signal.SIGCONT)
    kept._written[0][1].exception()
    unblock(root)
    if fail:
        with pytest.raises(CheckpointError, match="Not a directory"):
            kept.save_checkpoint(model=state(3), step=3)
    kept.save_checkpoint(model=state(4), step=4, blocking=fail)
    kept._settle(wait=True)
    assert kept.load_latest_checkpoint().step == 4  # type: ignore[union-attr]
    kept._writer.close()


def test_memory_is_provided_before_the_first_save(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    with manager(tmp_path) as kept:
        for _ in range(2):
            assert kept._writer._preparing is None
            model(torch.randn(2, 64)).sum().backward()
            optimizer.step()
        assert kept._writer._preparing is not None
        kept._writer._preparing.join()
        prepared = [buffer.arena for buffer in kept._writer._buffers]
        assert len(prepared) == 2
        kept.save_checkpoint(model=model, optimizer=optimizer, step=1, blocking=True)
        assert [buffer.arena for buffer in kept._writer._buffers] == prepared, "they are large enough"


def test_no_process_and_no_memory_is_left(tmp_path: Path) -> None:
    def mappings() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("ray-tracking-checkpoint")

    before = mappings()
    with manager(tmp_path) as kept:
        kept.save_checkpoint(model={"w": torch.zeros(1 << 20)}, step=1)
        kept.wait()
        pid = writer_pid(kept)
    assert not Path(f"/proc/{pid}").exists()
    del kept
    assert mappings() <= before, "what other tests left may go meanwhile"


def test_pin_and_unpin(tmp_path: Path) -> None:
    with manager(tmp_path, save_total_limit=1) as kept:
        kept.save_checkpoint(model=state(1), step=1)
        kept.pin(1)
        for step in (2, 3):
            kept.save_checkpoint(model=state(step), step=step)
        assert [info.step for info in kept.list_checkpoints()] == [1, 3]
        kept.unpin(1)
        kept.save_checkpoint(model=state(4), step=4)
        assert [info.step for info in kept.list_checkpoints()] == [4]
        with pytest.raises(CheckpointError, match=r"step 7\.(.|\n)*There are: 4"):
            kept.pin(7)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None) -> None:
    key, other = generate_key(), generate_key()
    monkeypatch.setenv("CHECKPOINT_KEY", key)
    section = {"checkpoint_dir": str(tmp_path), "compression": compression, "encryption": {"key_env": "CHECKPOINT_KEY"}}
    with create_checkpoint_manager(section) as kept:
        kept.save_checkpoint(model={"w": torch.arange(1e5)}, note={"text": "the secret of the state"}, step=1)
        loaded = kept.load_latest_checkpoint()
        assert loaded is not None
        assert torch.equal(loaded.model_state["w"], torch.arange(1e5))
        assert loaded.objects["note"] == {"text": "the secret of the state"}
        assert kept.verify() == {1: []}
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert sorted(path.suffix for path in (tmp_path / "step-000001").iterdir()) == [".enc", ".enc", ".enc", ".json"]
    assert b"secret of the state" not in stored
    assert key.encode() not in stored
    assert base64.b64decode(key) not in stored
    monkeypatch.setenv("CHECKPOINT_KEY", other)
    with create_checkpoint_manager(section) as kept, pytest.raises(RefusedError, match="encrypted for key"):
        kept.load_latest_checkpoint()
    monkeypatch.setenv("OLD_KEY", key)
    section["encryption"] = {"key_env": "CHECKPOINT_KEY", "old_keys": [{"key_env": "OLD_KEY"}]}
    with create_checkpoint_manager(section) as kept:
        assert kept.load_latest_checkpoint().step == 1  # type: ignore[union-attr]
        kept.save_checkpoint(model=state(2), step=2)
        assert kept.load_latest_checkpoint().step == 2  # type: ignore[union-attr]


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
    for after in (3, 5, 9):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == after:
                process.kill()
                break
        process.communicate(timeout=120)  # until its writer has ended too, which has the same stderr
        kept = manager(tmp_path)
        infos = kept.list_checkpoints()
        assert infos, "at most two copies wait to be written, so the saves before them were complete"
        assert all(problems == [] for problems in kept.verify().values())
        loaded = kept.load_latest_checkpoint()
        assert loaded is not None
        assert loaded.step >= after - 2
        assert torch.equal(loaded.model_state["w"], torch.full((2000,), float(loaded.step)))
        assert infos[-1].sequence > reached
        reached = infos[-1].sequence
