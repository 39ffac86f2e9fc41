"""Watches a directory for created, removed and changed files, through events of the operating system.

`FileTier` uses it to notice files that other programs put into or remove from `blocks/`.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from watchdog.events import (
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from erllama._runtime.log import logger

log = logger("erllama.cache")

# Files that are opened, or closed after reading, are left out: the watching thread would wake twice for every block
# that is read. On Linux the end of a write is a "closed" event.
_CHANGE_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileClosedEvent,
    FileModifiedEvent,
]


class DirectoryWatch:
    """Calls `changed(name)`, from its own thread, for every entry of `directory` that may have changed.

    Keeps only a weak reference to the object of a bound method, so that a watch which is never stopped does not
    keep that object alive. If the system cannot watch the directory, logs a warning and never calls `changed`.
    """

    def __init__(self, directory: Path, changed: Callable[[str], None]) -> None:
        self._observer = Observer()
        self._observer.daemon = True
        self._stop = weakref.finalize(self, _stop, self._observer)
        self._stop.atexit = False  # daemon threads need no stop at exit
        try:
            self._observer.schedule(_Handler(changed), str(directory), event_filter=_CHANGE_EVENTS)
            self._observer.start()
        except (OSError, RuntimeError) as error:
            log.warning(
                "%s is not watched (%s); files that others add appear after gc() or a restart", directory, error
            )

    def stop(self) -> None:
        """Stop calling `changed`. Idempotent."""
        self._stop()


class _Handler(FileSystemEventHandler):
    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = weakref.WeakMethod(changed) if hasattr(changed, "__self__") else lambda: changed

    def on_any_event(self, event: FileSystemEvent) -> None:
        changed = self._changed()
        if changed is None or event.is_directory:
            return
        for path in (event.src_path, event.dest_path):
            if path:
                changed(Path(str(path)).name)


class _StoppedWatchFilter(logging.Filter):
    """Drops the errors that watchdog logs for events during a stop."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "called when the thread is inactive" not in record.getMessage()


logging.getLogger("watchdog.observers.inotify").addFilter(_StoppedWatchFilter())


def _stop(observer: Observer) -> None:  # type: ignore[valid-type]
    """Stop in another thread, because a stop may take half a second."""
    try:
        threading.Thread(target=_stop_now, args=(observer,), name="erllama-cache-unwatch", daemon=True).start()
    except RuntimeError:  # the interpreter is ending, and daemon threads with it
        log.debug("a directory watch ends with the process")


def _stop_now(observer: Observer) -> None:  # type: ignore[valid-type]
    try:
        observer.stop()  # type: ignore[attr-defined]
    except Exception:
        log.debug("a directory watch could not be stopped", exc_info=True)
