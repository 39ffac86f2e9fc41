"""How long the current tick has taken, and how long its decode should take: whether a model thread hangs.

The model thread writes a `TickClock`. Other threads read it at any time, without a lock.
"""

from __future__ import annotations

import time

# The weight of the slowest decode so far, with each further decode of about as many rows.
_DECAY = 0.99
_MAX_BITS = 64


class TickClock:
    """Measures the ticks of one model thread.

    Attributes:
        began: when the current tick began, on the clock of time.monotonic; 0.0 between ticks.
        rows: rows of its decode; 0 until the decode begins.
    """

    def __init__(self) -> None:
        self.began = 0.0
        self.rows = 0
        self._slowest = [0.0] * _MAX_BITS  # seconds, by the bit length of the number of rows; 0.0 if unknown

    def begin(self) -> None:
        """Begin a tick."""
        self.rows = 0
        self.began = time.monotonic()

    def end(self) -> None:
        """End the tick."""
        self.began = 0.0

    def record(self, rows: int, seconds: float) -> None:
        """Record how long a decode took."""
        bits = rows.bit_length()
        slowest = self._slowest[bits] * _DECAY
        self._slowest[bits] = seconds if seconds > slowest else slowest

    @property
    def expected_seconds(self) -> float | None:
        """How long the decode of the current tick should take at most, by recent decodes.

        A decode takes at most as long as one with more rows. Beside one with fewer rows, it takes longer by at most
        the ratio of the rows. None before the decode begins, and before the first measurement.
        """
        bits = self.rows.bit_length()
        if not bits:
            return None
        slowest = enumerate(self._slowest)
        return min((seconds * max(2.0 ** (bits - n + 1), 1.0) for n, seconds in slowest if seconds), default=None)
