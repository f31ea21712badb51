"""What is not installed is named with the extra that brings it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ray_tracking.errors import MissingExtraError
from ray_tracking.extras import require

WITHOUT_RAY = """
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "ray" else find(name, *rest)
sys.argv = ["ray-tracking", *sys.argv[1:]]
from ray_tracking.cli.app import main
main()
"""


def test_what_is_there_is_not_complained_of() -> None:
    require("all", "json", "sys")


def test_the_message_names_package_and_extra() -> None:
    with pytest.raises(MissingExtraError, match=r'needs nosuch.*not installed.\nInstall with: pip install "ray-trac'):
        require("ray", "json", "nosuch")


@pytest.mark.parametrize("command", [["train", "x.py:f"], ["demo"]])
def test_training_without_ray_is_wrong_usage(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert 'pip install "ray-tracking[' in done.stderr
    assert "Traceback" not in done.stderr
