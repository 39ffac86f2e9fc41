"""Write-behind: saves wait here for the disk, bounded in bytes, and requests never wait for them.

The thread lives only while there is work, so that a cache nobody uses any
more holds no thread and can be collected.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks import Block

log = logging.getLogger("erllama.cache")

# A tail is overtaken as soon as its conversation goes on; waiting that long
# before it is written saves most of those writes, and a crash loses less than
# one block.
TAIL_DELAY_SECONDS = 5.0


class Pending(NamedTuple):
    """A save on its way to the disk; `due` by time.monotonic(). Makes the blocks `overtaken` superfluous."""

    block: Block
    payload: NDArray[np.uint8]
    overtaken: tuple[bytes, ...]
    due: float


class WriteBehind:
    """A bounded queue of saves and the thread that hands them to `write`, parents first."""

    def __init__(self, write: Callable[[Pending], None], limit_bytes: int) -> None:
        self._write = write
        self._limit = limit_bytes
        self._condition = threading.Condition()
        self._pending: dict[bytes, Pending] = {}
        self._n_bytes = 0
        self._writing: Pending | None = None
        self._thread: threading.Thread | None = None
        self._flushing = 0  # callers of flush(); while there are any, nothing is delayed

    @property
    def n_bytes(self) -> int:
        """Bytes that wait, the one being written among them."""
        return self._n_bytes

    def offer(self, block: Block, payload: NDArray[np.uint8], overtaken: tuple[bytes, ...], delay: float) -> bool:
        """Queue a save, to be written in `delay` seconds; False when the queue is full and it was not taken."""
        with self._condition:
            replaced = self._pending.get(block.key)
            n_bytes = self._n_bytes + payload.nbytes - (replaced.payload.nbytes if replaced else 0)
            if n_bytes > self._limit:
                return False
            if self._thread is None and not self._start():
                return False
            self._pending[block.key] = Pending(block, payload, overtaken, time.monotonic() + delay)
            self._n_bytes = n_bytes
            self._condition.notify_all()
        return True

    def _start(self) -> bool:
        """Start the thread, which waits for the condition we hold; False where threads cannot be had any more."""
        thread = threading.Thread(target=self._run, name="erllama-cache-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            log.warning("no thread to write the cache with: %s", error)
            return False
        self._thread = thread
        return True

    def get(self, key: bytes) -> Pending | None:
        """A save that still waits or is being written."""
        with self._condition:
            pending = self._pending.get(key)
            if pending is None and self._writing is not None and self._writing.block.key == key:
                pending = self._writing
            return pending

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.get(key) is not None

    def cancel(self, key: bytes) -> bool:
        """Take a waiting save back; False when it was not waiting."""
        with self._condition:
            pending = self._pending.pop(key, None)
            if pending is None:
                return False
            self._n_bytes -= pending.payload.nbytes
            self._condition.notify_all()
            return True

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything now, delayed saves too; False when `timeout` seconds were not enough."""
        with self._condition:
            self._flushing += 1
            self._condition.notify_all()
            try:
                return self._condition.wait_for(lambda: not self._pending and self._writing is None, timeout)
            finally:
                self._flushing -= 1

    def _run(self) -> None:
        while (pending := self._next()) is not None:
            try:
                self._write(pending)
            except Exception:
                # The queue must go on, and flush() must end, whatever happened to one save.
                log.exception("a save of %d tokens failed unexpectedly", pending.block.n_tokens)
            with self._condition:
                self._n_bytes -= pending.payload.nbytes
                self._writing = None
                self._condition.notify_all()

    def _next(self) -> Pending | None:
        """The next save that is due; None, and the thread ends, when none waits."""
        with self._condition:
            while self._pending:
                now = time.monotonic()
                # Insertion order puts parents before children; a delayed tail has no children.
                for key, pending in self._pending.items():
                    if self._flushing or pending.due <= now:
                        del self._pending[key]
                        self._writing = pending
                        return pending
                self._condition.wait(min(p.due for p in self._pending.values()) - now)
            self._thread = None
            return None
