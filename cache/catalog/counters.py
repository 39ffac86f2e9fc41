"""Counts and seconds of the operations of a cache, readable at any time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from erllama.cache.blocks.block import SaveReason

COUNTS = (
    "hits_exact",
    "hits_resume",
    "hits_longest_prefix",
    "misses",
    "tokens_reused",
    *(f"saves_{reason.name.lower()}" for reason in SaveReason),
    "saves_dropped",
    "duplicates_dropped",
    "tails_superseded",
    "promotions",
    "corrupt_files",
    "disk_errors",
    "restore_errors",
    "faults",
    "bytes_written",
    "pressure_evictions",
    "pins_refused",
    "event_batches",
    "event_overflows",
    "event_replays",
    "remote_reads",
    "remote_reads_late",
    "remote_reads_skipped",
    "remote_bytes_read",
    "remote_signatures_refused",
    "remote_manifests_refused",
    "remote_unknown_keys",
    "remote_uploads_lost",
    "remote_expired",
    "remote_outages",
)
TIERS = ("live", "ram", "ram_file", "disk")  # always have counts, even if not in use
TIMED = ("lookup", "load", "pack", "write")


class Counters:
    """Named counts and seconds. All names exist from the start. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, for calls from signal handlers
        self._counts = dict.fromkeys((*COUNTS, *(f"evictions_{tier}" for tier in TIERS)), 0)
        self._seconds = dict.fromkeys(TIMED, 0.0)

    def add_tier(self, name: str) -> None:
        """Add a count of evictions for a tier."""
        with self._lock:
            self._counts.setdefault(f"evictions_{name}", 0)

    def add(self, name: str, n: int = 1) -> None:
        with self._lock:
            self._counts[name] += n

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the seconds that the `with` block takes."""
        began = perf_counter()
        try:
            yield
        finally:
            self.add_seconds(name, perf_counter() - began)

    def add_seconds(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] += seconds

    def snapshot(self) -> dict[str, int | float]:
        with self._lock:
            return {**self._counts, **{f"{name}_seconds": spent for name, spent in self._seconds.items()}}
