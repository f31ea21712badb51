"""Is the Ray cluster there, does it let us in, does it let everyone in.

In: an address. Out: findings and what was seen of the cluster.
Asks by Ray's own command line in a child process:
this package does not import ray, and Ray's client would wait much longer than anyone does.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ray_tracking.errors import UsageError
from ray_tracking.monitoring.findings import Finding, ok, problem, warning
from ray_tracking.monitoring.web import ask
from ray_tracking.runtime.jobs.access import ADDRESS_VARIABLES, TOKEN_FIX, find_token

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 20.0
_CURRENT_CLUSTER = "/tmp/ray/ray_current_cluster"
_LOCAL = ("local", "")
_OPEN_FIX = "Start the cluster with RAY_AUTH_MODE=token: without it whoever reaches it runs code there."


@dataclass(frozen=True, slots=True)
class RayView:
    """What was seen of the cluster; `nodes` is None if it could not be asked."""

    nodes: int | None = None


def address_in_use(given: str | None, environment: Mapping[str, str]) -> str | None:
    """`--address`, else what Ray's own variables say, else None."""
    return given or next((environment[name] for name in ADDRESS_VARIABLES if environment.get(name)), None)


def ray_findings(address: str | None) -> tuple[list[Finding], RayView]:
    if address is None or address in _LOCAL:
        return [ok("ray cluster", "none asked for: a run starts its own on this machine")], RayView(1)
    from importlib.util import find_spec

    if find_spec("ray") is None:
        return [problem("ray cluster", "ray is not installed", 'pip install "ray-tracking[ray]"')], RayView()
    if address == "auto":
        address = _current_cluster()
        if address is None:
            fix = "Start one with `ray start --head`, or leave --address away: a run then starts its own."
            return [problem("ray cluster", "no cluster runs on this machine (--address auto)", fix)], RayView()
    if address.startswith(("http://", "https://")):
        return _jobs_server(address), RayView()
    host, port = host_and_port(address)
    if port is None:
        fix = "Allowed: HOST:PORT, ray://HOST:PORT, http://HOST:PORT, auto."
        return [problem("ray cluster", f"{address!r} is no address of a cluster", fix)], RayView()
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        fix = "Check the address and that the cluster runs; `ray start` has port 6379, the dashboard 8265."
        return [problem("ray cluster", f"nothing answers at {host}:{port}: {error}", fix)], RayView()
    if address.startswith("ray://"):
        return [ok("ray cluster", f"{address} accepts connections (login not checked)")], RayView()
    return _ask_cluster(f"{host}:{port}")


def host_and_port(address: str) -> tuple[str, int | None]:
    """Of `host:port` with or without a scheme; the port is None if there is none."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        return parts.hostname or "", parts.port
    except ValueError:
        return address, None


def _current_cluster() -> str | None:
    try:
        return Path(_CURRENT_CLUSTER).read_text().strip() or None
    except OSError:
        return None


def _ask_cluster(address: str) -> tuple[list[Finding], RayView]:
    code, said = _ray_status(address)
    if code is None:
        fix = "Look at the head node: `ray status` hangs there too if its control service is ill."
        return [problem("ray cluster", f"{address} gave no answer within {ANSWER_SECONDS:.0f} s", fix)], RayView()
    if code != 0:
        if "AuthenticationError" in said:
            return [problem("ray login", f"{address} refuses our token, or we have none", TOKEN_FIX)], RayView()
        fix = f"Try `ray status --address {address}`; Ray here and there must be of the same version."
        return [problem("ray cluster", f"{address} can't be asked: {_reason(said)}", fix)], RayView()
    nodes = count_nodes(said)
    findings = [ok("ray cluster", f"{address}: {nodes} node{'s' if nodes != 1 else ''}")]
    without_token, _ = _ray_status(address, RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH="")
    if without_token == 0:
        findings.append(warning("ray login", f"{address} lets everyone in", _OPEN_FIX))
    else:
        findings.append(ok("ray login", "by token"))
    return findings, RayView(nodes)


def _ray_status(address: str, **variables: str) -> tuple[int | None, str]:
    """Exit status and output of `ray status`; the status is None if it did not end in time."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr


def count_nodes(status: str) -> int:
    """The active nodes in the output of `ray status`:
    its section `Active:` has lines ` 1 node_<id>` or ` 2 <type>`."""
    section = re.search(r"^(?:Active|Healthy):\n((?: .*\n)*)", status, re.MULTILINE)
    idle = re.search(r"^Idle:\n((?: .*\n)*)", status, re.MULTILINE)
    lines = "".join(match[1] for match in (section, idle) if match)
    return sum(int(number) for number in re.findall(r"^ +(\d+) ", lines, re.MULTILINE))


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def _jobs_server(address: str) -> list[Finding]:
    url = f"{address.rstrip('/')}/api/version"
    status, error = ask(url)
    if status is None:
        fix = "Check the address and that the dashboard runs (ray start --head, port 8265)."
        return [problem("ray cluster", f"{address} does not answer: {error}", fix)]
    if status < 400:
        return [
            ok("ray cluster", f"{address} answers"),
            warning("ray login", f"{address} lets everyone in", _OPEN_FIX),
        ]
    if status not in (401, 403):
        fix = "Give the address of Ray's dashboard, http://HOST:8265."
        return [problem("ray cluster", f"{address} answers with HTTP {status}: no Ray dashboard", fix)]
    token = _token()
    status = ask(url, {"Authorization": f"Bearer {token}"})[0] if token else status
    if status is not None and status < 400:
        return [ok("ray cluster", f"{address} answers"), ok("ray login", "by token")]
    return [problem("ray login", f"{address} refuses our token, or we have none", TOKEN_FIX)]


def _token() -> str | None:
    try:
        return find_token(os.environ).value
    except UsageError:  # a file that is not there
        return None
