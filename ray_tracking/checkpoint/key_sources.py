"""Where the text of a key comes from: a file, an environment variable, a command; and what a key must be.

In: one `key_file`, `key_env` or `key_command` of a configuration. Out: 32 secret bytes, or a ConfigError that
tells what was wrong with the text without a letter of it. Runs the command; changes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import secrets
import selectors
import shlex
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NoReturn

from ray_tracking.errors import ConfigError, RefusedError, UsageError
from ray_tracking.log import get_logger

log = get_logger()

KEY_BYTES = 32
SOURCES = ("key_file", "key_env", "key_command")
COMMAND_SECONDS = 30.0
"""How long a key command may take."""

_ALLOWED = f"A key is {KEY_BYTES} random bytes as base64 or hex on one line; lines that begin with # are left out."
_HOW_TO_MAKE = "Make one with: ray-tracking checkpoints key new -o checkpoint.key"
_MOST_TEXT = 64 * 1024
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{43}=?")
_FEWEST_VALUES = 16
"""Of 32 random bytes this many differ but for one key in 10**18."""


def generate_key() -> str:
    """A new random key as a line of base64, as `key_file`, `key_env` and `key_command` take it."""
    while True:
        secret = secrets.token_bytes(KEY_BYTES)
        if _weakness(secret) is None:
            return base64.b64encode(secret).decode("ascii")


def write_key_file(path: str | os.PathLike[str], text: str, key_id: str) -> None:
    """A new file that only its owner can open. RefusedError if there is something under its name, UsageError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        file = os.open(path, flags, 0o600)
    except FileExistsError:
        raise RefusedError(
            f"{os.fspath(path)} is there already. A key that is written over opens nothing any more.",
            hint="Choose another name.",
        ) from None
    except OSError as error:
        raise UsageError(f"No key file can be made at {os.fspath(path)}: {error.strerror}.") from None
    try:
        with open(file, "w", encoding="ascii") as opened:
            opened.write(f"# ray-tracking checkpoint key {key_id}\n{text}\n")
            opened.flush()
            os.fsync(file)
        _fsync_folder(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        os.unlink(path)
        raise UsageError(f"The key file {os.fspath(path)} can't be written: {error.strerror}.") from None


def _fsync_folder(path: str) -> None:
    """So that the name outlives a power cut too, before anything is sealed with the key."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_secret(source: Mapping[str, Any], where: str) -> bytes:
    """The secret that the one source of `source` gives. `where`: the dotted key of the section, for messages.

    Raises ConfigError: not exactly one source, or it gives no key that is allowed.
    """
    named = [name for name in SOURCES if source.get(name) is not None]
    if len(named) != 1:
        found = " and ".join(named) or "no key"
        raise ConfigError(f"{where} names {found}. Allowed: exactly one of {', '.join(SOURCES)}.")
    value, where = str(source[named[0]]), f"{where}.{named[0]}"
    read = {"key_file": _read_file, "key_env": _read_variable, "key_command": _run}[named[0]]
    return _parse(read(value, where), where)


def parse_key(text: str) -> bytes:
    """The secret that a line of `generate_key` holds."""
    return _parse(text.encode("ascii"), "the key")


def _parse(text: bytes, where: str) -> bytes:
    # "replace": a UnicodeDecodeError would carry the text to wherever the error is shown.
    lines = [line.strip() for line in text.decode("ascii", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1:
        _refuse(where, f"gives {len(lines)} lines of text" if lines else "gives nothing")
    line = lines[0]
    if _HEX.fullmatch(line):
        secret = bytes.fromhex(line)
    elif _BASE64.fullmatch(line):
        secret = base64.urlsafe_b64decode(line.rstrip("=").replace("+", "-").replace("/", "_") + "=")
    else:
        _refuse(where, f"gives {len(line)} characters that are not {KEY_BYTES} bytes as base64 or hex")
    if (weakness := _weakness(secret)) is not None:
        _refuse(where, f"gives a weak key: {weakness}")
    return secret


def _weakness(secret: bytes) -> str | None:
    """Why nobody's random generator made this; None if one may have."""
    if secret in (secret + secret)[1:-1]:
        return "it repeats itself"
    if len({(after - before) % 256 for before, after in pairwise(secret)}) == 1:
        return "it counts"
    if all(32 <= byte < 127 for byte in secret):
        return "it is text"
    if len(set(secret)) < _FEWEST_VALUES:
        return "too few of its bytes differ"
    return None


def _refuse(where: str, found: str) -> NoReturn:
    raise ConfigError(f"{where} {found}. {_ALLOWED}", hint=_HOW_TO_MAKE)


def _read_file(path: str, where: str) -> bytes:
    try:
        with open(os.path.expanduser(path), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(_MOST_TEXT)
    except OSError as error:
        raise ConfigError(
            f"{where}: the key file {path} can't be read here: {error.strerror}.",
            hint="Put it, or set another path, on every machine that has a worker.",
        ) from None
    if stat.S_IMODE(mode) & 0o077:
        log.warning("others than its owner can open the key file", file=path, fix=f"chmod 600 {shlex.quote(path)}")
    return text


def _read_variable(name: str, where: str) -> bytes:
    text = os.environ.get(name)
    if text is None:
        raise ConfigError(
            f"{where}: the environment variable {name} is not set here.",
            hint="Set it where the program is started; workers get it from there.",
        )
    return os.fsencode(text)


def _run(command: str, where: str) -> bytes:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{where}: the command can't be split into words: {error}.") from None
    if not words:
        raise ConfigError(f"{where}: the command is empty.")
    # Messages name the program alone: its arguments may hold a token.
    who = f"{where}: {words[0]}"
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that what it started ends with it
        )
    except OSError as error:
        raise ConfigError(f"{who} can't be started here: {error.strerror}.") from None
    with process:
        try:
            output, errors, problem = _collect(process)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if problem is None and process.returncode:
        code = process.returncode
        problem = f"ended with exit status {code}" if code > 0 else f"was ended by signal {-code}"
    if problem is not None:
        raise ConfigError(f"{who} {problem}.{_shown(errors, output)}")
    return output


def _collect(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes, str | None]:
    """(stdout, the end of stderr, what went wrong), in bounded time and memory. May leave it running."""
    output, errors = bytearray(), bytearray()
    deadline = time.monotonic() + COMMAND_SECONDS
    too_late = f"did not end within {COMMAND_SECONDS:g} seconds"
    with selectors.DefaultSelector() as selector:
        for stream, kept in ((process.stdout, output), (process.stderr, errors)):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, kept)
        while selector.get_map():
            # What it leaves running in the background may hold the pipes open: read what is there and go.
            has_ended = process.poll() is not None
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(output), bytes(errors), too_late
            ready = selector.select(0 if has_ended else min(left, 0.1))
            if has_ended and not ready:
                break
            for key, _ in ready:
                data = os.read(key.fd, _MOST_TEXT)
                if not data:
                    selector.unregister(key.fileobj)
                key.data.extend(data)
            del errors[:-_MOST_TEXT]
            if len(output) > _MOST_TEXT:
                return b"", bytes(errors), f"prints more than {_MOST_TEXT} bytes"
    try:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return bytes(output), bytes(errors), too_late
    return bytes(output), bytes(errors), None


def _shown(errors: bytes, output: bytes) -> str:
    """The end of what a command wrote to stderr, without anything that it also wrote to stdout."""
    text = errors.decode("utf-8", "replace")
    for word in sorted(set(output.decode("utf-8", "replace").split()), key=len, reverse=True):
        text = text.replace(word, "[removed]") if len(word) >= 8 else text
    from ray_tracking.config.redaction import redact_text  # all of the configuration: not for the writer process

    text = redact_text(text).strip()[-2000:]
    return f" It says:\n{text}" if text else ""
