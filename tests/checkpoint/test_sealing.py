from __future__ import annotations

import contextlib
import gc
import hashlib
import hmac
import itertools
import shutil
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pyarrow
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.checkpoint import sealing as module
from ray_tracking.checkpoint.keys import DataKey, SealBrokenError
from ray_tracking.checkpoint.sealing import Sealing, seal, unseal

CHUNK = 64
HEADER, TAG = 60, 16
DATA_KEY = DataKey(hashlib.sha256(b"data key").digest())
OTHER_KEY = DataKey(hashlib.sha256(b"another").digest())
PLAIN, ZSTD, ENC, BOTH = Sealing(), Sealing("zstd"), Sealing(None, DATA_KEY), Sealing("zstd", DATA_KEY)
EVERY = pytest.mark.parametrize("how", [PLAIN, ZSTD, ENC, BOTH], ids=["plain", "zstd", "enc", "zstd+enc"])
ENCRYPTED = pytest.mark.parametrize("how", [ENC, BOTH], ids=["enc", "zstd+enc"])
THREADS = pytest.mark.parametrize("threads", [1, 3])
NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", CHUNK)


def noise(size: int) -> bytes:
    """The same bytes each time, that don't compress."""
    return hashlib.shake_128(b"noise").digest(size)


def sealed(data: bytes, how: Sealing, name: str = NAME, threads: int = 1) -> bytes:
    return b"".join(bytes(block) for block in seal(memoryview(data), how, name, threads=threads))


def opened(stored: bytes, size: int, how: Sealing, name: str = NAME, threads: int = 1) -> bytes:
    out = bytearray(b"\xaa" * size)
    try:
        unseal(memoryview(stored), size, how, name, memoryview(out), threads=threads)
    except SealBrokenError:
        assert out == bytes(size), "what was opened before the refusal is still there"
        raise
    return bytes(out)


def refused(stored: bytes, size: int, how: Sealing, name: str = NAME, threads: int = 1) -> str:
    with pytest.raises(SealBrokenError) as caught:
        opened(stored, size, how, name, threads)
    return str(caught.value)


def parts(stored: bytes, how: Sealing) -> list[bytes]:
    """An encrypted file's header and its chunks, each with its length before it if it has one."""
    found, rest = [stored[:HEADER]], stored[HEADER:]
    while rest:
        size = 4 + struct.unpack_from(">I", rest)[0] if how.compression else CHUNK + TAG
        found.append(rest[:size])
        rest = rest[size:]
    return found


@EVERY
@THREADS
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 9 * CHUNK + 5])
def test_round_trip(how: Sealing, threads: int, size: int) -> None:
    for data in (noise(size), bytes(size)):
        stored = sealed(data, how, threads=threads)
        assert opened(stored, size, how, threads=threads) == data
        assert opened(stored, size, how, threads=4 - threads) == data


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=700) | st.integers(0, 700).map(noise),
    st.sampled_from([PLAIN, ZSTD, ENC, BOTH, replace(BOTH, level=3)]),
    st.text(max_size=20),
    st.integers(1, 4),
    st.integers(1, 200),
)
def test_round_trip_of_anything(data: bytes, how: Sealing, name: str, threads: int, chunk: int) -> None:
    with mock.patch.object(module, "CHUNK", chunk):
        stored = sealed(data, how, name, threads)
    assert opened(stored, len(data), how, name, threads) == data


def test_suffixes() -> None:
    assert [how.suffix for how in (PLAIN, ZSTD, ENC, BOTH)] == ["", ".zst", ".enc", ".enc"]


@EVERY
def test_any_contiguous_buffer(how: Sealing) -> None:
    weights = np.arange(100, dtype=np.float32).reshape(4, 25)
    stored = b"".join(bytes(block) for block in seal(memoryview(weights), how, NAME))
    again = np.zeros_like(weights)
    unseal(memoryview(np.frombuffer(stored, np.uint8)), weights.nbytes, how, NAME, memoryview(again))
    assert np.array_equal(again, weights)


def test_plain_blocks_are_the_source_itself() -> None:
    source = np.zeros(3 * CHUNK, np.uint8)
    blocks = [np.frombuffer(block, np.uint8) for block in seal(memoryview(source), PLAIN, NAME)]
    assert len(blocks) == 3
    assert all(np.shares_memory(block, source) for block in blocks)


# The formats, from their descriptions alone: what is written today must open for ever.


