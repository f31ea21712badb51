"""The pure parts of the benchmarks: statistics, verdicts, table and JSON, which figures there are. Nothing is timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_tracking.checkpoint import CheckpointManager, CheckpointStore
from ray_tracking.examples.gpt_model import optimizer_for
from ray_tracking.storage import Storage
from tests.bench import __main__ as command
from tests.bench import (
    fresh_process,
    machine,
    other_savers,
    p3_checkpoint_stall,
    p4_sealed_save_and_restore,
    p9_growth,
    registry,
    report,
)
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
from tests.bench.p2_training_speed import speed, undisturbed
from tests.bench.state_workload import Memcpy, Workload, fastest

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
    assert {"P1", "P2", "P3", "P4", "P5", "P8", "P9"} <= found.keys()
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


def _round(foreign: float = 0.01, *, tracked: int = 49, silent: int = 50) -> dict[str, dict[str, float]]:
    quiet = {"steps": silent, "seconds": 1.0, "foreign": 0.01}
    return {"before": quiet, "tracked": quiet | {"steps": tracked}, "after": quiet | {"foreign": foreign}}


def test_p2_leaves_out_rounds_in_which_others_were_busy_unless_most_are_so() -> None:
    quiet, loud = _round(), _round(0.2)
    assert undisturbed([quiet, loud, quiet]) == [quiet, quiet]
    assert undisturbed([loud, quiet]) == [quiet]
    assert undisturbed([loud, loud, quiet]) == [loud, loud, quiet]


def test_p2_is_the_speed_of_the_tracked_windows_against_the_silent_ones_beside_them() -> None:
    def block(*rounds: dict[str, Any]) -> dict[str, Any]:
        return {"rounds": list(rounds), "cpu": 0.06, "records": 1000, "direct": {"cpu": 0.8, "records": 1000}}

    found = speed([block(_round(), _round(0.2, tracked=10), _round(tracked=47)), block(_round())])
    assert found.results == pytest.approx((0.96, 0.98))
    assert found.result == pytest.approx(0.97)
    assert not found.is_met
    assert "took 3.0% of a core while logging; 1 rounds" in found.note


# -- checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Workload:
    return Workload.build("tiny")


def _changed(workload: Workload) -> Workload:
    """Of the same kind, with other values everywhere."""
    other = Workload.build("tiny", seed=1)
    assert not any(map(torch.equal, _weights_and_moments(other), _weights_and_moments(workload)))
    return other


def _weights_and_moments(workload: Workload) -> list[torch.Tensor]:
    return [tensor for tensor in workload.tensors if tensor.dim() > 1]


def _are_equal(one: Workload, other: Workload) -> bool:
    return len(one.tensors) == len(other.tensors) and all(map(torch.equal, one.tensors, other.tensors))


def test_the_workload_is_all_of_the_training_state(tiny: Workload) -> None:
    parameters = sum(parameter.nbytes for parameter in tiny.model.parameters())
    steps = 4 * len(list(tiny.model.parameters()))
    assert tiny.bytes == 3 * parameters + steps == sum(tensor.nbytes for tensor in tiny.flat().values())


def test_a_training_step_changes_every_weight_and_moment(tiny: Workload) -> None:
    workload = _changed(tiny)
    before = [tensor.clone() for tensor in _weights_and_moments(workload)]
    workload.step()
    assert not any(map(torch.equal, before, _weights_and_moments(workload)))


@pytest.mark.parametrize("way", ["_foreach_copy_", "copy_", "memmove"])
def test_the_base_copies_every_byte_in_each_of_its_ways(way: str) -> None:
    sources = [torch.randn(3_000_000), torch.tensor(2.5), torch.empty(0), torch.arange(7, dtype=torch.int64)]
    copy = Memcpy(sources)
    for target in copy.targets:
        target.zero_()
    copy.way = way
    copy()
    assert all(map(torch.equal, copy.targets, sources))
    assert not {target.data_ptr() for target in copy.targets if target.numel()} & {s.data_ptr() for s in sources}


def test_the_base_refuses_what_memmove_would_copy_wrongly() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Memcpy([torch.zeros(4, 4).t()[:2]])


def test_the_fastest_way_is_that_of_the_least_median() -> None:
    assert fastest({"a": [1.0, 5.0, 5.0], "b": [4.0, 4.0, 9.0], "c": [4.5]}) == "b"


@pytest.mark.parametrize("name", list(other_savers.SAVERS))
def test_the_other_savers_save_all_of_the_state(name: str, tiny: Workload, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    wait = other_savers.SAVERS[name](tiny, path)
    wait()
    restored = _changed(tiny)
    if name in (other_savers.TORCH, other_savers.DURABLE):
        other_savers.torch_load(restored, path)
    elif name == other_savers.SAFETENSORS:
        from safetensors.torch import load_file

        saved, live = load_file(path), tiny.flat()
        assert saved.keys() == live.keys()
        assert all(torch.equal(saved[key], live[key]) for key in live)
        restored = tiny
    else:
        other_savers.dcp_load(restored, path)
    assert _are_equal(restored, tiny)
    other_savers.clear(path)
    assert not path.exists()


def test_every_way_to_restore_into_a_new_optimizer_restores_all(tiny: Workload, tmp_path: Path) -> None:
    with CheckpointManager(CheckpointStore(Storage.open(tmp_path / "plain"))) as manager:
        manager.save_checkpoint(step=1, **tiny.objects)
    other_savers.dcp_save_by_name(tiny, tmp_path / "dcp")
    ways = [
        (fresh_process.restore_newest, "plain"),
        (p4_sealed_save_and_restore.by_manager, "plain"),
        (other_savers.dcp_load_anew, "dcp"),
    ]
    for load, folder in ways:
        model = _changed(tiny).model
        new = Workload(model, optimizer_for(model, 1e-3))
        load(new, tmp_path / folder)
        assert _are_equal(new, tiny)


def test_the_raw_write_is_of_the_same_bytes_and_leaves_no_file(tiny: Workload, tmp_path: Path) -> None:
    raw = p4_sealed_save_and_restore.RawWrite(tiny.tensors, tmp_path / "raw")
    assert bytes(raw.data) == b"".join(tensor.numpy().tobytes() for tensor in tiny.tensors)
    assert raw() > 0
    assert list(tmp_path.iterdir()) == []
    raw.create(1 << 20)
    assert (tmp_path / "raw").read_bytes() == bytes(raw.data)


def test_p3_holds_every_goal_against_its_own_base() -> None:
    steady = {
        "save_checkpoint": [0.04, 0.05],
        "memcpy": [0.04, 0.04],
        **{name: [0.8, 0.4] for name in other_savers.SAVERS},
    }
    first = {
        side: [{"stall": 0.3, "memcpy": 0.05, "prepared": 2.0, "steps": 7}] * 2
        for side in ("save_checkpoint, unprepared", "torch.save", "dcp.save", "dcp.async_save", "safetensors save_file")
    }
    first["save_checkpoint"] = [{"stall": stall, "memcpy": 0.03, "prepared": 2.0, "steps": 7} for stall in (0.03, 0.06)]
    found = {one.what: one for one in p3_checkpoint_stall.measurements(steady, [1.0, 3.0], first, "500 MB")}
    per_save = found["stall per save, against memcpy"]
    assert per_save.results == pytest.approx((1.0, 1.25))
    assert per_save.goal.bound == 1.3
    assert "Back to back, with 2 buffers, a save takes 2 s" in per_save.note
    early = found["stall of the first save, against memcpy"]
    assert early.result == pytest.approx(1.5)
    assert early.goal.bound == 1.5
    assert "2 s after the optimizer's second step (to step 7)" in early.note
    assert "300 ms, 6.00x the memcpy" in early.note
    assert found["stall per save, against torch.save"].results == pytest.approx((20.0, 8.0))
    assert found["stall per save, against torch.save"].goal.bound == 10
    assert found["stall of the first save, against torch.save"].results == pytest.approx((10.0, 5.0))
    assert len(found) == 2 + 6 + 4


def test_p4_is_a_speed_for_saves_and_a_ratio_for_restores() -> None:
    saves = {"sealed": [0.5], "plain": [0.4], "zstd": [1.0], "write + fsync": [0.4]}
    sides = ("memcpy", "load_into", "load_into, sealed", "load_latest_checkpoint + restore", "dcp.load", "torch.load")
    times = dict(zip(sides, (0.03, 0.06, 0.2, 0.3, 0.6, 0.4), strict=True))
    loads = {name + end: [seconds * (2 if end else 1)] for name, seconds in times.items() for end in ("", " anew")}
    fresh = {name: [0.9] for name in ("load_into", "dcp.load", "torch.load")}
    found = {
        one.what: one for one in p4_sealed_save_and_restore.measurements(saves, loads, fresh, 500_000_000, "one write")
    }
    sealed = found["sealed save, speed against write + fsync"]
    assert sealed.result == pytest.approx(0.8)
    assert sealed.is_met
    assert "1.25 GB/s, the save with zstd at 0.50 GB/s" in sealed.note
    for where in ("in place", "into a new optimizer"):
        assert found[f"restore {where}, against memcpy"].result == pytest.approx(2.0)
        assert found[f"restore {where}, against dcp.load"].result == pytest.approx(10.0)
    assert "torch.load 800 ms" in found["restore into a new optimizer, against dcp.load"].note


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_growth_is_the_exponent_of_the_power_law(power: float) -> None:
    assert p9_growth.exponent({count: 3e-6 * count**power for count in p9_growth.COUNTS}) == pytest.approx(power)


def test_quadratic_growth_misses_its_goal_and_linear_growth_meets_it() -> None:
    def costs(power: float) -> p9_growth.Costs:
        return {"listing": {count: [1e-6 * count**power] * 3 for count in p9_growth.COUNTS}}

    (linear,) = p9_growth.measurements(costs(1.0))
    assert linear.is_met
    assert linear.ours.median == pytest.approx(1e-6)
    assert "per checkpoint 1 µs at 100, 1 µs at 1,000, 1 µs at 10,000; 10 ms for all 10,000" in linear.note
    (quadratic,) = p9_growth.measurements(costs(2.0))
    assert quadratic.result == pytest.approx(2.0)
    assert not quadratic.is_met


def test_the_checkpoints_whose_growth_is_measured_are_real_ones(tmp_path: Path) -> None:
    p9_growth.make(tmp_path, 5)
    store = CheckpointStore(Storage.open(tmp_path), "attempt-001")
    infos = store.checkpoints()
    assert [info.step for info in infos] == [1, 2, 3, 4, 5]
    assert all(store.verify(info) == [] for info in infos)
    loaded = store.load_latest()
    assert loaded is not None
    assert loaded.step == 5
    p9_growth.keep(store, 2)
    assert [info.step for info in store.checkpoints()] == [4, 5]
