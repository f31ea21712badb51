"""Why checkpoints are sealed as they are: ways to encrypt and to compress one buffer, measured side by side.

Not one of the figures: run by hand as `python -m tests.bench.sealing_choice [--size MB] [--rounds N]`. The sides take
turns in each round; a rate is the median over the rounds, of wall and of the process's CPU time, in GB/s of plain
bytes. Memory is how much the process's peak grew in a further run. What isn't installed is named and left out.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import xxhash
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from ray_tracking.checkpoint import sealing
from ray_tracking.checkpoint.keys import DataKey
from ray_tracking.checkpoint.sealing import Sealing, seal, unseal
from tests.bench.machine import machine

NAME = "model.safetensors"
_READ = 1 << 20
_NOTHING = 1000.0
"""GB/s beyond any memory's: the bytes were not touched."""


@dataclass(frozen=True, slots=True)
class Way:
    """`seal` makes what is stored, as whoever writes it to a file would; `open` takes what `seal` gave."""

    name: str
    seal: Callable[[], Any]
    open: Callable[[Any], Any] | None


class Sink(io.RawIOBase):
    """A file that counts and forgets what is written to it."""

    size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def close(self) -> None:
        """A stream that is done closes it; its size is still wanted."""


def ours(name: str, source: memoryview, out: memoryview, how: Sealing, threads: int = 1) -> Way:
    stored = memoryview(b"".join(map(bytes, seal(source, how, NAME))))

    def stream() -> None:
        deque(seal(source, how, NAME, threads=threads), maxlen=0)

    return Way(name, stream, lambda _: unseal(stored, source.nbytes, how, NAME, out, threads=threads))


def written(source: memoryview, how: Sealing, chunk: int) -> Way:
    """What the process that writes does with each block: digest and write, here to memory."""
    file = os.memfd_create("sealed")

    def write() -> None:
        os.lseek(file, 0, os.SEEK_SET)
        digest = xxhash.xxh3_128()
        with mock.patch.object(sealing, "CHUNK", chunk):
            for block in seal(source, how, NAME):
                digest.update(block)
                os.write(file, block)

    return Way(f"chunks of {chunk >> 10} KiB", write, None)


def plain_calls(name: str, cipher: AESGCM | ChaCha20Poly1305, source: memoryview, *, into: bool) -> Way:
    """The same chunks with the library's calls alone: `into` a reused buffer, or a new object for each."""
    chunk = sealing.CHUNK
    borders = range(0, source.nbytes, chunk)
    buffer = memoryview(bytearray(chunk + 16))

    def call(begin: int) -> None:
        plain = source[begin : begin + chunk]
        if into:
            cipher.encrypt_into(begin.to_bytes(12, "big"), plain, None, buffer[: plain.nbytes + 16])
        else:
            cipher.encrypt(begin.to_bytes(12, "big"), plain, None)

    return Way(name, lambda: deque(map(call, borders), maxlen=0), None)


def age(source: memoryview) -> list[Way]:
    import pyrage

    identity = pyrage.x25519.Identity.generate()
    recipients = [identity.to_public()]
    plain = bytes(source)
    stored = pyrage.encrypt(plain, recipients)
    return [
        Way(
            "age (pyrage), whole",
            lambda: pyrage.encrypt(plain, recipients),
            lambda _: pyrage.decrypt(stored, [identity]),
        ),
        Way(
            "age (pyrage), streams",
            lambda: pyrage.encrypt_io(io.BytesIO(plain), Sink(), recipients),
            lambda _: pyrage.decrypt_io(io.BytesIO(stored), Sink(), [identity]),
        ),
    ]


def tink(source: memoryview) -> list[Way]:
    from tink import new_keyset_handle, streaming_aead

    streaming_aead.register()
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    primitive = new_keyset_handle(template).primitive(streaming_aead.StreamingAead)

    def write(into: Any) -> Any:
        with primitive.new_encrypting_stream(into, NAME.encode()) as stream:
            for begin in range(0, source.nbytes, _READ):
                stream.write(source[begin : begin + _READ])
        return into

    class Kept(io.BytesIO):
        def close(self) -> None:
            pass

    stored = write(Kept()).getvalue()

    def read(_: Any) -> None:
        with primitive.new_decrypting_stream(io.BytesIO(stored), NAME.encode()) as stream:
            while stream.read(_READ):
                pass

    return [Way("Tink AES256_GCM_HKDF_1MB", lambda: write(Sink()), read)]


