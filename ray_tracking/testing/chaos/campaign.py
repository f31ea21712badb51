"""Running a training command to its end, undisturbed or under strikes.

In: the scene with the run's command, the run's directory, what is to be struck. Out: what was hit, when, and what was
left on storage.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.errors import RayTrackingError, RunFailedError, StorageError
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.cluster import LocalCluster
from ray_tracking.testing.chaos.following import Follower
from ray_tracking.testing.chaos.outages import Outage
from ray_tracking.testing.chaos.plan import Hit, Part, Strike
from ray_tracking.testing.chaos.processes import Launched, Process, await_end
from ray_tracking.tracking.cursor import BackendState, Cursor

OUTAGE_SECONDS = 15.0
_POLL_SECONDS = 0.05
_SAY_SECONDS = 10.0
_LONGEST_PAUSE = 10.0

Say = Callable[[str], None]


class Scene(Protocol):
    """What a campaign needs of what is around a run; see `scene.Scene`."""

    cluster: LocalCluster | None

    def start(self, run_id: str, output: Path, *, resume: bool) -> Launched: ...

    def sync(self, run_id: str, output: Path) -> Launched: ...

    def find(self, driver: Launched, part: Part) -> list[Process]: ...

    def outage(self, part: Part, directory: Storage, driver: Launched) -> Outage | None: ...


class Campaign:
    """Runs on one storage, one after the other, with `patience` seconds for each to show something new.

    `away`: the most seconds for which an outage lasts. It ends before, once it was felt and half of the time to the
    next strike is over, as the pace of the run that was left alone tells: else a quick run would be over too soon.
    """

    def __init__(
        self,
        scene: Scene,
        storage: Storage,
        logs: Path,
        say: Say,
        *,
        patience: float,
        away: float = OUTAGE_SECONDS,
        keyring: Keyring | None = None,
    ) -> None:
        self._scene = scene
        self._runs = RunStore(storage)
        self._logs = logs
        self._say = say
        self._patience = patience
        self._away = away
        self._keyring = keyring
        self._said = 0.0
        self._pace = 0.0
        self._steps = 0
        self.synced: list[str] = []
        """The backends of the last run that lacked something at its end."""

    def run(self, run_id: str, strikes: Sequence[Strike] = ()) -> list[Hit]:
        """Start the run, strike, start it again after the driver's death, until it is completed.

        What backends lack then is sent by `ray-tracking sync`, as a user would; `synced` says which lacked something.
        Returns the strikes that hit: fewer if the run was over before. Raises RunFailedError with the command's last
        lines if it fails by itself or shows nothing new for too long.
        """
        follower = Follower(self._runs.directory(run_id))
        hits: list[Hit] = []
        starts = 0
        resume = False
        while True:
            starts += 1
            output = self._logs / f"{run_id}-{starts}.log"
            driver = self._scene.start(run_id, output, resume=resume)
            try:
                ended_by = self._follow(run_id, driver, follower, strikes, hits)
            except RayTrackingError as error:
                hint = f"The end of {output}:\n{driver.tail()}"
                raise type(error)(error.message, hint=f"{error.hint}\n{hint}" if error.hint else hint) from error
            finally:
                driver.kill_all()
            if ended_by is None or self._is_completed(run_id):  # it may be killed when its work is done
                if not strikes:
                    self._pace, self._steps = follower.seconds_per_step, follower.step
                self._fill(run_id)
                return hits
            resume = ended_by is Part.HEAD

    def _fill(self, run_id: str) -> None:
        cursors = Cursor.load_all(self._runs.directory(run_id))
        self.synced = [cursor.backend for cursor in cursors if cursor.state is BackendState.PENDING]
        if not self.synced:
            return
        self._say(f"{run_id} has ended before all was in {', '.join(self.synced)}: filling with `ray-tracking sync`")
        output = self._logs / f"{run_id}-sync.log"
        command = self._scene.sync(run_id, output)
        try:
            end = time.monotonic() + self._patience
            while command.status is None and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
            if command.status != 0:
                how = f"ended with status {command.status}" if command.status else "did not end"
                raise RunFailedError(f"`ray-tracking sync {run_id}` {how}.", hint=f"{output}:\n{command.tail()}")
        finally:
            command.kill_all()

    def _follow(
        self, run_id: str, driver: Launched, follower: Follower, strikes: Sequence[Strike], hits: list[Hit]
    ) -> Part | None:
        """Until the command ends. Returns what was killed, so that it is to be started again; None: it is done."""
        follower.changed = time.monotonic()
        while driver.status is None:
            follower.update()
            self._show(run_id, follower)
            if self._scene.cluster is not None:
                self._scene.cluster.mend()
            strike = strikes[len(hits)] if len(hits) < len(strikes) else None
            if strike is not None and follower.is_training and follower.step >= strike.step:
                time.sleep(min(strike.further * follower.seconds_per_step, _LONGEST_PAUSE))
                following = strikes[len(hits) + 1].step if len(hits) + 1 < len(strikes) else self._steps
                least = min(self._away, max(0, following - strike.step) * self._pace / 2)
                hit = self._strike(run_id, strike, driver, follower, least)
                if hit is not None:
                    hits.append(hit)
                    follower.mark(new_attempt=strike.part.restarts_workers)
                if hit is not None and strike.part.ends_driver:
                    return strike.part
            if time.monotonic() - follower.changed > self._patience:
                raise RunFailedError(f"The run {run_id} showed nothing new for {self._patience:.0f} s.")
            time.sleep(_POLL_SECONDS)
        follower.update()
        if driver.status != 0:
            raise RunFailedError(f"The run {run_id} ended by itself with status {driver.status}.")
        if (status := self.record(run_id).status) is not Status.COMPLETED:
            raise RunFailedError(f"The command ended with status 0, but the run {run_id} is {status.value}.")
        return None

    def _strike(self, run_id: str, strike: Strike, driver: Launched, follower: Follower, least: float) -> Hit | None:
        """None if there is nothing to hit: between two lives of the part, or after the run."""
        where = f"{strike.part.value} at step {follower.step} of attempt {follower.attempt}"
        attempt = follower.attempt
        if strike.part.is_outage:
            outage = self._scene.outage(strike.part, self._runs.directory(run_id), driver)
            if outage is None or driver.status is not None:
                return None
            self._say(f"fault {strike.number}: {where}")
            begun, clock = time.time(), time.monotonic()
            pids = outage.begin()
            try:
                noticed = self._wait_away(outage, run_id, follower, least)
                complete, problems = self._checkpoints(run_id)
            finally:
                away = time.monotonic() - clock
                outage.end()
            return Hit(strike, begun, attempt, tuple(pids), complete, tuple(problems), away, noticed)
        struck = self._kill(strike, driver)
        if not struck:
            return None
        gone = time.time()
        complete, problems = self._checkpoints(run_id)
        self._say(f"fault {strike.number}: {where}")
        return Hit(strike, gone, attempt, tuple(process.pid for process in struck), complete, tuple(problems))

    def _kill(self, strike: Strike, driver: Launched) -> list[Process]:
        """What was killed, when it is gone; [] if there is nothing to kill."""
        cluster = self._scene.cluster
        if driver.status is not None:
            return []
        if strike.part is Part.HEAD and cluster is not None:
            return cluster.kill(driver)
        if strike.part is Part.NODE and cluster is not None:
            return cluster.kill_node(strike.pick)
        if strike.part is Part.DRIVER:
            return driver.kill_all()
        processes = self._scene.find(driver, strike.part)
        if not processes:
            return []
        victim = processes[int(strike.pick * len(processes))]
        victim.send(signal.SIGKILL)
        await_end([victim])
        return [victim]

    def _wait_away(self, outage: Outage, run_id: str, follower: Follower, least: float) -> str | None:
        """Until the outage is to end; how the run showed that it felt it."""
        felt: str | None = None
        begun = time.monotonic()
        while (passed := time.monotonic() - begun) < self._away and (felt is None or passed < least):
            felt = felt or outage.felt()
            with contextlib.suppress(StorageError):  # it may be the storage that is away
                follower.update()
            self._show(run_id, follower)
            time.sleep(_POLL_SECONDS)
        return felt

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

    def _is_completed(self, run_id: str) -> bool:
        return self._runs.exists(run_id) and self.record(run_id).status is Status.COMPLETED

    def record(self, run_id: str) -> RunRecord:
        return self._runs.load(run_id)

    def _show(self, run_id: str, follower: Follower) -> None:
        now = time.monotonic()
        if now - self._said >= _SAY_SECONDS:
            self._said = now
            where = f"step {follower.step} of attempt {follower.attempt}" if follower.attempt else "starting"
            self._say(f"{run_id}: {where}")
