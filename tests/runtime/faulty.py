"""A training function that things happen to: which, where and in which attempt its params say."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from ray.train import PreemptionInfo
from ray.train.v2._internal.execution.context import get_train_context
from torch import nn

from ray_tracking import Run
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.runs import stopping
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from tests.runtime.functions import data


def train(run: Run) -> None:
    """12 steps an epoch on two workers; each epoch's weights are left in the folder `params.notes`.

    `params.faults`: [[kind, attempt, rank, step], ...]; None: any of them.
    """
    model = run.prepare(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = run.loader(data(), batch_size=5)
    run.restore(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(run.params["epochs"]):
        for x, y in run.steps(loader):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.log_metrics({"train/loss": loss})
            time.sleep(run.params.get("pause", 0.0))
            for kind, *where in run.params.get("faults", ()):
                here = (run.attempt, run.rank, run.step)
                if all(wanted in (None, found) for wanted, found in zip(where, here, strict=True)):
                    FAULTS[kind](run)
            if run.params.get("asks") and run.should_stop():
                return
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        if run.rank == 0:
            Path(run.params["notes"], f"weights-{epoch}").write_text(json.dumps([float(w).hex() for w in weights]))


def wait_for_checkpoint(run: Run) -> None:
    """Until the one before (every fourth step) is complete: what is tested is not the race with its writing."""
    store = CheckpointStore(RunStore(Storage.open(run.config.storage)).directory(run.params["run_id"]))
    wanted, end = (run.step - 1) // 4 * 4, time.monotonic() + 60
    while time.monotonic() < end and wanted > max((info.step for info in store.checkpoints()), default=0):
        time.sleep(0.1)


def die(run: Run) -> None:
    wait_for_checkpoint(run)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever(run: Run) -> None:
    time.sleep(100_000)


def stand_still(run: Run) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def ask_to_stop(run: Run) -> None:
    stopping.request(RunStore(Storage.open(run.config.storage)).directory(run.params["run_id"]))


def be_preempted(run: Run) -> None:
    """As Ray's watcher tells every worker of a node's drain."""
    deadline = int((time.time() + run.params["notice"]) * 1000)
    info = PreemptionInfo(deadline_ms=deadline, preempted_node_to_ranks={"f00dcafe": [0]})
    get_train_context().preemption_context.preemption_info = info


def eat_memory(run: Run) -> None:
    eaten: list[Any] = []
    while True:
        eaten.append(bytearray(b"x" * (50 << 20)))
        time.sleep(0.05)


FAULTS = {
    "die": die,
    "sleep": sleep_for_ever,
    "stand still": stand_still,
    "stop": ask_to_stop,
    "preempted": be_preempted,
    "memory": eat_memory,
}
