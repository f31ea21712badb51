"""From the bytes of a file to what is stored, and back: compressed, encrypted, both or neither, chunk by chunk.

Plain
    The bytes themselves.
Compressed
    A zstd frame per chunk and a seek table at the end: zstd's seekable format, which every zstd tool opens.
Encrypted
    AES-256-GCM in the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and
    its Nonce-Reuse Misuse-Resistance, 2015), laid out as Tink does: the nonce of a chunk is a random prefix of the
    file, the chunk's number, and 1 for the last chunk, else 0. So a chunk altered, left out, added, repeated or moved
    fails to open. A header goes before them (magic, version, method, plain bytes per chunk, plain bytes in all, salt,
    nonce prefix); the file's key is derived from the data key, the header and the file's name, so a header altered
    or a file under another name fails at the first chunk. Compressed inside: each chunk is one zstd frame, with the
    length of its ciphertext before it.

Memory: one chunk; with threads one per thread and one more; twice that where it is compressed; whatever the size.
Plain and compressed files carry no proof of being whole: that is the manifest's digest of what is stored.
"""

from __future__ import annotations

import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from ray_tracking.checkpoint.keys import DataKey, SealBrokenError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["CHUNK", "CIPHER", "SealBrokenError", "Sealing", "seal", "unseal"]

CIPHER = "AES-256-GCM-STREAM"
CHUNK = 2 << 20
"""Plain bytes per chunk: where sealing, digest and write together are fastest (tests/bench/sealing_choice.py)."""

_MOST_CHUNK = 64 << 20
"""The largest chunk that is read, so that a crafted file can't ask for more memory."""
_TAG = 16
_HEADER = struct.Struct(">6sBBIQ32s7sx")
_MAGIC, _VERSION = b"RTSEAL", 1
_METHODS = {None: 0, "zstd": 1}
_NONCE = struct.Struct(">7sIB")
_LENGTH = struct.Struct(">I")
_SKIPPABLE = struct.Struct("<II")
_SKIPPABLE_MAGIC = 0x184D2A5E
_TABLE_ENTRY = struct.Struct("<II")
_TABLE_END = struct.Struct("<IBI")
_TABLE_MAGIC = 0x8F92EAB1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sealing:
    """How a file is stored. `level` is zstd's and matters only where something is compressed."""

    compression: Literal["zstd"] | None = None
    data_key: DataKey | None = None
    level: int = 1

    @property
    def suffix(self) -> str:
        """What the stored file's name ends with."""
        if self.data_key is not None:
            return ".enc"
        return ".zst" if self.compression else ""


def seal(source: memoryview, sealing: Sealing, name: str, *, threads: int = 1) -> Iterator[memoryview]:
    """What is stored, in order. Each block is valid until the next one is asked for.

    `name` is the file's name in its checkpoint: an encrypted file opens under no other. `source` is read until the
    iterator is used up or closed, by `threads` threads while a block is out if there are more than one.
    """
    source = source.cast("B")
    if sealing.data_key is not None:
        return _encrypt(source, sealing, sealing.data_key, name, threads)
    if sealing.compression is not None:
        return _compress(source, sealing.level, threads)
    return (source[begin : begin + CHUNK] for begin in range(0, source.nbytes, CHUNK))


def unseal(
    stored: memoryview, raw_size: int, sealing: Sealing, name: str, out: memoryview, *, threads: int = 1
) -> None:
    """Fill `out`, of exactly `raw_size` bytes, with what was sealed.

    Raises SealBrokenError with the reason; `out` is all zeros then, so that nothing unproven is left in it.
    """
    out = out.cast("B")
    if out.nbytes != raw_size:
        raise ValueError(f"out has {out.nbytes} bytes, not {raw_size}")
    stored = stored.cast("B")
    try:
        if sealing.data_key is not None:
            _decrypt(stored, sealing, sealing.data_key, name, out, threads)
        elif sealing.compression is not None:
            _decompress(stored, out, threads)
        else:
            if stored.nbytes != raw_size:
                raise SealBrokenError(f"it has {stored.nbytes} bytes instead of {raw_size}")
            out[:] = stored
    except BaseException:
        for begin in range(0, raw_size, CHUNK):
            out[begin : begin + CHUNK] = bytes(min(CHUNK, raw_size - begin))
        raise


