"""Training on a real Ray cluster: what is logged arrives everywhere, what dies goes on, what fails says why."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest

from ray_tracking import TrainingManager, get_config
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.errors import MetricError, NameRefusedError, RefusedError, RunFailedError, StorageError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking.cursor import Cursor
from tests import readback
from tests.runtime import functions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

EPOCHS = 4
STEPS = EPOCHS * 12  # 120 samples, 2 workers, batches of 5


def config(storage: Path, **overrides: Any) -> Any:
    return get_config(
        "testing",
        {
            "storage": str(storage),
            "name": "t",
            "params": {"epochs": EPOCHS, **overrides.pop("params", {})},
            "scaling.workers": 2,
            "training.default.save_steps": 5,
            "training.default.monitor": "val/loss",
            **overrides,
        },
    )


def reader(storage: Path, run_id: str) -> JournalReader:
    return JournalReader(RunStore(Storage.open(storage)).directory(run_id))


def points(storage: Path, run_id: str) -> list[readback.Point]:
    table = reader(storage, run_id).effective()
    return list(zip(*(table.column(name).to_pylist() for name in ("key", "step", "value")), strict=True))


def weights(storage: Path, run_id: str) -> str:
    texts = [r for r in reader(storage, run_id).effective_records() if r.kind is Kind.TEXT and r.key == "weights"]
    assert texts[-1].data is not None
    return texts[-1].data.decode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, Any]:
    """A run with all three backends that nothing happened to."""
    storage = tmp_path_factory.mktemp("whole")
    backends = {f"experiment_tracking.{name}.enabled": True for name in ("tensorboard", "wandb", "mlflow")}
    patient = {"experiment_tracking.delivery.final_secs": 60}
    return storage, TrainingManager(config(storage, **backends, **patient)).fit(functions.regression)


def test_curves_in_three_backends_equal_the_journal(whole: tuple[Path, Any]) -> None:
    storage, result = whole
    assert result.status == "completed"
    logged = points(storage, result.run_id)
    expected = {(f"train/m{i}", step, float(step * 10 + i)) for step in range(1, STEPS + 1) for i in range(9)}
    assert {point for point in logged if point[0].startswith("train/m")} == expected
    assert len(logged) == STEPS * 10 + EPOCHS
    cursors = {c.backend: c for c in Cursor.load_all(RunStore(Storage.open(storage)).directory(result.run_id))}
    shown = {
        "tensorboard": readback.tensorboard_points(cursors["tensorboard"].location),
        "wandb": readback.wandb_points(cursors["wandb"].location, cursors["wandb"].run_id),
        "mlflow": readback.mlflow_points(cursors["mlflow"].location, cursors["mlflow"].run_id),
    }
    for name, found in shown.items():
        assert len(found) == len(logged), name
        for (key, step, value), (other_key, other_step, other) in zip(sorted(logged), sorted(found), strict=True):
            assert (key, step) == (other_key, other_step), name
            assert math.isclose(value, other, rel_tol=1e-6), name  # TensorBoard keeps 32 bits
    assert all(backend["pending"] == 0 for backend in result.backends.values())


def test_the_result_says_what_there_is(whole: tuple[Path, Any]) -> None:
    storage, result = whole
    assert result.last_step == STEPS
    assert result.attempts == 1
    assert result.path == str(storage / result.run_id)
    assert result.latest_checkpoint.step == STEPS
    assert result.metrics["train/m0"] == {"last": STEPS * 10.0, "best": 10.0}
    steps = [info.step for info in CheckpointStore(Storage.open(result.path)).checkpoints()]
    assert len(steps) == 3, "save_total_limit"
    record = RunStore(Storage.open(storage)).load(result.run_id)
    assert record.status == "completed"
    assert [(a.number, a.resumed_from_step, a.reason) for a in record.attempts] == [(1, -1, "completed")]


def test_ray_knows_the_checkpoints(whole: tuple[Path, Any]) -> None:
    """They went through Ray's Checkpoint API: its own snapshot names them."""
    _, result = whole
    snapshot = json.loads((Path(result.path) / "attempt-001" / "checkpoint_manager_snapshot.json").read_text())
    assert f"step-{STEPS:06d}" in json.dumps(snapshot)


def test_a_completed_run_is_not_written_on(whole: tuple[Path, Any]) -> None:
    storage, result = whole
    with pytest.raises(RefusedError, match="is completed"):
        TrainingManager(config(storage), run_id=result.run_id).fit(functions.regression)


@pytest.mark.parametrize(
    ("how", "rank", "save_steps", "die_at", "resumed"),
    # Every step saved: far faster than Ray registers checkpoints, which must not hold back their writing.
    [("kill", 1, 1, 40, 39), pytest.param("raise", 0, 5, 19, 15, marks=pytest.mark.slow)],
)
def test_a_run_that_dies_goes_on_to_the_same_end(
    whole: tuple[Path, Any], tmp_path: Path, how: str, rank: int, save_steps: int, die_at: int, resumed: int
) -> None:
    """Killed in the middle of an epoch, between two checkpoints: same weights bit for bit, same curve."""
    params = {"die_at": die_at, "die_rank": rank, "how": how, "marker": str(tmp_path / "died")}
    settings = {"failure.max_failures": 1, "training.default.save_steps": save_steps}
    backends = {"experiment_tracking.tensorboard.enabled": True} if how == "kill" else {}
    result = TrainingManager(config(tmp_path, params=params, **settings, **backends)).fit(functions.regression)
    assert (tmp_path / "died").exists()
    assert result.attempts == 2
    record = RunStore(Storage.open(tmp_path)).load(result.run_id)
    assert record.attempts[1].resumed_from_step == resumed
    assert f"rank {rank}" in record.attempts[0].reason or how == "kill"
    storage, undisturbed = whole
    assert weights(tmp_path, result.run_id) == weights(storage, undisturbed.run_id)
    assert sorted(points(tmp_path, result.run_id)) == sorted(points(storage, undisturbed.run_id))
    assert b"hunter2" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    if backends:
        shown = readback.tensorboard_points(result.backends["tensorboard"]["location"])
        assert sorted((key, step) for key, step, _ in shown) == sorted(
            (key, step) for key, step, _ in points(storage, undisturbed.run_id)
        )


