"""The README's commands and programs, run as they stand, in their order, by a newcomer in an empty folder.

Those in blocks of `sh` need a cluster elsewhere: tests/cli/test_submitted.py runs them on one.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ray_tracking import get_config

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
RUN_ELSEWHERE = {
    "make": "targets of the Makefile, which CI runs",
    "pip": "the installation, which `make setup` does",
}
MAY_FIND_PROBLEMS = {"doctor"}


def _commands() -> list[list[str]]:
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_every_command_is_known() -> None:
    assert {words[0] for words in _commands()} == {"ray-tracking", *RUN_ELSEWHERE}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in _commands() if words[0] == "make"} <= targets


def test_the_configurations_are_valid(tmp_path: Path) -> None:
    texts = [text for kind, text in BLOCKS if kind == "yaml"]
    assert len(texts) == 2
    for text in texts:
        file = tmp_path / "my.yaml"
        file.write_text(text)
        assert get_config(file=file).training.default.monitor == "val/loss"


@pytest.mark.ray
def test_programs_and_commands_run(tmp_path: Path) -> None:
    programs = [text for kind, text in BLOCKS if kind == "python"]
    for program in programs:
        name = re.match(r"# (\w+\.py)\n", program)
        assert name, "a program's first line is its file name"
        (tmp_path / name[1]).write_text(program)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_TRACKING")}
    commands = [[sys.executable, "script.py"]]
    commands += [
        [sys.executable, "-m", "ray_tracking", *words[1:]] for words in _commands() if words[0] == "ray-tracking"
    ]
    assert len(commands) > 5
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        allowed = {0, 1} if MAY_FIND_PROBLEMS & set(command) else {0}
        assert done.returncode in allowed, (command, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, command
    assert (tmp_path / "history.csv").read_text().startswith('"key","step","value"')
