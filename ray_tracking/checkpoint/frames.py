"""Messages between a trainer and its checkpoint writer: JSON with a length before it, and at most one descriptor."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Mapping[str, Any], fd: int | None = None) -> None:
    """Raises OSError when nobody is there any more. One sender at a time."""
    data = json.dumps(message).encode()
    length = _LENGTH.pack(len(data))
    if fd is None:
        connection.sendall(length + data)
        return
    socket.send_fds(connection, [length], [fd])
    connection.sendall(data)


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """The next message and the descriptor that came with it; None at the end of the connection."""
    length, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
    fd = fds[0] if fds else None
    data = None
    if length:
        head = length + (_exactly(connection, _LENGTH.size - len(length)) or b"")
        if len(head) == _LENGTH.size:
            data = _exactly(connection, _LENGTH.unpack(head)[0])
    if data is None:
        if fd is not None:
            os.close(fd)
        return None
    return json.loads(data), fd


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            return None
        parts += part
    return bytes(parts)
