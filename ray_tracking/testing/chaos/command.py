"""The training command that chaos starts, the same for both runs but for the run id.

In: what the user gave. Out: its words, its environment, and the configuration that it will have.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from ray_tracking.config import Config, get_config, parse_assignments

EXAMPLE = "ray_tracking.examples.gpt:train"
EXAMPLE_SETTINGS: Mapping[str, str] = {
    "name": "chaos",
    "params.size": "tiny",
    "params.epochs": "8",
    "params.samples_per_epoch": "800",
    "params.sample_tokens": "30",
    "scaling.workers": "2",
    "training.default.save_steps": "20",
    "experiment_tracking.delivery.final_secs": "120",
}
"""400 steps of two workers, in epochs of 50: saves fall into them and on their ends."""
_BACKENDS = ("tensorboard", "mlflow", "wandb")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""One each: a sum over several threads may come out in another order, and so with other last bits."""

_OTHER_CLUSTERS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR")
_PROGRAM = (sys.executable, "-m", "ray_tracking")


@dataclass(frozen=True, slots=True)
class TrainCommand:
    """`ray-tracking train` of a target. `settings` are its `--set`, by dotted key, as text."""

    target: str
    file: str | None
    environment: str | None
    settings: Mapping[str, str]

    @classmethod
    def of(
        cls,
        target: str | None,
        file: str | None,
        environment: str | None,
        assignments: Sequence[str],
        *,
        storage: str,
        times: int,
    ) -> TrainCommand:
        """`target` None: the example, with its settings and every backend that is installed, unless a file says others.

        What is killed must not use up the failures that the user allows: `times` more are. Raises ConfigError.
        """
        parse_assignments(assignments)
        settings = {key.strip(): text for key, _, text in (each.partition("=") for each in assignments)}
        if target is None and file is None:
            installed = {f"experiment_tracking.{name}.enabled": str(find_spec(name) is not None) for name in _BACKENDS}
            settings = {**EXAMPLE_SETTINGS, **installed, **settings}
        settings["storage"] = storage
        command = cls(target or EXAMPLE, file, environment, settings)
        allowed = command.config().failure.max_failures
        if allowed >= 0:
            settings["failure.max_failures"] = str(allowed + times)
        return command

    def config(self) -> Config:
        """What the command will train with. Raises ConfigError."""
        return get_config(self.environment, parse_assignments(self._assignments), self.file)

    @property
    def _assignments(self) -> list[str]:
        return [f"{key}={text}" for key, text in self.settings.items()]

    def words(self, run_id: str, *, address: str | None = None, resume: bool = False) -> list[str]:
        """The whole command; `resume`: the one that goes on with what the storage holds, and is told nothing else."""
        cluster = () if address is None else ("--address", address)
        if resume:
            return [*_PROGRAM, "resume", run_id, "--storage", self.settings["storage"], *cluster]
        return [
            *(*_PROGRAM, "train", self.target, "--run-id", run_id),
            *(() if self.file is None else ("--config", self.file)),
            *(() if self.environment is None else ("--env", self.environment)),
            *(word for assignment in self._assignments for word in ("--set", assignment)),
            *cluster,
        ]

    def sync_words(self, run_id: str) -> list[str]:
        """The command that fills the run's backends with what they lack."""
        return [*_PROGRAM, "sync", run_id, "--storage", self.settings["storage"]]


def child_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Ours, but never with a cluster that is not chaos's own, and with what makes sums come out the same each time."""
    chosen = dict.fromkeys(_THREADS, "1") | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    return {**chosen, **{name: value for name, value in ours.items() if name not in _OTHER_CLUSTERS}}