def test_an_encrypted_file_is_what_the_docs_say() -> None:
    data = noise(2 * CHUNK + 7)
    stored = sealed(data, ENC)
    magic, version, method, chunk, size, salt, prefix, end = struct.unpack(">6sBBIQ32s7sB", stored[:HEADER])
    assert (magic, version, method, chunk, size, end) == (b"RTSEAL", 1, 0, CHUNK, len(data), 0)
    info = b"ray-tracking checkpoint file v1\0" + stored[:HEADER] + NAME.encode()
    pseudorandom = hmac.digest(salt, DATA_KEY.secret, "sha256")  # RFC 5869
    cipher = AESGCM(hmac.digest(pseudorandom, info + b"\1", "sha256"))
    plain = b"".join(
        cipher.decrypt(prefix + index.to_bytes(4, "big") + bytes([index == 2]), part, None)
        for index, part in enumerate(parts(stored, ENC)[1:])
    )
    assert plain == data


GOLDEN = {
    "enc": (
        ENC,
        "52545345414c0100000000400000000000000064fa6e12f06fbb2f630210ad281aae4a3109352a881ba410e2941f55f8"
        "b0cbd9b64b063631b786d100a02f459c2108ee59605b1dd98bafe940ff32d24517ca6a8d0fded0035fd605c3c1903ae2"
        "91ddecce45e53b8a06fd5b748a1bf4edaa4a3fa8f9ddcbdd62a32c414b41c8ee19af75321076e4683d9e720d683e094e"
        "4e62f7f5723eb2afe2a8e8b88f50868b8af7bd3cb1db81cd193cc7b91962ac872eae5ce15301a74cd5bedd512dd498fb",
    ),
    "zstd+enc": (
        BOTH,
        "52545345414c0101000000400000000000000064551a68251bd1fbcd4e5c13241729aad182a61f56ceb39cf4d3b26e49"
        "0d6cda3e105979cc5eef1e0000000051e606c2ae958553e0c80122d2c80e6bf1494209513a058658252fb944730da40d"
        "64bfeb75e1b7dd2fd9ca623c2eb52caa1ba91bb7185c38b7e1eda07fdb6bc22c0857825866591f53423c8ad6092d3355"
        "b10000003d87fa5b98e1473bd876f3d79c19222acd9999c074bc212b2b375cb9dad3c7882ea5e80fe1aafd6ae661b1d3"
        "3646152fde00c3ef9ff8376e23a72ee76d9a",
    ),
    "zstd": (
        ZSTD,
        "28b52ffd2040c5010002040d13a0371d40dcbef5ad6ef37b304655c5c5fe8b1a408bf99a454ed7d32d071a4b0b733103"
        "afe7c41bc4b53c090f25551c0b9d65410028b52ffd2024210100206f7220697420776173206e6f2075736520746f2073"
        "65616c20697420617420616c6c2e5e2a4d181900000041000000400000002d000000240000000200000000b1ea928f",
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_files_of_before_open(kind: str) -> None:
    how, stored = GOLDEN[kind]
    text = b"What was sealed by the first version opens with every later one, or it was no use to seal it at all."
    assert opened(bytes.fromhex(stored), len(text), how) == text


@pytest.mark.parametrize("size", [0, 1, 5 * CHUNK + 1])
def test_a_compressed_file_opens_with_the_zstd_command(size: int) -> None:
    command = shutil.which("zstd")
    if command is None:
        pytest.skip("no zstd command here")
    done = subprocess.run([command, "-dc"], input=sealed(noise(size), ZSTD), capture_output=True, check=True)
    assert done.stdout == noise(size)


def test_a_compressed_file_is_in_the_seekable_format() -> None:
    data = bytes(CHUNK) + noise(CHUNK) + b"end"
    stored = sealed(data, ZSTD)
    count, flags, magic = struct.unpack("<IBI", stored[-9:])
    assert (count, flags, magic) == (3, 0, 0x8F92EAB1)
    entries = list(struct.iter_unpack("<II", stored[-9 - 8 * count : -9]))
    assert [plain for _, plain in entries] == [CHUNK, CHUNK, 3]
    frames = sum(size for size, _ in entries)
    assert struct.unpack_from("<II", stored, frames) == (0x184D2A5E, 8 * count + 9)
    assert len(stored) == frames + 8 + 8 * count + 9
    assert pyarrow.Codec("zstd").decompress(stored[:frames], len(data), asbytes=True) == data


def test_compressed_files_are_smaller() -> None:
    data = bytes(50 * CHUNK)
    assert len(sealed(data, ZSTD)) < len(data)
    with mock.patch.object(module, "CHUNK", 16 * CHUNK):
        assert len(sealed(data, BOTH)) < len(data) / 5


# Encrypted: whatever is done to a file is found.


@ENCRYPTED
def test_every_flipped_bit_is_found(how: Sealing) -> None:
    data = noise(3 * CHUNK + 10)
    stored = bytearray(sealed(data, how))
    for position, bit in itertools.product(range(len(stored)), range(8)):
        stored[position] ^= 1 << bit
        refused(bytes(stored), len(data), how)
        stored[position] ^= 1 << bit
    assert opened(bytes(stored), len(data), how) == data


@ENCRYPTED
@THREADS
@pytest.mark.parametrize("size", [0, CHUNK, 3 * CHUNK, 3 * CHUNK + 10])
def test_every_cut_is_found(how: Sealing, threads: int, size: int) -> None:
    stored = sealed(noise(size), how)
    for length in range(len(stored)):
        assert "cut" in refused(stored[:length], size, how, threads=threads)


@ENCRYPTED
def test_a_cut_at_a_border_is_found_though_all_sizes_agree(how: Sealing) -> None:
    data = noise(4 * CHUNK)
    header, *chunks = parts(sealed(data, how), how)
    for count in range(1, 4):
        forged = header[:12] + struct.pack(">Q", count * CHUNK) + header[20:]
        body = b"".join(chunks[:count])
        assert f"part 1 of {count} does not open" in refused(forged + body, count * CHUNK, how)
        assert "its header does not say what the manifest says" in refused(header + body, count * CHUNK, how)


@ENCRYPTED
def test_every_extension_is_found(how: Sealing) -> None:
    data = noise(2 * CHUNK)
    stored = sealed(data, how)
    last = parts(stored, how)[-1]
    for more in (b"\0", bytes(4), bytes(CHUNK), last, stored):
        assert "cut or extended" in refused(stored + more, len(data), how)


@ENCRYPTED
@THREADS
def test_chunks_in_another_order_left_out_or_repeated_are_found(how: Sealing, threads: int) -> None:
    size = 4 * CHUNK
    header, *chunks = parts(sealed(noise(size), how), how)
    for order in itertools.product(range(4), repeat=4):
        stored = header + b"".join(chunks[index] for index in order)
        if order == (0, 1, 2, 3):
            assert opened(stored, size, how, threads=threads) == noise(size)
        else:
            refused(stored, size, how, threads=threads)
    for left_out in range(4):
        refused(header + b"".join(chunks[:left_out] + chunks[left_out + 1 :]), size, how, threads=threads)


@ENCRYPTED
def test_chunks_and_headers_of_another_file_are_found(how: Sealing) -> None:
    size = 3 * CHUNK
    first, second = (parts(sealed(noise(size), how), how) for _ in range(2))
    for index in range(4):
        mixed = [*first[:index], second[index], *first[index + 1 :]]
        assert "does not open" in refused(b"".join(mixed), size, how)


@ENCRYPTED
def test_a_file_under_another_name_or_of_another_save_is_found(how: Sealing) -> None:
    stored = sealed(noise(100), how)
    assert "not what was sealed as state-00000.json" in refused(stored, 100, how, "state-00000.json")
    refused(stored, 100, how, NAME + " ")
    refused(stored, 100, replace(how, data_key=OTHER_KEY))


@ENCRYPTED
def test_two_files_of_the_same_bytes_share_nothing(how: Sealing) -> None:
    first, second = (sealed(bytes(5 * CHUNK), how) for _ in range(2))
    windows = [
        {stored[begin : begin + 8] for begin in range(HEADER + 4, len(stored) - 8)} for stored in (first, second)
    ]
    assert not windows[0] & windows[1]
    assert len(windows[0]) == len(first) - HEADER - 12


def test_one_thing_in_place_of_another_is_refused() -> None:
    data = noise(100)
    kinds = {"plain": PLAIN, "zstd": ZSTD, "enc": ENC, "both": BOTH}
    for (is_, wrote), (should, reads) in itertools.permutations(kinds.items(), 2):
        if should == "plain":
            assert "bytes instead of 100" in refused(sealed(data, wrote), 100, reads), (is_, should)
        else:
            refused(sealed(data, wrote), 100, reads)


@pytest.mark.parametrize(
    ("position", "value", "why"),
    [
        (0, b"S", "does not begin as an encrypted file"),
        (6, b"\x02", "version 2; this version of ray-tracking opens 1"),
        (7, b"\x02", "does not say what the manifest says"),
        (8, b"\0\0\0\0", "does not say what the manifest says"),
        (8, b"\xff\xff\xff\xff", "does not say what the manifest says"),
        (8, b"\0\0\0\x01", "cut or extended"),
        (59, b"\x01", "part 1 of 4 does not open"),
    ],
)
def test_an_altered_header_is_refused_by_name(position: int, value: bytes, why: str) -> None:
    stored = bytearray(sealed(noise(4 * CHUNK), ENC))
    stored[position : position + len(value)] = value
    assert why in refused(bytes(stored), 4 * CHUNK, ENC)


@pytest.mark.parametrize("length", [0, TAG - 1, 144, 2**32 - 1])
def test_a_length_that_no_chunk_can_have_is_refused_before_it_is_opened(length: int) -> None:
    stored = bytearray(sealed(noise(4 * CHUNK), BOTH))
    stored[HEADER : HEADER + 4] = struct.pack(">I", length)
    assert f"part 1 of 4 was altered or cut: {length} bytes" in refused(bytes(stored), 4 * CHUNK, BOTH)


@THREADS
def test_nothing_of_a_broken_file_is_left(threads: int) -> None:
    data = noise(8 * CHUNK)
    stored = bytearray(sealed(data, ENC))
    stored[-1] ^= 1
    out = bytearray(len(data))
    with pytest.raises(SealBrokenError, match="part 8 of 8"):
        unseal(memoryview(stored), len(data), ENC, NAME, memoryview(out), threads=threads)
    assert out == bytes(len(data))


def test_a_wrong_size_of_the_buffer_is_not_blamed_on_the_file() -> None:
    with pytest.raises(ValueError, match="out has 3 bytes, not 4") as caught:
        unseal(memoryview(b"abcd"), 4, PLAIN, NAME, memoryview(bytearray(3)))
    assert not isinstance(caught.value, SealBrokenError)


# Compressed alone: the manifest's digest proves the bytes; here nothing may crash, grow or be left over.


def test_every_cut_and_extension_of_a_compressed_file_is_found() -> None:
    for size in (0, CHUNK, 3 * CHUNK + 10):
        stored = sealed(noise(size), ZSTD)
        for length in range(len(stored)):
            refused(stored[:length], size, ZSTD)
        for more in (b"\0", stored, stored[-9:]):
            refused(stored + more, size, ZSTD)
        refused(stored, size + 1, ZSTD)
        if size:
            refused(stored, size - 1, ZSTD)


def test_a_compressed_file_with_a_flipped_bit_is_refused_or_keeps_its_size() -> None:
    data = noise(2 * CHUNK) + bytes(CHUNK)
    stored = bytearray(sealed(data, ZSTD))
    for position, bit in itertools.product(range(len(stored)), range(8)):
        stored[position] ^= 1 << bit
        with contextlib.suppress(SealBrokenError):
            opened(bytes(stored), len(data), ZSTD)
        stored[position] ^= 1 << bit


def seekable(frames: list[tuple[bytes, int]]) -> bytes:
    """A compressed file that claims these plain sizes."""
    table = b"".join(struct.pack("<II", len(frame), size) for frame, size in frames)
    table += struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
    return b"".join(frame for frame, _ in frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


BOMB = pyarrow.Codec("zstd").compress(bytes(256 << 20), asbytes=True)


@pytest.fixture
def most_native() -> Iterator[Callable[[], int]]:
    """The most bytes that were allocated at once outside Python's own memory, by what compresses."""
    before = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(pool)
    yield pool.max_memory
    pyarrow.set_memory_pool(before)


@pytest.mark.parametrize("claimed", [100, 256 << 20, 2**32 - 1])
def test_a_bomb_does_not_go_off(claimed: int, most_native: Callable[[], int]) -> None:
    why = "part 1 is not 100 bytes compressed" if claimed == 100 else "more than the 100 bytes"
    assert why in refused(seekable([(BOMB, claimed)]), 100, ZSTD)
    assert most_native() <= 1024


def test_a_huge_chunk_is_refused_even_in_a_huge_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_CHUNK", 1000)
    assert "would become more" in refused(seekable([(bytes(9), 1001)]), 2000, ZSTD)
    with mock.patch.object(module, "CHUNK", 1001):
        stored = sealed(bytes(1500), ENC)
    assert "its header does not say" in refused(stored, 1500, ENC)


def test_a_bomb_inside_encryption_does_not_go_off(most_native: Callable[[], int]) -> None:
    bomb = pyarrow.Codec("zstd").compress(bytes(10_000), asbytes=True)
    assert len(bomb) < CHUNK
    with mock.patch.object(module, "_compressed", return_value=memoryview(bomb)):
        stored = sealed(noise(CHUNK), BOTH)
    assert "part 1 is not 64 bytes compressed" in refused(stored, CHUNK, BOTH)
    assert most_native() <= 1024


def test_claimed_numbers_of_parts_are_not_believed() -> None:
    stored = bytearray(sealed(noise(CHUNK), ZSTD))
    stored[-9:-5] = struct.pack("<I", 2**32 - 1)
    assert "seek table" in refused(bytes(stored), CHUNK, ZSTD)
    stored[-9:-5] = bytes(4)
    assert "seek table" in refused(bytes(stored), CHUNK, ZSTD)


@pytest.mark.parametrize("position", range(-25, 0))
def test_an_altered_seek_table_is_refused(position: int) -> None:
    stored = bytearray(sealed(noise(CHUNK), ZSTD))
    stored[position] ^= 1
    refused(bytes(stored), CHUNK, ZSTD)


# Memory and threads.


@EVERY
@THREADS
def test_memory_is_bounded(
    how: Sealing, threads: int, monkeypatch: pytest.MonkeyPatch, most_native: Callable[[], int]
) -> None:
    chunk, count = 64 << 10, 200
    monkeypatch.setattr(module, "CHUNK", chunk)
    weights = np.frombuffer(noise(chunk * 8), np.uint8)
    source = np.tile(weights, count // 8)
    stored = np.zeros(source.nbytes + source.nbytes // 8, np.uint8)
    out = np.zeros_like(source)
    tracemalloc.start()
    try:
        end = 0
        for block in seal(memoryview(source), how, NAME, threads=threads):
            stored[end : end + block.nbytes] = np.frombuffer(block, np.uint8)
            end += block.nbytes
        unseal(memoryview(stored[:end]), source.nbytes, how, NAME, memoryview(out), threads=threads)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(out, source)
    assert most < (threads + 2) * chunk + (256 << 10)
    assert most_native() < (2 * threads + 2) * chunk


@EVERY
@THREADS
def test_a_block_is_valid_until_the_next_is_asked_for(how: Sealing, threads: int) -> None:
    for block in seal(memoryview(noise(12 * CHUNK)), how, NAME, threads=threads):
        before = bytes(block)
        time.sleep(0.002)
        assert bytes(block) == before


@EVERY
@THREADS
def test_the_source_is_let_go(how: Sealing, threads: int) -> None:
    """Shared memory can't be unmapped while something looks at it."""
    gc.disable()
    try:
        for blocks in (1, 2, 100):
            source = bytearray(noise(12 * CHUNK))
            blocks_left = seal(memoryview(source), how, NAME, threads=threads)
            for _ in itertools.islice(blocks_left, blocks):
                pass
            blocks_left.close()  # type: ignore[attr-defined]
            del blocks_left, _
            source.append(0)
    finally:
        gc.enable()


@pytest.mark.parametrize("how", [ZSTD, ENC, BOTH], ids=["zstd", "enc", "zstd+enc"])
@THREADS
def test_a_refusal_that_is_kept_lets_go_of_the_file(how: Sealing, threads: int) -> None:
    stored = bytearray(sealed(noise(6 * CHUNK), how))
    out = bytearray(6 * CHUNK)
    if how is ZSTD:
        stored[:4] = b"none"
    else:
        stored[-1] ^= 1
    gc.disable()
    try:
        with pytest.raises(SealBrokenError) as caught:
            unseal(memoryview(stored), len(out), how, NAME, memoryview(out), threads=threads)
        error = caught.value.with_traceback(None)
        del caught
        stored.append(0)
        out.append(0)
    finally:
        gc.enable()
    assert str(error).startswith("part ")


def test_closing_waits_for_the_threads() -> None:
    running = []

    def slow(plain: memoryview, level: int) -> memoryview:
        running.append(plain)
        time.sleep(0.02)
        running.remove(plain)
        return memoryview(bytes(plain))

    with mock.patch.object(module, "_compressed", side_effect=slow):
        blocks = seal(memoryview(noise(20 * CHUNK)), ZSTD, NAME, threads=3)
        next(blocks)
        blocks.close()  # type: ignore[attr-defined]
        assert not running


@ENCRYPTED
def test_an_error_in_a_thread_arrives(how: Sealing) -> None:
    with (
        mock.patch.object(module, "_nonce", side_effect=[b"n" * 12, MemoryError("no room")] + [b"m" * 12] * 9),
        pytest.raises(MemoryError, match="no room"),
    ):
        sealed(noise(9 * CHUNK), how, threads=3)


def test_a_sealing_does_not_show_its_key() -> None:
    assert DATA_KEY.secret.hex() not in repr(ENC)
    assert repr(DATA_KEY.secret)[2:-1] not in repr(ENC)
    with pytest.raises(TypeError, match="is secret"):
        asdict(ENC)
