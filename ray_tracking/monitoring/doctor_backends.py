"""Can each backend the config switches on be reached: installed, answering, logged in, writable.

In: a config. Out: findings, with no secret in them. Waits at most a few seconds for a server.
"""

from __future__ import annotations

import netrc
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ray_tracking.config import Config, redact_text
from ray_tracking.monitoring.doctor_files import filesystem_of, is_network_filesystem
from ray_tracking.monitoring.findings import Finding, ok, problem, warning
from ray_tracking.monitoring.web import ask

WANDB_HOST = "https://api.wandb.ai"


def backend_findings(config: Config, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """One or more findings per backend; one that is switched off is only named."""
    tracking = config.experiment_tracking
    findings: list[Finding] = []
    for name, section in (
        ("tensorboard", tracking.tensorboard),
        ("wandb", tracking.wandb),
        ("mlflow", tracking.mlflow),
    ):
        installed = installed_version(name)
        said = installed or "not installed"
        if not (tracking.enabled and section.enabled):
            findings.append(ok(name, f"{said} (switched off)"))
        elif installed is None:
            off = f"--set experiment_tracking.{name}.enabled=false"
            findings.append(problem(name, said, f'pip install "ray-tracking[{name}]", or switch it off: {off}'))
        else:
            findings.append(ok(name, said))
            findings += _deeper(name, section, environment)
    return findings


def _deeper(name: str, section: Any, environment: Mapping[str, str]) -> list[Finding]:
    if name == "wandb":
        mode = environment.get("WANDB_MODE") or section.mode
        return wandb_login(mode, environment, Path.home())
    if name == "mlflow":
        uri = section.tracking_uri or environment.get("MLFLOW_TRACKING_URI")
        return mlflow_server(uri, environment) if uri else []
    return []


def installed_version(package: str) -> str | None:
    """Of a distribution, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def wandb_login(mode: str, environment: Mapping[str, str], home: Path) -> list[Finding]:
    """Offline needs no login; online a key from WANDB_API_KEY or netrc, and a server that answers."""
    if mode != "online":
        return [ok("wandb login", f"not needed: mode is {mode}")]
    base = environment.get("WANDB_BASE_URL") or WANDB_HOST
    if environment.get("WANDB_API_KEY"):
        findings = [ok("wandb login", "WANDB_API_KEY is set")]
    elif _in_netrc(urlsplit(base).hostname or "", Path(environment.get("NETRC") or home / ".netrc")):
        findings = [ok("wandb login", "in netrc")]
    else:
        fix = "wandb login, or --set experiment_tracking.wandb.mode=offline and upload later with `wandb sync`."
        findings = [problem("wandb login", f"no key for {redact_text(base)}", fix)]
    status, error = ask(base)
    if status is None:
        fix = "Check the network and WANDB_BASE_URL, or --set experiment_tracking.wandb.mode=offline."
        findings.append(problem("wandb server", f"{redact_text(base)} does not answer: {error}", fix))
    else:
        findings.append(ok("wandb server", f"{redact_text(base)} answers"))
    return findings


def _in_netrc(host: str, file: Path) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def mlflow_server(uri: str, environment: Mapping[str, str]) -> list[Finding]:
    """A server that answers, or a database that can be written."""
    shown = redact_text(uri)
    if uri.startswith(("http://", "https://")):
        return [_mlflow_answers(uri, shown, environment)]
    if uri.startswith("sqlite:///"):
        # three slashes and a relative path, or four and an absolute one
        return sqlite_writable(Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])))
    return [ok("mlflow server", f"{shown}: not checked")]


def _mlflow_answers(uri: str, shown: str, environment: Mapping[str, str]) -> Finding:
    headers = {}
    if token := environment.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    status, error = ask(f"{uri.rstrip('/')}/health", headers)
    if status is None:
        fix = "Start the server, or correct experiment_tracking.mlflow.tracking_uri; runs go on meanwhile."
        return problem("mlflow server", f"{shown} does not answer: {error}", fix)
    if status in (401, 403):
        fix = "Set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        return problem("mlflow server", f"{shown} refuses this login (HTTP {status})", fix)
    if status >= 400:
        fix = "Check that experiment_tracking.mlflow.tracking_uri is that of an MLflow server."
        return warning("mlflow server", f"{shown} answers with HTTP {status} where MLflow says it is well", fix)
    return ok("mlflow server", f"{shown} answers")


def sqlite_writable(path: Path) -> list[Finding]:
    """Asks for the write lock of the database and gives it back; one that is not there yet is not made."""
    if is_network_filesystem(filesystem_of(path.parent)):
        fix = "Put it on a local disk, or run an MLflow server and set its address as tracking_uri."
        return [warning("mlflow database", f"{path} lies on a network filesystem, where SQLite breaks", fix)]
    move = "Check its permissions, or set experiment_tracking.mlflow.tracking_uri to another place."
    if not path.exists():
        folder = next(folder for folder in (path.parent, *path.parent.parents) if folder.exists())
        if os.access(folder, os.W_OK | os.X_OK):
            return [ok("mlflow database", f"{path} will be made")]
        return [problem("mlflow database", f"{path} can't be made: {folder} is not writable", move)]
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=2, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
    except sqlite3.Error as error:
        return [problem("mlflow database", f"{path} can't be written: {error}", move)]
    return [ok("mlflow database", f"{path} is writable")]
