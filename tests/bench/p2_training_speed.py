"""Training speed with three backends on against none; every record delivered; CPU per record against direct calls.

One `TrainingManager.fit` with two DDP workers, whose steps keep both cores busy. Inside it, windows with `log_metrics`
and windows with a function that does nothing take turns, so that both sides have the same processes, model and memory,
and what else the machine does hits both; fits of their own would differ by more than the two per cent in question.
Each logging window is held against the mean of the silent ones before and after it; a round in which other processes
were busy is taken again.
Two things keep that honest. A logging window is timed only after a warm-up longer than delivery lags, so that the
backends work at the pace of the logging all through the timed part; and it is followed by a wait until everything is
delivered, so that nothing of it falls into the other side. The tracker idles in the silent windows and costs a little
there; the loss is scaled up by what that is of its CPU time, to what it would be against no tracker at all.
CPU per record: of the tracker's process and its children over the whole logging window with warm-up and wait, and of
the sender's threads, against a process that makes the same calls directly, beside the same training.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.measures import Measurement, Setup, Side, absolute, at_least, at_most, ratio
from tests.bench.windows import Windows
from tests.bench.workload import KEYS, THREE_BACKENDS, metrics_of

_ROUNDS, _QUICK_ROUNDS = 18, 4
_WINDOW_SECONDS = 8.0
_FOREIGN_CORES = 0.1
"""A round in which others took more than this is taken again."""
_WORKERS = 2
_BATCH, _WIDTH = 64, 64

Round = dict[str, Any]


def measure(setup: Setup) -> list[Measurement]:
    from ray_tracking import TrainingManager

    found = setup.folder / "rounds.json"
    wanted = _QUICK_ROUNDS if setup.quick else _ROUNDS
    config = {
        "name": "bench",
        "storage": str(setup.folder / "runs"),
        "scaling": {"workers": _WORKERS},
        "experiment_tracking": THREE_BACKENDS,
        "params": {
            "rounds": wanted,
            "window": _WINDOW_SECONDS,
            "driver": os.getpid(),
            "direct": str(setup.folder / "direct"),
            "found": str(found),
        },
    }
    result = TrainingManager(config).fit(train)
    answer = json.loads(found.read_text())
    rounds = answer["rounds"]
    missing = _missing(result, answer["before"] + sum(row["tracked"]["records"] for row in rounds))
    counted = undisturbed(rounds, wanted)
    return [_speed(counted, len(rounds) - len(counted)), _delivered(missing), _cpu(rounds)]


def foreign_cores(row: Round) -> float:
    """How many cores others kept busy in the round's worst window."""
    return max(row[name]["foreign"] / row[name]["whole_seconds"] for name in ("before", "tracked", "after"))


def is_disturbed(row: Round) -> bool:
    return foreign_cores(row) > _FOREIGN_CORES


def undisturbed(rounds: list[Round], wanted: int) -> list[Round]:
    """The rounds to count. If under half of what is wanted is quiet, all count: the machine is like that."""
    quiet = [row for row in rounds if not is_disturbed(row)]
    return quiet if 2 * len(quiet) >= wanted else rounds


def _speed(rounds: list[Round], left_out: int) -> Measurement:
    def idle(row: Round) -> float:
        windows = (row["before"], row["after"])
        return sum(window["cpu"] for window in windows) / sum(window["whole_seconds"] for window in windows)

    def active(row: Round) -> float:
        return float(row["tracked"]["cpu"] / row["tracked"]["whole_seconds"])

    def silent(row: Round) -> float:
        windows = (row["before"], row["after"])
        return sum(window["steps"] for window in windows) / sum(window["seconds"] for window in windows)

    def tracked(row: Round) -> float:
        loss = silent(row) - row["tracked"]["steps"] / row["tracked"]["seconds"]
        return silent(row) - loss * active(row) / (active(row) - idle(row))

    def middle(value: Callable[[Round], float]) -> float:
        return statistics.median(map(value, rounds))

    note = (
        f"the tracker took {middle(active):.1%} of a core, {middle(idle):.1%} when idle; backends lagged"
        f" {middle(lambda row: row['tracked']['lag']):.1f} s; others took {max(middle(foreign_cores), 0.0):.1%} of a"
        f" core, {left_out} rounds with more than {_FOREIGN_CORES:.0%} are not counted"
    )
    found = ratio(
        "P2",
        "training speed, three backends on against none",
        "steps/s",
        Side("log_metrics", tuple(map(tracked, rounds))),
        Side("no-op", tuple(map(silent, rounds))),
        at_least(0.98),
    )
    return replace(found, note=note)


def _delivered(missing: dict[str, int]) -> Measurement:
    lost = Side("logged less read back", (float(max(missing.values())),))  # the worst backend decides
    return absolute("P2", f"records missing in {', '.join(missing)}", "", lost, at_most(0.0))


def _cpu(rounds: list[Round]) -> Measurement:
    both = [row for row in rounds if "direct" in row]
    ours, direct = (
        Side(name, tuple(row[side]["cpu"] / row[side]["records"] for row in both))
        for name, side in (("tracker process and sender", "tracked"), ("direct calls", "direct"))
    )
    return ratio("P2", "fan-out CPU per record against direct calls", "s", ours, direct, at_most(0.3))


def _missing(result: Any, logged: int) -> dict[str, int]:
    """Per backend, how many of the logged records its own client does not show (or shows more than once)."""
    from tests import readback

    pending = {name: backend["pending"] for name, backend in result.backends.items()}
    if any(pending.values()):
        raise RuntimeError(f"not delivered at the end of the run: {pending}")
    runs = Path(result.path.removeprefix("file://")).parent
    mlflow_uri = result.backends["mlflow"]["location"]
    shown = {
        "TensorBoard": readback.tensorboard_points(runs / "tensorboard" / result.run_id),
        "W&B": readback.wandb_points(runs / "wandb", result.run_id),
        "MLflow": readback.mlflow_points(mlflow_uri, _mlflow_run(mlflow_uri, result.run_id)),
    }
    keys = frozenset(KEYS)
    return {name: abs(logged - sum(key in keys for key, _, _ in points)) for name, points in shown.items()}


def _mlflow_run(uri: str, run_id: str) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments, f"tags.`ray_tracking.run_id` = '{run_id}'")
    return str(found.info.run_id)


# --- on the workers ---------------------------------------------------------------------------------------------


def train(run: Any) -> None:
    """The training function: real images, a small CNN, one thread per worker."""
    import torch

    from ray_tracking.examples.digits import DigitsCNN, digits

    torch.set_num_threads(1)
    train_set, _ = digits()
    model = run.prepare(DigitsCNN(_WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    loader = run.loader(train_set, batch_size=_BATCH, drop_last=True)
    batches = _for_ever(run, loader)

    def steps(count: int, log: Callable[[dict[str, Any]], None]) -> None:
        for _ in range(count):
            x, y = next(batches)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            log({**metrics_of(run.step), KEYS[0]: loss})

    Windows(run, steps, is_disturbed).measure()


def _for_ever(run: Any, loader: Any) -> Iterator[Any]:
    for _ in run.epochs(1_000_000):
        yield from run.steps(loader)
