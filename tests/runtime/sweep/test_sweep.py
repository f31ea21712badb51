"""Sweeps on a real Ray cluster: what fails does not stop them, what is killed goes on, nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_tracking import TrainingManager, get_config
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.errors import RefusedError, RunFailedError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.monitoring.sweep import sweep_view
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore, TrialStatus
from ray_tracking.runtime.sweep.result import SweepResult
from ray_tracking.runtime.sweep.resuming import resume_sweep
from ray_tracking.storage import Storage
from tests.monitoring.builder import RunBuilder
from tests.runtime.sweep import functions

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

HOW = ["ok", "raise", "ok", "kill", "ok", "nan", "ok", "ok"]


def config(storage: Path, sweep: dict[str, Any], **overrides: Any) -> Any:
    return get_config(
        "testing",
        {
            "storage": str(storage),
            "name": "valley",
            "training.default.save_on_epoch_end": True,
            "logging.level": "warning",
            "sweep": {"max_concurrent": 3, **sweep},
            **overrides,
        },
    )


_OF_THE_CLUSTER = ("_AutoscalingCoordinatorActor",)
"""Actors that Ray Train starts once for a cluster."""


def alive() -> set[str]:
    """Actors that live, and placement groups that are held."""
    from ray._private.state import actors

    table = ray.util.placement_group_table().items()
    return {f"placement group {name}" for name, group in table if group["state"] != "REMOVED"} | {
        f"{actor['ActorClassName']} {actor['ActorID']}"
        for actor in actors().values()
        if actor["State"] not in ("DEAD", 4) and actor["ActorClassName"] not in _OF_THE_CLUSTER
    }


def wait_until_gone(before: set[str]) -> None:
    end = time.monotonic() + 60
    while alive() - before and time.monotonic() < end:
        time.sleep(0.5)
    assert alive() - before == set()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> SweepResult:
    """Eight trials: one raises, one is killed, one comes to NaN."""
    storage = tmp_path_factory.mktemp("mixed")
    points = [{"x": round(0.1 * n, 1), "how": how, "pair": {"a": n, "b": 7}} for n, how in enumerate(HOW)]
    space = {"x": {"uniform": [0, 1]}, "how": {"choice": ["ok", "raise", "kill", "nan"]}}
    space |= {"pair": {"a": {"randint": [0, 9]}, "b": 7}}
    before = alive()
    made = config(
        storage,
        {"space": space, "points": points, "num_samples": 8, "keep_best_trials": 2},
        **{
            "experiment_tracking.tensorboard.enabled": True,
            "experiment_tracking.mlflow.enabled": True,
            "experiment_tracking.wandb.enabled": True,
            "experiment_tracking.delivery.final_secs": 60,
        },
    )
    result = TrainingManager(made, run_id="mixed").sweep(functions.valley)
    wait_until_gone(before)
    return result


def storage_of(result: SweepResult) -> Path:
    return Path(result.path).parent


def test_what_fails_is_recorded_with_its_reason_and_stops_nobody(mixed):
    assert [trial.status for trial in mixed.trials] == ["failed" if how != "ok" else "completed" for how in HOW]
    reasons = {how: trial.reason for how, trial in zip(HOW, mixed.trials, strict=True)}
    assert reasons["raise"].startswith("ValueError: no good, with password=")
    assert "hunter2" not in json.dumps([trial.reason for trial in mixed.trials])
    assert reasons["kill"] == "the worker process died: killed, out of memory, or crashed"
    assert reasons["nan"] == "diverged: val/loss is nan at step 4"
    assert mixed.status == "completed"


def test_the_best_is_the_lowest_of_those_that_did_not_fail(mixed):
    assert mixed.best is not None
    assert mixed.best.trial == 3  # x = 0.2, next to it 0.3 was killed
    assert mixed.best.value == pytest.approx(0.1 + 1 / 3)
    assert mixed.best.params == {"x": 0.2, "how": "ok", "pair": {"a": 2, "b": 7}}
    assert mixed.best.best_checkpoint is not None
    assert mixed.best.best_checkpoint.step == 6


def test_each_trial_is_a_run_of_its_own_in_the_folder_of_the_sweep(mixed):
    runs = RunStore(Storage.open(storage_of(mixed)))
    assert list(runs.ids()) == ["mixed"]
    assert {trial.run_id for trial in mixed.trials} == {f"mixed.trial-{n:03d}" for n in range(1, 9)}
    for trial in mixed.trials:
        record = runs.load(trial.run_id)
        assert record.status.value == ("failed" if trial.status == "failed" else "completed")
        assert {key: record.config["params"][key] for key in trial.params} == trial.params
        assert (record.monitor, record.mode) == ("val/loss", "min")
        table = JournalReader(runs.directory(trial.run_id)).effective()
        values = [value for key, value in zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True)
                  if key == "val/loss"]  # fmt: skip
        assert trial.metrics["val/loss"]["last"] == pytest.approx(values[-1], nan_ok=True)


def test_only_the_best_trials_keep_checkpoints(mixed):
    runs = RunStore(Storage.open(storage_of(mixed)))
    kept = {trial.trial for trial in mixed.trials if CheckpointStore(runs.directory(trial.run_id)).checkpoints()}
    assert kept == {3, 5}


def test_mlflow_has_one_parent_and_its_children_with_params_and_metrics(mixed):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{storage_of(mixed)}/mlflow.db")
    experiment = client.get_experiment_by_name("valley")
    assert experiment is not None
    found = {run.data.tags["ray_tracking.run_id"]: run for run in client.search_runs([experiment.experiment_id])}
    parent = found.pop("mixed")
    assert parent.info.status == "FINISHED"
    assert set(found) == {trial.run_id for trial in mixed.trials}
    for trial in mixed.trials:
        run = found[trial.run_id]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params["x"] == str(trial.params["x"])
        assert run.data.metrics["epoch"] == trial.metrics["epoch"]["last"]
    history = client.get_metric_history(parent.info.run_id, "val/loss")
    assert len(history) == sum(trial.value is not None for trial in mixed.trials)


def test_tensorboard_shows_the_trials_params_and_ends(mixed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    best = storage_of(mixed) / "tensorboard" / "mixed" / "mixed.trial-003"
    events = EventAccumulator(str(best))
    events.Reload()
    plugin = events.PluginTagToContent("hparams")
    started = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    ended = metadata.parse_session_end_info_plugin_data(plugin[metadata.SESSION_END_INFO_TAG])
    assert started.hparams["x"].number_value == 0.2
    assert ended.status == 1  # success


def test_wandb_groups_the_trials(mixed):
    files = list((storage_of(mixed) / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem.removeprefix("run-") for file in files} >= {f"mixed.trial-{n:03d}" for n in (1, 3, 5)}
    assert all(b"mixed" in file.read_bytes() for file in files)


def test_it_reads_well(mixed):
    runs = RunStore(Storage.open(storage_of(mixed)))
    view = sweep_view(runs, "mixed", time.time())
    document = json.loads(json.dumps(view.to_json()))
    assert [trial["trial"] for trial in document["trials"]] == list(range(1, 9))
    assert set(document["trials"][0]) >= {"trial", "run_id", "status", "reason", "params", "metrics"}
    assert document["best"]["run_id"] == "mixed.trial-003"
    assert document["ranking"][:3] == [3, 5, 1]
    assert document["status"] == "completed"


def test_a_completed_sweep_and_a_single_trial_are_not_resumed(mixed):
    runs = RunStore(Storage.open(storage_of(mixed)))
    with pytest.raises(RefusedError, match="completed"):
        resume_sweep(runs, "mixed", train=functions.valley)
    with pytest.raises(UsageError, match="resume mixed"):
        TrainingManager.resume("mixed.trial-002", str(storage_of(mixed)))


def test_asha_and_a_plateau_end_trials_early_and_say_so(tmp_path):
    points = [{"x": x} for x in (0.3, 0.9, 0.8)]
    result = TrainingManager(
        config(
            tmp_path,
            {
                "space": {"x": {"uniform": [0, 1]}},
                "points": points,
                "num_samples": 3,
                "max_concurrent": 1,
                "scheduler": "asha",
                "stop": {"plateau_reports": 2, "plateau_min_delta": 0.2},
            },
            params={"epochs": 6, "bulk": 100_000_000},
        ),
        run_id="early",
    ).sweep(functions.valley)
    assert [trial.status for trial in result.trials] == ["stopped"] * 3
    assert result.trials[0].reason == "stopped: no better in 2 reports"
    assert [trial.reason for trial in result.trials[1:]] == ["stopped by asha after 1 report"] * 2
    assert result.best is not None
    assert result.best.trial == 1
    checkpoints = CheckpointStore(RunStore(Storage.open(tmp_path)).directory(result.trials[0].run_id))
    assert [found.reason for found in checkpoints.scan() if found.info is None] == []
    assert checkpoints.checkpoints()[-1].step == 10  # being written when the sixth report ended the trial


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_hanging_trial_is_ended_and_a_sweep_without_a_value_fails(tmp_path, workers):
    before = alive()
    manager = TrainingManager(
        config(
            tmp_path,
            {"space": {"x": {"choice": [0.5]}}, "num_samples": 1, "hang_secs": 20, "metric": "other"},
            **{"scaling.workers": workers},
            params={"how": "hang", "epochs": 2},
        ),
        run_id="hanging",
    )
    with pytest.raises(RunFailedError, match="trial 1: hung: no step further for 20 s"):
        manager.sweep(functions.valley)
    wait_until_gone(before)


def test_what_can_not_be_is_refused_before_anything_starts(tmp_path):
    space = {"x": {"uniform": [0, 1]}}
    with pytest.raises(UsageError, match="cluster can't hold"):
        TrainingManager(
            config(tmp_path, {"space": space}, **{"scaling.resources_per_worker": {"CPU": 64}}), run_id="a"
        ).sweep(functions.valley)
    with pytest.raises(UsageError, match="no sweep section"):
        TrainingManager(get_config("testing", {"storage": str(tmp_path)}), run_id="b").sweep(functions.valley)


@pytest.mark.parametrize("trials", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_a_sweep_whose_driver_was_killed_goes_on(tmp_path, trials):
    """After the fourth trial: none runs twice from its start, none is missing, points and ranking are the same."""
    started = tmp_path / "started"
    search = {"space": {"x": {"uniform": [0, 1]}}, "num_samples": trials, "max_concurrent": 2, "seed": 5}
    plain = {"name": "valley", "storage": str(tmp_path / "runs"), "sweep": search, "failure": {"lease_secs": 10}}
    plain |= {"params": {"started": str(started), "pause": 0.3}, "training": {"default": {"save_on_epoch_end": True}}}
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(plain))
    command = [sys.executable, "-m", "ray_tracking", "sweep", "tests.runtime.sweep.functions:valley", "-c", str(file)]
    address = ray.get_runtime_context().gcs_address
    others = alive()
    driver = subprocess.Popen(
        [*command, "--env", "testing", "--run-id", "killed", "--address", address],
        start_new_session=True,
        env={**os.environ, "RAY_AUTH_MODE": "token"},  # that of the cluster of the tests, in their own HOME
    )
    runs = RunStore(Storage.open(tmp_path / "runs"))
    store = SweepStore(runs, "killed")
    end = time.monotonic() + 240
    try:
        while time.monotonic() < end and driver.poll() is None:
            if runs.storage.exists("killed") and sum(trial.status.is_over for trial in store.load()) >= 4:
                break
            time.sleep(0.2)
        assert driver.poll() is None, "the sweep ended before it could be killed"
    finally:
        driver.kill()
        driver.wait()
    wait_until_gone(others)  # until then a trial may still begin, or end
    before = {trial.number: trial for trial in store.load()}
    assert 4 <= sum(trial.status.is_over for trial in before.values()) < trials
    begun = {line.split()[0] for line in started.read_text().splitlines()}
    under_way = {n for n, t in before.items() if not t.status.is_over and repr(t.params["x"]) in begun}
    saved = {n for n in under_way if CheckpointStore(runs.directory(store.run_id(n))).checkpoints()}

    result = resume_sweep(runs, "killed", train=functions.valley)
    assert [trial.status for trial in result.trials] == ["completed"] * trials
    short = {"params.epochs": 1} if trials == 8 else {}
    whole = TrainingManager(config(tmp_path / "whole", search, **short), run_id="w").sweep(functions.valley)
    assert [trial.params for trial in result.trials] == [trial.params for trial in whole.trials]
    assert [trial.value for trial in result.trials] == [trial.value for trial in whole.trials] or short
    for number, trial in before.items():
        if trial.status is TrialStatus.COMPLETED:
            assert result.trials[number - 1].value == trial.value
    starts = [tuple(line.split()) for line in started.read_text().splitlines()]
    for trial in result.trials:
        steps = [step for x, step in starts if x == repr(trial.params["x"])]
        assert steps[0] == "0"
        assert len(steps) == (2 if trial.trial in under_way else 1)
        assert all(step != "0" for step in steps[1:] if trial.trial in saved), "run twice from its start"


def test_a_run_is_no_sweep_and_a_sweep_no_run(tmp_path):
    """Nothing is written into the one by who takes it for the other."""
    one = config(tmp_path, {"space": {"x": {"uniform": [0, 1]}}, "metric": "loss"})
    RunBuilder(RunStore(Storage.open(tmp_path)), "plain")
    with pytest.raises(RefusedError, match="is a run"):
        TrainingManager(one, run_id="plain").sweep(functions.valley)
    RunBuilder(RunStore(Storage.open(tmp_path)), "many")
    SweepStore(RunStore(Storage.open(tmp_path)), "many").create("loss", "min", {})
    with pytest.raises(RefusedError, match="is a sweep"):
        TrainingManager(one, run_id="many").fit(functions.valley)
