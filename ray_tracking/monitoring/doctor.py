"""Is this machine set up for what the config asks:
the checks of `ray-tracking doctor`, run one after the other.

In: a config, an address. Out: findings. Starts no cluster, sends nothing but questions,
and waits for none for long.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ray_tracking.config import Config
from ray_tracking.errors import RayTrackingError
from ray_tracking.monitoring.doctor_backends import backend_findings, installed_version
from ray_tracking.monitoring.doctor_files import file_findings, filesystem_of, is_network_filesystem
from ray_tracking.monitoring.doctor_ray import RayView, address_in_use, ray_findings
from ray_tracking.monitoring.findings import Finding, ok, problem, warning
from ray_tracking.storage import Storage

RAY_SERIES = "2.60"
"""The Ray this version is made for."""
_OLDEST_PYTHON = (3, 11)
_LITTLE_SPACE = 1 << 30
_NO_SPACE = 100 << 20


def examine(config: Config, *, address: str | None = None, config_file: Path | None = None) -> list[Finding]:
    """All findings. A check that itself breaks is a finding too, and does not stop the others."""
    findings = _guarded("versions", versions)
    findings += _guarded("backends", lambda: backend_findings(config))
    findings += _guarded("files", lambda: file_findings(config_file, Path.home()))
    cluster = RayView()
    asked = address_in_use(address, os.environ)

    def ask_ray() -> list[Finding]:
        nonlocal cluster
        found, cluster = ray_findings(asked)
        return found

    findings += _guarded("ray", ask_ray)
    return findings + _guarded("storage", lambda: storage_findings(config.storage, cluster.nodes))


def _guarded(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(run())
    except Exception as error:  # noqa: BLE001 - a doctor that falls over on a broken machine is of no use there
        found = f"the check itself failed: {type(error).__name__}: {error}"
        return [problem(check, found, "Run `ray-tracking doctor --debug`, and report this.")]


def versions() -> list[Finding]:
    """Python, Ray and torch; the backends have checks of their own."""
    python = sys.version.split()[0]
    findings = [
        ok("python", python)
        if sys.version_info >= _OLDEST_PYTHON
        else problem("python", python, "Install Python 3.11 or newer and make the environment anew.")
    ]
    for package, extra in (("ray", "ray"), ("torch", "torch")):
        installed = installed_version(package)
        if installed is None:
            need = f'pip install "ray-tracking[{extra}]"; tracking in plain scripts works without it.'
            findings.append(warning(package, "not installed", need))
        elif package == "ray" and not installed.startswith(f"{RAY_SERIES}."):
            need = f'This version is made for Ray {RAY_SERIES}: pip install "ray-tracking[ray]".'
            findings.append(warning(package, installed, need))
        else:
            findings.append(ok(package, installed))
    return findings


def storage_findings(uri: str, nodes: int | None) -> list[Finding]:
    """Writable, with space, and where all of `nodes` (None: unknown) can reach it."""
    storage = Storage.open(uri)
    findings = [_writable(storage)]
    if not storage.is_local:
        findings.append(ok("storage shared", f"{storage.filesystem.type_name}: every node can reach it"))
        return findings
    folder = _nearest_folder(storage.root)
    free = shutil.disk_usage(folder).free
    said = f"{free / 1e9:.1f} GB free at {storage.root}"
    more = "Make space, or set another --storage."
    if free < _NO_SPACE:
        findings.append(problem("storage space", said, more))
    else:
        findings.append(warning("storage space", said, more) if free < _LITTLE_SPACE else ok("storage space", said))
    findings.append(_shared(folder, nodes))
    return findings


def _shared(folder: Path, nodes: int | None) -> Finding:
    kind = filesystem_of(folder)
    if is_network_filesystem(kind):
        return ok("storage shared", f"{kind}: mount it at the same path on every node")
    if nodes is not None and nodes > 1:
        found = f"a local disk ({kind or 'unknown filesystem'}), but the cluster has {nodes} nodes"
        return problem("storage shared", found, "Set --storage to s3://, gs:// or a path mounted on every node.")
    return ok("storage shared", f"a local disk ({kind or 'unknown filesystem'}): enough for one machine")


def _writable(storage: Storage) -> Finding:
    if storage.is_local and not os.path.isdir(storage.root):
        # asked without making it: a check leaves nothing behind
        folder = _nearest_folder(storage.root)
        if os.access(folder, os.W_OK | os.X_OK):
            return ok("storage", f"{storage.root} will be made")
        found = f"{storage.root} can't be made: {folder} is not writable"
        return problem("storage", found, "Set --storage or RAY_TRACKING_STORAGE to a place you may write to.")
    try:
        storage.probe()
    except RayTrackingError as error:
        return problem("storage", error.message, error.hint or "Set another --storage.")
    return ok("storage", f"{storage.uri} is writable")


def _nearest_folder(path: str) -> Path:
    """The path itself or the closest folder above it that is there."""
    return next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
