"""What of a cluster's output reaches the terminal."""

from __future__ import annotations

import pytest

from ray_tracking.runtime import console

STATE = "Checkpoint(filesystem=local, path=/runs/sweep/tune-001/trial_1/checkpoint_000003)"


@pytest.mark.parametrize(
    "line",
    [
        f"Checkpoint successfully created at: {STATE}",
        f"Restored on 192.0.2.2 from checkpoint: {STATE} [repeated 3x across cluster]",
        "WARNING: 26 PYTHON worker processes have been started on node: dc91 with address: 192.0.2.2, which is 13x",
    ],
)
def test_housekeeping_is_left_out_and_the_line_beside_it_shown(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr(console, "print_to_stdstream", lambda data, _: shown.append(data["lines"]))
    data = {"actor_name": "trial", "lines": [line, "Restored on a rainy day"]}
    console._show(data)
    assert shown == [["Restored on a rainy day"]]
    assert data["lines"] == [line, "Restored on a rainy day"]
    console._show({"actor_name": None, "lines": [line]})
    assert len(shown) == 1


def test_ours_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console._show({"actor_name": "TrackerActor", "lines": ["12:00:00 [info] delivered"]})
    assert capsys.readouterr().err == "12:00:00 [info] delivered\n"


@pytest.mark.parametrize("actor", sorted(console._HOUSEKEEPING))
def test_rays_own_actors_are_not_heard(actor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "print_to_stdstream", lambda data, _: pytest.fail(str(data)))
    console._show({"actor_name": actor, "lines": ["starting"]})
