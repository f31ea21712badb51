"""Checkpoints of runs on Ray: at another number of workers, sealed, after an exception, in time before a preemption."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_tracking import TrainingManager, get_config
from ray_tracking.checkpoint import CheckpointInfo, CheckpointStore
from ray_tracking.checkpoint.keys import Keyring, generate_key
from ray_tracking.errors import ConfigError, RunFailedError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking.cursor import Cursor
from tests import readback
from tests.runtime import functions
from tests.s3 import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def config(folder: Path, workers: int, params: dict[str, Any], **overrides: Any) -> Any:
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    settings = {
        "storage": str(folder),
        "name": "c",
        "params": {"epochs": 2, "notes": str(notes), **params},
        "scaling.workers": workers,
        "failure.max_failures": 0,
        "training.default.save_steps": 4,
        "training.default.save_total_limit": None,
    }
    return get_config("testing", {**settings, **overrides})


def checkpoints(path: str, **options: Any) -> list[CheckpointInfo]:
    return CheckpointStore(Storage.open(path), **options).checkpoints()


def given(storage: Path, run_id: str) -> dict[int, Counter[int]]:
    """By epoch, how often each sample was given in what counts: steps that no later attempt took back."""
    lines = [json.loads(line) for path in (storage / "notes").iterdir() for line in path.read_text().splitlines()]
    attempts = RunStore(Storage.open(storage)).load(run_id).attempts
    epochs: dict[int, Counter[int]] = {}
    for line in lines:
        later = [attempt.resumed_from_step for attempt in attempts if attempt.number > line["attempt"]]
        if all(line["step"] <= step for step in later if step is not None):
            epochs.setdefault(line["epoch"], Counter()).update(line["indices"])
    return epochs


@pytest.mark.slow
def test_from_two_workers_to_one_and_to_four(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every sample of an epoch exactly once, whatever the number of workers that shared it."""
    manager = TrainingManager(config(tmp_path, 2, {"stop_in_step": 7}))
    with pytest.raises(RunFailedError, match="no further"):
        manager.fit(functions.counts_samples)
    assert [info.step for info in checkpoints(str(tmp_path / manager.run_id))] == [4], "step 7 was not whole"
    params = {"stop_after_epoch_in": [2]}
    with pytest.raises(RunFailedError):
        TrainingManager(config(tmp_path, 1, params), run_id=manager.run_id).fit(functions.counts_samples)
    result = TrainingManager(config(tmp_path, 4, params), run_id=manager.run_id).fit(functions.counts_samples)
    infos = checkpoints(result.path)
    assert [info.world_size for info in infos if info.attempt == 1] == [2]
    assert {info.world_size for info in infos if info.attempt == 2} == {1}
    assert {info.world_size for info in infos if info.attempt == 3} == {4}
    resumed = [attempt.resumed_from_step for attempt in RunStore(Storage.open(tmp_path)).load(result.run_id).attempts]
    # 40 of 120 samples by step 4; the other 80 in 16 steps of one worker; then the exception after the epoch.
    assert resumed == [-1, 4, 20]
    assert infos[-1].step == 20 + 6
    assert given(tmp_path, result.run_id) == {epoch: Counter(dict.fromkeys(range(120), 1)) for epoch in (0, 1)}
    assert "another world size" in capfd.readouterr().err