def test_a_failed_run_says_why_and_is_resumed(whole: tuple[Path, Any], tmp_path: Path) -> None:
    """The driver's way: fit failed, `resume` goes on from the last checkpoint, with what the storage knows alone."""
    params = {"die_at": 26, "how": "raise", "marker": str(tmp_path / "died")}
    manager = TrainingManager(config(tmp_path, params=params))
    with pytest.raises(RunFailedError, match=r"rank 0: .*a bug in the training function") as failure:
        manager.fit(functions.regression)
    assert "functions.py" in str(failure.value), "the user's own traceback"
    assert "hunter2" not in str(failure.value)
    store = RunStore(Storage.open(tmp_path))
    assert store.load(manager.run_id).status == "failed"
    result = TrainingManager.resume(manager.run_id, str(tmp_path))
    assert result.status == "completed"
    assert [a.resumed_from_step for a in store.load(manager.run_id).attempts] == [-1, 25]
    assert (tmp_path / manager.run_id / "attempt-002").is_dir()
    storage, undisturbed = whole
    assert weights(tmp_path, result.run_id) == weights(storage, undisturbed.run_id)
    assert sorted(points(tmp_path, result.run_id)) == sorted(points(storage, undisturbed.run_id))


def test_what_the_function_refuses_is_not_tried_again(tmp_path: Path) -> None:
    manager = TrainingManager(config(tmp_path, **{"failure.max_failures": 5}))
    with pytest.raises(UsageError, match=r"params\.width: found 'wide'"):
        manager.fit(functions.refuses)
    record = RunStore(Storage.open(tmp_path)).load(manager.run_id)
    assert (record.status, len(record.attempts)) == ("failed", 1)


def test_a_dead_mlflow_changes_nothing_but_its_own_cursor(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # free again once closed, so nothing listens there
    settings = {
        "experiment_tracking.mlflow": {"enabled": True, "tracking_uri": f"http://127.0.0.1:{port}"},
        "experiment_tracking.delivery.final_secs": 2,
    }
    result = TrainingManager(config(tmp_path, **settings)).fit(functions.regression)
    assert result.status == "completed"
    assert len(points(tmp_path, result.run_id)) == STEPS * 10 + EPOCHS
    mlflow = result.backends["mlflow"]
    assert mlflow["state"] == "pending"
    assert mlflow["pending"] > STEPS * 10
    assert str(port) in mlflow["error"] or "refused" in mlflow["error"].lower()


def test_every_kind_is_journaled_once_from_rank_0(tmp_path: Path) -> None:
    artifact = tmp_path / "note.txt"
    artifact.write_text("kept")
    result = TrainingManager(config(tmp_path, params={"artifact": str(artifact)})).fit(functions.logs_everything)
    records = [r for r in reader(tmp_path, result.run_id).read() if r.kind is not Kind.ATTEMPT]
    assert {(r.kind, r.key) for r in records} == {
        (Kind.SCALAR, "rank"),
        (Kind.RANK_SCALAR, "speed"),
        (Kind.SCALAR, "speed/mean"),
        (Kind.SCALAR, "speed/min"),
        (Kind.SCALAR, "speed/max"),
        (Kind.HISTOGRAM, "h"),
        (Kind.TEXT, "t"),
        (Kind.IMAGE, "i"),
        (Kind.ARTIFACT, "note.txt"),
        (Kind.PARAM, "extra"),
        (Kind.PARAM, "epochs"),
        (Kind.PARAM, "artifact"),
    }
    assert [r.value for r in records if r.key == "rank"] == [0.0]
    assert {(r.rank, r.value) for r in records if r.key == "speed"} == {(0, 10.0), (1, 20.0)}
    assert {r.key: r.value for r in records if "/" in r.key} == {
        "speed/mean": 15.0,
        "speed/min": 10.0,
        "speed/max": 20.0,
    }
    assert (tmp_path / result.run_id / "artifacts" / "note.txt").read_text() == "kept"


def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path) -> None:
    manager = TrainingManager(config(tmp_path))
    with pytest.raises(UsageError, match="not str"):
        manager.fit("functions:train")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="one argument"):
        manager.fit(functions.wrong_signature)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"64 workers need 64 CPU|The cluster can't hold"):
        TrainingManager(config(tmp_path, **{"scaling.workers": 64})).fit(functions.regression)
    with pytest.raises(UsageError, match="GPU"):
        TrainingManager(config(tmp_path, **{"scaling.use_gpu": True})).fit(functions.regression)
    with pytest.raises(NameRefusedError):
        TrainingManager(config(tmp_path), run_id="../x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        TrainingManager(config(tmp_path / "file" / "runs")).fit(functions.regression)
    assert not [entry for entry in Storage.open(tmp_path).list() if entry.is_dir], "nothing was begun"


def test_metric_error_names_the_key() -> None:
    from ray_tracking.tracking import values

    with pytest.raises(MetricError, match="'a/b' is no number: None"):
        values.scalars({"a": {"b": None}})
