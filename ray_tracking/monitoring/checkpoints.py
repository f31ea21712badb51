"""Checkpoints as a person looks at them: a line for each, which one is meant, and whether it is what was saved.

In: a `Place` and one scan of its store, which reads each manifest once. Out: lines, infos, verdicts. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import CheckpointInfo
from ray_tracking.checkpoint.store import Found, newest_per_step
from ray_tracking.checkpoint.verified import problems
from ray_tracking.errors import CheckpointCorruptError, UsageError
from ray_tracking.monitoring.places import Place
from ray_tracking.monitoring.strays import ONCE_COMPLETE, strays

LATEST, BEST, ALL = "latest", "best", "all"


@dataclass(frozen=True, slots=True)
class CheckpointLine:
    """A complete checkpoint in a list. `value` is that of `metric`; `keys` are the ids of those that open it."""

    step: int
    epoch: int
    attempt: int
    folder: str
    metric: str | None
    value: float | None
    bytes: int
    raw_bytes: int
    created: float
    world_size: int
    latest: bool
    best: bool
    pinned: bool
    reason: str
    improved: bool
    compression: str | None
    encryption: str | None
    keys: tuple[str, ...]
    metrics: Mapping[str, float]

    @property
    def marks(self) -> tuple[str, ...]:
        """Why it will not be deleted, whatever the rules say."""
        return tuple(word for word in ("latest", "best", "pinned") if getattr(self, word))

    @property
    def sealed(self) -> str:
        """How its files are sealed: `zstd`, `encrypted for 3f1c...`, nothing."""
        parts = [self.compression] if self.compression else []
        if self.encryption:
            parts.append(f"encrypted for {', '.join(key[:8] for key in self.keys)}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "complete": True}


def complete(found: Sequence[Found]) -> list[CheckpointInfo]:
    """Oldest first; of several at one step the newest."""
    return newest_per_step(item.info for item in found if item.info is not None)


def lines(place: Place, infos: Sequence[CheckpointInfo]) -> list[CheckpointLine]:
    """One per checkpoint, in the order of `infos`, which are those of `complete`."""
    best = place.best(infos)
    metric = place.shown_metric(infos)
    return [
        line_of(info, metric, latest=info is infos[-1], best=best is not None and info.folder == best.folder)
        for info in infos
    ]


def superseded(found: Sequence[Found]) -> list[CheckpointLine]:
    """Complete checkpoints in whose place a later one of the same step counts, oldest first."""
    shown = {info.folder for info in complete(found)}
    older = [item.info for item in found if item.info is not None and item.folder not in shown]
    return [line_of(info, None, latest=False, best=False) for info in sorted(older, key=lambda each: each.order)]


def line_of(info: CheckpointInfo, metric: str | None, *, latest: bool, best: bool) -> CheckpointLine:
    first = info.manifests[0]
    encryption = first.encryption
    return CheckpointLine(
        step=info.step,
        epoch=info.epoch,
        attempt=info.attempt,
        folder=info.folder,
        metric=metric,
        value=info.metrics.get(metric) if metric is not None else None,
        bytes=info.size,
        raw_bytes=sum(entry.raw_size for manifest in info.manifests for entry in manifest.files.values()),
        created=info.created,
        world_size=info.world_size,
        latest=latest,
        best=best,
        pinned=info.pinned,
        reason=info.reason,
        improved=info.improved,
        compression=first.compression,
        encryption=None if encryption is None else str(encryption.get("cipher")),
        keys=() if encryption is None else tuple(str(key.get("id")) for key in encryption.get("keys", ())),
        metrics=dict(info.metrics),
    )


def is_choice(word: str, *, every: bool = False) -> bool:
    """Whether a word on the command line says which checkpoint, and is no run's name."""
    return word.isdecimal() or word in (LATEST, BEST) or (every and word == ALL)


def choose(place: Place, found: Sequence[Found], which: str) -> CheckpointInfo:
    """The complete checkpoint that `latest`, `best` or a step means.

    Raises UsageError naming those there are; CheckpointCorruptError where there is a folder of that step that does
    not count.
    """
    infos = complete(found)
    if which == LATEST and infos:
        return infos[-1]
    if which == BEST and infos:
        best = place.best(infos)
        if best is not None:
            return best
        known = ", ".join(sorted({key for info in infos for key in info.metrics})) or "none"
        raise UsageError(
            f"Which checkpoint of {place.title} is best is not known: none has a finite "
            f"{repr(place.monitor) if place.monitor else 'monitor'}; metrics saved with them: {known}.",
            hint="Name the metric with --monitor, or the checkpoint by its step.",
        )
    if which.isdecimal():
        step = int(which)
        info = next((each for each in infos if each.step == step), None)
        if info is not None:
            return info
        broken = next((item for item in reversed(found) if item.step == step), None)
        if broken is not None:
            path = place.storage.path(broken.folder)
            raise CheckpointCorruptError(
                f"{path} is no complete checkpoint: {broken.reason}.", hint="See `ray-tracking checkpoints ls --all`."
            )
    elif which not in (LATEST, BEST):
        raise UsageError(f"{which!r} is no checkpoint.", hint=f"Allowed: a step, {LATEST}, {BEST}.")
    shown = ", ".join(str(info.step) for info in infos[-10:]) or "none"
    raise UsageError(
        f"There is no checkpoint {which} in {place.title}. Complete ones there: {shown}.",
        hint="List them with `ray-tracking checkpoints ls`.",
    )


# -- whether it is what was saved --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading one checkpoint showed. `opened`: False if it is encrypted and no key was at hand, so that only its
    digests were compared."""

    step: int | None
    folder: str
    bytes: int
    problems: tuple[str, ...]
    opened: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    place: Place, infos: Sequence[CheckpointInfo], keyring: Keyring | None, advance: Callable[[int], None]
) -> Iterator[Verified]:
    """Read every byte of each in turn. `advance` is called with each number of bytes read."""
    known = set() if keyring is None else set(keyring.ids)
    for info in infos:
        found: list[str] = []
        for manifest in info.manifests:
            found += problems(place.storage, replace(info, manifests=(manifest,)), keyring)
            advance(sum(entry.size for entry in manifest.files.values()))
        keys = line_of(info, None, latest=False, best=False).keys
        opened = info.manifests[0].encryption is None or bool(known.intersection(keys))
        yield Verified(info.step, info.folder, info.size, tuple(found), opened)


def broken(place: Place, found: Sequence[Found], now: float) -> list[Verified]:
    """Folders that were complete checkpoints once, each with what happened to it."""
    return [
        Verified(stray.step, stray.path, stray.bytes, (f"{stray.place_in(place)}: {stray.why}.",))
        for stray in strays(place, found, now)
        if stray.kind in ONCE_COMPLETE
    ]
