"""MLflow's real server behind a proxy that hangs, resets, delays, refuses, limits, fails, loses replies.

In each: the journal takes records as before, one warning, and in the end every point once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.tracking.cursor import BackendState
from tests.tracking.fakes import wait_until
from tests.tracking.faults.conftest import SECONDS, Track, in_mlflow, journaled
from tests.tracking.proxy import Answer, Hanging, LosingReplies, Mode, Passing, Proxy, Resetting

JOURNAL_SECONDS = 4.0
"""What a batch may take on a machine that is busy with other tests: a backend's time-out and the delay are longer."""


@pytest.fixture
def proxy(mlflow_server: MLflowServer) -> Iterator[Proxy]:
    with Proxy(mlflow_server.uri) as running:
        yield running


def through(proxy: Proxy, **delivery: float) -> dict[str, dict[str, object]]:
    return {"mlflow": {"enabled": True, "tracking_uri": proxy.uri}, "delivery": {"final_secs": SECONDS, **delivery}}


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if "[warning" in line or "[error" in line]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        pytest.param(Hanging(), "timed out", id="hangs"),
        pytest.param(Resetting(), "reset", id="resets"),
        pytest.param(Answer(500), "500", id="500"),
        pytest.param(Answer(503, {"Retry-After": "1"}), "503", id="503", marks=pytest.mark.slow),
        pytest.param(LosingReplies(), "reset", id="reply lost"),
    ],
)
def test_in_the_middle(
    mode: Mode,
    said: str,
    proxy: Proxy,
    track: Track,
    mlflow_server: MLflowServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = track(through(proxy))
    run.log(20)
    run.wait_delivered()
    with proxy.behaving(mode):
        run.log(1)
        run.wait_for(BackendState.FAILING)
        wait_until(lambda: said in (run.cursor().error or ""), SECONDS)
        failed, met = time.monotonic(), len(proxy.times)
        while time.monotonic() - failed < 2.5:  # the first waits are 1 s and 2 s
            run.log(5)
            time.sleep(0.05)
        assert len(proxy.times) - met <= 4  # two tries at most, of two calls at most
        assert run.cursor().state is BackendState.FAILING
    run.wait_delivered()
    run.log(20)
    assert run.close()["mlflow"]["state"] == "complete"
    assert run.journaled < JOURNAL_SECONDS
    assert in_mlflow(mlflow_server, run) == journaled(run)
    (warning,) = warnings(capsys.readouterr().err)
    assert "backend fails" in warning


def test_a_delay_of_five_seconds_is_only_a_delay(
    proxy: Proxy,
    track: Track,
    mlflow_server: MLflowServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")  # as it is by default
    run = track(through(proxy))
    run.log(20)
    run.wait_delivered()
    with proxy.behaving(Passing(delay=5.0)):
        run.log(20)
        run.wait_delivered()
    assert run.close()["mlflow"]["state"] == "complete"
    assert run.journaled < JOURNAL_SECONDS
    assert in_mlflow(mlflow_server, run) == journaled(run)
    assert warnings(capsys.readouterr().err) == []


def test_a_delay_beyond_the_deadline_is_said_once(
    proxy: Proxy, track: Track, mlflow_server: MLflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run = track(through(proxy, deadline_secs=0.5))
    run.log(20)
    run.wait_delivered()
    capsys.readouterr()  # on a busy machine it may have taken longer to begin, too: that was its one warning then
    with proxy.behaving(Hanging()):
        run.log(20)
        run.wait_for(BackendState.HANGING)
        run.wait_for(BackendState.FAILING)  # by its own time-out
        run.wait_for(BackendState.HANGING)
        said = capsys.readouterr().err
    run.wait_delivered()
    assert run.close()["mlflow"]["state"] == "complete"
    assert in_mlflow(mlflow_server, run) == journaled(run)
    assert (said.count("backend hangs"), said.count("backend fails")) == (1, 0)
    assert len(warnings(said)) <= 1


@pytest.mark.parametrize(
    ("asked", "least"), [("4", 4.0), pytest.param("Wed, 21 Oct 2015 07:28:00 GMT", 1.0, marks=pytest.mark.slow)]
)
def test_429_is_left_alone_for_as_long_as_it_asked(
    asked: str,
    least: float,
    proxy: Proxy,
    track: Track,
    mlflow_server: MLflowServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A date that has passed is no reason to ask at once."""
    run = track(through(proxy))
    run.log(20)
    run.wait_delivered()
    with proxy.behaving(Answer(429, {"Retry-After": asked})):
        run.log(1)
        run.wait_for(BackendState.FAILING)
        last = proxy.times[-1]
    run.log(20)
    wait_until(lambda: proxy.times[-1] > last, SECONDS)
    assert next(met for met in proxy.times if met > last) - last >= least
    run.wait_delivered()
    assert run.close()["mlflow"]["state"] == "complete"
    assert in_mlflow(mlflow_server, run) == journaled(run)
    assert len(warnings(capsys.readouterr().err)) == 1


@pytest.mark.parametrize("status", [401, pytest.param(403, marks=pytest.mark.slow)])
def test_refused_it_is_disabled_and_left_alone(
    status: int, proxy: Proxy, track: Track, capsys: pytest.CaptureFixture[str]
) -> None:
    run = track(through(proxy))
    run.log(20)
    run.wait_delivered()
    capsys.readouterr()
    with proxy.behaving(Answer(status)):
        run.log(1)
        run.wait_for(BackendState.DISABLED)
        met = len(proxy.times)
        run.log(20)
        time.sleep(2.5)
    run.log(20)
    report = run.close()["mlflow"]
    assert len(proxy.times) == met
    assert (report["state"], report["pending"]) == ("disabled", 2 * 41)
    assert "MLFLOW_TRACKING_USERNAME" in report["error"]
    (warning,) = warnings(capsys.readouterr().err)
    assert "backend disabled" in warning


@pytest.mark.parametrize(
    ("mode", "final"),
    [
        pytest.param(Hanging(), 3.0, id="hangs", marks=pytest.mark.slow),
        pytest.param(Answer(500), 3.0, id="500", marks=pytest.mark.slow),
        pytest.param(Answer(429, {"Retry-After": "3600"}), 60.0, id="429"),
    ],
)
def test_at_the_end_it_is_waited_for_in_bounds(mode: Mode, final: float, proxy: Proxy, track: Track) -> None:
    run = track(through(proxy, final_secs=final))
    run.log(20)
    run.wait_delivered()
    proxy.mode = mode
    run.log(20)
    began = time.monotonic()
    report = run.close()["mlflow"]
    assert time.monotonic() - began < 3.0 + 15.0
    assert (report["state"], report["pending"]) == ("pending", 40)
    assert report["error"]


def test_from_the_start_until_the_middle(proxy: Proxy, track: Track, mlflow_server: MLflowServer) -> None:
    proxy.mode = Resetting()
    run = track(through(proxy))
    run.log(50)
    run.wait_for(BackendState.FAILING)
    proxy.mode = Passing()
    run.wait_delivered()
    run.log(50)
    assert run.close()["mlflow"]["state"] == "complete"
    assert in_mlflow(mlflow_server, run) == journaled(run)


@pytest.mark.slow
def test_whatever_happens_one_after_the_other(proxy: Proxy, track: Track, mlflow_server: MLflowServer) -> None:
    run = track(through(proxy))
    for mode in (LosingReplies(), Resetting(), LosingReplies()):
        run.log(30)
        met = len(proxy.times)
        with proxy.behaving(mode):
            wait_until(lambda met=met: len(proxy.times) > met, SECONDS)  # type: ignore[misc]
            run.log(30)
            time.sleep(0.3)
    assert run.close()["mlflow"]["state"] == "complete"
    assert in_mlflow(mlflow_server, run) == journaled(run)
