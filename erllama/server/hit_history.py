"""How much of the prompts the cache had over time: the counts of the latest intervals in which requests ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

INTERVAL_SECONDS = 10
# One hour of uninterrupted use. Intervals in which no request ended take no room.
MAX_INTERVALS = 360


class Counts(NamedTuple):
    """Sums over the requests of some models.

    Attributes:
        requests: how many ended.
        prompt_tokens, cached_tokens, completion_tokens: of them.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: Counts) -> Counts:
        """Return the sums of both."""
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


class Interval(NamedTuple):
    """The requests that ended within one interval.

    Attributes:
        began: its start, in whole seconds since 1970.
        counts: of each model, by name.
    """

    began: int
    counts: dict[str, Counts]


@dataclass(slots=True)
class HitHistory:
    """Counts requests as they end. An interval without requests takes no memory.

    Args:
        clock: returns the time in seconds since 1970.

    Attributes:
        totals: counts of each model since the start, by name.
        intervals: the latest ones with requests, oldest first.
    """

    clock: Callable[[], float] = time.time
    totals: dict[str, Counts] = field(default_factory=dict)
    intervals: deque[Interval] = field(default_factory=lambda: deque(maxlen=MAX_INTERVALS))

    def add(self, model: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> None:
        """Count a request that ended."""
        counts = Counts(1, prompt_tokens, cached_tokens, completion_tokens)
        began = int(self.clock()) // INTERVAL_SECONDS * INTERVAL_SECONDS
        if not self.intervals or self.intervals[-1].began < began:  # a clock set back extends the latest interval
            self.intervals.append(Interval(began, {}))
        for sums in (self.totals, self.intervals[-1].counts):
            sums[model] = sums.get(model, Counts()).plus(counts)
