"""What a training loop sees of a backend that misbehaves: nothing. The tracker is a process of its own here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.tracking import syncing
from ray_tracking.tracking.composite import CompositeTracker
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.recorded import tracking_of
from tests.readback import comparable, mlflow_points
from tests.tracking.fakes import wait_until
from tests.tracking.faults.conftest import OFF, SECONDS
from tests.tracking.proxy import Answer, Hanging, LosingReplies, Mode, Passing, Proxy, Resetting

P99_SECONDS = 0.005
"""A backend's least time-out is a thousand times that."""
_CALLS = 300
_PAUSE_SECONDS = 0.001

MODES: dict[str, Mode] = {
    "hangs": Hanging(),
    "resets": Resetting(),
    "delays 5 s": Passing(delay=5.0),
    "500": Answer(500),
    "429": Answer(429, {"Retry-After": "1"}),
    "loses replies": LosingReplies(),
    "401": Answer(401),  # the last: it is disabled by it
}


@pytest.fixture
def proxy(mlflow_server: MLflowServer) -> Iterator[Proxy]:
    with Proxy(mlflow_server.uri) as running:
        yield running


def p99(tracker: CompositeTracker, step: int) -> float:
    seconds = []
    for i in range(step, step + _CALLS):
        metrics = {f"m{k}": i + k / 10 for k in range(10)}
        began = time.perf_counter()
        tracker.log_metrics(metrics, step=i)
        seconds.append(time.perf_counter() - began)
        time.sleep(_PAUSE_SECONDS)
    return statistics.quantiles(seconds, n=100)[98]


@pytest.mark.slow
def test_log_metrics_takes_as_long_as_ever_and_nothing_is_lost(
    tmp_path: Path, proxy: Proxy, mlflow_server: MLflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**OFF, "mlflow": {"enabled": True, "tracking_uri": proxy.uri}, "delivery": {"final_secs": 2}}
    tracker = CompositeTracker(config, storage=str(tmp_path))
    run_id = tracker.init_experiment("faults")
    directory = Storage.open(tmp_path).child(run_id)
    wait_until(lambda: proxy.seen["Passing"] > 0, SECONDS)  # its client is loaded
    found = {"passes": p99(tracker, 0)}
    for mode_name, mode in MODES.items():
        kind = type(mode).__name__
        met = proxy.seen[kind]
        with proxy.behaving(mode):
            found[mode_name] = p99(tracker, _CALLS * len(found))
            wait_until(lambda kind=kind, met=met: proxy.seen[kind] > met, SECONDS)  # type: ignore[misc]
    wait_until(lambda: Cursor.load(directory, "mlflow").state is BackendState.DISABLED, SECONDS)
    tracker.finalize_experiment()
    print("p99 of log_metrics, in µs:", {name: round(seconds * 1e6, 1) for name, seconds in found.items()})
    assert max(found.values()) < P99_SECONDS

    effective = JournalReader(directory).effective()
    logged = comparable(zip(*(effective[name].to_pylist() for name in ("key", "step", "value")), strict=True))
    assert len(logged) == 10 * _CALLS * len(found)
    assert Cursor.load(directory, "mlflow").state is BackendState.DISABLED
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    store = RunStore(Storage.open(tmp_path))
    record = store.load(run_id)
    (outcome,) = syncing.sync(store, record, tracking_of(record, Cursor.load_all(directory), {}))
    assert outcome.state is BackendState.COMPLETE
    assert comparable(mlflow_points(mlflow_server.uri, Cursor.load(directory, "mlflow").run_id or "")) == logged
