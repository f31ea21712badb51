from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

from ray_tracking.cli.sweep import shown
from ray_tracking.cli.sweep_progress import SweepProgressView, drawn, param_columns, shown_trials, summary
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore, TrialRecord, TrialStatus
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars


def a_sweep(store: RunStore) -> None:
    """Three trials: one completed, one failed, one under way."""
    RunBuilder(store, "s")
    sweep = SweepStore(store, "s")
    sweep.create("val/loss", "min", {})
    now = time.time()
    for number, status, reason, value in (
        (1, TrialStatus.FAILED, "ValueError: no", 0.125),
        (2, TrialStatus.COMPLETED, "completed", 0.25),
        (3, TrialStatus.RUNNING, None, None),
    ):
        builder = RunBuilder(store, f"s.trial-{number:03d}").log(scalars([1, 2, 4][: 4 - number]))
        if status.is_over:
            builder.finish()
        params = {"lr": 0.01 * number, "optimizer": {"kind": "adam"}}
        sweep.save(TrialRecord(number, params, status, reason, value=value, started=now - 9, ended=now))


def test_show(cli: Cli, store: RunStore) -> None:
    a_sweep(store)
    done = cli("sweep", "show", "latest")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines() if "optimizer.kind=adam" in line]
    assert [row[:3] for row in rows[:3]] == [
        ["2", "completed", "0.25"],
        ["3", "running", "1"],
        ["1", "failed", "0.125"],
    ]
    assert "Trial 1 failed: ValueError: no" in done.out
    assert "trial 2, val/loss 0.25" in done.out


def test_show_json(cli: Cli, store: RunStore) -> None:
    a_sweep(store)
    document = json.loads(cli("sweep", "show", "s", "--json").out)
    assert [trial["status"] for trial in document["trials"]] == ["failed", "completed", "running"]
    assert document["trials"][1]["metrics"]["val/loss"] == {"last": 0.5, "best": 0.5}
    assert document["trials"][1]["params"] == {"lr": 0.02, "optimizer": {"kind": "adam"}}
    assert document["trials"][0]["reason"] == "ValueError: no"
    assert document["best"]["run_id"] == "s.trial-002"
    assert document["ranking"] == [2, 3, 1]


def test_trials_do_not_stand_among_the_runs_but_are_found_by_their_ids(cli: Cli, store: RunStore) -> None:
    a_sweep(store)
    assert [line["run_id"] for line in json.loads(cli("runs", "ls", "--json").out)] == ["s"]
    assert json.loads(cli("runs", "show", "s.trial-002", "--json").out)["run_id"] == "s.trial-002"


def test_a_run_that_is_no_sweep_is_told(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "plain")
    done = cli("sweep", "show", "plain")
    assert done.code == 2
    assert "'plain' is no sweep" in done.err


def test_a_trial_alone_is_not_resumed(cli: Cli, store: RunStore) -> None:
    a_sweep(store)
    done = cli("resume", "s.trial-003")
    assert done.code == 2
    assert "ray-tracking resume s" in done.err


def test_a_bad_space_is_told_before_anything_starts(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("sweep:\n  space:\n    lr: {loguniform: [0, 1]}\n")
    done = cli("sweep", "ray_tracking.examples.digits:train", "-c", str(file))
    assert done.code == 2
    assert f"{file}, line 3: sweep.space.lr.loguniform: found [0, 1]" in done.err


def test_options_may_come_before_the_target(cli: Cli, store: RunStore) -> None:
    done = cli("sweep", "--set", "sweep.space={}", "ray_tracking.examples.digits:train")
    assert done.code == 2
    assert "sweep.space: found an empty mapping" in done.err


def test_progress_says_how_far_it_is_and_what_is_best(capsys) -> None:
    from ray_tracking.runtime.sweep.result import SweepProgress

    trials = [
        TrialRecord(1, {"lr": 0.1}, TrialStatus.COMPLETED, value=0.5),
        TrialRecord(2, {"lr": 0.2}, TrialStatus.FAILED),
        TrialRecord(3, {"lr": 0.3}, TrialStatus.RUNNING, value=0.25),
    ]
    report = SweepProgress(
        "s", "val/loss", "min", trials, 5, {3: {"step": 7, "metrics": {"val/loss": 0.3}}}, 61.0, 30.0
    )
    line = "2/5 trials  1 running  1 failed  best val/loss 0.25 (trial 3)  1m 01s  30s left"
    assert summary(report) == line
    with SweepProgressView(live=False) as view:
        view.report(report)
        view.report(report)
    assert capsys.readouterr().err.count("2/5 trials") == 1


def test_params_are_shown_in_one_line() -> None:
    assert shown({"lr": 0.0012345678, "o": {"kind": "adam", "betas": [0.9, 0.99]}}) == (
        "lr=0.0012346 o.kind=adam o.betas=[0.9, 0.99]"
    )


def _under_way(count: int) -> Any:
    from ray_tracking.runtime.sweep.result import SweepProgress

    trials = [
        TrialRecord(
            number,
            {"lr": 0.001 * number, "width": 32, "optimizer": {"kind": "sgd", "momentum": 0.01 * number}},
            TrialStatus.RUNNING if number in (2, count) else TrialStatus.COMPLETED,
            value=1.0 if number == 3 else 2.0,
        )
        for number in range(1, count + 1)
    ]
    return SweepProgress("s", "val/loss", "min", trials, count, {2: {"step": 7, "metrics": {}}}, 61.0, 30.0)


def test_the_live_table_fits_the_terminal_and_keeps_what_runs_and_the_best() -> None:
    from rich.console import Console

    report = _under_way(30)
    assert [trial.number for trial in shown_trials(report, 6)] == [2, 3, 27, 28, 29, 30]
    screen = Console(width=70, height=14, record=True, file=io.StringIO(), force_terminal=True)
    screen.print(drawn(report, 14))
    lines = screen.export_text().splitlines()
    assert len(lines) <= 14
    assert lines[0].startswith("28/30 trials  2 running  best val/loss 1 (trial 3)")
    assert "30s left" in " ".join(lines[:2])
    (head,) = [line for line in lines if "trial  status" in line]
    assert head.split() == ["trial", "status", "step", "now", "best", "lr", "momentum"]
    assert lines[-1].strip() == "and 22 more"


def test_params_that_differ_have_columns_with_short_headings() -> None:
    trials = [
        TrialRecord(1, {"a": {"lr": 1, "width": 8}, "b": {"lr": 2}}),
        TrialRecord(2, {"a": {"lr": 3, "width": 8}, "b": {"lr": 4}, "depth": {"of": 5}}),
    ]
    assert param_columns(trials) == {"a.lr": "a.lr", "b.lr": "b.lr", "depth.of": "of"}
    assert param_columns(trials[:1]) == {"a.lr": "a.lr", "a.width": "width", "b.lr": "b.lr"}
    assert param_columns([]) == {}
