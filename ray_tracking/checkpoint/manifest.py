"""What a checkpoint is on storage: the names of its folder and files, and the manifest each rank writes last.

In: bytes and listings. Out: `Manifest`, `CheckpointInfo`. Pure: no I/O, no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import xxhash

SCHEMA = 2
SUFFIXES = ("", ".zst", ".enc")
"""What a sealed file's name ends with: nothing (plain), compressed, encrypted (perhaps compressed inside)."""
PIN_FILE = "pinned"
"""An empty file of this name in a checkpoint's folder keeps it from retention."""

_STEP_FOLDER = re.compile(r"step-([0-9]{6,})(?:-try([0-9]+))?")
_ATTEMPT_FOLDER = re.compile(r"attempt-([0-9]{3,})")
_RANK_FILE = re.compile(r"rank-([0-9]{5})-of-([0-9]{5})\.json")
_DATA_FILE = re.compile(
    r"(?:model(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors|state-[0-9]{5}\.(?:safetensors|json))"
    r"(?:\.zst|\.enc)?"
)


class ManifestError(ValueError):
    """A manifest is not what was written; the text is the reason."""


class OtherVersionError(ManifestError):
    """A manifest of a schema that this version does not read: another version's checkpoint, not rubbish."""


class FileEntry(NamedTuple):
    """One file of a checkpoint: size in bytes and xxh3-128 in hex of what is stored, size before it was sealed."""

    size: int
    digest: str
    raw_size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one rank wrote. `sequence` orders the checkpoints of one attempt.

    `save_id` and `plan` (digest of the replicated state's structure) are the same on every rank of one save.
    `reason`: why it was saved; `improved`: whether the monitor was better than ever before.
    `encryption`: None, or {cipher, chunk, keys: [{id, wrapped}], mac}.
    """

    step: int
    epoch: int
    rank: int
    world_size: int
    sequence: int
    created: float
    metrics: Mapping[str, float]
    objects: tuple[str, ...]
    files: Mapping[str, FileEntry]
    save_id: str = ""
    plan: str = ""
    reason: str = ""
    improved: bool = False
    compression: str | None = None
    encryption: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint. `folder` is relative to the store; `attempt` is 0 outside attempt folders;
    `created` is Unix time.
    """

    step: int
    folder: str = ""
    epoch: int = 0
    attempt: int = 0
    sequence: int = 0
    world_size: int = 1
    created: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    size: int = 0
    pinned: bool = False
    reason: str = ""
    improved: bool = False
    manifests: tuple[Manifest, ...] = field(default=(), repr=False)

    @property
    def order(self) -> tuple[int, int, int, str]:
        """Ascending with age: a later attempt is newer whatever its steps; clocks play no part."""
        return self.attempt, self.sequence, self.step, self.folder


_SAVE_ID = "attempt-"


def save_id(attempt: int) -> str:
    """Of the saves of a run's attempt."""
    return f"{_SAVE_ID}{attempt}"


def save_attempt(info: CheckpointInfo) -> int:
    """The attempt that saved it. Its folder only tells the first one of the driver's."""
    number = info.manifests[0].save_id.removeprefix(_SAVE_ID) if info.manifests else ""
    return int(number) if number.isdecimal() else info.attempt


def step_folder(step: int, trial: int = 1) -> str:
    """`step-000120`, or `step-000120-try2` where the plain name is taken."""
    return f"step-{step:06d}" if trial == 1 else f"step-{step:06d}-try{trial}"


def parse_step_folder(name: str) -> tuple[int, int] | None:
    """(step, try) of a checkpoint folder's name, None for any other name."""
    match = _STEP_FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def parse_attempt_folder(name: str) -> int | None:
    match = _ATTEMPT_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def rank_file(rank: int, world_size: int) -> str:
    return f"rank-{rank:05d}-of-{world_size:05d}.json"


def parse_rank_file(name: str) -> tuple[int, int] | None:
    """(rank, world size) of a manifest's name, None for any other name."""
    match = _RANK_FILE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def state_file(rank: int) -> str:
    """The rank's nested state: JSON whose tensors lie in `tensor_file(rank)` and the model file."""
    return f"state-{rank:05d}.json"


def tensor_file(rank: int) -> str:
    """All tensors the rank wrote but those of the model."""
    return f"state-{rank:05d}.safetensors"


def model_file(rank: int, world_size: int) -> str:
    """The model's tensors that the rank wrote; opens with the plain safetensors library unless it is sealed."""
    return "model.safetensors" if world_size == 1 else f"model-{rank:05d}-of-{world_size:05d}.safetensors"


def plain_name(stored: str) -> str:
    """A data file's name without the suffix that says how it is sealed."""
    return stored.removesuffix(".zst").removesuffix(".enc")


def join(*parts: str) -> str:
    """A name relative to the store; empty parts fall out."""
    return "/".join(part for part in parts if part)


def digest(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON that carries its own digest; every byte of it is covered."""
    return _seal(_body(manifest))


def authenticated_bytes(manifest: Manifest) -> bytes:
    """What `encryption["mac"]` is computed over: the whole manifest but the mac itself."""
    body = _body(manifest)
    body["encryption"] = {key: value for key, value in (manifest.encryption or {}).items() if key != "mac"}
    return _dump(body)


def _body(manifest: Manifest) -> dict[str, Any]:
    body = asdict(manifest)
    body["files"] = {name: entry._asdict() for name, entry in manifest.files.items()}
    body["metrics"] = {key: _number_out(value) for key, value in manifest.metrics.items()}
    body["schema"] = SCHEMA
    return body


def _seal(body: Mapping[str, Any]) -> bytes:
    return _dump({**body, "digest": digest(_dump(body))})


def _dump(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True, allow_nan=False).encode("ascii")


def decode_manifest(data: bytes) -> Manifest:
    """Raises ManifestError for anything but the exact bytes of `encode_manifest` in a schema this version
    knows.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not a manifest ({len(data)} bytes that are not JSON)") from error
    if not isinstance(body, dict) or "digest" not in body or "schema" not in body:
        raise ManifestError("not a manifest (JSON of another kind)")
    schema = body["schema"]
    if type(schema) is int and schema != SCHEMA:
        age = "a newer" if schema > SCHEMA else "an older"
        raise OtherVersionError(f"written by {age} version of ray-tracking (schema {schema}; this one reads {SCHEMA})")
    claimed = body.pop("digest")
    try:
        intact = digest(_dump(body)) == claimed and _seal(body) == data
    except (ValueError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ManifestError("its own digest does not match: it was altered or cut")
    del body["schema"]
    try:
        files = {
            name: FileEntry(int(entry["size"]), str(entry["digest"]), int(entry["raw_size"]))
            for name, entry in body["files"].items()
        }
        metrics = {key: float(value) for key, value in body["metrics"].items()}
        manifest = Manifest(**{**body, "files": files, "metrics": metrics, "objects": tuple(body["objects"])})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"a field is missing or of another kind: {error}") from error
    for name in files:
        if not _DATA_FILE.fullmatch(name):
            raise ManifestError(f"names a file that no checkpoint has: {name!r}")
    return manifest


def _number_out(value: float) -> float | str:
    """JSON has no NaN or infinity: those become their names, which `float` reads back."""
    return value if math.isfinite(value) else str(value)


def combine(folder: str, attempt: int, manifests: tuple[Manifest, ...], *, pinned: bool) -> CheckpointInfo:
    """The checkpoint that the manifests of all its ranks (in rank order) make up. Metrics are rank 0's."""
    first = manifests[0]
    return CheckpointInfo(
        step=first.step,
        folder=folder,
        epoch=first.epoch,
        attempt=attempt,
        sequence=first.sequence,
        world_size=first.world_size,
        created=first.created,
        metrics=first.metrics,
        size=sum(entry.size for manifest in manifests for entry in manifest.files.values()),
        pinned=pinned,
        reason=first.reason,
        improved=first.improved,
        manifests=manifests,
    )


def why_incomplete(step: int, sizes: Mapping[str, int], manifests: Mapping[tuple[int, int], Manifest]) -> str | None:
    """None if the files make up a complete checkpoint of `step`, else the reason it does not count.

    `sizes`: size of every file in the folder. `manifests`: those that could be read, by (rank, world size)
    of their name.
    """
    if not manifests:
        return "no rank's manifest is there (the save did not finish)"
    worlds = {world for _, world in manifests}
    if len(worlds) > 1:
        return f"manifests of several world sizes are mixed: {sorted(worlds)}"
    world = worlds.pop()
    missing = [rank for rank in range(world) if (rank, world) not in manifests]
    if missing:
        return f"the manifest of rank {missing[0]} is not there: {rank_file(missing[0], world)}"
    if len({manifest.save_id for manifest in manifests.values()}) > 1:
        return "manifests of several saves are mixed"
    if len({manifest.plan for manifest in manifests.values()}) > 1:
        return "the ranks saved states of different structure"
    for (rank, _), manifest in sorted(manifests.items()):
        if (manifest.rank, manifest.world_size, manifest.step) != (rank, world, step):
            return (
                f"{rank_file(rank, world)} was written for another place "
                f"(step {manifest.step}, rank {manifest.rank} of {manifest.world_size})"
            )
        for name, entry in manifest.files.items():
            if name not in sizes:
                return f"{name} is not there"
            if sizes[name] != entry.size:
                return f"{name} has {sizes[name]} bytes instead of {entry.size}"
    return None
