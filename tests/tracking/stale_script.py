"""A script with a tracker, to be stopped from outside: `python -m tests.tracking.stale_script STORAGE LEASE_SECONDS`.

It logs 20 steps and says "ready CHILD_PID"; on a line from stdin it logs ten more, waits for them, ends the run, and
says what became of both.
"""

from __future__ import annotations

import sys

from ray_tracking.errors import LeaseError
from ray_tracking.storage import Storage
from ray_tracking.tracking.child import ChildTransport
from ray_tracking.tracking.logger import RunLogger
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.spec import TrackerSpec
from tests.tracking.fakes import Clock

RUN, NAME = "run-1", "stale"
TRACKING = {"tensorboard": {"enabled": True}, "mlflow": {"enabled": True}}


class Tracked:
    """The run as one script sees it, going on from step `resumed`."""

    def __init__(self, storage: str, lease_secs: float, resumed: int) -> None:
        spec = TrackerSpec(RUN, NAME, storage, storage, tracking=TRACKING, lease_secs=lease_secs)
        self.transport = ChildTransport(spec)
        attempt = self.transport.call("begin_attempt", 1)
        self.sender = Sender(self.transport, rank=0, attempt=attempt, interval=0.05)
        self.logger = RunLogger(self.sender, Clock(), Storage.open(storage).child(RUN, "artifacts"))
        self.logger.begin_attempt(resumed)

    def log(self, steps: range, value: float) -> None:
        for step in steps:
            self.logger.log_metrics({"loss": value + step, "speed": 2.0 * step}, step)

    def deliver(self) -> bool:
        return self.sender.flush(60) and bool(self.transport.call("wait_delivered", 180.0))


def main(storage: str, lease_secs: str) -> None:
    run = Tracked(storage, float(lease_secs), -1)
    run.log(range(1, 21), 0.0)
    assert run.deliver()
    print("ready", run.transport.pid, flush=True)
    sys.stdin.readline()
    run.log(range(21, 31), 1000.0)
    for act in (lambda: run.sender.flush(60), lambda: run.transport.call("close", "completed", "done")):
        try:
            print(act(), flush=True)
        except LeaseError as error:
            print(type(error).__name__, error.epoch, error.process and error.process.pid, flush=True)
    print("unsent", run.sender.close(), flush=True)
    run.transport.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
