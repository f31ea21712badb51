"""The base of P1 and P2: TensorBoard, W&B and MLflow called in the loop, as their own guides show it.

In a process of its own, so that their threads and memory are not in the process on the other side of the ratio.
Run as `python -m tests.bench.direct FOLDER`: a line `CALLS PAUSE` on stdin logs 10 scalars CALLS times, PAUSE seconds
apart; the answer on stdout is a line of JSON, `{"seconds": [of each call], "cpu": of the process and its children}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.machine import ROOT, tree_cpu
from tests.bench.workload import metrics_of


class Direct:
    """The process seen from outside."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "direct.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.direct", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def block(self, calls: int, pause: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{calls} {pause}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the direct process ended: {self._log.read_text()[-2000:]}")
        return json.loads(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main(folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the clients print goes to the log
    import mlflow
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(os.path.join(folder, "tensorboard"))
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = wandb.init(project="bench", mode="offline", dir=folder, settings=settings)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.start_run(experiment_id=mlflow.create_experiment("bench", artifact_location=f"{folder}/artifacts"))

    def log(step: int) -> float:
        metrics = metrics_of(step)
        begin = time.perf_counter()
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        run.log(metrics, step=step)
        mlflow.log_metrics(metrics, step=step)
        return time.perf_counter() - begin

    step = 0
    for line in sys.stdin:
        calls, pause = line.split()
        before, seconds = _settled_cpu(), []
        for _ in range(int(calls)):
            step += 1
            time.sleep(float(pause))
            seconds.append(log(step))
        writer.flush()
        answers.write(json.dumps({"seconds": seconds, "cpu": _settled_cpu() - before}) + "\n")
        answers.flush()
    writer.close()
    run.finish()
    mlflow.end_run()


def _settled_cpu() -> float:
    """CPU seconds so far, once the clients' own processes and threads have caught up (at most 3 s)."""
    seconds = tree_cpu(os.getpid())
    for _ in range(15):
        time.sleep(0.2)
        before, seconds = seconds, tree_cpu(os.getpid())
        if seconds - before < 0.01:
            break
    return seconds


if __name__ == "__main__":
    main(sys.argv[1])
