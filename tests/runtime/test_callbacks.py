"""What stands in the place of two of Ray Train's callbacks. Without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.data_integration.interfaces import DatasetShardMetadata

from ray_tracking.errors import UsageError
from ray_tracking.runtime.callbacks import as_runs_need_them


class Killed(Backend):
    """One of whose workers Ray has ended for want of memory."""

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")


class KilledConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return Killed


TRAINER = SimpleNamespace(train_run_context=SimpleNamespace(dataset_config=None), backend_config=KilledConfig())


def test_others_stay_as_they_are() -> None:
    other = WorkingDirectorySetupCallback()
    assert as_runs_need_them([other], TRAINER) == [other]


def test_there_is_no_dataset_manager_and_asking_for_a_shard_says_what_to_do() -> None:
    (callback,) = as_runs_need_them([DatasetsCallback(TRAINER.train_run_context, {})], TRAINER)
    assert isinstance(callback, DatasetsCallback), "the DataContext is still handed on"
    providers = callback.before_init_train_context([object(), object()])["dataset_shard_provider"]
    assert len(providers) == 2
    with pytest.raises(UsageError, match=r"no dataset 'train'.*\n.*run\.loader"):
        providers[0].get_dataset_shard(DatasetShardMetadata("train", world_rank=0))
    callback.after_worker_group_shutdown(None)  # what Ray calls at the end of each group
    callback.after_worker_group_abort(None)


def test_a_group_with_a_worker_that_was_short_of_memory_can_be_ended() -> None:
    rays = BackendSetupCallback(TRAINER.backend_config)
    with pytest.raises(OutOfMemoryError):  # or ours is not needed any more
        rays.before_execution_group_shutdown(None)
    (ours,) = as_runs_need_them([rays], TRAINER)
    ours.before_execution_group_shutdown(None)
