"""What all tests share: an environment of their own, and one Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import s3

# Before anything imports ray, wandb or mlflow, and inherited by every process the tests start.
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "WANDB_MODE": "offline",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
        # What the S3 server of the tests needs, in all of Ray's own processes too.
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
)
for name in ("ENV", "STORAGE", "LOG_LEVEL"):
    os.environ.pop(f"RAY_TRACKING_{name}", None)
for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)


_LONG = ("runtime", "testing", "cli/test_submitted", "examples", "tracking/faults")
"""Files whose tests start clusters and servers: first, so that of two processes none is left with one at the end."""


# On a busy machine a slow example says nothing; without a deadline the time to draw them may be long too.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    items.sort(key=lambda item: not item.path.relative_to(here).as_posix().startswith(_LONG))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist's: what it prints nobody sees
        session.config.workeroutput["s3"] = s3.said


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    s3.said.extend(getattr(node, "workeroutput", {}).get("s3", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in s3.said:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty HOME: no login, no settings of whoever runs the tests."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("HOME")
    os.environ["HOME"] = str(home)
    yield home
    if before is not None:
        os.environ["HOME"] = before


@pytest.fixture(scope="session")
def ray_cluster(_home: Path) -> Iterator[None]:
    """A private Ray cluster for the whole session: starting one costs seconds."""
    import ray

    from ray_tracking.runtime.console import quieten

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=True)
    quieten()
    yield
    ray.shutdown()
