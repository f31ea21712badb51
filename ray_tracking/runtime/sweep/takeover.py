"""The state of another trial as a trial's own: its checkpoint is copied, checked on the way, as the next attempt's.

In: whose state, of which step. Out: a checkpoint in the trial's run that it goes on from by the ordinary rules, also
after a crash; a note of it that stays. Encrypted ones are opened and sealed again: they are bound to their run's saves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest
from ray_tracking.checkpoint.part import PartWriter
from ray_tracking.checkpoint.sealing import Sealing
from ray_tracking.checkpoint.verified import CheckpointFiles
from ray_tracking.errors import CheckpointError, RefusedError, StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.sweep.holding import Takeover, candidates, release

log = get_logger()


@dataclass(frozen=True, slots=True)
class Taken:
    """What was taken over: `step` is that of the state, which may be a later one if that asked for was gone."""

    takeover: Takeover
    step: int
    folder: str
    is_new: bool
    """Done just now, and not by an earlier start of the trial."""


def take_over(runs: RunStore, run_id: str, takeover: Takeover, keyring: Keyring | None) -> Taken:
    """Before the trial's next attempt begins, in its own process. Done once. Raises CheckpointError."""
    directory = runs.directory(run_id)
    note = f"takeover-{takeover.number:03d}.json"
    with suppress(FileNotFoundError):
        document = json.loads(directory.read_bytes(note))
        return Taken(takeover, int(document["taken_step"]), str(document["folder"]), is_new=False)
    attempts = runs.load(run_id).attempts
    attempt = attempts[-1].number + 1 if attempts else 1
    reasons = []
    for info in candidates(runs, takeover.run_id, takeover.step):
        try:
            folder = _copy(runs, takeover.run_id, info, run_id, attempt, keyring)
        except (RefusedError, StorageError, FileNotFoundError) as error:
            reasons.append(str(error).splitlines()[0])
            log.warning("a state can't be taken over, trying another", of=takeover.run_id, step=info.step, reason=error)
            continue
        taken = Taken(takeover, info.step, folder, is_new=True)
        document = {**asdict(takeover), "taken_step": info.step, "folder": folder, "from_folder": info.folder}
        directory.write_bytes(note, json.dumps(document, indent=1).encode())
        release(runs, takeover, run_id)
        return taken
    raise CheckpointError(
        f"The state of {takeover.run_id} can't be taken over: {'; '.join(reasons) or 'it has no whole checkpoint'}.",
        hint="Resume the sweep when its storage is well again.",
    )


def _copy(runs: RunStore, donor: str, info: CheckpointInfo, run_id: str, attempt: int, keyring: Keyring | None) -> str:
    """Every rank's part, then their manifests: it counts with the last of them. Returns the folder."""
    target = CheckpointStore(runs.directory(run_id), f"attempt-{attempt:03d}")
    folder = target.new_folder(info.step)
    changes: Mapping[str, Any] = {
        "save_id": names.save_id(attempt),
        "reason": f"taken over from {donor}",
        "sequence": info.step,
    }
    whole: list[Manifest] = []
    files = CheckpointFiles(runs.directory(donor), info, keyring)
    try:
        for rank, manifest in enumerate(info.manifests):
            key = keyring.new_data_key() if manifest.encryption is not None and keyring is not None else None
            compression: Any = manifest.compression
            part = PartWriter(target.storage, folder, Sealing(compression, key))
            whole.append(_write(part, files, rank, replace(manifest, **changes)))
    finally:
        files.close(discard=True)
    for manifest in whole:
        PartWriter(target.storage, folder, Sealing()).commit(manifest)
    return folder


def _write(part: PartWriter, files: CheckpointFiles, rank: int, manifest: Manifest) -> Manifest:
    plain = sorted(names.plain_name(stored) for stored in manifest.files)
    files.open_all([(rank, name) for name in plain])
    opened = {name: memory.view for name in plain if (memory := files.open(rank, name)) is not None}
    writing = part.write(manifest, opened)
    while True:
        try:
            next(writing)
        except StopIteration as end:
            written: Manifest = end.value
            return written
