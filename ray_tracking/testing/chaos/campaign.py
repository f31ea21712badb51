"""Running a training command to its end, undisturbed or under strikes.

In: how to start it, its run's directory, what is to be killed. Out: what was hit, when, and what was left on storage.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.errors import RayTrackingError, RunFailedError
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.following import Follower
from ray_tracking.testing.chaos.plan import Hit, Part, Strike
from ray_tracking.testing.chaos.processes import Driver, Start, await_end

_POLL_SECONDS = 0.05
_SAY_SECONDS = 10.0
_LONGEST_PAUSE = 10.0

Say = Callable[[str], None]


class Campaign:
    """Runs on one storage, one after the other, with `patience` seconds for each to show something new."""

    def __init__(
        self, start: Start, storage: Storage, logs: Path, say: Say, *, patience: float, keyring: Keyring | None = None
    ) -> None:
        self._start = start
        self._runs = RunStore(storage)
        self._logs = logs
        self._say = say
        self._patience = patience
        self._keyring = keyring
        self._said = 0.0

    def run(self, run_id: str, strikes: Sequence[Strike] = ()) -> list[Hit]:
        """Start the run, strike, start it again after the driver's death, until it is completed.

        Returns the strikes that hit: fewer if the run was over before. Raises RunFailedError with the command's last
        lines if it fails by itself or shows nothing new for too long.
        """
        follower = Follower(self._runs.directory(run_id))
        hits: list[Hit] = []
        starts = 0
        while True:
            starts += 1
            output = self._logs / f"{run_id}-{starts}.log"
            driver = self._start(run_id, output)
            try:
                again = self._follow(run_id, driver, follower, strikes, hits)
            except RayTrackingError as error:
                hint = f"The end of {output}:\n{driver.tail()}"
                raise type(error)(error.message, hint=f"{error.hint}\n{hint}" if error.hint else hint) from error
            finally:
                driver.kill_all()
            if not again:
                return hits

    def _follow(
        self, run_id: str, driver: Driver, follower: Follower, strikes: Sequence[Strike], hits: list[Hit]
    ) -> bool:
        """Until the command ends. Returns whether it is to be started again: it was killed."""
        follower.changed = time.monotonic()
        while driver.status is None:
            follower.update()
            self._show(run_id, follower)
            strike = strikes[len(hits)] if len(hits) < len(strikes) else None
            if strike is not None and follower.is_training and follower.step >= strike.step:
                time.sleep(min(strike.further * follower.seconds_per_step, _LONGEST_PAUSE))
                hit = self._strike(run_id, strike, driver, follower)
                if hit is not None:
                    hits.append(hit)
                    follower.mark(new_attempt=strike.part.restarts_workers)
                if hit is not None and strike.part is Part.DRIVER:
                    return True
            if time.monotonic() - follower.changed > self._patience:
                raise RunFailedError(f"The run {run_id} showed nothing new for {self._patience:.0f} s.")
            time.sleep(_POLL_SECONDS)
        follower.update()
        if driver.status != 0:
            raise RunFailedError(f"The run {run_id} ended by itself with status {driver.status}.")
        if (status := self.record(run_id).status) is not Status.COMPLETED:
            raise RunFailedError(f"The command ended with status 0, but the run {run_id} is {status.value}.")
        return False

    def _strike(self, run_id: str, strike: Strike, driver: Driver, follower: Follower) -> Hit | None:
        """None if there is nothing to hit: between two lives of the part, or after the run."""
        attempt = follower.attempt
        now = time.time()
        if strike.part is Part.DRIVER:
            if driver.status is not None:
                return None
            struck = driver.kill_all()
        else:
            processes = driver.find(strike.part)
            if not processes:
                return None
            victim = processes[int(strike.pick * len(processes))]
            victim.send(signal.SIGKILL)
            struck = [victim]
            await_end(struck)
        complete, problems = self._checkpoints(run_id)
        pids = tuple(process.pid for process in struck)
        self._say(f"kill {strike.number}: {strike.part.value} at step {follower.step} of attempt {attempt}")
        return Hit(strike, now, attempt, pids, complete, tuple(problems))

    def _checkpoints(self, run_id: str) -> tuple[int, list[str]]:
        """How many complete checkpoints there are now, and what is wrong with them: read and checked whole."""
        store = CheckpointStore(self._runs.directory(run_id), keyring=self._keyring)
        complete = [found.info for found in store.scan() if found.info is not None]
        problems = []
        for info in complete:
            wrong = store.verify(info)
            if wrong and store.inspect(info.folder).info is not None:  # else retention has deleted it meanwhile
                problems += wrong
        return len(complete), problems

    def record(self, run_id: str) -> RunRecord:
        return self._runs.load(run_id)

    def _show(self, run_id: str, follower: Follower) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_SECONDS:
            self._said = now
            where = f"step {follower.step} of attempt {follower.attempt}" if follower.attempt else "starting"
            self._say(f"{run_id}: {where}")
