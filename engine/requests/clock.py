"""When the phases of one request began. `Sequence` owns the clock, and the model thread uses it."""

from __future__ import annotations

import time

from erllama.engine.metrics import EngineMetrics
from erllama.engine.requests.request import Timings


class RequestClock:
    """The times of one request, on the clock of time.perf_counter; 0 until they are known.

    Args:
        submitted: when the request was submitted.
        has_reply: whether the reply began in another process. Its next token is not its first.

    Attributes:
        last_token_at: when the last token of its reply was sampled.
    """

    def __init__(self, submitted: float, *, has_reply: bool = False) -> None:
        self._submitted, self._has_reply = submitted, has_reply
        self._entered_at = self._restored_at = self._first_token_at = self.last_token_at = 0.0

    @property
    def entered(self) -> bool:
        """Whether the request has entered the context."""
        return self._entered_at > 0

    def enter(self, began: float) -> None:
        """Record that the prefix of its prompt is restored.

        Args:
            began: when restoring began.
        """
        self._entered_at = began
        self._restored_at = self._first_token_at = time.perf_counter()

    def add_token(self, now: float, metrics: EngineMetrics) -> None:
        """Record that a token was sampled."""
        if self.last_token_at:
            metrics.between_tokens.observe(now - self.last_token_at)
        else:
            self._first_token_at = now
            if not self._has_reply:
                metrics.first_token.observe(now - self._submitted)
        self.last_token_at = now

    def timings(self, prefill_tokens: int, decode_tokens: int) -> Timings:
        """Return where the time went until now, or until the last token."""
        now = time.perf_counter()
        began = self._entered_at or now
        return Timings(
            queued=began - self._submitted,
            restore=(self._restored_at or now) - began,
            prefill=(self._first_token_at or now) - (self._restored_at or now),
            decode=max(self.last_token_at - self._first_token_at, 0.0),
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
        )
