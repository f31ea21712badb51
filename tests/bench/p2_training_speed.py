"""Training speed with three backends on against none; every record delivered; CPU per record against direct calls.

One `TrainingManager.fit` with two DDP workers, whose steps keep both cores busy. Inside it, windows with `log_metrics`
and windows with a function that does nothing take turns, so that both sides have the same processes, model and memory,
and what else the machine does hits both; fits of their own would differ by more than the two per cent in question. Rounds
in which other processes were busy are taken again.
Two things keep that honest. A logging window is timed only after a warm-up longer than delivery lags, so that the
backends work at the pace of the logging all through the timed part; and it is followed by a wait until everything is
delivered, so that nothing of it falls into the other side. What the idle tracker costs is in both sides; it is measured
in the silent windows and taken off the speed, as if all of it were lost to training.
CPU per record: of the tracker's process and its children over the whole logging window with warm-up and wait, and of
the sender's threads, against the process that makes the same calls directly, which gets its turn in every round.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.machine import child_named, machine_cpu, tree_cpu
from tests.bench.measures import Measurement, Setup, Side, absolute, at_least, at_most, ratio
from tests.bench.workload import KEYS, THREE_BACKENDS, metrics_of

_ROUNDS, _QUICK_ROUNDS = 10, 2
_WINDOW_SECONDS, _QUICK_WINDOW_SECONDS = 10.0, 5.0
_WARM_UP_SECONDS = 2.5
_SETTLE_SECONDS = 0.5
_DIRECT_STEPS, _DIRECT_PAUSE = 80, 0.012
_DELIVERY_SECONDS = 120.0
_FOREIGN_CORES = 0.1
"""A round in which others took more than this is taken again."""
_MOST_TRIES = 1.5
_WORKERS = 2
_BATCH, _WIDTH = 64, 64


def measure(setup: Setup) -> list[Measurement]:
    from ray_tracking import TrainingManager

    found = setup.folder / "rounds.json"
    config = {
        "name": "bench",
        "storage": str(setup.folder / "runs"),
        "scaling": {"workers": _WORKERS},
        "experiment_tracking": THREE_BACKENDS,
        "params": {
            "rounds": _rounds(setup.quick),
            "driver": os.getpid(),
            "window": _QUICK_WINDOW_SECONDS if setup.quick else _WINDOW_SECONDS,
            "direct": str(setup.folder / "direct"),
            "found": str(found),
        },
    }
    result = TrainingManager(config).fit(train)
    answer = json.loads(found.read_text())
    missing = _missing(result, answer["before"] + sum(row["tracked"]["records"] for row in answer["rounds"]))
    rounds, disturbed = undisturbed(answer["rounds"], _rounds(setup.quick))
    return _measurements(rounds, disturbed, missing)


def _rounds(quick: bool) -> int:
    return _QUICK_ROUNDS if quick else _ROUNDS


def undisturbed(rounds: list[dict[str, Any]], wanted: int) -> tuple[list[dict[str, Any]], int]:
    """The rounds to count, at most `wanted` and in order, and how many others were too disturbed.

    If there are too few quiet ones (under half of what is wanted), all count: the machine is like that.
    """
    quiet = [row for row in rounds if row["foreign"] <= _FOREIGN_CORES]
    if 2 * len(quiet) < wanted:
        return rounds, 0
    return quiet[:wanted], len(rounds) - len(quiet)


def _measurements(rounds: list[dict[str, Any]], disturbed: int, missing: dict[str, int]) -> list[Measurement]:
    def column(side: str, value: Callable[[dict[str, Any]], float]) -> tuple[float, ...]:
        return tuple(value(row[side]) for row in rounds)

    idle = column("silent", lambda row: row["cpu"] / row["cpu_seconds"])
    speeds = column("tracked", lambda row: row["steps"] / row["seconds"])
    tracked = tuple(speed * (1.0 - share) for speed, share in zip(speeds, idle, strict=True))
    note = (
        f"the idle tracker's {statistics.median(idle):.1%} of a core is taken off the speed; the backends had"
        f" everything {statistics.median(column('tracked', lambda row: row['lag'])):.1f} s after the last step;"
        f" others took {statistics.median(row['foreign'] for row in rounds):.1%} of a core"
        f" ({disturbed} rounds with more than {_FOREIGN_CORES:.0%} not counted)"
    )
    silent = Side("no-op", column("silent", lambda row: row["steps"] / row["seconds"]))
    ours = Side("tracker process and sender", column("tracked", lambda row: row["cpu"] / row["records"]))
    direct = Side("direct calls", column("direct", lambda row: row["cpu"] / row["records"]))
    lost = Side("logged less read back", tuple(float(number) for number in missing.values()))
    speed = "training speed, three backends on against none"
    return [
        replace(ratio("P2", speed, "steps/s", Side("log_metrics", tracked), silent, at_least(0.98)), note=note),
        absolute("P2", f"records missing in {', '.join(missing)}", "", lost, at_most(0.0)),
        ratio("P2", "fan-out CPU per record against direct calls", "s", ours, direct, at_most(0.3)),
    ]


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

    _Windows(run, steps).measure()


def _for_ever(run: Any, loader: Any) -> Iterator[Any]:
    for _ in run.epochs(1_000_000):
        yield from run.steps(loader)


def _nothing(metrics: dict[str, Any]) -> None:
    """The other side of `log_metrics`."""


class _Windows:
    """Takes the windows in turn. All ranks walk through it alike; rank 0 measures."""

    def __init__(self, run: Any, steps: Callable[[int, Callable[[dict[str, Any]], None]], None]) -> None:
        self._run = run
        self._steps = steps
        self._is_first = run.rank == 0
        self._tracker = child_named(os.getppid(), "ray::TrackerActor") if self._is_first else 0

    def measure(self) -> None:
        from tests.bench.direct import Direct

        params = self._run.params
        pace = self._pace()
        timed, warm_up = int(params["window"] * pace), int(_WARM_UP_SECONDS * pace)
        direct = Direct(Path(params["direct"])) if self._is_first else None
        if direct is not None:
            direct.block(5, _DIRECT_PAUSE)
        before = self._window(self._run.log_metrics, warm_up, warm_up)["records"]  # opens the backends
        rounds = []
        number = quiet = 0
        while self._together(float(quiet < params["rounds"] and number < _MOST_TRIES * params["rounds"])):
            foreign, begin = self._foreign(), time.perf_counter()
            row: dict[str, Any] = {}
            for side in ("tracked", "silent") if number % 2 else ("silent", "tracked"):
                log = self._run.log_metrics if side == "tracked" else _nothing
                row[side] = self._window(log, warm_up, timed)
            row["foreign"] = (self._foreign() - foreign) / (time.perf_counter() - begin)
            if direct is not None:
                row["direct"] = {**direct.block(_DIRECT_STEPS, _DIRECT_PAUSE), "records": _DIRECT_STEPS * len(KEYS)}
            rounds.append(row)
            number += 1
            quiet += row["foreign"] <= _FOREIGN_CORES
        if direct is not None:
            direct.close()
            Path(params["found"]).write_text(json.dumps({"rounds": rounds, "before": before}))
        self._together(0)

    def _pace(self) -> float:
        """Steps per second, the same number on all ranks."""
        self._steps(40, _nothing)
        begin = time.perf_counter()
        self._steps(60, _nothing)
        return float(self._together(60 / (time.perf_counter() - begin)))

    def _window(self, log: Callable[[dict[str, Any]], None], warm_up: int, timed: int) -> dict[str, Any]:
        begin, cpu = time.perf_counter(), self._cpu()
        self._steps(warm_up, log)
        self._together(0)
        begin_timed = time.perf_counter()
        self._steps(timed, log)
        self._together(0)
        seconds = time.perf_counter() - begin_timed
        lag = self._deliver()
        return {
            "steps": timed,
            "seconds": seconds,
            "lag": lag,
            "records": (warm_up + timed) * len(KEYS) if log is not _nothing else 0,
            "cpu": self._cpu() - cpu,
            "cpu_seconds": time.perf_counter() - begin,
        }

    def _deliver(self) -> float:
        """Wait until the backends have everything; returns how long that took, in seconds."""
        begin = time.perf_counter()
        if self._is_first:
            sender = self._run.tracker._sender
            if not (sender.flush(_DELIVERY_SECONDS) and sender._transport.call("wait_delivered", _DELIVERY_SECONDS)):
                raise RuntimeError(f"the backends did not take the records within {_DELIVERY_SECONDS:.0f} s")
        lag = time.perf_counter() - begin
        time.sleep(_SETTLE_SECONDS)  # W&B's own process works on
        self._together(0)
        return lag

    def _together(self, value: float) -> Any:
        """Wait for the other ranks; everyone gets rank 0's value."""
        from ray_tracking.runtime.collective import broadcast

        return broadcast(value)

    def _foreign(self) -> float:
        """CPU seconds so far of everything on the machine but this benchmark, stolen ones included; on rank 0."""
        return machine_cpu() - tree_cpu(self._run.params["driver"]) if self._is_first else 0.0

    def _cpu(self) -> float:
        """CPU seconds so far: the tracker's process with its children, and the sender's threads in this one."""
        if not self._is_first:
            return 0.0
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("ray-tracking-")]
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread.ident]
        return tree_cpu(self._tracker) + sum(time.clock_gettime(clock) for clock in clocks)
