"""What a tracker is to those who log: the interface that every tracker has, in Ray and in a plain script."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class ExperimentTracker(ABC):
    """Logs one run. `step` defaults to the run's step in a training function, else to the last step plus one.

    Log calls return at once and never raise because of a backend; they raise MetricError for what can't be logged.
    """

    @abstractmethod
    def init_experiment(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Start a run, or continue the unfinished run `run_id`. Returns the run id.

        Raises RefusedError for a run that is completed, LeaseHeldError for one that another process writes now,
        StorageError if the storage can't be written.
        """

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers by name; nested mappings are joined with `/`; tensors and arrays of one element are welcome."""

    @abstractmethod
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Hyperparameters by name."""

    @abstractmethod
    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None:
        """The distribution of a tensor, array or sequence of any shape."""

    @abstractmethod
    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """A text, up to a million characters."""

    @abstractmethod
    def log_image(self, key: str, image: Any, step: int | None = None) -> None:
        """An image: PIL, or an array or tensor [H, W], [H, W, C] or [C, H, W], floats 0 to 1 or integers 0 to 255."""

    @abstractmethod
    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None:
        """Keep a file, or a folder's files, with the run. It is copied before the call returns."""

    @abstractmethod
    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all that was logged is in the journal. False if the time ran out.

        Raises LeaseLostError if another process has taken over the run (this one was stopped or cut off for long).
        """

    @abstractmethod
    def finalize_experiment(self, status: str = "completed") -> None:
        """End the run: `status` is completed, failed or aborted. What a backend lacks then stays in the journal.

        Raises LeaseLostError as `flush` does; the run is the other process's then, and is not touched.
        """


class NoopTracker(ExperimentTracker):
    """Logs nothing: where tracking is switched off."""

    def init_experiment(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        return run_id or name

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_histogram(self, key: str, values: Any, step: int | None = None) -> None: ...

    def log_text(self, key: str, text: str, step: int | None = None) -> None: ...

    def log_image(self, key: str, image: Any, step: int | None = None) -> None: ...

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None) -> None: ...

    def flush(self, timeout: float = 30.0) -> bool:
        return True

    def finalize_experiment(self, status: str = "completed") -> None: ...
