"""Write-behind: saves and chores wait here for the storage, bounded in bytes, and requests never wait for them.

The thread lives only while there is work, so that a cache nobody uses any
more holds no thread and can be collected.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.uninterrupted import uninterrupted

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
    serial: int = 0  # its place in the queue


class _Chore(NamedTuple):
    """A call that waits; a flush neither hurries it nor waits for it where it is `patient`."""

    due: float
    serial: int
    patient: bool


class _Flush(NamedTuple):
    """A caller who waits for all that was queued up to a serial; `done` is released when it is done."""

    serial: int
    done: threading.Lock


def _merged(old: Pending, new: Pending) -> Pending:
    """One save for two of a block: of the newer version, for the tiers of both."""
    kept = new if new.replace or not old.replace else old
    return kept._replace(
        to=tuple(dict.fromkeys(old.to + new.to)),
        replace=old.replace or new.replace,
        overtaken=tuple(dict.fromkeys(old.overtaken + new.overtaken)),
        due=min(old.due, new.due),
        serial=old.serial,
    )


class Abandoned(BaseException):
    """Raised within a piece of work, ends the thread on the spot, as if the process had been killed. For tests."""


class WriteQueue:
    """A bounded queue of saves, chores, and the thread that does them: saves go to `write`, parents first."""

    def __init__(self, write: Callable[[Pending], None], limit_bytes: int) -> None:
        self._write = write
        self._limit = limit_bytes
        self._condition = threading.Condition()
        self._pending: dict[bytes, Pending] = {}
        self._chores: dict[Callable[[], None], _Chore] = {}
        self._serial = 0  # of what was queued last
        self._n_bytes = 0
        self._writing: Pending | None = None
        self._doing = 0  # the serial of what the thread does now; 0 for nothing that a flush waits for
        self._thread: threading.Thread | None = None
        self._flushes: list[_Flush] = []
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
            else:
                # A flush that waits for a tail waits for the block that overtakes it: that one has its tokens.
                overtaken = (self._pending[key].serial for key in save.overtaken if key in self._pending)
                save = save._replace(serial=min(overtaken, default=0) or self._next_serial())
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
            waiting = self._chores.get(chore)
            if waiting is not None:
                self._chores[chore] = waiting._replace(due=min(due, waiting.due))
            else:
                # What the thread defers belongs to what it does: who waits for that waits for this, too.
                mine = self._doing if threading.get_ident() == self._thread_ident else 0
                self._chores[chore] = _Chore(due, mine or self._next_serial(), patient)
            self._started()
            self._condition.notify_all()

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    @property
    def _thread_ident(self) -> int | None:
        return self._thread.ident if self._thread is not None else None

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
            self._end_flushes()
            self._condition.notify_all()
            return True

    def flush(self, timeout: float | None = None) -> bool:
        """Do now what waits at this moment, what is delayed too; False when `timeout` seconds were not enough."""
        flush = self._begin_flush()
        if flush is None:
            return False
        # Not in `uninterrupted`: an interrupted caller must not leave a thread that waits for a disk that hangs.
        if flush.done.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX)):
            return True
        self._give_up(flush)
        return False

    @uninterrupted
    def _begin_flush(self) -> _Flush | None:
        with self._condition:
            if threading.get_ident() == self._thread_ident:
                return None
            flush = _Flush(self._serial, threading.Lock())
            flush.done.acquire()
            self._flushes.append(flush)
            # Chores that found no thread are not waited for.
            if self._waits_for(flush) and not self._doing and not self._pending and not self._started():
                self._flushes.remove(flush)
                flush.done.release()
            self._end_flushes()
            self._condition.notify_all()
            return flush

    @uninterrupted
    def _give_up(self, flush: _Flush) -> None:
        with self._condition:
            self._flushes = [other for other in self._flushes if other is not flush]

    def _waits_for(self, flush: _Flush) -> bool:
        """Whether something that was queued before a flush is still to be done."""
        return (
            0 < self._doing <= flush.serial
            or any(pending.serial <= flush.serial for pending in self._pending.values())
            or any(not chore.patient and chore.serial <= flush.serial for chore in self._chores.values())
        )

    def _end_flushes(self) -> None:
        """Wake the callers of flush() whose work is done; under the condition."""
        for flush in [flush for flush in self._flushes if not self._waits_for(flush)]:
            self._flushes.remove(flush)
            flush.done.release()

    def abandon(self) -> None:
        """Do nothing any more, as if the process had ended; what waits is lost."""
        with self._condition:
            self._abandoned = True
            self._pending.clear()
            self._chores.clear()
            self._end_flushes()
            self._condition.notify_all()

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
                self._doing = 0
                del work
                self._end_flushes()
                self._condition.notify_all()

    def _next(self) -> Pending | Callable[[], None] | None:
        """What is due next; None, and the thread ends, when nothing waits."""
        with self._condition:
            while (self._pending or self._chores) and not self._abandoned:
                now = time.monotonic()
                hurried = max((flush.serial for flush in self._flushes), default=0)
                key, chore = self._due_save(now, hurried), self._due_chore(now, hurried)
                # In the order in which they were queued, so that neither keeps the other waiting for ever.
                if key is not None and (chore is None or self._pending[key].serial <= self._chores[chore].serial):
                    self._writing = pending = self._pending.pop(key)
                    self._doing = pending.serial
                    return pending
                if chore is not None:
                    found = self._chores.pop(chore)
                    self._doing = 0 if found.patient else found.serial
                    return chore
                dues = [save.due for save in self._pending.values()] + [c.due for c in self._chores.values()]
                self._condition.wait(min(dues) - now)
            self._thread = None
            return None

    def _due_save(self, now: float, hurried: int) -> bytes | None:
        """The key of the first save that is due; those up to the serial `hurried` are."""
        # Insertion order puts parents before children; a delayed tail has no children.
        # What is delayed must not crowd out what is not.
        hurry = 2 * self._n_bytes > self._limit
        for key, pending in self._pending.items():
            if hurry or pending.serial <= hurried or pending.due <= now:
                return key
        return None

    def _due_chore(self, now: float, hurried: int) -> Callable[[], None] | None:
        for chore, waiting in self._chores.items():
            if waiting.due <= now or (waiting.serial <= hurried and not waiting.patient):
                return chore
        return None
