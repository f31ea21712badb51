from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_tracking.cli import runs
from ray_tracking.cli.app import main
from ray_tracking.errors import RefusedError, RunFailedError
from tests.cli.conftest import Cli

COMMANDS = (
    "demo", "train", "sweep", "submit", "resume", "runs", "checkpoints", "gc", "export", "report", "sync", "status",
    "logs", "stop", "ui", "doctor",
)  # fmt: skip


def test_help_lists_every_command_with_its_help(cli: Cli) -> None:
    done = cli("--help")
    assert done.code == 0
    for command in COMMANDS:
        (line,) = [line for line in done.out.splitlines() if line.startswith(f"  {command} ")]
        assert len(line.split()) > 4
        assert "..." not in line


@pytest.mark.parametrize(
    "command",
    [
        *COMMANDS,
        "sweep run",
        "sweep show",
        "submit train",
        "runs ls",
        "runs show",
        "runs compare",
        "checkpoints ls",
        "checkpoints prune",
    ],
)
def test_every_command_has_help(cli: Cli, command: str) -> None:
    done = cli(*command.split(), "--help")
    assert done.code == 0
    assert "Usage: ray-tracking" in done.out
    assert max(map(len, done.out.splitlines())) <= 80


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """P8: at most 0.4 s. Counted in CPU seconds, which are the wall time of a machine that does nothing else."""
    assert sum(_processor_seconds("-m", "ray_tracking", "--help") for _ in range(3)) / 3 <= 0.4
    probe = "import sys, ray_tracking.cli.app; print(*sorted(m for m in sys.modules if '.' not in m))"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, text=True, cwd=_root()
    ).stdout.split()
    heavy = {
        "torch",
        "ray",
        "pyarrow",
        "numpy",
        "pydantic",
        "yaml",
        "mlflow",
        "wandb",
        "tensorboard",
        "structlog",
    }
    assert not heavy & set(loaded)


def _processor_seconds(*words: str) -> float:
    """Of Python with these arguments, which must end well: of that process alone, unlike getrusage."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, cwd=_root())
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


def _root() -> Path:
    return Path(__file__).parents[2]


def test_no_command_prints_the_help(cli: Cli) -> None:
    done = cli()
    assert "Usage" in done.out + done.err


@pytest.mark.parametrize("arguments", [["nope"], ["runs", "ls", "--nope"], ["train"], ["runs", "ls", "-n", "0"]])
def test_wrong_usage_is_2(cli: Cli, arguments: list[str]) -> None:
    assert cli(*arguments).code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunFailedError("It failed.", hint="Mend it."), 1),
        (RefusedError("No.", hint="Ask."), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_a_message_and_a_status(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(runs, "open_store", fail)
    done = cli("runs", "ls")
    assert done.code == code
    assert done.out == ""
    assert done.err == (f"{error}\n" if str(error) else "Interrupted.\n")
    if code != 130:
        assert "Traceback" in cli("runs", "ls", "--debug").err


def test_an_unexpected_error_is_one_line_and_a_way_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(runs, "open_store", fail)
    done = cli("runs", "ls")
    assert (done.code, "--debug" in done.err, "Traceback" in done.err) == (1, True, False)
    assert "ZeroDivisionError: division by zero" in done.err
    assert "Traceback" in cli("runs", "ls", "--debug").err


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    """`ray-tracking ... | head -1`"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ray_tracking", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        cwd=_root(),
        check=False,
    )
    os.close(writing)
    assert b"Traceback" not in done.stderr


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("ray-tracking ")
    assert callable(main)
