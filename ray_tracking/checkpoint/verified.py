"""The files of a complete checkpoint, each against its size and digest in the manifest, and opened where it is sealed.

In: a Storage, a `CheckpointInfo`, the keys of encrypted ones. Out: the bytes that were saved, or the problems found.
No torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint import mapping
from ray_tracking.checkpoint.keys import SECTION, Keyring, WrongKeyError, no_key_error
from ray_tracking.checkpoint.manifest import CheckpointInfo, Manifest, ManifestError
from ray_tracking.checkpoint.mapping import FileMemory, NotThatFileError, Source
from ray_tracking.checkpoint.part import sealed_name
from ray_tracking.checkpoint.sealing import CIPHER, SealBrokenError, Sealing, unseal
from ray_tracking.errors import CheckpointCorruptError, RayTrackingError, StorageError
from ray_tracking.log import get_logger
from ray_tracking.storage import Storage

_THREADS = min(4, os.cpu_count() or 1)
_log = get_logger()


@dataclass(frozen=True, slots=True)
class UnreadFile:
    """An open file and the digest that its bytes have to have."""

    source: Source
    digest: str


class CheckpointFiles:
    """The files of one checkpoint by rank and plain name: checked, opened where they are sealed, and kept."""

    def __init__(
        self, storage: Storage, info: CheckpointInfo, keyring: Keyring | None, nearby: Storage | None = None
    ) -> None:
        self.from_nearby: set[str] = set()
        """The files (names on storage) that were read from `nearby`, where copies of some may lie."""
        self._storage = storage
        self._nearby = nearby
        self._info = info
        self._keyring = keyring
        self._sealings: dict[int, Sealing] = {}
        self._open: dict[tuple[int, str], FileMemory] = {}
        self._unread = ExitStack()

    def path(self, rank: int, plain: str) -> str:
        """Where it lies on storage."""
        manifest = self._info.manifests[rank]
        stored = next((name for name in manifest.files if names.plain_name(name) == plain), plain)
        return self._storage.path(names.join(self._info.folder, stored))

    def open(self, rank: int, plain: str) -> FileMemory | None:
        """None if the rank has no such file."""
        if (rank, plain) not in self._open:
            memory = self._checked(rank, plain)
            if memory is None:
                return None
            self._open[rank, plain] = memory
        return self._open[rank, plain]

    def open_all(self, places: Iterable[tuple[int, str]]) -> None:
        """Check several at once. The first error is raised when all are done."""
        missing = [place for place in places if place not in self._open]
        for rank, _ in missing:
            self._sealing(rank)  # here, so that its key is derived once
        if not missing:
            return
        with ThreadPoolExecutor(min(_THREADS, len(missing)), thread_name_prefix="checkpoint-check") as pool:
            outcomes = list(pool.map(self._attempt, missing))
        self._open.update(
            (place, outcome)
            for place, outcome in zip(missing, outcomes, strict=True)
            if isinstance(outcome, FileMemory)
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, RayTrackingError)]
        try:
            if errors:
                raise errors[0]
        finally:
            del errors, outcomes  # the error holds this frame, which must not hold the error: it would never go

    def has(self, rank: int, plain: str) -> bool:
        return plain + self._sealing(rank).suffix in self._info.manifests[rank].files

    def unread(self, rank: int, plain: str) -> UnreadFile | None:
        """The file without its content, open until `close`, if it is stored as it is on a local file system; else None.

        Of the wrong size, gone or damaged at its beginning counts as any other: `open` says what is wrong with it.
        """
        manifest = self._info.manifests[rank]
        entry = manifest.files.get(plain)
        if entry is None or entry.raw_size != entry.size or (rank, plain) in self._open or self._sealing(rank).suffix:
            return None
        name = names.join(self._info.folder, plain)
        for storage in (self._nearby, self._storage):
            if storage is None or not storage.is_local:
                continue
            with suppress(FileNotFoundError, NotThatFileError, StorageError):
                source = self._unread.enter_context(mapping.open_source(storage, name, entry.size))
                if storage is self._nearby:
                    self.from_nearby.add(plain)
                return UnreadFile(source, entry.digest)
        return None

    def drop(self, rank: int, plain: str) -> None:
        self._open.pop((rank, plain)).close(discard=True)

    def close(self, *, discard: bool) -> None:
        self._unread.close()
        opened, self._open = self._open, {}
        for memory in opened.values():
            memory.close(discard=discard)

    def _sealing(self, rank: int) -> Sealing:
        if rank not in self._sealings:
            self._sealings[rank] = sealing_of(self._storage, self._info, self._info.manifests[rank], self._keyring)
        return self._sealings[rank]

    def _attempt(self, place: tuple[int, str]) -> FileMemory | RayTrackingError | None:
        try:
            return self._checked(*place)
        except RayTrackingError as error:
            return error

    def _checked(self, rank: int, plain: str) -> FileMemory | None:
        manifest = self._info.manifests[rank]
        sealing = self._sealing(rank)
        stored = plain + sealing.suffix
        if stored not in manifest.files:
            return None
        if self._nearby is not None:
            copied = self._copied(self._nearby, manifest, stored, sealing)
            if copied is not None:
                self.from_nearby.add(stored)
                return copied
            self.from_nearby.discard(stored)
        return open_verified(self._storage, self._info, manifest, stored, sealing)

    def _copied(self, nearby: Storage, manifest: Manifest, stored: str, sealing: Sealing) -> FileMemory | None:
        """Held against the storage's manifest as the storage's own file would be; None without such a copy."""
        try:
            return open_verified(nearby, self._info, manifest, stored, sealing)
        except (CheckpointCorruptError, StorageError) as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                _log.warning("the copy in this node's memory is passed over, storage is read", reason=error.message)
            return None


def sealing_of(storage: Storage, info: CheckpointInfo, manifest: Manifest, keyring: Keyring | None) -> Sealing:
    """How the files of a manifest are sealed. Of an encrypted one the manifest itself is proven with its key.

    Raises CheckpointCorruptError if it was altered, or is plain and `keyring` refuses that; WrongKeyError if `keyring`
    does not open it.
    """
    own = storage.path(names.join(info.folder, names.rank_file(manifest.rank, manifest.world_size)))
    if manifest.compression not in (None, "zstd"):
        raise CheckpointCorruptError(f"{own} names a compression that is not known: {manifest.compression!r}.")
    compression: Any = manifest.compression
    if manifest.encryption is None:
        if keyring is not None and keyring.refuse_plain:
            raise CheckpointCorruptError(
                f"{own} is of a checkpoint that is not encrypted, and {SECTION}.refuse_plain is set: "
                "nothing proves who wrote it.",
                hint=f"If it is an old one of yours, restore it once with {SECTION}.refuse_plain=false.",
            )
        return Sealing(compression)
    try:
        cipher, keys, mac = (manifest.encryption.get(key) for key in ("cipher", "keys", "mac"))
        if cipher != CIPHER:
            raise CheckpointCorruptError(f"{own} names a cipher that is not known: {cipher!r}.")
        if keyring is None:
            raise no_key_error(keys or ())
        data_key = keyring.open(keys or ())
        if not isinstance(mac, str) or not data_key.has_mac(names.authenticated_bytes(manifest), mac):
            raise CheckpointCorruptError(f"{own} was altered by someone without the key.")
    except WrongKeyError as error:
        raise WrongKeyError(f"{own}: {error.message}", hint=error.hint) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointCorruptError(f"{own}: {error}.") from error
    return Sealing(compression, data_key)


def open_verified(
    storage: Storage, info: CheckpointInfo, manifest: Manifest, stored: str, sealing: Sealing
) -> FileMemory:
    """What was saved as `stored` (its name on storage). Runs on any thread. Raises CheckpointCorruptError."""
    name = names.join(info.folder, stored)
    path = storage.path(name)
    entry = manifest.files[stored]
    try:
        memory = mapping.open_bytes(storage, name, entry.size)
        try:
            plain = _plain_bytes(memory.view, manifest, stored, sealing)
        except BaseException:
            memory.close(discard=True)
            raise
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{path} is not there any more.") from error
    except (NotThatFileError, SealBrokenError, MemoryError) as error:
        # Without its traceback: that holds a view of the file for as long as someone holds the error.
        raise CheckpointCorruptError(f"{path} is not what was saved: {error}.") from error.with_traceback(None)
    if plain is None:
        return memory
    memory.close(discard=True)
    return FileMemory(plain)


def _plain_bytes(data: memoryview, manifest: Manifest, stored: str, sealing: Sealing) -> memoryview | None:
    """What stands sealed in `data`, which are the bytes on storage; None if they are plain themselves."""
    entry = manifest.files[stored]
    if names.digest(data) != entry.digest:
        raise NotThatFileError("its digest does not match: it was altered since it was saved")
    if sealing.suffix:
        plain = mapping.room(entry.raw_size)
        unseal(data, entry.raw_size, sealing, sealed_name(manifest, names.plain_name(stored)), plain, threads=_THREADS)
        return plain
    if entry.raw_size != entry.size:
        raise NotThatFileError(f"its manifest gives it {entry.raw_size} bytes and {entry.size}")
    return None


def problems(storage: Storage, info: CheckpointInfo, keyring: Keyring | None = None) -> list[str]:
    """Read all bytes of all ranks: what is wrong, each naming its file.

    Encrypted files are opened too if `keyring` can; if not, the log says that only their digests were compared.
    """
    found = []
    for manifest in info.manifests:
        own = _manifest_problem(storage, info, manifest)
        if own is not None:
            found.append(own)
        sealing = None
        try:
            sealing = sealing_of(storage, info, manifest, keyring)
        except WrongKeyError as error:
            if manifest.rank == 0:
                _log.warning("encrypted checkpoint not opened: digests compared, nothing proven", reason=error.message)
        except CheckpointCorruptError as error:
            found.append(error.message)
        for stored in manifest.files:
            try:
                _check(storage, info, manifest, stored, sealing)
            except CheckpointCorruptError as error:
                found.append(error.message)
    return found


def _manifest_problem(storage: Storage, info: CheckpointInfo, manifest: Manifest) -> str | None:
    own = names.join(info.folder, names.rank_file(manifest.rank, manifest.world_size))
    path = storage.path(own)
    try:
        data = storage.read_bytes(own)
        names.decode_manifest(data)
    except FileNotFoundError:
        return f"{path} is not there any more."
    except ManifestError as error:
        return f"{path}: {error}."
    # Not the objects: NaN metrics differ from themselves.
    return None if data == names.encode_manifest(manifest) else f"{path} was replaced since it was listed."


def _check(storage: Storage, info: CheckpointInfo, manifest: Manifest, stored: str, sealing: Sealing | None) -> None:
    if sealing is not None and sealing.data_key is not None:
        open_verified(storage, info, manifest, stored, sealing).close()
        return
    name = names.join(info.folder, stored)
    entry = manifest.files[stored]
    try:
        if mapping.digest_of(storage, name, entry.size) != entry.digest:
            raise NotThatFileError("its digest does not match: it was altered since it was saved")
    except FileNotFoundError as error:
        raise CheckpointCorruptError(f"{storage.path(name)} is not there any more.") from error
    except NotThatFileError as error:
        raise CheckpointCorruptError(f"{storage.path(name)} is not what was saved: {error}.") from error
