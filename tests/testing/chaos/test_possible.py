"""What can be struck here is known before anything starts; the rest is refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_tracking.config import get_config
from ray_tracking.errors import RefusedError, UsageError
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos import possible
from ray_tracking.testing.chaos.__main__ import main
from ray_tracking.testing.chaos.plan import BACKENDS, Part

ALL = {f"experiment_tracking.{name.value}.enabled": True for name in BACKENDS}


def choose(kinds: str, folder: Path, *, own: bool = True, **settings: Any) -> tuple[list[Part], dict[Part, str]]:
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    config = get_config(overrides={**ALL, **dotted, "storage": str(folder)})
    chosen, left_out = possible.choose(*possible.parts_of(kinds), config, Storage.open(folder), own_storage=own)
    return chosen, dict(left_out)


@pytest.mark.parametrize(
    ("text", "named", "grouped"),
    [
        ("worker, disk", [Part.WORKER, Part.DISK], []),
        ("backend", [], list(BACKENDS)),
        ("mlflow,backend,mlflow", [Part.MLFLOW], [Part.TENSORBOARD, Part.WANDB]),
        ("all", [], list(Part)),
    ],
)
def test_kinds(text: str, named: list[Part], grouped: list[Part]) -> None:
    assert possible.parts_of(text) == (named, grouped)


@pytest.mark.parametrize(("text", "said"), [("worker,cat", "'cat'[^|]*tensorboard[^|]*backend"), (" , ", "nothing")])
def test_a_wrong_kind_says_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        possible.parts_of(text)
    assert main(["--kinds", text]) == 2


def test_what_the_run_has_is_chosen(tmp_path: Path) -> None:
    assert choose("worker,backend,head", tmp_path) == ([Part.WORKER, Part.HEAD, *BACKENDS], {})


def test_of_a_group_what_the_run_lacks_is_left_out_and_said(tmp_path: Path) -> None:
    chosen, left_out = choose("backend", tmp_path, experiment_tracking__mlflow__enabled=False)
    assert chosen == [Part.TENSORBOARD, Part.WANDB]
    assert "--set experiment_tracking.mlflow.enabled=true" in left_out[Part.MLFLOW]


@pytest.mark.parametrize(
    ("kinds", "settings", "said"),
    [
        ("worker,mlflow", {"experiment_tracking__mlflow__enabled": False}, "mlflow can't be struck here: the run does"),
        ("backend", {"experiment_tracking__enabled": False}, "tensorboard can't[^|]*wandb can't"),
        ("wandb", {"experiment_tracking__wandb__mode": "online"}, "wandb.mode=offline"),
        ("node", {"scaling__use_gpu": True}, "can't share its GPUs"),
        ("tensorboard", {"experiment_tracking__tensorboard__log_dir": "s3://bucket/logs"}, "log_dir=null"),
    ],
)
def test_what_is_named_and_can_not_be_is_refused(tmp_path: Path, kinds: str, settings: Any, said: str) -> None:
    with pytest.raises(RefusedError, match=said) as refused:
        choose(kinds, tmp_path, **settings)
    assert refused.value.exit_code == 3


def test_without_the_right_to_mount_a_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(possible, "why_no_tmpfs", lambda: "`mount` was refused: must be superuser.")
    with pytest.raises(RefusedError, match=r"must be superuser[^|]*Run it as root"):
        choose("disk", tmp_path)
    chosen, left_out = choose("all", tmp_path)
    assert Part.DISK not in chosen
    assert list(left_out) == [Part.DISK]


def test_the_disk_and_folders_of_other_runs_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    with pytest.raises(RefusedError, match=r"disk can't[^|]*Leave out --storage[^|]*wandb can't[^|]*other runs"):
        choose("disk,wandb", tmp_path, own=False)
