"""Writing one rank's part of a checkpoint: data files first, sealed and digested on their way, the manifest last.

In: a manifest without files, the bytes of each file. Out: files on storage. Needs no torch: it runs in a process of
its own, a block at a time, so that whoever drives it decides on which thread the next block is done.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import DataKey
from ray_tracking.checkpoint.manifest import FileEntry, Manifest
from ray_tracking.checkpoint.sealing import CHUNK, CIPHER, Sealing, seal
from ray_tracking.storage import Storage

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class PartWriter:
    """Writes into `folder` of `storage`, sealed as `sealing` says."""

    storage: Storage
    folder: str
    sealing: Sealing

    def write(self, manifest: Manifest, files: Mapping[str, memoryview]) -> Generator[None, None, Manifest]:
        """Write the data files; yields after each block. Returns the manifest to `commit`. Raises StorageError."""
        entries = {}
        for plain, source in files.items():
            stored = plain + self.sealing.suffix
            entries[stored] = yield from self._write_file(stored, source, sealed_name(manifest, plain))
        key = self.sealing.data_key
        whole = replace(
            manifest,
            files=entries,
            created=time.time(),
            compression=self.sealing.compression,
            encryption=None if key is None else {"cipher": CIPHER, "chunk": CHUNK, "keys": key.wrapped},
        )
        return whole if key is None else _authenticated(whole, key)

    def commit(self, manifest: Manifest) -> None:
        """Make the part count: durable and visible when it returns."""
        name = names.rank_file(manifest.rank, manifest.world_size)
        self.storage.write_bytes(names.join(self.folder, name), names.encode_manifest(manifest))

    def _write_file(self, stored: str, source: memoryview, bound_name: str) -> Generator[None, None, FileEntry]:
        digest = xxhash.xxh3_128()
        size = 0
        expected = len(source) if not self.sealing.suffix else None
        with self.storage.create(names.join(self.folder, stored), expected) as writing:
            for block in seal(source, self.sealing, bound_name):
                for begin in range(0, len(block), _BLOCK):
                    part = block[begin : begin + _BLOCK]
                    digest.update(part)
                    writing.write(part)
                    size += len(part)
                    yield
        return FileEntry(size, digest.hexdigest(), len(source))


def sealed_name(manifest: Manifest, plain: str) -> str:
    """What an encrypted file is bound to: moved to another save, step, rank or name, it does not open."""
    return f"{manifest.save_id}/{manifest.step}/{manifest.rank}/{plain}"


def _authenticated(manifest: Manifest, key: DataKey) -> Manifest:
    encryption: dict[str, Any] = dict(manifest.encryption or {})
    return replace(manifest, encryption={**encryption, "mac": manifest_mac(manifest, key)})


def manifest_mac(manifest: Manifest, key: DataKey) -> str:
    """HMAC-SHA256 of the manifest, in hex."""
    return key.mac(names.authenticated_bytes(manifest))


def encode_key(key: DataKey | None) -> dict[str, Any] | None:
    """A data key as JSON, for the pipe to the writer process and for nothing else."""
    return None if key is None else {"secret": base64.b64encode(key.secret).decode(), "wrapped": key.wrapped}


def decode_key(fields: Mapping[str, Any] | None) -> DataKey | None:
    return None if fields is None else DataKey(base64.b64decode(fields["secret"]), fields["wrapped"])
