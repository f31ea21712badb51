"""The pure parts of the benchmarks: statistics, verdicts, table and JSON, which figures there are. Nothing is timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench import __main__ as command
from tests.bench import machine, registry, report
from tests.bench.measures import (
    Measurement,
    Setup,
    Side,
    absolute,
    at_least,
    at_most,
    difference,
    interquartile_range,
    percentile,
    ratio,
    speedup,
)
from tests.bench.p2_training_speed import undisturbed

SLOWER = Side("ours", (2.0, 4.0, 9.0))
BASE = Side("base", (1.0, 2.0, 3.0))


def test_a_ratio_is_taken_pair_by_pair() -> None:
    found = ratio("P1", "calls", "s", SLOWER, BASE, at_most(2.0))
    assert found.results == (2.0, 2.0, 3.0)
    assert found.result == 2.0  # the ratio of the medians would be 2 as well, that of the means 2.5
    assert found.is_met
    disturbed = ratio("P1", "calls", "s", Side("a", (1, 10, 1)), Side("b", (1, 10, 4)), at_most(1.0))
    assert disturbed.result == 1.0


def test_a_speedup_turns_times_into_how_many_times_faster() -> None:
    found = speedup("P1", "calls", "s", BASE, SLOWER, at_least(2.5))
    assert found.result == 2.0
    assert not found.is_met


def test_a_difference_keeps_the_unit() -> None:
    found = difference("P8", "import", "s", SLOWER, BASE, at_most(2.0))
    assert (found.results, found.result_unit, found.is_met) == ((1.0, 2.0, 6.0), "s", True)


def test_one_side_alone_is_held_against_its_goal() -> None:
    assert absolute("P8", "--help", "s", BASE, at_most(2.0)).is_met
    assert not absolute("P8", "--help", "s", BASE, at_most(1.9)).is_met


def test_sides_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples of ours, 1 of base"):
        ratio("P1", "calls", "s", SLOWER, Side("base", (1.0,)), at_most(2.0))


@pytest.mark.parametrize(
    ("goal", "result", "met"),
    [
        (at_most(3.0), 3.0, True),
        (at_most(3.0), 3.0001, False),
        (at_least(0.98), 0.98, True),
        (at_least(0.98), 0.9799, False),
        (at_most(3.0), math.nan, False),
        (at_least(0.98), math.nan, False),
    ],
)
def test_the_bound_itself_is_good_enough_and_nan_never_is(goal: object, result: float, met: bool) -> None:
    assert goal.is_met_by(result) is met  # type: ignore[attr-defined]


def test_percentiles_are_samples_by_nearest_rank() -> None:
    samples = list(range(1, 101))
    assert [percentile(samples, p) for p in (0, 1, 50, 99, 99.5, 100)] == [1, 1, 50, 99, 100, 100]
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_a_percentile_bounds_its_share_of_the_samples(samples: list[float], percent: float) -> None:
    found = percentile(samples, percent)
    assert found in samples
    assert sum(sample <= found for sample in samples) >= len(samples) * percent / 100 - 1e-9


def test_the_spread_is_the_interquartile_range() -> None:
    assert interquartile_range([1, 2, 3, 4, 5]) == 2
    assert interquartile_range([3.0]) == 0.0
    assert interquartile_range([1, 2, 3, 4, 1000]) == 2  # one wild sample changes nothing


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (4.3e-7, "s", "430 ns"),
        (6.13e-6, "s", "6.13 µs"),
        (0.0108, "s", "10.8 ms"),
        (2.5, "s", "2.50 s"),
        (0.0, "s", "0 s"),
        (0.9812, "x", "0.981x"),
        (2.4567, "x", "2.46x"),
        (21113.4, "x", "21113x"),
        (70.25, "steps/s", "70.2 steps/s"),
        (0.0, "", "0"),
        (math.nan, "x", "nanx"),
    ],
)
def test_quantities_are_readable(number: float, unit: str, text: str) -> None:
    assert report.quantity(number, unit) == text


def test_the_table_shows_both_sides_the_goal_and_the_verdict() -> None:
    met = ratio("P2", "speed", "steps/s", SLOWER, BASE, at_least(0.98))
    missed = replace(absolute("P8", "--help", "s", Side("x", (0.5,)), at_most(0.4)), note="disk was cold")
    lines = report.table([met, missed]).splitlines()
    assert lines[0].split() == ["figure", "what", "ours", "base", "result", "goal", "verdict"]
    assert " ".join(lines[2].split()) == "P2 speed 4 steps/s ± 3.50 steps/s 2 steps/s ± 1 steps/s 2x ≥ 0.980x met"
    assert " ".join(lines[3].split()) == "P8 --help 500 ms ± 0 s 500 ms ≤ 400 ms MISSED"
    assert lines[4] == "P8: disk was cold"


def test_the_json_says_all(tmp_path: Path) -> None:
    found = ratio("P1", "calls", "s", SLOWER, BASE, at_most(2.0))
    content = report.document("P1", "a title", [found], {"cores": 2}, quick=True, seconds=1.26)
    path = report.write(tmp_path / "new", content)
    assert path.name == "P1.json"
    read = json.loads(path.read_text())
    assert (read["figure"], read["met"], read["quick"], read["seconds"]) == ("P1", True, True, 1.3)
    assert read["machine"] == {"cores": 2}
    (one,) = read["measurements"]
    assert one["ours"] == {"name": "ours", "samples": [2.0, 4.0, 9.0], "median": 4.0, "iqr": 3.5}
    assert (one["result"], one["goal"], one["met"]) == (2.0, {"bound": 2.0, "at_most": True}, True)


def test_a_figure_without_measurements_is_not_met() -> None:
    assert report.document("P1", "", [], {}, quick=False, seconds=0)["met"] is False


def test_figures_are_the_files_named_so_in_order(tmp_path: Path) -> None:
    for name in ("p10_last", "p2_second", "p3x", "plot"):
        (tmp_path / f"{name}.py").write_text('"""The title.\n\nMore."""\nraise SystemExit("imported")\n')
    found = registry.figures(tmp_path)
    assert [(figure.name, figure.module, figure.title) for figure in found] == [
        ("P2", "p2_second", "The title."),
        ("P10", "p10_last", "The title."),
    ]


def test_the_figures_of_the_design_are_there() -> None:
    found = {figure.name: figure for figure in registry.figures()}
    assert {"P1", "P2", "P8"} <= found.keys()
    assert all(callable(figure.load()) for figure in found.values())


def test_figures_are_chosen_by_name() -> None:
    known = registry.figures()
    assert registry.chosen(known, []) == known
    assert [figure.name for figure in registry.chosen(known, ["p8", "P1"])] == ["P1", "P8"]
    with pytest.raises(ValueError, match="no figure P99"):
        registry.chosen(known, ["P1", "p99"])


def _fake(name: str, *results: float) -> registry.Figure:
    class Fake(registry.Figure):
        def load(self):  # type: ignore[no-untyped-def]
            def measure(setup: Setup) -> list[Measurement]:
                if not results:
                    raise RuntimeError("no such thing")
                return [absolute(name, "it", "s", Side("x", results), at_most(1.0))]

            return measure

    return Fake(name, "fake", f"{name}'s title")


@pytest.mark.parametrize(
    ("figures", "status", "verdicts"),
    [
        ([_fake("P1", 0.5), _fake("P2", 1.0)], 0, ["met", "met"]),
        ([_fake("P1", 0.5), _fake("P2", 1.5)], 1, ["met", "MISSED"]),
        ([_fake("P1"), _fake("P2", 0.5)], 1, ["met"]),  # one that breaks keeps no other from being measured
    ],
)
def test_the_exit_status_is_the_verdict(
    figures: list[registry.Figure],
    status: int,
    verdicts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "figures", lambda: figures)
    monkeypatch.setattr(machine, "isolate", lambda home: None)
    assert command.main(["--output", str(tmp_path)]) == status
    table = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("met", "MISSED"))]
    assert [line.split()[-1] for line in table if "measured:" not in line] == verdicts
    assert len(list(tmp_path.glob("P*.json"))) == len(verdicts)


def test_an_unknown_figure_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "P99", "--output", str(tmp_path)]) == 2
    assert "no figure P99; there are P1" in capsys.readouterr().err


def test_the_machine_is_described() -> None:
    found = machine.machine()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert len(found["load_average"]) == 3
    assert found["versions"]["numpy"]
    json.dumps(found)


def test_cpu_time_counts_children_that_live_and_that_have_ended() -> None:
    """In a process of its own: this one's other children (a Ray cluster, say) come and go."""
    check = "from tests.test_bench import check_cpu_time; check_cpu_time()"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1])


