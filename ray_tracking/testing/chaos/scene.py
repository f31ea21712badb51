"""What chaos sets up around a run so that it can be taken away: a cluster, a server, a disk.

In: the parts that are to be struck and the run's configuration. Out: how its command is started, and outages.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ray_tracking.config import Config
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.cluster import LocalCluster, Shape
from ray_tracking.testing.chaos.command import TrainCommand
from ray_tracking.testing.chaos.outages import FolderOutage, FullDisk, Outage, ServerOutage, folder_of
from ray_tracking.testing.chaos.plan import Part
from ray_tracking.testing.chaos.processes import Launched, Process
from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.testing.chaos.tmpfs import Tmpfs

DISK_FOLDER = "disk"
"""Of the scratch folder: where the runs lie if the disk is to be struck."""


class Scene:
    """Both runs are trained on it, one after the other. A context manager: what it has started or mounted is gone
    afterwards.

    `environment` is that of the command; `scratch` takes what servers and nodes print.
    """

    def __init__(
        self,
        command: TrainCommand,
        config: Config,
        parts: Sequence[Part],
        environment: Mapping[str, str],
        scratch: Path,
    ) -> None:
        self.environment = dict(environment)
        self.disk = Tmpfs(scratch / DISK_FOLDER) if Part.DISK in parts else None
        self._server = MLflowServer(scratch) if Part.MLFLOW in parts else None
        more = {} if self._server is None else {"experiment_tracking.mlflow.tracking_uri": self._server.uri}
        self._command = replace(command, settings={**command.settings, **more})
        self.cluster: LocalCluster | None = None
        if Part.NODE in parts or Part.HEAD in parts:
            self.cluster = LocalCluster(Shape.of(config.scaling), environment, scratch)
            self.environment = self.cluster.environment

    def __enter__(self) -> Scene:
        try:
            if self.disk is not None:
                self.disk.mount()
            if self._server is not None:
                self._server.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.cluster is not None:
            self.cluster.close()
        if self._server is not None:
            self._server.kill()
        if self.disk is not None and self.disk.folder.is_mount():
            self.disk.unmount()

    def keep(self, folder: Path) -> None:
        """Copy what would be gone with the scene."""
        if self.disk is not None:
            shutil.copytree(self.disk.folder, folder, dirs_exist_ok=True)

    def start(self, run_id: str, output: Path, *, resume: bool) -> Launched:
        """Start the run's command, on a cluster that is complete. `resume`: go on with what the storage holds alone."""
        address = None
        if self.cluster is not None:
            self.cluster.start()
            address = self.cluster.address
        return Launched(self._command.words(run_id, address=address, resume=resume), self.environment, output)

    def sync(self, run_id: str, output: Path) -> Launched:
        """Start the command that fills backends which lack something."""
        return Launched(self._command.sync_words(run_id), self.environment, output)

    def find(self, driver: Launched, part: Part) -> list[Process]:
        """The processes of a part of the run: below its command, or on the cluster's nodes."""
        return [*driver.find(part), *([] if self.cluster is None else self.cluster.find(part))]

    def outage(self, part: Part, directory: Storage, driver: Launched) -> Outage | None:
        """The outage of one part for the run in `directory`. None: there is nothing yet that could be taken away."""
        if part is Part.DISK and self.disk is not None:
            return FullDisk(self.disk, lambda: driver.printed)
        if part is Part.MLFLOW and self._server is not None:
            return ServerOutage(self._server, directory)
        folder = folder_of(directory, part)
        return None if folder is None else FolderOutage(part, folder, directory, lambda it: self.find(driver, it))
