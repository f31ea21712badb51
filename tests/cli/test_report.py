from __future__ import annotations

from pathlib import Path

from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars
from tests.monitoring.sweep_builder import a_sweep


def test_a_sweep_in_a_file(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    a_sweep(store)
    done = cli("report", "s", "-o", "sweep.html")
    assert done.code == 0
    assert "s in sweep.html (4.9 MB)" in done.err
    assert "<title>s: sweep</title>" in (tmp_path / "sweep.html").read_text()
    assert [path.name for path in tmp_path.glob("*.html")] == ["sweep.html"]


def test_a_run_and_a_trial_have_their_own_and_are_named_by_their_ids(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    a_sweep(store)
    RunBuilder(store, "plain").log(scalars([1, 2])).finish()
    assert cli("report", "plain").code == 0
    assert "<title>plain: run</title>" in (tmp_path / "plain.html").read_text()
    assert cli("report", "s.trial-002").code == 0
    assert "<title>s.trial-002: run</title>" in (tmp_path / "s.trial-002.html").read_text()


def test_a_file_that_is_there_is_overwritten_by_force_alone(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    RunBuilder(store, "plain").log(scalars([1])).finish()
    (tmp_path / "plain.html").write_text("mine")
    done = cli("report", "plain")
    assert (done.code, (tmp_path / "plain.html").read_text()) == (2, "mine")
    assert "--force" in done.err
    assert cli("report", "plain", "--force").code == 0


def test_a_name_that_is_no_page(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    RunBuilder(store, "plain")
    assert "Allowed endings: .html" in cli("report", "plain", "-o", "plain.pdf").err
    assert "is a folder" in cli("report", "plain", "-o", str(tmp_path)).err
    assert "no folder" in cli("report", "plain", "-o", "nowhere/plain.html").err
    assert not list(tmp_path.glob("*.html"))


def test_no_run(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "plain")
    assert cli("report", "other").code == 2
