from __future__ import annotations

import sys

import pytest

from ray_tracking.errors import ConfigError
from ray_tracking.testing.chaos.__main__ import main
from ray_tracking.testing.chaos.command import EXAMPLE, TrainCommand, child_environment
from ray_tracking.testing.chaos.plan import Part


def command(*assignments: str, target: str | None = None, file: str | None = None) -> TrainCommand:
    return TrainCommand.of(target, file, None, assignments, storage="/somewhere", times=4)


def test_the_example_brings_settings_that_can_be_changed() -> None:
    config = command("params.epochs=3").config()
    assert config.params["size"] == "tiny"
    assert config.params["epochs"] == 3
    assert config.storage == "/somewhere"
    assert config.experiment_tracking.tensorboard.enabled
    assert command().words("r")[1:5] == ["-m", "ray_tracking", "train", EXAMPLE]


def test_a_target_of_ones_own_gets_no_settings_but_ones_own() -> None:
    own = command("params.a=b=c", target="mine.py:train")
    assert own.settings == {"params.a": "b=c", "storage": "/somewhere", "failure.max_failures": "7"}
    assert own.words("r") == [
        *(sys.executable, "-m", "ray_tracking", "train", "mine.py:train", "--run-id", "r"),
        *("--set", "params.a=b=c", "--set", "storage=/somewhere", "--set", "failure.max_failures=7"),
    ]


def test_kills_do_not_use_up_the_failures_that_are_allowed() -> None:
    assert command("failure.max_failures=1").config().failure.max_failures == 5
    assert command("failure={max_failures: 1}").config().failure.max_failures == 5
    assert command("failure.max_failures=-1").config().failure.max_failures == -1


def test_what_is_misspelt_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="Did you mean training"):
        command("trainin.default.save_steps=3")
    assert main(["--set", "trainin.default.save_steps=3"]) == 2
    assert main(["--set", "nonsense"]) == 2
    assert "key=value" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [(["--times", "0"], "above 0"), (["--outage", "-1"], "above 0")])
def test_wrong_usage_says_what_is_allowed(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_help_documents_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"    {part.value} " in text for part in Part)
    assert "Exit status" in text


def test_resume_is_told_the_storage_and_the_cluster_and_nothing_else() -> None:
    own = command("params.a=1", target="mine.py:train")
    assert own.words("r", address="127.0.0.1:7", resume=True)[3:] == [
        *("resume", "r", "--storage", "/somewhere", "--address", "127.0.0.1:7")
    ]
    assert own.words("r", address="127.0.0.1:7")[-2:] == ["--address", "127.0.0.1:7"]


def test_the_cluster_is_private_and_sums_are_repeatable() -> None:
    environment = child_environment({"RAY_ADDRESS": "auto", "OMP_NUM_THREADS": "4", "HOME": "/h"})
    assert "RAY_ADDRESS" not in environment
    assert environment["OMP_NUM_THREADS"] == "4", "what the user says stands"
    assert environment["MKL_NUM_THREADS"] == "1"
    assert environment["HOME"] == "/h"
