"""What a tracker process is told of its run: plain data, so that it can be sent to an actor or a child process."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_tracking.config import redact
from ray_tracking.runs.lease_rules import DEFAULT_SECONDS
from ray_tracking.runs.record import RunRecord
from ray_tracking.storage import Storage


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """`storage` is the root that holds the run's folder, `local_dir` where backends may keep files on this host.

    `tracking` is the section `experiment_tracking` of the config, with its secrets: it is never written anywhere.
    """

    run_id: str
    name: str
    storage: str
    local_dir: str
    tracking: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """The run's config, secrets removed: for `run.json` and the backends."""
    tags: dict[str, str] = field(default_factory=dict)
    monitor: str | None = None
    mode: str = "min"
    entrypoint: str | None = None
    code_digest: str | None = None
    log_level: str = "info"
    log_json: bool = False
    lease: str | None = None
    """The ticket of the driver that owns the run; None: the tracker process becomes the owner itself."""
    lease_secs: float = DEFAULT_SECONDS
    """Of a lease that it takes itself: seconds without a sign of life after which others may take over."""
    patience: float = 0.0
    """How long it waits for whoever holds that lease."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> TrackerSpec:
        return cls(**json.loads(text))

    def new_record(self, now: float, versions: dict[str, str]) -> RunRecord:
        return RunRecord(
            self.run_id,
            self.name,
            created=now,
            entrypoint=self.entrypoint,
            code_digest=self.code_digest,
            monitor=self.monitor,
            mode=self.mode,
            # A plain script's config says nothing of its backends: `sync` has to find them here.
            config={"experiment_tracking": redact(self.tracking), **self.config},
            tags=self.tags,
            versions=versions,
        )


def local_directory(storage: Storage) -> str:
    """Where backends keep files on this host: the storage itself if it is local, else a folder in the user's cache."""
    if storage.is_local:
        return storage.root
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", storage.uri.partition("?")[0]).strip("-")
    return os.path.join(cache, "ray-tracking", slug)