def _encrypt(source: memoryview, sealing: Sealing, data_key: DataKey, name: str, threads: int) -> Iterator[memoryview]:
    salt, prefix = secrets.token_bytes(32), secrets.token_bytes(7)
    method = _METHODS[sealing.compression]
    header = _HEADER.pack(_MAGIC, _VERSION, method, CHUNK, source.nbytes, salt, prefix)
    cipher = _cipher(data_key, salt, header, name)
    count = _count(source.nbytes, CHUNK)
    largest = min(CHUNK, source.nbytes)
    room = largest + _TAG if method == 0 else _LENGTH.size + _frame_bound(largest) + _TAG
    buffers = [memoryview(bytearray(room)) for _ in range(_slots(count, threads))]

    def work(index: int, slot: int) -> memoryview:
        plain = source[index * CHUNK : (index + 1) * CHUNK]
        nonce, buffer = _nonce(prefix, index, count), buffers[slot]
        if method == 0:
            block = buffer[: plain.nbytes + _TAG]
            cipher.encrypt_into(nonce, plain, None, block)
            return block
        frame = _compressed(plain, sealing.level)
        block = buffer[: _LENGTH.size + frame.nbytes + _TAG]
        _LENGTH.pack_into(block, 0, frame.nbytes + _TAG)
        cipher.encrypt_into(nonce, frame, None, block[_LENGTH.size :])
        return block

    yield memoryview(header)
    yield from _in_order(work, count, threads)


def _decrypt(stored: memoryview, sealing: Sealing, data_key: DataKey, name: str, out: memoryview, threads: int) -> None:
    if stored.nbytes < _HEADER.size:
        raise SealBrokenError(f"it was cut: {stored.nbytes} bytes are less than its header")
    header = bytes(stored[: _HEADER.size])
    magic, version, method, chunk, raw_size, salt, prefix = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise SealBrokenError("it does not begin as an encrypted file of a checkpoint")
    if version != _VERSION:
        raise SealBrokenError(f"its header says version {version}; this version of ray-tracking opens {_VERSION}")
    if method != _METHODS[sealing.compression] or raw_size != out.nbytes or not 0 < chunk <= _MOST_CHUNK:
        raise SealBrokenError("its header does not say what the manifest says")
    count = _count(raw_size, chunk)
    sealed = _sealed_chunks(stored[_HEADER.size :], raw_size, chunk, count, framed=method != 0)
    cipher = _cipher(data_key, salt, header, name)
    largest = max((block.nbytes for block in sealed), default=0) if method else 0
    buffers = [memoryview(bytearray(largest)) for _ in range(_slots(count, threads))]

    def work(index: int, slot: int) -> None:
        block, plain = sealed[index], out[index * chunk : (index + 1) * chunk]
        frame = plain if method == 0 else buffers[slot][: block.nbytes - _TAG]
        if not _opens(cipher, _nonce(prefix, index, count), block, frame):
            part = f"part {index + 1} of {count}"
            raise SealBrokenError(f"{part} does not open: it was altered, or it is not what was sealed as {name}")
        if method:
            _expand(frame, plain, index)

    for _ in _in_order(work, count, threads):
        pass


def _opens(cipher: AESGCM, nonce: bytes, block: memoryview, plain: memoryview) -> bool:
    """Decrypts. No exception: one that is kept would keep what it saw, and so the mapping of a file."""
    from cryptography.exceptions import InvalidTag

    try:
        cipher.decrypt_into(nonce, block, None, plain)
    except InvalidTag:
        return False
    return True


def _sealed_chunks(body: memoryview, raw_size: int, chunk: int, count: int, *, framed: bool) -> list[memoryview]:
    """The ciphertext of each chunk, which together are exactly `body`."""
    if not framed:
        if body.nbytes != raw_size + count * _TAG:
            raise SealBrokenError(f"it was cut or extended: {body.nbytes - raw_size - count * _TAG:+d} bytes")
        return [body[index * (chunk + _TAG) : (index + 1) * (chunk + _TAG)] for index in range(count)]
    blocks: list[memoryview] = []
    begin = 0
    most = _frame_bound(min(chunk, raw_size)) + _TAG
    while begin < body.nbytes and len(blocks) < count:
        if body.nbytes - begin < _LENGTH.size:
            break
        length = _LENGTH.unpack_from(body, begin)[0]
        begin += _LENGTH.size
        if not _TAG <= length <= min(most, body.nbytes - begin):
            raise SealBrokenError(f"part {len(blocks) + 1} of {count} was altered or cut: {length} bytes")
        blocks.append(body[begin : begin + length])
        begin += length
    if begin != body.nbytes or len(blocks) != count:
        more = body.nbytes - begin
        raise SealBrokenError(f"it was cut or extended: {len(blocks)} of {count} parts, then {more} bytes")
    return blocks


def _cipher(data_key: DataKey, salt: bytes, header: bytes, name: str) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(data_key.file_key(salt, header + name.encode("utf-8", "surrogatepass")))


