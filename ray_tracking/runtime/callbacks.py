"""Two of Ray Train's callbacks, as runs need them.

Without Ray's dataset manager, a process that each start of the workers else pays for: a run reads its data by
`run.loader`, and what a training function does with Ray Data by itself is not touched by this. And with an end of the
workers that a worker which Ray has ended for want of memory does not keep from coming.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ray.exceptions import RayError
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.data_integration.interfaces import DatasetShardProvider
from ray.train.v2._internal.execution.worker_group import ExecutionGroup

from ray_tracking.errors import UsageError
from ray_tracking.log import get_logger

log = get_logger()


class NoDatasets:
    """What `ray.train.get_dataset_shard` asks."""

    def get_dataset_shard(self, dataset_info: Any) -> NoReturn:
        raise UsageError(
            f"There is no dataset {dataset_info.dataset_name!r}: a run gets none from its trainer.",
            hint="Read it in the training function: run.loader(dataset), or ray.data there.",
        )


class NoDatasetsCallback(DatasetsCallback):
    """Hands the driver's DataContext to the workers, as Ray's own does."""

    def before_init_train_context(self, workers: Sequence[Any]) -> dict[str, list[DatasetShardProvider]]:
        return {"dataset_shard_provider": [NoDatasets()] * len(workers)}


class BackendCallback(BackendSetupCallback):
    """Ray's own lets an OutOfMemoryError of a worker pass, which ends the group then no more, however often."""

    def before_execution_group_shutdown(self, execution_group: ExecutionGroup) -> None:
        try:
            super().before_execution_group_shutdown(execution_group)
        except RayError as error:
            log.debug("the process group was not left in order", error=str(error).splitlines()[0])


def as_runs_need_them(callbacks: Iterable[Any], trainer: Any) -> list[Any]:
    """Ray Train's callbacks of a trainer without datasets."""

    def ours(callback: Any) -> Any:
        if type(callback) is DatasetsCallback:
            return NoDatasetsCallback(trainer.train_run_context, datasets={})
        return BackendCallback(trainer.backend_config) if type(callback) is BackendSetupCallback else callback

    return [ours(callback) for callback in callbacks]
