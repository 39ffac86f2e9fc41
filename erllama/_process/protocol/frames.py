"""Frames: messages with their length, over a socket between two processes.

A frame is the length of its body, 4 bytes, little-endian, and the body. Both processes use an `Outbox` to send and
a `FrameReader` to receive.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator

from erllama.errors import Error

# The longest body. The largest messages are the embeddings of all tokens of a text.
MAX_FRAME = 1 << 30
_LENGTH = struct.Struct("<I")
_RECEIVED = 1 << 18  # bytes received at once


class ProtocolError(Error):
    """The other process sent bytes that are not a message."""


class FrameReader:
    """Splits a stream of bytes into the bodies of frames. Not thread-safe.

    Args:
        max_frame: the longest body that is accepted, in bytes.
    """

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._buffer = bytearray()
        self._max_frame = max_frame

    def feed(self, received: bytes | memoryview) -> Iterator[bytes]:
        """Add received bytes, and yield the bodies of the frames that are complete.

        Raises:
            ProtocolError: a frame is empty or too long.
        """
        buffer = self._buffer
        buffer += received
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (n_bytes,) = _LENGTH.unpack_from(buffer, start)
                if not 0 < n_bytes <= self._max_frame:
                    raise ProtocolError(f"a frame of {n_bytes} bytes; 1 to {self._max_frame} are allowed")
                end = start + _LENGTH.size + n_bytes
                if len(buffer) < end:
                    return
                body = bytes(memoryview(buffer)[start + _LENGTH.size : end])
                start = end
                yield body
        finally:
            del buffer[:start]


def receive(connection: socket.socket) -> bytes:
    """Wait for bytes from a socket, and return some; b"" if the connection has ended or was lost."""
    try:
        return connection.recv(_RECEIVED)
    except OSError:
        return b""


class Outbox:
    """Sends frames without waiting. What the socket does not take is kept and sent when it is writable.

    Thread-safe. Once the other process is gone, frames are dropped.

    Args:
        connection: the socket.
        on_backlog: called when the first bytes are kept: `flush` is to be called once the socket is writable.
        max_bytes: the outbox is `full` beyond this many bytes. A user who asks then sends no more until it is not.

    Attributes:
        on_backlog: the argument; another function may take its place.
    """

    def __init__(
        self, connection: socket.socket, on_backlog: Callable[[], None], max_bytes: int = MAX_FRAME
    ) -> None:
        self._connection, self.on_backlog, self._max_bytes = connection, on_backlog, max_bytes
        self._lock = threading.RLock()
        self._kept: deque[memoryview] = deque()
        self._n_kept = 0
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether more bytes wait than `max_bytes`."""
        return self._n_kept > self._max_bytes

    @property
    def waiting(self) -> bool:
        """Whether bytes wait for the socket."""
        return self._n_kept > 0

    def send(self, body: bytes) -> None:
        """Send one frame.

        Raises:
            ProtocolError: it is longer than the other side accepts.
        """
        if len(body) > MAX_FRAME:
            raise ProtocolError(f"a message of {len(body)} bytes; at most {MAX_FRAME} are allowed")
        frame = memoryview(_LENGTH.pack(len(body)) + body)
        with self._lock:
            if self._closed:
                return
            if not self._n_kept:
                frame = frame[self._send(frame) :]
            if frame and not self._closed:
                first = not self._n_kept
                self._kept.append(frame)
                self._n_kept += len(frame)
                if first:
                    self.on_backlog()

    def flush(self) -> bool:
        """Send as much as the socket takes. Return whether nothing is left."""
        with self._lock:
            while self._kept:
                first = self._kept[0]
                sent = self._send(first)
                if self._closed:
                    break
                self._n_kept -= sent
                if sent < len(first):
                    self._kept[0] = first[sent:]
                    break
                self._kept.popleft()
            return not self._n_kept

    def close(self) -> None:
        """Drop what is kept, and all later frames."""
        with self._lock:
            self._closed = True
            self._kept.clear()
            self._n_kept = 0

    def _send(self, data: memoryview) -> int:
        """Return how many bytes the socket took."""
        try:
            return self._connection.send(data, socket.MSG_DONTWAIT | _NO_SIGNAL)
        except BlockingIOError:
            return 0
        except OSError:  # the other process has ended
            self.close()
            return 0


_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)