def _nonce(prefix: bytes, index: int, count: int) -> bytes:
    return _NONCE.pack(prefix, index, index == count - 1)


def _compress(source: memoryview, level: int, threads: int) -> Iterator[memoryview]:
    count = _count(source.nbytes, CHUNK)
    table = bytearray()

    def work(index: int, _: int) -> memoryview:
        return _compressed(source[index * CHUNK : (index + 1) * CHUNK], level)

    for index, frame in enumerate(_in_order(work, count, threads)):
        table += _TABLE_ENTRY.pack(frame.nbytes, min(CHUNK, source.nbytes - index * CHUNK))
        yield frame
    table += _TABLE_END.pack(count, 0, _TABLE_MAGIC)
    yield memoryview(_SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(table)) + table)


def _decompress(stored: memoryview, out: memoryview, threads: int) -> None:
    frames: list[tuple[memoryview, memoryview]] = []
    begin = plain_begin = 0
    for size, plain_size in _seek_table(stored):
        if plain_size > min(_MOST_CHUNK, out.nbytes - plain_begin):
            raise SealBrokenError(f"it would become more than the {out.nbytes} bytes it had")
        frames.append((stored[begin : begin + size], out[plain_begin : plain_begin + plain_size]))
        begin, plain_begin = begin + size, plain_begin + plain_size
    if begin + _SKIPPABLE.size + _TABLE_ENTRY.size * len(frames) + _TABLE_END.size != stored.nbytes:
        raise SealBrokenError("it was cut or extended: its seek table is of another size")
    if plain_begin != out.nbytes:
        raise SealBrokenError(f"it would become {plain_begin} bytes instead of {out.nbytes}")

    def work(index: int, _: int) -> None:
        _expand(*frames[index], index)

    for _ in _in_order(work, len(frames), threads):
        pass


def _seek_table(stored: memoryview) -> Iterator[tuple[int, int]]:
    """(stored bytes, plain bytes) of each frame."""
    end = stored.nbytes - _TABLE_END.size
    if end < 0:
        raise SealBrokenError(f"it was cut: {stored.nbytes} bytes")
    count, flags, magic = _TABLE_END.unpack_from(stored, end)
    begin = end - count * _TABLE_ENTRY.size
    if magic != _TABLE_MAGIC or flags or count == 0 or begin < _SKIPPABLE.size:
        raise SealBrokenError("its seek table was altered or cut off")
    if _SKIPPABLE.unpack_from(stored, begin - _SKIPPABLE.size) != (_SKIPPABLE_MAGIC, stored.nbytes - begin):
        raise SealBrokenError("its seek table was altered")
    yield from _TABLE_ENTRY.iter_unpack(stored[begin:end])


def _compressed(plain: memoryview, level: int) -> memoryview:
    """One zstd frame that says its plain size."""
    import pyarrow

    return memoryview(pyarrow.Codec("zstd", compression_level=level).compress(plain)).cast("B")


def _expand(frame: memoryview, plain: memoryview, index: int) -> None:
    """Decompress exactly `plain.nbytes` bytes; zstd stops at one more."""
    import pyarrow

    problem = None
    try:
        plain[:] = memoryview(pyarrow.Codec("zstd").decompress(frame, plain.nbytes)).cast("B")
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem is not None:  # not in the handler, see _opens
        raise SealBrokenError(f"part {index + 1} is not {plain.nbytes} bytes compressed: {problem}")


def _frame_bound(size: int) -> int:
    """The most that `size` bytes become in a zstd frame (ZSTD_COMPRESSBOUND)."""
    return size + (size >> 8) + (max((128 << 10) - size, 0) >> 11)


def _count(size: int, chunk: int) -> int:
    """Chunks of a file; an empty one has one empty chunk, so that there is something to prove."""
    return max(-(-size // chunk), 1)


def _slots(count: int, threads: int) -> int:
    return min(threads + 1, count) if threads > 1 else 1


def _in_order(work: Callable[[int, int], _T], count: int, threads: int) -> Iterator[_T]:
    """work(index, slot) of every index in order, up to `threads` at once.

    What runs and what is in the caller's hands never share a slot; slots are below `_slots(count, threads)`.
    """
    if threads <= 1 or count <= 1:
        for index in range(count):
            yield work(index, 0)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="seal")
    try:
        ahead: deque[Future[_T]] = deque(pool.submit(work, index, index) for index in range(min(threads, count)))
        for index in range(threads, count + threads):
            result = ahead.popleft().result()
            if index < count:
                ahead.append(pool.submit(work, index, index % (threads + 1)))
            yield result
    finally:
        # Waits: what still runs reads the source and writes the buffers.
        pool.shutdown(wait=True, cancel_futures=True)
