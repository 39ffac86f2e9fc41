"""Write-behind: saves and chores wait here for the storage, bounded in bytes, and requests never wait for them.

The thread lives only while there is work, so that a cache nobody uses any
more holds no thread and can be collected.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from erllama._log import logger
from erllama.cache.blocks import Block

log = logger("erllama.cache")

# A tail is overtaken as soon as its conversation goes on; waiting that long
# before it is written, about as long as people take to answer, saves most of
# those writes, and a crash loses less than one block. Where other processes
# look on, they are to see it within a second.
TAIL_DELAY_SECONDS = 30.0
SHARED_TAIL_DELAY_SECONDS = 0.4


class Pending(NamedTuple):
    """A save on its way to the tiers `to`; `due` by time.monotonic(). Makes the blocks `overtaken` superfluous."""

    block: Block
    payload: memoryview
    to: tuple[str, ...]
    replace: bool
    overtaken: tuple[bytes, ...]
    due: float


def _merged(old: Pending, new: Pending) -> Pending:
    """One save for two of a block: of the newer version, for the tiers of both."""
    kept = new if new.replace or not old.replace else old
    return kept._replace(
        to=tuple(dict.fromkeys(old.to + new.to)),
        replace=old.replace or new.replace,
        overtaken=tuple(dict.fromkeys(old.overtaken + new.overtaken)),
        due=min(old.due, new.due),
    )


class Abandoned(BaseException):
    """Raised within a piece of work, ends the thread on the spot, as if the process had been killed. For tests."""


class WriteBehind:
    """A bounded queue of saves, chores, and the thread that does them: saves go to `write`, parents first."""

    def __init__(self, write: Callable[[Pending], None], limit_bytes: int) -> None:
        self._write = write
        self._limit = limit_bytes
        self._condition = threading.Condition()
        self._pending: dict[bytes, Pending] = {}
        self._chores: dict[Callable[[], None], float] = {}  # and when they are due
        self._patient: set[Callable[[], None]] = set()  # chores that a flush neither hurries nor waits for
        self._n_bytes = 0
        self._writing: Pending | None = None
        self._busy = False
        self._thread: threading.Thread | None = None
        self._flushing = 0  # callers of flush(); while there are any, nothing is delayed
        self._abandoned = False

    @property
    def n_bytes(self) -> int:
        """Bytes that wait, the one being written among them."""
        return self._n_bytes

    def offer(self, save: Pending) -> bool:
        """Queue a save; False when the queue is full and it was not taken."""
        with self._condition:
            replaced = self._pending.get(save.block.key)
            n_bytes = self._n_bytes + save.payload.nbytes - (replaced.payload.nbytes if replaced else 0)
            if n_bytes > self._limit or not self._started():
                return False
            if replaced is not None:
                save = _merged(replaced, save)
                n_bytes = self._n_bytes + save.payload.nbytes - replaced.payload.nbytes
            self._pending[save.block.key] = save
            self._n_bytes = n_bytes
            self._condition.notify_all()
        return True

    def defer(self, chore: Callable[[], None], delay: float = 0.0, *, patient: bool = False) -> None:
        """Have the thread call `chore`, once, in `delay` seconds; equal ones that wait are called together.

        Args:
            patient: a flush neither hurries it nor waits for it.
        """
        with self._condition:
            due = time.monotonic() + delay
            self._chores[chore] = min(due, self._chores.get(chore, due))
            if patient:
                self._patient.add(chore)
            self._started()
            self._condition.notify_all()

    def _started(self) -> bool:
        """Start the thread, which waits for the condition we hold; False where threads cannot be had any more."""
        if self._thread is None and not self._abandoned:
            thread = threading.Thread(target=self._run, name="erllama-cache-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("no thread to write the cache with: %s", error)
                return False
            self._thread = thread
        return self._thread is not None

    def get(self, key: bytes) -> Pending | None:
        """A save that still waits or is being written."""
        with self._condition:
            pending = self._pending.get(key)
            if pending is None and self._writing is not None and self._writing.block.key == key:
                pending = self._writing
            return pending

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.get(key) is not None

    def waits(self, key: bytes) -> bool:
        """Whether a save waits, the one being written apart."""
        with self._condition:
            return key in self._pending

    def hurry(self) -> None:
        """Delay nothing that waits now."""
        with self._condition:
            for key, pending in self._pending.items():
                self._pending[key] = pending._replace(due=0.0)
            self._condition.notify_all()

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
        """Do everything now, what is delayed too; False when `timeout` seconds were not enough."""
        with self._condition:
            if threading.current_thread() is self._thread:
                return False
            self._flushing += 1
            self._condition.notify_all()
            try:
                return self._condition.wait_for(lambda: not self._waiting and not self._busy, timeout)
            finally:
                self._flushing -= 1

    def abandon(self) -> None:
        """Do nothing any more, as if the process had ended; what waits is lost."""
        with self._condition:
            self._abandoned = True
            self._pending.clear()
            self._chores.clear()
            self._patient.clear()
            self._condition.notify_all()

    @property
    def _waiting(self) -> bool:
        impatient = self._chores.keys() - self._patient
        if self._thread is None and impatient and not self._pending:
            return self._started()  # chores that found no thread
        return bool(self._pending or impatient)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                if isinstance(work, Pending):
                    self._write(work)
                else:
                    work()
            except Abandoned:
                return
            except BaseException:  # SystemExit, too: the thread is the cache's, and flush() waits for it
                # The queue must go on, and flush() must end, whatever happened to one piece of work.
                log.exception("work behind the cache failed unexpectedly")
            with self._condition:
                if isinstance(work, Pending):
                    self._n_bytes -= work.payload.nbytes
                self._writing = None
                self._busy = False
                del work
                self._condition.notify_all()

    def _next(self) -> Pending | Callable[[], None] | None:
        """What is due next; None, and the thread ends, when nothing waits."""
        with self._condition:
            while (self._pending or self._chores) and not self._abandoned:
                now = time.monotonic()
                # Insertion order puts parents before children; a delayed tail has no children.
                # What is delayed must not crowd out what is not.
                hurry = self._flushing or 2 * self._n_bytes > self._limit
                for key, pending in self._pending.items():
                    if hurry or pending.due <= now:
                        del self._pending[key]
                        self._writing, self._busy = pending, True
                        return pending
                for chore, due in self._chores.items():
                    if due <= now or (self._flushing and chore not in self._patient):
                        del self._chores[chore]
                        self._busy = chore not in self._patient
                        self._patient.discard(chore)
                        return chore
                dues = [*(p.due for p in self._pending.values()), *self._chores.values()]
                self._condition.wait(min(dues) - now)
            self._thread = None
            return None