def test_sealed_and_saved_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encrypted and compressed on Ray; told of a preemption, a run saves at once, and once."""
    monkeypatch.setenv("CHECKPOINT_KEY", generate_key())
    sealed = {
        "training.default.encryption": {"key_env": "CHECKPOINT_KEY"},
        "training.default.compression": "zstd",
        "training.default.save_steps": None,
        "training.default.save_at_end": False,
    }
    params = {"epochs": 1, "preempted_in": 1, "slow": True}
    result = TrainingManager(config(tmp_path, 1, params, **sealed)).fit(functions.counts_samples)
    (info,) = checkpoints(result.path)
    assert info.reason == "preemption"
    assert 3 <= info.step < 24
    keyring = Keyring.from_config({"key_env": "CHECKPOINT_KEY"})
    store = CheckpointStore(Storage.open(result.path), keyring=keyring)
    assert store.verify(info) == []
    assert store.load(info).model_state["weight"].shape == (1, 6)
    names = {path.name for path in (Path(result.path) / info.folder).iterdir()}
    assert names == {"model.safetensors.enc", "state-00000.safetensors.enc", "state-00000.json.enc"} | {
        "rank-00000-of-00001.json"
    }
    key = os.environ["CHECKPOINT_KEY"].encode()
    assert not any(key in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_damaged_checkpoint_on_resume_leaves_one_curve(tmp_path: Path) -> None:
    """The newest is damaged, the one before it is used: every backend shows each step once."""
    backends = {f"experiment_tracking.{name}.enabled": True for name in ("tensorboard", "wandb", "mlflow")}
    params = {"die_at": 14, "how": "raise", "marker": str(tmp_path / "died")}
    manager = TrainingManager(config(tmp_path, 1, {**params, "epochs": 1}, **backends))
    with pytest.raises(RunFailedError):
        manager.fit(functions.regression)
    steps = [info.step for info in checkpoints(str(tmp_path / manager.run_id))]
    assert steps == [4, 8, 12, 14], "the last one after the exception"
    for step in (12, 14):
        path = tmp_path / manager.run_id / "attempt-001" / f"step-{step:06d}" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    result = TrainingManager.resume(manager.run_id, str(tmp_path))
    assert RunStore(Storage.open(tmp_path)).load(result.run_id).attempts[1].resumed_from_step == 8
    history = JournalReader(Storage.open(result.path)).effective()
    logged = sorted(zip(history["key"].to_pylist(), history["step"].to_pylist(), strict=True))
    assert [step for key, step in logged if key == "train/loss"] == list(range(1, 25))
    cursors = {cursor.backend: cursor for cursor in Cursor.load_all(Storage.open(result.path))}
    shown = {
        "tensorboard": readback.tensorboard_points(cursors["tensorboard"].location),
        "wandb": readback.wandb_points(cursors["wandb"].location, cursors["wandb"].run_id),
        "mlflow": readback.mlflow_points(cursors["mlflow"].location, cursors["mlflow"].run_id),
    }
    for name, points in shown.items():
        assert sorted((key, step) for key, step, _ in points) == logged, name


@pytest.mark.slow
def test_sharded_by_fsdp(tmp_path: Path) -> None:
    """Each rank stores its shard; after a failure training goes on to the same end, bit for bit."""
    params = {"parallel": "fsdp", "marker": str(tmp_path / "died"), "how": "raise"}
    undisturbed = TrainingManager(config(tmp_path, 2, params)).fit(functions.regression)
    settings = {"failure.max_failures": 1}
    failing = TrainingManager(config(tmp_path, 2, {**params, "die_at": 10}, **settings)).fit(functions.regression)
    attempts = RunStore(Storage.open(tmp_path)).load(failing.run_id).attempts
    assert [attempt.resumed_from_step for attempt in attempts] == [-1, 8]
    stores = [CheckpointStore(Storage.open(result.path)) for result in (undisturbed, failing)]
    ends = [store.checkpoints()[-1] for store in stores]
    assert [info.step for info in ends] == [24, 24]
    one, other = (store.load(info).model_state for store, info in zip(stores, ends, strict=True))
    assert one["0.weight"].shape == (8, 6)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_whole_run_on_s3(tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journal, checkpoints and Ray's own run directory on a real S3 server; a worker dies and training goes on."""
    monkeypatch.chdir(tmp_path)
    params = {"epochs": 2, "die_at": 9, "how": "kill", "marker": str(tmp_path / "died")}
    settings = {"storage": s3_uri, "failure.max_failures": 1, "training.default.save_total_limit": 2}
    result = TrainingManager(config(tmp_path, 2, params, **settings)).fit(functions.regression)
    assert result.status == "completed"
    assert result.attempts == 2
    storage = Storage.open(s3_uri)
    assert RunStore(storage).load(result.run_id).attempts[1].resumed_from_step == 8
    store = CheckpointStore(storage.child(result.run_id))
    assert [info.step for info in store.checkpoints()] == [20, 24]
    assert [store.verify(info) for info in store.checkpoints()] == [[], []]
    history = JournalReader(storage.child(result.run_id)).effective()
    assert history.num_rows == 24 * 10 + 2
    assert not (tmp_path / result.run_id).exists()


def test_a_key_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    sealed = {"training.default.encryption": {"key_env": "NO_SUCH_VARIABLE"}}
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        TrainingManager(config(tmp_path, 1, {}, **sealed)).fit(functions.counts_samples)
    assert not list(tmp_path.glob("c-*"))


@pytest.mark.slow
def test_only_the_best_and_a_point_to_resume_from(tmp_path: Path) -> None:
    """save_best_only on Ray: what is no improvement is saved to resume from, and gone with the next save."""
    rules = {
        "training.default.save_best_only": True,
        "training.default.save_steps": 6,
        "training.default.monitor": "val/loss",
        "training.default.save_total_limit": 5,
    }
    result = TrainingManager(config(tmp_path, 2, {"epochs": 3}, **rules)).fit(functions.worsens)
    infos = checkpoints(result.path)
    assert [(info.step, info.improved) for info in infos] == [(12, True), (36, False)]
    assert infos[-1].reason.endswith("resume point")
    assert result.best_checkpoint is not None
    assert result.best_checkpoint.step == 12
    assert torch.is_tensor(CheckpointStore(Storage.open(result.path)).load(infos[-1]).model_state["weight"])
