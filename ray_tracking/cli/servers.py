"""Children that serve a page on this machine: started, waited for until they answer,
and ended whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from ray_tracking.errors import RayTrackingError

_START_SECONDS = 120.0
_STOP_SECONDS = 5.0
_ANSWER_SECONDS = 2.0
_LOOK_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Server:
    """A command that answers at `url` once it is up."""

    name: str
    command: tuple[str, ...]
    url: str
    variables: tuple[tuple[str, str], ...] = ()


def tensorboard(logdir: str, host: str, port: int) -> Server:
    command = (
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        logdir,
        "--host",
        host,
        "--port",
        str(port),
    )
    return Server("TensorBoard", command, f"http://{host}:{port}")


def mlflow(uri: str, artifacts: Path, host: str, port: int) -> Server:
    """One web worker, and none of the job runners that MLflow otherwise starts beside it."""
    options = ("--backend-store-uri", uri, "--artifacts-destination", str(artifacts), "--workers", "1")
    command = (sys.executable, "-m", "mlflow", "server", *options, "--host", host, "--port", str(port))
    variables = (("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false"), ("MLFLOW_DISABLE_TELEMETRY", "true"))
    return Server("MLflow", command, f"http://{host}:{port}", variables)


def free_port(wanted: int, host: str = "127.0.0.1") -> int:
    """`wanted` if nothing listens there, else a port the system gives."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise RayTrackingError(f"No port is free on {host}.", hint="End another server, then try again.")


def serve(servers: Sequence[Server], say: Callable[[str], None], *, show_output: bool = False) -> None:
    """Run the servers until Ctrl-C or SIGTERM, then end them.
    Raises RayTrackingError if none is left running."""
    with tempfile.TemporaryDirectory(prefix="ray-tracking-ui-") as folder, _ends_as_interrupt():
        running: dict[Server, subprocess.Popen[bytes]] = {}
        logs = {server: Path(folder) / f"{server.name}.log" for server in servers}
        try:
            for server in servers:
                running[server] = _start(server, None if show_output else logs[server])
            _watch(running, logs, say)
        except KeyboardInterrupt:
            say("Ending.")
        finally:
            stop(running.values())


def _start(server: Server, log: Path | None) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C reaches only us,
    and all that the server starts can be ended with it."""
    output: IO[bytes] | None = log.open("wb") if log is not None else None
    try:
        return subprocess.Popen(
            server.command,
            env={**os.environ, **dict(server.variables)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    finally:
        if output is not None:
            output.close()


def _watch(
    running: dict[Server, subprocess.Popen[bytes]], logs: dict[Server, Path], say: Callable[[str], None]
) -> None:
    waiting = dict.fromkeys(running, time.monotonic() + _START_SECONDS)
    alive = dict(running)
    while alive:
        for server, process in list(alive.items()):
            if process.poll() is not None:
                del alive[server]
                waiting.pop(server, None)
                say(f"{server.name} ended with status {process.returncode}. {_last_lines(logs[server])}")
            elif server in waiting and answers(server.url):
                del waiting[server]
                say(f"{server.name:<12} {server.url}")
                if not waiting:
                    say("Ctrl-C ends them.")
            elif server in waiting and time.monotonic() > waiting[server]:
                del waiting[server]
                say(f"{server.name} gives no answer at {server.url} for {_START_SECONDS:.0f} s: see --debug.")
        time.sleep(_LOOK_SECONDS)
    raise RayTrackingError("No server is running.", hint="Run `ray-tracking ui --debug` to see what they say.")


def answers(url: str) -> bool:
    """Whether an HTTP server is there, whatever it says."""
    try:
        # never through a proxy: the server is on this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End processes started by `_start`, with all they started: asked first, then killed."""
    started = list(processes)
    for process in started:
        _signal_group(process, signal.SIGTERM)
    end = time.monotonic() + _STOP_SECONDS
    for process in started:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue  # killed below, like what the others left behind
    for process in started:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # the whole group has ended


@contextmanager
def _ends_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP end us like Ctrl-C, so that no server is left behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_lines(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return "Its last words:\n  " + "\n  ".join(lines[-5:]) if lines else ""