def if_installed(package: str, make: Callable[[memoryview], list[Way]], source: memoryview) -> list[Way]:
    try:
        return make(source)
    except ImportError as error:
        print(f"{package} is left out: {error}")
        return []


def measured(action: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the wall and on the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_growth(action: Callable[[], Any]) -> float:
    """MB by which the process's peak of resident memory goes over what it had before (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    action()
    return max(_status("VmHWM") - before, 0) / 1e3


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def compare(title: str, ways: Sequence[Way], size: int, rounds: int) -> None:
    """Print a line for each way."""
    sealing_: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    opening: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for index in range(rounds + 1):
        for way in ways:
            sealed = measured(way.seal)
            opened = measured(lambda way=way: way.open(None)) if way.open else None  # type: ignore[misc]
            if index:  # the first round warms up
                sealing_[way.name].append(sealed)
                if opened:
                    opening[way.name].append(opened)
    print(f"\n{title}\n{'':42}{'seal: wall':>11}{'CPU':>7}{'open: wall':>12}{'CPU':>7}{'peak MB':>9}")
    for way in ways:
        columns = f"{_rates(size, sealing_[way.name], 11)}{_rates(size, opening[way.name], 12)}"
        print(f"{way.name:42}{columns}{peak_growth(way.seal):9.0f}")


def _rates(size: int, seconds: Sequence[tuple[float, float]], width: int) -> str:
    if not seconds:
        return f"{'-':>{width}}{'-':>7}"
    wall, cpu = (size / 1e9 / statistics.median(column) for column in zip(*seconds, strict=True))
    if cpu > _NOTHING:
        return f"{'free':>{width}}{'free':>7}"
    return f"{wall:{width}.2f}{cpu:7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128, metavar="MB")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    size = arguments.size << 20
    # The scale of a trained layer's weights; what zstd finds in them is the exponent.
    weights = np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)
    weights *= 0.02
    source = memoryview(weights).cast("B")
    out = memoryview(bytearray(size))
    here = machine()
    print(f"{size >> 20} MiB of float32; {here['processor']}, {here['cores']} cores, load {here['load_average']}")
    key = DataKey(bytes(range(32)))
    encrypted = Sealing(None, key)

    def copy(_: Any = None) -> None:
        out[:] = source

    ways = [
        Way("memcpy", copy, copy),
        ours("ours, AES-256-GCM", source, out, encrypted),
        ours("ours, AES-256-GCM, 2 threads", source, out, encrypted, threads=2),
        plain_calls("AESGCM.encrypt_into alone", AESGCM(bytes(32)), source, into=True),
        plain_calls("AESGCM.encrypt, new objects", AESGCM(bytes(32)), source, into=False),
        plain_calls("ChaCha20Poly1305.encrypt_into", ChaCha20Poly1305(bytes(32)), source, into=True),
        *if_installed("pyrage", age, source),
        *if_installed("tink", tink, source),
    ]
    compare("Encryption, GB/s", ways, size, arguments.rounds)
    chunks = [64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20]
    ways = [written(source, encrypted, chunk) for chunk in chunks]
    compare("Encrypt, digest and write, GB/s", ways, size, arguments.rounds)
    smaller = source[: min(size, 64 << 20)]
    ways = []
    for name, how in {
        "plain": Sealing(),
        "zstd 1": Sealing("zstd"),
        "zstd 3": Sealing("zstd", level=3),
        "zstd 1, encrypted": Sealing("zstd", key),
    }.items():
        stored = sum(block.nbytes for block in seal(smaller, how, NAME))
        for threads in (1, 2) if how.compression else (1,):
            title = f"{name}, {threads} thread{'s' * (threads > 1)}: {stored / smaller.nbytes:.3f} of it"
            ways.append(ours(title, smaller, out[: smaller.nbytes], how, threads))
    compare("Compression, GB/s", ways, smaller.nbytes, arguments.rounds)


if __name__ == "__main__":
    main()
