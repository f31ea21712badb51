"""Training speed with three backends on against none; every record delivered; CPU per record against direct calls.

One `TrainingManager.fit` with two DDP workers, whose steps keep both cores busy. Inside it, short windows with
`log_metrics` and windows without tracking take turns, so that both sides have the same processes, model and memory, and
what else the machine does hits both; fits of their own would differ by more than the two per cent in question.
In a window without, the function that logs does nothing and the tracker's processes are stopped (SIGSTOP): all that
tracking costs, idle or late, falls into the windows with it. They go on where they were stopped, so the backends work
at the pace of the logging all through; since timers run out while they are stopped, they are woken rather more often
than in a run of its own.
A tracked window is held against the silent ones before and after it. Windows are short because a machine drifts: here
windows of eight seconds each tell two per cent less surely than the same time in windows of two. A block's speeds are
over all its rounds in which others were quiet; the result is the median of the blocks.
CPU per record: of the tracker's process and its children over a whole block, and of the sender's threads, against a
process that makes the same calls directly, beside the same training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.measures import Measurement, Setup, Side, absolute, at_least, at_most, ratio
from tests.bench.windows import Windows
from tests.bench.workload import KEYS, THREE_BACKENDS, metrics_of

_BLOCKS, _QUICK_BLOCKS = 12, 2
_ROUNDS = 10
_WINDOW_SECONDS = 2.0
_FOREIGN_CORES = 0.1
"""A round in which others took more than this is taken again."""
_WORKERS = 2
_BATCH, _WIDTH = 64, 64

Round = dict[str, Any]


def measure(setup: Setup) -> list[Measurement]:
    from ray_tracking import TrainingManager

    found = setup.folder / "blocks.json"
    config = {
        "name": "bench",
        "storage": str(setup.folder / "runs"),
        "scaling": {"workers": _WORKERS},
        "experiment_tracking": THREE_BACKENDS,
        "params": {
            "blocks": _QUICK_BLOCKS if setup.quick else _BLOCKS,
            "rounds": _ROUNDS,
            "window": _WINDOW_SECONDS,
            "driver": os.getpid(),
            "direct": str(setup.folder / "direct"),
            "found": str(found),
        },
    }
    result = TrainingManager(config).fit(train)
    answer = json.loads(found.read_text())
    missing = _missing(result, answer["records"])
    return [speed(answer["blocks"]), _delivered(missing), _cpu(answer["blocks"])]


def foreign_cores(row: Round) -> float:
    """How many cores others kept busy in the round's worst window."""
    return max(row[name]["foreign"] / row[name]["seconds"] for name in ("before", "tracked", "after"))


def is_disturbed(row: Round) -> bool:
    return foreign_cores(row) > _FOREIGN_CORES


def undisturbed(rounds: list[Round]) -> list[Round]:
    """The rounds to count. If under half are quiet, all count: the machine is like that."""
    quiet = [row for row in rounds if not is_disturbed(row)]
    return quiet if 2 * len(quiet) >= len(rounds) else rounds


def speed(blocks: list[dict[str, Any]]) -> Measurement:
    """Steps per second of each block's counted rounds, tracked and silent."""
    counted = [undisturbed(block["rounds"]) for block in blocks]
    tracked = tuple(_rate(row["tracked"] for row in rounds) for rounds in counted)
    silent = tuple(_rate(row[side] for row in rounds for side in ("before", "after")) for rounds in counted)
    left_out = sum(len(block["rounds"]) for block in blocks) - sum(map(len, counted))
    tracker = sum(block["cpu"] for block in blocks)
    seconds = sum(row["tracked"]["seconds"] for block in blocks for row in block["rounds"])
    note = (
        f"the tracker and the sender took {tracker / seconds:.1%} of a core while logging; {left_out} rounds in which"
        f" others took more than {_FOREIGN_CORES:.0%} of a core are not counted"
    )
    found = ratio(
        "P2",
        "training speed, three backends on against none",
        "steps/s",
        Side("log_metrics", tracked),
        Side("no tracker", silent),
        at_least(0.98),
    )
    return replace(found, note=note)


def _rate(windows: Iterable[dict[str, Any]]) -> float:
    taken = list(windows)
    return float(sum(window["steps"] for window in taken) / sum(window["seconds"] for window in taken))


def _delivered(missing: dict[str, int]) -> Measurement:
    lost = Side("logged less read back", (float(max(missing.values())),))  # the worst backend decides
    return absolute("P2", f"records missing in {', '.join(missing)}", "", lost, at_most(0.0))


def _cpu(blocks: list[dict[str, Any]]) -> Measurement:
    ours = Side("tracker process and sender", tuple(block["cpu"] / block["records"] for block in blocks))
    direct = Side("direct calls", tuple(block["direct"]["cpu"] / block["direct"]["records"] for block in blocks))
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
