from __future__ import annotations

import io
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.cli import progress
from ray_tracking.cli.progress import ProgressView, describe, rate, remember, time_left
from ray_tracking.runtime.result import Progress


def report(step: int = 120, elapsed: float = 61.0, **fields: object) -> Progress:
    values = {
        "run_id": "r", "phase": "training", "step": step, "total_steps": 1000, "epoch": 1, "total_epochs": 5,
        "loss_key": "train/loss", "loss": 0.43218, "elapsed": elapsed, "backends": {"mlflow": "ok"}, **fields,
    }  # fmt: skip
    return Progress(**values)


def fed(*pairs: tuple[float, int]) -> list[tuple[float, int]]:
    samples: list[tuple[float, int]] = []
    for pair in pairs:
        samples = remember(samples, pair)
    return samples


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([], None),
        ([(0.0, 5)], None),
        ([(1.0, 5), (1.0, 6)], None),
        ([(1.0, 5), (3.0, 5)], None),
        ([(1.0, 5), (3.0, 9)], 2.0),
        ([(0.0, 0), (60.0, 60), (75.0, 360), (90.0, 660)], 20.0),  # the slow minute at the start is forgotten
    ],
)
def test_rate_is_over_the_window(samples: list[tuple[float, int]], expected: float | None) -> None:
    assert rate(fed(*samples)) == expected


def test_a_new_attempt_starts_the_rate_afresh() -> None:
    assert rate(fed((0.0, 0), (1.0, 100), (2.0, 50), (3.0, 60))) == pytest.approx(10.0)


@given(st.lists(st.tuples(st.floats(0, 5, exclude_min=True), st.integers(1, 50)), min_size=2, max_size=200))
def test_a_steady_memory_and_a_rate_between_the_slowest_and_the_quickest(
    moves: list[tuple[float, int]],
) -> None:
    samples: list[tuple[float, int]] = []
    elapsed, step = 0.0, 0
    for seconds, steps in moves:
        elapsed, step = elapsed + seconds, step + steps
        samples = remember(samples, (elapsed, step))
        assert all(at > elapsed - progress.WINDOW_SECONDS for at, _ in samples[1:])
    rates = [steps / seconds for seconds, steps in moves]
    shown = rate(samples)
    if shown is not None:
        assert min(rates) * 0.999 <= shown <= max(rates) * 1.001


@pytest.mark.parametrize(
    ("step", "total", "per_second", "left"),
    [
        (10, None, 1.0, None),
        (10, 20, None, None),
        (10, 20, 0.0, None),
        (10, 20, 2.0, 5.0),
        (25, 20, 2.0, 0.0),
    ],
)
def test_time_left(step: int, total: int | None, per_second: float | None, left: float | None) -> None:
    assert time_left(step, total, per_second) == left


def test_the_line() -> None:
    line = describe(report(), 12.345)
    assert line == "training  step 120/1000  epoch 2/5  12.3 steps/s  train/loss 0.43218  1m 01s  1m 11s left"


def test_the_line_leaves_out_what_is_not_known_and_names_ailing_backends() -> None:
    line = describe(
        report(
            total_steps=None,
            total_epochs=None,
            epoch=0,
            loss=None,
            backends={"mlflow": "failing", "wandb": "ok"},
        ),
        None,
    )
    assert line == "training  step 120  1m 01s  mlflow failing"
    assert describe(report(phase="starting", elapsed=3.0), None) == "starting  3s"


def test_a_loss_that_diverged_and_odd_names_do_not_break_it() -> None:
    line = describe(report(loss=float("nan"), loss_key="[red]\x1b[2J"), 1.0)
    assert "[red]?[2J nan" in line


def test_plain_lines_come_every_ten_seconds_and_at_once_for_a_new_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    with ProgressView(live=False, clock=lambda: now[0]) as view:
        view.report(report(0, 0.0, phase="starting"))
        for half_seconds in range(50):
            now[0] = half_seconds / 2
            view.report(report(half_seconds, now[0]))
    view.report(report(99))  # a thread that comes late
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["starting", "0s"], ["training", "step", "0/1000"], ["training", "step", "20/1000"],
        ["training", "step", "40/1000"], ["training", "step", "49/1000"],
    ]  # fmt: skip


def test_a_live_line_ends_with_its_last_state(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    view = ProgressView()
    with view:
        thread = threading.Thread(target=lambda: [view.report(report(step, step / 2)) for step in range(1, 40)])
        thread.start()
        thread.join()
    assert terminal.getvalue().rstrip().endswith("left")
    assert "step 39/1000" in terminal.getvalue().splitlines()[-1]


def test_the_time_before_the_first_step_is_no_part_of_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(live=False, clock=lambda: 0.0) as view:
        view.report(report(0, 0.0, phase="starting"))
        view.report(report(0, 20.0, phase="starting"))
        view.report(report(10, 21.0))
        view.report(report(30, 22.0))
    assert "20 steps/s" in capsys.readouterr().err.splitlines()[-1]
