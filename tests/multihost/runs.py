"""Runs of the short training: how they are asked for, followed, and compared with the one that nothing happened to.

In: the shared folder. Out: words of commands, steps reached, AssertionError that names what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.comparing import compare_checkpoints, last_step, rows
from ray_tracking.testing.chaos.evidence import Difference, Ignored, compare_histories
from ray_tracking.testing.chaos.shown import compare_backends
from tests.hosts import RAY_TRACKING, Network, Running

JOB = Path(__file__).parent / "job"
TARGET = "short.py:train"
STEPS = 80
LEASE_SECONDS = 8
BACKENDS = ("tensorboard", "wandb")
_SETTINGS = {
    "params.epochs": "10",
    "params.pause": "0.15",
    "scaling.workers": "2",
    "training.default.save_steps": "5",
    "failure.max_failures": "10",
    "failure.lease_secs": str(LEASE_SECONDS),
    "experiment_tracking.delivery.final_secs": "120",
    **{f"experiment_tracking.{name}.enabled": "true" for name in BACKENDS},
}
_PATIENCE_SECONDS = 400.0
_LOOK_SECONDS = 0.1


class SharedRuns:
    """The runs at a path or URI that all hosts and this machine see."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.store = RunStore(Storage.open(uri))

    def options(self, run_id: str, **settings: str) -> list[str]:
        """Of `train` and `submit train`: the run's id, place and settings; further ones with `__` for dots."""
        more = {key.replace("__", "."): value for key, value in settings.items()}
        assignments = [f"{key}={value}" for key, value in {**_SETTINGS, **more}.items()]
        return [
            *("--run-id", run_id, "--storage", self.uri),
            *(word for assignment in assignments for word in ("--set", assignment)),
        ]

    def until_step(self, run_id: str, step: int, running: Running) -> int:
        """Wait until the journal has a step as high; returns the highest. The command must go on meanwhile."""
        directory = self.store.directory(run_id)
        return self._until(lambda: last_step(directory), lambda reached: reached >= step, running)

    def newest_attempt(self, run_id: str) -> int:
        """The number of the newest attempt that has logged a step."""
        return max((row.attempt for row in rows(self.store.directory(run_id)) if row.step > 0), default=0)

    def _until(self, look: Callable[[], int], is_enough: Callable[[int], bool], running: Running) -> int:
        end = time.monotonic() + _PATIENCE_SECONDS
        while not is_enough(found := look()):
            assert running.status is None, f"ended at {found} with status {running.status}:\n{running.printed}"
            assert time.monotonic() < end, f"still at {found} after {_PATIENCE_SECONDS:.0f} s:\n{running.printed}"
            time.sleep(_LOOK_SECONDS)
        return found


class Reference:
    """Trained when it is first compared with."""

    run_id = "nothing-happened"

    def __init__(self, network: Network, runs: SharedRuns) -> None:
        self._network = network
        self._runs = runs

    def assert_same(self, run_id: str, runs: SharedRuns | None = None, also: Sequence[str] = ()) -> None:
        """The other run has the same checkpoint, history and backends, to the last bit, and is completed.

        `also`: the backends that it has besides `BACKENDS`.
        """
        runs = runs or self._runs
        self._train()
        one, other = self._runs.store.directory(self.run_id), runs.store.directory(run_id)
        record = runs.store.load(run_id)
        assert record.status == "completed", record
        ignored = Ignored(("pause",))
        differences: list[Difference] = [
            *compare_checkpoints(one, other, None),
            compare_histories(*(JournalReader(each).effective_records() for each in (one, other)), ignored),
            *compare_backends(other, ignored),
        ]
        assert {*BACKENDS, *also, "journal", "model"} <= {each.what for each in differences}
        wrong = [f"{each.what}: {each}" for each in differences if not each.is_equal or not each.compared]
        assert not wrong, "\n".join(wrong)
        assert last_step(other) == STEPS

    def _train(self) -> None:
        if self._runs.store.exists(self.run_id):
            return
        done = self._network.start_outside(
            *RAY_TRACKING,
            "train",
            str(JOB / TARGET),
            *self._runs.options(self.run_id, params__pause="0"),
            env={"GLOO_SOCKET_IFNAME": "lo", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": "/tmp/ray"},
        ).wait(_PATIENCE_SECONDS)
        assert done.status == 0, done.printed
