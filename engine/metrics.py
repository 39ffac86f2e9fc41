"""Counters and histograms of one engine.

The model thread writes them, callers write `refused` under a lock, and any thread may read them without a lock.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

# Seconds. From a tick on a GPU to a long prompt on a small machine; doubling, so that ratios look alike everywhere.
BUCKETS = tuple(0.001 * 2**i for i in range(18))


class Histogram:
    """Counts of observations by size.

    Attributes:
        counts: for each of BUCKETS, the observations at most as large and larger than the bucket before; the last
            counts all larger ones. Not cumulative.
        total: the sum of all observations, in seconds.
    """

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def observe(self, seconds: float, n: int = 1) -> None:
        """Add `n` equal observations."""
        self.counts[bisect_left(BUCKETS, seconds)] += n
        self.total += seconds * n


@dataclass(slots=True)
class EngineMetrics:
    """Counts since the model was loaded.

    Attributes:
        finished: requests that ended with a reply, by finish reason.
        failed: requests that ended with an error, by the error's name.
        refused: requests that were refused because the queue was full.
        prompt_tokens: tokens of the prompts of requests that entered the context.
        shared_tokens: prompt tokens reused from cells of other sequences.
        cached_tokens: prompt tokens restored from the cache.
        prefilled_tokens: tokens computed in slices of prefill, including those of resumed requests.
        decoded_tokens: rows of replies that were computed, one a tick for each reply that is generated.
        drafted_tokens, accepted_tokens: rows computed ahead, and those of them that were accepted.
        drafts: decodes with rows that were computed ahead.
        ticks: decodes.
        preempted: preemptions of requests, which lost their cells to others and waited.
        first_token, between_tokens: seconds from submission to the first token, and from token to token.
    """

    finished: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    drafts: int = 0
    ticks: int = 0
    preempted: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)

    def count_finished(self, reason: str) -> None:
        """Count a request that ended with a reply."""
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def count_failed(self, error: BaseException) -> None:
        """Count a request that ended with an error."""
        name = type(error).__name__
        self.failed[name] = self.failed.get(name, 0) + 1
