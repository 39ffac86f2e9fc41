"""Whether a remote tier is worth waiting for: a circuit breaker, and the measured cost of reads.

The tier's threads record what succeeded and failed. Requests ask before they wait. Thread-safe; no call waits.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from erllama._runtime.log import logger
from erllama.errors import CacheError, RemoteUnreachable

log = logger("erllama.cache")

_random = random.SystemRandom()  # apart from the generator that a program may have seeded: machines must differ

_FAILURES_TO_OPEN = 3
_FIRST_PROBE_SECONDS = 0.25
_LONGEST_PROBE_SECONDS = 30.0
_WEIGHT = 0.25  # of the newest measurement
_SMALL_BYTES = 64 << 10  # the time of a smaller read is that of a round trip
# Until a read was measured: those of a service in the same region.
_DEFAULT_ROUND_TRIP = 0.05
_DEFAULT_BYTES_PER_SECOND = 50e6


class CircuitBreaker:
    """Stops reads and writes while a service fails.

    The first failure suspends reads until a probe in the background succeeds, so that one request at most waits in
    vain. Three failures in a row open the breaker: the tier reports itself, and probes become rare.

    Args:
        location: of the tier, for messages.
        on_open: called when the breaker opens.
    """

    def __init__(self, location: str, on_open: Callable[[], None]) -> None:
        self._location, self._on_open = location, on_open
        self._lock = threading.Lock()
        self._n_failures = 0
        self._error: CacheError | None = None
        self._probe_at = 0.0  # by time.monotonic()

    @property
    def closed(self) -> bool:
        """Whether requests may wait for the tier."""
        return self._n_failures == 0

    @property
    def open(self) -> bool:
        """Whether the service has failed several times in a row."""
        return self._n_failures >= _FAILURES_TO_OPEN

    @property
    def problem(self) -> CacheError | None:
        """Why the tier does not serve now; None if it does."""
        return self._error if self.open else None

    def seconds_to_probe(self) -> float | None:
        """Return when the next probe is due, in seconds from now; None if none is needed."""
        with self._lock:
            return max(self._probe_at - time.monotonic(), 0.0) if self._n_failures else None

    def record_success(self) -> None:
        """Record that the service has answered."""
        if not self._n_failures:
            return
        with self._lock:
            was_open, self._n_failures, self._error = self.open, 0, None
        if was_open:
            log.info("the remote tier %s answers again", self._location)

    def record_failure(self, error: CacheError) -> None:
        """Record that the service has failed."""
        with self._lock:
            was_open = self.open
            self._n_failures += 1
            self._error = error
            delay = min(_FIRST_PROBE_SECONDS * 2 ** (min(self._n_failures, 10) - 1), _LONGEST_PROBE_SECONDS)
            if self._n_failures == 1:
                delay = 0.0
            # Machines that lost the service together must not return to it together.
            self._probe_at = time.monotonic() + delay * _random.uniform(0.5, 1.0)
            opened = self.open and not was_open
        if opened:
            self._on_open()
            log.warning("%s. The cache continues without the remote tier until it answers", error)

    def record_late(self) -> None:
        """Record that a read exceeded its deadline: the tier is suspended until a probe succeeds."""
        with self._lock:
            self._n_failures = max(self._n_failures, 1)
            self._error = self._error or RemoteUnreachable(f"{self._location}: a read exceeded its deadline")
            self._probe_at = min(self._probe_at, time.monotonic())


class ReadCost:
    """The cost of reads, from measurements: a round trip, and the time for each byte."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round_trip = _DEFAULT_ROUND_TRIP
        self._per_byte = 1 / _DEFAULT_BYTES_PER_SECOND
        self._measured = [False, False]

    def record(self, n_bytes: int, seconds: float) -> None:
        """Record that a read of some bytes took some time."""
        with self._lock:
            if n_bytes < _SMALL_BYTES:
                self._round_trip = self._average(0, self._round_trip, seconds)
            else:
                self._round_trip = min(self._round_trip, seconds)  # after late reads, the estimate may be too high
                rest = max(seconds - self._round_trip, 0.1 * seconds)
                self._per_byte = self._average(1, self._per_byte, rest / n_bytes)

    def _average(self, which: int, before: float, now: float) -> float:
        """Return the new average. Reads that have become slow count at once."""
        weight = 1.0 if not self._measured[which] else _WEIGHT
        self._measured[which] = True
        return before + weight * (now - before)

    def record_late(self, n_bytes: int, seconds: float, n_rounds: int = 1) -> None:
        """Record that reads took longer than some time, by an unknown amount. Arguments as of `expected`."""
        with self._lock:
            expected = self.expected(n_bytes, n_rounds)
            if seconds <= expected:
                return  # known already, by another read that was late at the same time
            factor = min(2 * seconds / expected, 16.0) if expected else 2.0
            self._round_trip *= factor
            if n_bytes:
                self._per_byte *= factor

    def expected(self, n_bytes: int, n_rounds: int = 1) -> float:
        """Return the seconds that `n_rounds` reads of so many bytes together should take, one after another."""
        return self._round_trip * n_rounds + n_bytes * self._per_byte
