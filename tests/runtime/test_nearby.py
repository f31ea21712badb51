"""A worker that dies is started again from the copies in its node's memory; the storage has nothing else to give."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ray_tracking import Run, TrainingManager, get_config
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint.nearby_folders import leftovers, of_run
from ray_tracking.errors import RunFailedError
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from tests.runtime.functions import data
from tests.s3 import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SAVED, DIES = 8, 9


def dies_with_its_storage(run: Run) -> None:
    """Dies after step 9. Before it does, the files of the checkpoint of step 8 are overwritten on storage."""
    torch.manual_seed(0)
    model = run.prepare(nn.Linear(6, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = run.loader(data(), batch_size=5)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(1):
        for x, y in run.steps(loader):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log_metrics({"train/loss": loss})
            if run.attempt == 1 and run.step == DIES and run.rank == 0:
                spoil_storage(run)
                os.kill(os.getpid(), signal.SIGKILL)


def spoil_storage(run: Run) -> None:
    store = CheckpointStore(Storage.open(run.config.storage).child(run.params["run_id"]))
    folder = f"attempt-001/step-{SAVED:06d}"
    end = time.monotonic() + 60
    while (info := store.inspect(folder).info) is None and time.monotonic() < end:
        time.sleep(0.05)
    assert info is not None
    time.sleep(0.5)  # the copy of the manifest comes after the manifest; here it would only be tidier
    for manifest in info.manifests:
        for name, entry in manifest.files.items():
            store.storage.write_bytes(f"{folder}/{name}", bytes(entry.size))


def settings(storage: str, run_id: str, memory_copy: str, **more: object) -> object:
    return get_config(
        "testing",
        {
            "storage": storage,
            "params": {"run_id": run_id},
            "scaling.workers": 2,
            "failure.max_failures": 1,
            "training.default.save_steps": 4,
            "training.default.save_at_end": False,
            "training.default.memory_copy": memory_copy,
            "logging.level": "info",
            **more,
        },
    )


@pytest.mark.parametrize("where", [pytest.param("a folder", marks=pytest.mark.slow), "S3"])
def test_a_killed_worker_restores_from_memory(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    storage, choice = (str(tmp_path), "on") if where == "a folder" else (request.getfixturevalue("s3_uri"), "auto")
    run_id = f"nearby-{os.getpid()}-{choice}"
    config = settings(storage, run_id, choice)
    result = TrainingManager(config, run_id=run_id).fit(dies_with_its_storage)  # type: ignore[arg-type]
    assert (result.status, result.attempts, result.last_step) == ("completed", 2, 12)
    record = RunStore(Storage.open(storage)).load(run_id)
    assert record.attempts[1].resumed_from_step == SAVED
    said, end = "", time.monotonic() + 60
    while "read from this node's memory" not in said and time.monotonic() < end:  # Ray forwards it by and by
        said += capfd.readouterr().err
        time.sleep(0.1)
    read = re.findall(r"read from this node's memory .*bytes=(\d+) of=(\d+)", said)
    assert read, said
    # On one rank or both, whose lines Ray may show as one. That both have restored it, the step says.
    assert all(0 < int(part) <= int(whole) for part, whole in read)
    directory = RunStore(Storage.open(storage)).directory(run_id)
    assert of_run(directory) not in [each.path for each in leftovers()]


def test_a_run_that_fails_leaves_nothing_in_memory(tmp_path: Path) -> None:
    run_id = f"nearby-{os.getpid()}-fails"
    config = settings(str(tmp_path), run_id, "on", **{"failure.max_failures": 0, "scaling.workers": 1})
    with pytest.raises(RunFailedError):
        TrainingManager(config, run_id=run_id).fit(dies_with_its_storage)  # type: ignore[arg-type]
    directory = RunStore(Storage.open(tmp_path)).directory(run_id)
    assert of_run(directory) not in [each.path for each in leftovers()]
