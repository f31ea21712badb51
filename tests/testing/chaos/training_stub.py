"""A run without Ray or torch, to be started as a child: journals steps, keeps helpers with a run's process titles.

`python -m tests.testing.chaos.training_stub STORAGE RUN_ID STEPS HOW` goes on where the run stopped. HOW: `well`,
`badly` (it ends with an error after 30 steps), `silently` (it logs no step at all), `lingering` (it does not end when
its run is completed), `held:A,B` (before each of these steps it waits for a file `go-A` or `go-B` in STORAGE).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from ray_tracking.journal.reader import JournalReader
from ray_tracking.journal.writer import JournalWriter
from ray_tracking.records import Kind, Record
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage

SAVE_STEPS = 10
WORKER = "ray::RayTrainWorker.stub"


def main(storage: str, run_id: str, steps: int, how: str) -> None:
    runs = RunStore(Storage.open(storage))
    directory = runs.directory(run_id)
    record = runs.load(run_id) if runs.exists(run_id) else RunRecord(run_id, "stub", time.time())
    reached = max((row.step for row in JournalReader(directory).read(limit=100_000)), default=0)
    resumed = reached // SAVE_STEPS * SAVE_STEPS if record.attempts else -1
    record = record.begin_attempt(time.time(), 1)
    number = record.attempts[-1].number
    runs.save(record.resumed(number, resumed))
    writer = JournalWriter(directory, number)
    writer.append([Record(Kind.ATTEMPT, "", resumed, time.time(), attempt=number)])
    helper = subprocess.Popen([WORKER, "1000"], executable="/bin/sleep")
    if how == "silently":
        time.sleep(1000)
    held = how.removeprefix("held:").split(",") if how.startswith("held:") else []
    for step in range(max(resumed, 0) + 1, steps + 1):
        while str(step) in held and not Path(storage, f"go-{step}").exists():
            time.sleep(0.02)
        row = Record(Kind.SCALAR, "train/loss", step, time.time(), 1.0 / step, attempt=number, seq=step)
        writer.append([row])
        time.sleep(0.02)
        if how == "badly" and step == 30:
            sys.exit("no luck at all")
    helper.kill()
    runs.save(runs.load(run_id).finish(time.time(), Status.COMPLETED, "completed"))
    if how == "lingering":
        time.sleep(1000)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