def check_cpu_time() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    before, everything = machine.tree_cpu(os.getpid()), machine.machine_cpu()
    subprocess.run([sys.executable, "-c", burn], check=True)
    after = machine.tree_cpu(os.getpid())
    assert after - before >= 0.25
    assert machine.machine_cpu() - everything >= 0.2
    living = subprocess.Popen(
        [sys.executable, "-c", f"{burn}print(flush=True)\nimport sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert living.stdout is not None
    try:
        living.stdout.readline()
        assert machine.tree_cpu(living.pid) >= 0.25
        assert machine.tree_cpu(os.getpid()) - after >= 0.25
        assert machine.child_named(os.getpid(), sys.executable) == living.pid
    finally:
        living.communicate()


def _round(foreign: float) -> dict[str, dict[str, float]]:
    quiet = {"foreign": 0.01, "whole_seconds": 2.0}
    return {"before": quiet, "tracked": quiet, "after": {"foreign": foreign, "whole_seconds": 2.0}}


def test_disturbed_rounds_are_not_counted_unless_most_are() -> None:
    quiet, loud = _round(0.02), _round(0.5)
    assert undisturbed([quiet, loud, quiet], 2) == [quiet, quiet]
    assert undisturbed([loud, quiet], 2) == [quiet]
    assert undisturbed([loud, loud, quiet], 4) == [loud, loud, quiet]
