"""An MLflow tracking server of chaos's own, over SQLite: MLflow's real one, stopped and started at will."""

from __future__ import annotations

import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from ray_tracking.errors import RunFailedError
from ray_tracking.testing.chaos.ports import free_port
from ray_tracking.testing.chaos.processes import Launched

_HOST = "127.0.0.1"
_START_SECONDS = 180.0
_LOOK_SECONDS = 0.2
_ANSWER_SECONDS = 2.0


class MLflowServer:
    """`folder` takes its database, artifacts and log. `host` is this machine's address on which it listens."""

    def __init__(self, folder: Path, host: str = _HOST) -> None:
        self._folder = folder
        self._host = host
        self._port = free_port(host)
        self._launched: Launched | None = None

    @property
    def uri(self) -> str:
        return f"http://{self._host}:{self._port}"

    def start(self) -> None:
        """On the same port and database each time; returns when it answers."""
        options = {
            "--backend-store-uri": f"sqlite:///{self._folder}/mlflow.db",
            "--artifacts-destination": f"{self._folder}/mlflow-artifacts",
            "--workers": "1",
            "--host": self._host,
            "--port": str(self._port),
        }
        words = [word for option in options.items() for word in option]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        launched = self._launched = Launched(
            [sys.executable, "-m", "mlflow", "server", *words], {**os.environ, **quiet}, self._folder / "mlflow.log"
        )
        end = time.monotonic() + _START_SECONDS
        while not self._answers():
            if launched.status is not None or time.monotonic() > end:
                raise RunFailedError(
                    f"MLflow's server did not answer at {self.uri} within {_START_SECONDS:.0f} s.",
                    hint=f"It said:\n{launched.tail()}",
                )
            time.sleep(_LOOK_SECONDS)

    def kill(self) -> list[int]:
        """The ids of the killed processes; [] if it does not run."""
        if self._launched is None:
            return []
        killed = self._launched.kill_all()
        self._launched = None
        return [process.pid for process in killed]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=_ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
