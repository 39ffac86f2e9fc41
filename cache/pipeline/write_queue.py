"""The write queue: saves and tasks that wait for storage, bounded, and the thread that runs them.

The first link of the pipeline. A limit in bytes of payload bounds it. Requests add to it and never wait for
it. The thread lives only while there is work, so that an unused cache holds no thread and can be collected. A
waiting save or task keeps the pipeline of its cache alive.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.tiers.tier import SimulatedCrash
from erllama.cache.uninterrupted import uninterrupted

log = logger("erllama.cache")

# The next turn of a conversation supersedes a tail. A tail therefore waits about as long as people take to
# answer, which avoids most of those writes. A crash loses less than one block. Other processes that share a
# directory, and no faster one, must see a tail within a second.
TAIL_DELAY_SECONDS = 30.0
SHARED_TAIL_DELAY_SECONDS = 0.4


class PendingSave(NamedTuple):
    """A save that waits to be written.

    Attributes:
        tiers: names of the tiers to write to, with the time to write to each, by time.monotonic().
        replace: write even if a tier has the block.
        superseded: keys of tails to remove once the block is written.
        serial: its place in the queue.
    """

    block: Block
    payload: memoryview
    tiers: Mapping[str, float]
    replace: bool
    superseded: tuple[bytes, ...]
    serial: int = 0


class _Task(NamedTuple):
    """The time to call a function. A flush neither runs a `background` task early nor waits for it."""

    due: float
    serial: int
    background: bool


class Flush(NamedTuple):
    """A caller that waits for all work up to a serial. Releasing `done` wakes it."""

    serial: int
    done: threading.Lock


def _merge(old: PendingSave, new: PendingSave) -> PendingSave:
    """Return one save for two of a block: the newer version, for the tiers of both."""
    kept = new if new.replace or not old.replace else old
    return kept._replace(
        tiers={
            name: min(old.tiers.get(name, math.inf), new.tiers.get(name, math.inf))
            for name in (*old.tiers, *new.tiers)
        },
        replace=old.replace or new.replace,
        superseded=tuple(dict.fromkeys(old.superseded + new.superseded)),
        serial=old.serial,
    )


class WriteQueue:
    """A bounded queue of saves and tasks, with the thread that runs them. Parents are written first.

    Args:
        write: writes one save.
        limit_bytes: maximum bytes of payloads that may wait.
        immediate: names of the tiers that receive every save without a delay, and before other tiers receive any.
    """

    def __init__(
        self,
        write: Callable[[PendingSave], None],
        limit_bytes: int,
        immediate: frozenset[str] = frozenset(),
    ) -> None:
        self._write = write
        self.limit_bytes = limit_bytes
        self.immediate = immediate
        self._condition = threading.Condition()
        self._pending: dict[bytes, PendingSave] = {}
        self._for_immediate: dict[bytes, None] = {}  # keys of those that wait for an immediate tier, in order
        self._tasks: dict[Callable[[], None], _Task] = {}
        self._last_serial = 0
        self._n_bytes = 0
        self._current_save: PendingSave | None = None
        self._current_bytes = 0  # of the running save; 0 while the same save also waits for other tiers
        self._current_serial = 0  # of the running work; 0 if no flush waits for it
        self._thread: threading.Thread | None = None
        self._flushes: list[Flush] = []
        self._abandoned = False

    @property
    def n_bytes(self) -> int:
        """Bytes of the saves that wait or are being written."""
        return self._n_bytes

    def offer(self, save: PendingSave) -> bool:
        """Queue a save; False if the queue is full or has no thread."""
        with self._condition:
            replaced = self._pending.get(save.block.key)
            n_bytes = self._n_bytes + save.payload.nbytes - (replaced.payload.nbytes if replaced else 0)
            if n_bytes > self.limit_bytes or not self._ensure_thread():
                return False
            if replaced is not None:
                save = _merge(replaced, save)
                n_bytes = self._n_bytes + save.payload.nbytes - replaced.payload.nbytes
            else:
                # A flush that waits for a tail also waits for the block that supersedes it and has its tokens.
                superseded = (self._pending[key].serial for key in save.superseded if key in self._pending)
                save = save._replace(serial=min(superseded, default=0) or self._next_serial())
            self._put(save)
            self._n_bytes = n_bytes
            self._condition.notify_all()
        return True

    def defer(self, task: Callable[[], None], delay: float = 0.0, *, background: bool = False) -> None:
        """Call `task` once in the thread, after `delay` seconds. Equal tasks that wait are merged.

        Args:
            background: a flush neither runs the task early nor waits for it.
        """
        with self._condition:
            due = time.monotonic() + delay
            waiting = self._tasks.get(task)
            if waiting is not None:
                self._tasks[task] = waiting._replace(due=min(due, waiting.due))
            else:
                # A task that the thread defers belongs to the running work: a flush waits for both or neither.
                serial = self._current_serial if threading.get_ident() == self._thread_ident else 0
                self._tasks[task] = _Task(due, serial or self._next_serial(), background)
            self._ensure_thread()
            self._condition.notify_all()

    def _next_serial(self) -> int:
        self._last_serial += 1
        return self._last_serial

    @property
    def _thread_ident(self) -> int | None:
        return self._thread.ident if self._thread is not None else None

    def _ensure_thread(self) -> bool:
        """Start the thread, which waits for the condition that the caller holds; False if it cannot start."""
        if self._thread is None and not self._abandoned:
            thread = threading.Thread(target=self._run, name="erllama-cache-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                log.warning("cannot start the thread that writes the cache: %s", error)
                return False
            self._thread = thread
        return self._thread is not None

    def get(self, key: bytes) -> PendingSave | None:
        """Return the save of a block that waits or is being written, with the tiers of both."""
        with self._condition:
            pending, current = self._pending.get(key), self._current_save
            if current is None or current.block.key != key:
                return pending
            return current if pending is None else pending._replace(tiers={**current.tiers, **pending.tiers})

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.get(key) is not None

    def is_waiting(self, key: bytes) -> bool:
        """Return whether a save of a block waits, apart from the one that is being written."""
        with self._condition:
            return key in self._pending

    def skip_delays(self, tiers: Collection[str] | None = None) -> None:
        """Make all waiting saves due now, for these tiers; for all if None."""
        with self._condition:
            for key, pending in self._pending.items():
                dues = {name: 0.0 if tiers is None or name in tiers else at for name, at in pending.tiers.items()}
                self._pending[key] = pending._replace(tiers=dues)
            self._condition.notify_all()

    def cancel(self, key: bytes) -> bool:
        """Remove a waiting save; False if none was waiting."""
        with self._condition:
            pending = self._pop(key)
            if pending is None:
                return False
            current = self._current_save
            if current is not None and current.payload is pending.payload and not self._current_bytes:
                self._current_bytes = pending.payload.nbytes  # until it is written to the first tiers
            else:
                self._n_bytes -= pending.payload.nbytes
            self._end_flushes()
            self._condition.notify_all()
            return True

    def flush(self, timeout: float | None = None) -> bool:
        """Write all saves that wait at the time of the call, delayed ones included.

        Returns:
            False if `timeout` seconds were not enough, or if the queue's own thread calls.
        """
        return self.wait(self.begin_flush(), timeout)

    def wait(self, flush: Flush | None, timeout: float | None = None) -> bool:
        """Wait until a flush ends, at most `timeout` seconds. False if it has not ended, or is None."""
        if flush is None:
            return False
        # Not in `uninterrupted`: an interrupted caller must not leave a thread that waits for a disk that hangs.
        if flush.done.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX)):
            return True
        self._cancel_flush(flush)
        return False

    @uninterrupted
    def begin_flush(self) -> Flush | None:
        """Make all waiting saves due now. Returns the flush to wait for; None if the queue's own thread calls."""
        with self._condition:
            if threading.get_ident() == self._thread_ident:
                return None
            flush = Flush(self._last_serial, threading.Lock())
            flush.done.acquire()
            self._flushes.append(flush)
            # A flush does not wait for tasks if no thread can start.
            if (
                self._waits_for(flush)
                and not self._current_serial
                and not self._pending
                and not self._ensure_thread()
            ):
                self._flushes.remove(flush)
                flush.done.release()
            self._end_flushes()
            self._condition.notify_all()
            return flush

    @uninterrupted
    def _cancel_flush(self, flush: Flush) -> None:
        with self._condition:
            self._flushes = [other for other in self._flushes if other is not flush]

    def _waits_for(self, flush: Flush) -> bool:
        """Return whether some of the work that was queued before a flush is not done yet."""
        return (
            0 < self._current_serial <= flush.serial
            or any(pending.serial <= flush.serial for pending in self._pending.values())
            or any(not task.background and task.serial <= flush.serial for task in self._tasks.values())
        )

    def _end_flushes(self) -> None:
        """Wake the callers of flush() whose work is done. The caller holds the condition."""
        for flush in [flush for flush in self._flushes if not self._waits_for(flush)]:
            self._flushes.remove(flush)
            flush.done.release()

    def abandon(self) -> None:
        """Stop forever, as if the process had ended. Waiting work is lost."""
        with self._condition:
            self._abandoned = True
            self._current_serial = 0  # of a thread that a simulated crash has ended
            self._pending.clear()
            self._for_immediate.clear()
            self._tasks.clear()
            self._end_flushes()
            self._condition.notify_all()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            try:
                if isinstance(work, PendingSave):
                    self._write(work)
                else:
                    work()
            except SimulatedCrash:
                return
            except BaseException:  # SystemExit, too: the thread is the cache's own, and flush() waits for it
                # The queue continues and flush() returns, even if one save or task raised an exception.
                log.exception("a write or task of the cache failed unexpectedly")
            with self._condition:
                if isinstance(work, PendingSave):
                    self._n_bytes -= self._current_bytes
                self._current_save = None
                self._current_serial = 0
                del work
                self._end_flushes()
                self._condition.notify_all()

    def _next(self) -> PendingSave | Callable[[], None] | None:
        """Wait for the next due work and return it. None: the queue is empty, and the thread ends."""
        with self._condition:
            while (self._pending or self._tasks) and not self._abandoned:
                now = time.monotonic()
                flushed = max((flush.serial for flush in self._flushes), default=0)
                save, task = self._due_save(now, flushed), self._due_task(now, flushed)
                # In the order of the queue, so that neither saves nor tasks delay the others forever.
                if save is not None and (task is None or save.serial <= self._tasks[task].serial):
                    self._take(save)
                    return save
                if task is not None:
                    found = self._tasks.pop(task)
                    self._current_serial = 0 if found.background else found.serial
                    return task
                dues = [at for save in self._pending.values() for at in save.tiers.values()]
                self._condition.wait(min(dues + [waiting.due for waiting in self._tasks.values()]) - now)
            self._thread = None
            return None

    def _due_save(self, now: float, flushed: int) -> PendingSave | None:
        """Return the first due save, for its tiers that are due. Up to the serial `flushed`, all are due."""
        # The order of insertion puts parents before children; a delayed tail has no children.
        # Delayed saves must leave room for others, so delays do not apply while the queue is over half full.
        over_half = 2 * self._n_bytes > self.limit_bytes
        if self._for_immediate and not over_half:
            pending = self._pending[next(iter(self._for_immediate))]
            return pending._replace(
                tiers={name: at for name, at in pending.tiers.items() if name in self.immediate}
            )
        for pending in self._pending.values():
            if over_half or pending.serial <= flushed:
                return pending
            if due := {name: at for name, at in pending.tiers.items() if at <= now}:
                return pending._replace(tiers=due)
        return None

    def _take(self, save: PendingSave) -> None:
        """Start the write of a waiting save to the tiers that it names. It still waits for its other tiers."""
        waiting = self._pending[save.block.key]
        others = {name: at for name, at in waiting.tiers.items() if name not in save.tiers}
        if others:
            self._put(waiting._replace(tiers=others))
        else:
            self._pop(save.block.key)
        self._current_save, self._current_serial = save, save.serial
        self._current_bytes = 0 if others else save.payload.nbytes

    def _put(self, save: PendingSave) -> None:
        """Add a waiting save, or replace the one of its block."""
        self._pending[save.block.key] = save
        if self.immediate.isdisjoint(save.tiers):
            self._for_immediate.pop(save.block.key, None)
        else:
            self._for_immediate[save.block.key] = None

    def _pop(self, key: bytes) -> PendingSave | None:
        """Remove and return the waiting save of a block, if any."""
        self._for_immediate.pop(key, None)
        return self._pending.pop(key, None)

    def _due_task(self, now: float, flushed: int) -> Callable[[], None] | None:
        for task, waiting in self._tasks.items():
            if waiting.due <= now or (waiting.serial <= flushed and not waiting.background):
                return task
        return None
