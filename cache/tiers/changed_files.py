"""Names of block files that changed outside the cache and that a tier has yet to check.

The directory watch adds names from its own thread; `Reconciler.check_changed` takes them. Memory is bounded: after
a thousand names, all files are checked instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_MAX_NAMES = 1000
_RETRY_SECONDS = 1.0  # before the first retry of a check that failed for a temporary reason
_MAX_RETRY_SECONDS = 300.0


class ChangedFiles:
    """File names, each with the earliest time to check it. Thread-safe.

    Attributes:
        on_add: called after a name was added, in the thread that added it.
    """

    def __init__(self) -> None:
        self.on_add: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}  # by time.monotonic()
        self._all = False  # more names than are remembered
        self._delays: dict[str, float] = {}  # seconds before the last retry, by name

    def __len__(self) -> int:
        return len(self._due)

    def add(self, name: str, delay: float = 0.0) -> None:
        """Add a name to check in `delay` seconds. A name that is already there keeps its time."""
        with self._lock:
            self._due.setdefault(name, time.monotonic() + delay)
            if len(self._due) > _MAX_NAMES:
                self._due, self._all = {}, True
        self.on_add()

    def add_retry(self, name: str) -> bool:
        """Add a name whose check failed, with a delay that doubles each time; return whether it is the first."""
        delay = self._delays[name] = min(2 * self._delays.get(name, _RETRY_SECONDS / 2), _MAX_RETRY_SECONDS)
        self.add(name, delay)
        return delay == _RETRY_SECONDS

    def add_failed(self, names: list[str]) -> None:
        """Add names whose check was interrupted by an error."""
        for name in names:
            self.add(name, _RETRY_SECONDS)

    def take_all(self) -> bool:
        """Return whether all files need a check, and clear the mark."""
        with self._lock:
            taken, self._all = self._all, False
        return taken

    def mark_all(self) -> None:
        """Require a check of all files."""
        self._all = True

    def take_due(self, now: float) -> list[str]:
        """Remove and return the names to check at `now`, by time.monotonic()."""
        with self._lock:
            due = [name for name, since in self._due.items() if since <= now]
            for name in due:
                del self._due[name]
        return due
