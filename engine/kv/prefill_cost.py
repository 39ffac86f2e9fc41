"""How long a model computes a token of a prompt, by recent ticks: what a read from a remote tier may take at most.

The scheduler records; `PrefixCache.fetch` reads, in the same thread.
"""

from __future__ import annotations

_MIN_TOKENS = 16  # smaller slices say little about larger ones
_WEIGHT = 0.2  # of the newest tick


class PrefillCost:
    """The moving average of the seconds per token.

    Attributes:
        seconds_per_token: None before the first measurement.
    """

    def __init__(self) -> None:
        self.seconds_per_token: float | None = None

    def record(self, n_tokens: int, seconds: float) -> None:
        """Record that a tick computed some tokens of prompts in some time."""
        if n_tokens >= _MIN_TOKENS:
            now, before = seconds / n_tokens, self.seconds_per_token
            self.seconds_per_token = now if before is None else before + _WEIGHT * (now - before)
