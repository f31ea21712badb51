"""Which backends `sync` fills, and how it reaches them."""

from __future__ import annotations

from typing import Any

import pytest

from ray_tracking.config import get_config
from ray_tracking.errors import ConfigError, UsageError
from ray_tracking.runs.record import RunRecord
from ray_tracking.tracking.cursor import Cursor
from ray_tracking.tracking.recorded import touched_by, tracking_of


def record(**overrides: Any) -> RunRecord:
    """As a run on Ray leaves it."""
    config = get_config("testing", overrides={f"experiment_tracking.{k}": v for k, v in overrides.items()})
    return RunRecord("r1", "run", created=0.0, config=config.to_dict())


def enabled(tracking: Any) -> list[str]:
    return [name for name in ("tensorboard", "wandb", "mlflow") if tracking[name].enabled]


def uri(key: str = "experiment_tracking.mlflow.tracking_uri", value: str = "http://host:5000") -> dict[str, Any]:
    return {key: value}


def test_those_that_the_record_switches_on() -> None:
    tracking = tracking_of(record(**{"tensorboard.enabled": True, "mlflow.enabled": True}), [], {})
    assert enabled(tracking) == ["tensorboard", "mlflow"]


def test_one_that_the_run_never_had() -> None:
    tracking = tracking_of(record(**{"tensorboard.enabled": True}), [], uri(), ["mlflow"])
    assert enabled(tracking) == ["mlflow"]
    assert tracking.mlflow.tracking_uri == "http://host:5000"


def test_switched_off_altogether_or_without_a_record_of_it() -> None:
    off = record(**{"enabled": False, "tensorboard.enabled": True})
    assert enabled(tracking_of(off, [], {}, ["tensorboard"])) == ["tensorboard"]
    bare = RunRecord("r1", "run", created=0.0, config={"lr": 0.1})
    with pytest.raises(UsageError, match="has no backend") as raised:
        tracking_of(bare, [], {})
    assert "--backend tensorboard" in str(raised.value)
    assert enabled(tracking_of(bare, [], {"experiment_tracking.wandb.enabled": True})) == ["wandb"]


@pytest.mark.parametrize(
    ("location", "found"),
    [
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////data/runs/mlflow.db", None),  # the default: beside the runs, wherever they are now
        ("postgresql://db/mlflow", "postgresql://db/mlflow"),
    ],
)
def test_a_backend_that_was_filled_elsewhere_than_the_record_says(location: str, found: str | None) -> None:
    cursors = [Cursor("mlflow", run_id="x", location=location), Cursor("plugin")]
    tracking = tracking_of(RunRecord("r1", "run", created=0.0), cursors, {})
    assert (enabled(tracking), tracking.mlflow.tracking_uri) == (["mlflow"], found)
    assert tracking_of(RunRecord("r1", "run", created=0.0), cursors, uri()).mlflow.tracking_uri == "http://host:5000"


@pytest.mark.parametrize(
    ("location", "found"),
    [("/logs/team/r1", "/logs/team"), ("/runs/tensorboard/r1", None), ("s3://b/logs/r1", "s3://b/logs")],
)
def test_tensorboard_in_its_own_folder(location: str, found: str | None) -> None:
    tracking = tracking_of(RunRecord("r1", "run", created=0.0), [Cursor("tensorboard", location=location)], {})
    assert tracking.tensorboard.log_dir == found


def test_a_login_that_the_record_does_not_hold() -> None:
    hidden = record(**{"mlflow.enabled": True, "mlflow.tracking_uri": "http://[removed]@host:5000"})
    with pytest.raises(UsageError, match=r"--set experiment_tracking\.mlflow\.tracking_uri="):
        tracking_of(hidden, [], {})
    assert tracking_of(hidden, [], uri()).mlflow.tracking_uri == "http://host:5000"
    # the login may come from the environment, and the place is known
    cursor = Cursor("mlflow", location="http://host:5000")
    assert tracking_of(hidden, [cursor], {}).mlflow.tracking_uri == "http://host:5000"
    assert enabled(tracking_of(hidden, [], {}, ["tensorboard"])) == ["tensorboard"]  # none of its business


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="run has ended"):
        tracking_of(record(), [], {"params.lr": 1})
    with pytest.raises(UsageError, match="Did you mean mlflow"):
        tracking_of(record(), [], {}, ["mlfow"])
    with pytest.raises(ConfigError, match=r"experiment_tracking\.mlflow\.traking_uri is not a known key"):
        tracking_of(record(), [], {"experiment_tracking.mlflow.traking_uri": "x"})


def test_touched_by() -> None:
    assert touched_by({**uri(), "experiment_tracking.delivery.deadline_secs": 1}) == {"mlflow"}
