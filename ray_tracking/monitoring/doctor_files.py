"""Who may read the files that hold secrets, and on what filesystem a path lies.

In: paths. Out: findings. Pure but for `stat` and the mount table.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from ray_tracking.monitoring.findings import Finding, ok, problem, warning

_NETWORK = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "beegfs",
        "9p",
        "afs",
        "virtiofs",
    }
)


def file_findings(config_file: Path | None, home: Path, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Files that hold a login: the Ray token, netrc, and a config file with a secret in it."""
    token = Path(environment.get("RAY_AUTH_TOKEN_PATH") or home / ".ray" / "auth_token")
    netrc = Path(environment.get("NETRC") or home / ".netrc")
    # who reads the token can run code on the cluster, who reads netrc can log in as the user
    files = [("file ray token", token, problem), ("file netrc", netrc, problem)]
    if config_file is not None and _has_secret(config_file):
        files.append(("file config", config_file, warning))
    return [_private(check, path, found) for check, path, found in files if path.is_file()]


def _private(check: str, path: Path, complain: Callable[[str, str, str], Finding]) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return ok(check, f"{path} is yours alone")
    return complain(check, f"{path} holds a secret and others may read it (mode {mode:04o})", f"chmod 600 {path}")


def _has_secret(path: Path) -> bool:
    import yaml

    from ray_tracking.config import redact

    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False  # the loader has said what is wrong with it
    return bool(redact(document) != document)


def filesystem_of(path: Path, mounts: str = "/proc/self/mounts") -> str | None:
    """The type of the filesystem a path lies on (`ext4`, `nfs4`); None where the system does not say."""
    try:
        table = Path(mounts).read_text("utf-8", errors="replace")
    except OSError:
        return None
    return filesystem_in(table, os.path.realpath(path))


def filesystem_in(table: str, path: str) -> str | None:
    """As `filesystem_of`, from the text of a mount table (`device mountpoint type options ...`);
    the last of equals counts."""
    found, longest = None, -1
    for line in table.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ").rstrip("/")
        if (path == point or path.startswith(f"{point}/")) and len(point) >= longest:
            found, longest = fields[2], len(point)
    return found


def is_network_filesystem(kind: str | None) -> bool:
    return kind is not None and (kind in _NETWORK or kind.startswith("fuse."))
