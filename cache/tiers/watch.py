"""Hears of files that come, go or change in a directory, through the system's own events."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer

from erllama._runtime.log import logger

log = logger("erllama.cache")

# An open or a read changes nothing, and on Linux a file that is being written is told of again when it is closed.
_HEARD = {"created", "deleted", "moved", "closed", "modified"}


class DirectoryWatch:
    """Calls `changed(name)`, from a thread of its own, for every entry of `directory` that may have changed.

    Holds `changed` weakly if it is a bound method: who forgets to stop a watch does not live for ever.
    Where the system cannot watch, that is logged, and nothing is ever called.
    """

    def __init__(self, directory: Path, changed: Callable[[str], None]) -> None:
        self._observer = Observer()
        self._observer.daemon = True
        self._stop = weakref.finalize(self, _stop, self._observer)
        self._stop.atexit = False  # a daemon's threads need no farewell
        try:
            self._observer.schedule(_Handler(changed), str(directory))
            self._observer.start()
        except (OSError, RuntimeError) as error:
            log.warning(
                "%s is not watched (%s); what others put there shows after gc() or a restart", directory, error
            )

    def stop(self) -> None:
        """Call nothing any more. Idempotent."""
        self._stop()


class _Handler(FileSystemEventHandler):
    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = weakref.WeakMethod(changed) if hasattr(changed, "__self__") else lambda: changed

    def on_any_event(self, event: FileSystemEvent) -> None:
        changed = self._changed()
        if changed is None or event.is_directory or event.event_type not in _HEARD:
            return
        for path in (event.src_path, event.dest_path):
            if path:
                changed(Path(str(path)).name)


class _Quiet(logging.Filter):
    """Drops what watchdog says, as an error, of events that come while it is being stopped."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "called when the thread is inactive" not in record.getMessage()


logging.getLogger("watchdog.observers.inotify").addFilter(_Quiet())


def _stop(observer: Observer) -> None:  # type: ignore[valid-type]
    """Stop from a thread of its own: it may take half a second, which nobody should wait for."""
    try:
        threading.Thread(target=_stop_now, args=(observer,), name="erllama-cache-unwatch", daemon=True).start()
    except RuntimeError:  # the interpreter is ending, and its daemons with it
        log.debug("a watch is left to end with the process")


def _stop_now(observer: Observer) -> None:  # type: ignore[valid-type]
    try:
        observer.stop()  # type: ignore[attr-defined]
    except Exception:
        log.debug("a watch could not be stopped", exc_info=True)
