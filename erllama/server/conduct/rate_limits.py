"""Limits of requests and tokens per minute, one pair of buckets for each key.

A bucket holds a minute's worth and refills continuously. Tokens are charged when a request ends, since a reply's
length is not known before; so a bucket may fall below zero, and new requests wait until it holds one token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from erllama.server.conduct.errors import ApiError
from erllama.server.conduct.keys import ApiKey


class RateLimits:
    """The buckets of all keys. Used by the event loop alone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def admit(self, key: ApiKey) -> None:
        """Count a request; raise ApiError if the key has used up its requests or tokens."""
        now = self._clock()
        requests = self._bucket(key, "requests", key.requests_per_minute)
        tokens = self._bucket(key, "tokens", key.tokens_per_minute)
        for name, bucket in (("requests", requests), ("tokens", tokens)):
            wait = bucket.wait(now) if bucket is not None else 0.0
            if bucket is not None and wait > 0:
                raise ApiError(
                    "rate_limited",
                    f"this key may use {bucket.per_minute} {name} a minute; try again in {math.ceil(wait)} seconds",
                    f"{name}_per_minute",
                    retry_after=math.ceil(wait),
                )
        if requests is not None:
            requests.take(now, 1.0)

    def charge(self, key: ApiKey, n_tokens: int) -> None:
        """Charge the tokens of a request that ended."""
        bucket = self._bucket(key, "tokens", key.tokens_per_minute)
        if bucket is not None:
            bucket.take(self._clock(), n_tokens)

    def _bucket(self, key: ApiKey, name: str, per_minute: int | None) -> _Bucket | None:
        if per_minute is None:
            return None
        bucket = self._buckets.get((key.secret, name))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.secret, name] = _Bucket(per_minute, self._clock())
        return bucket


class _Bucket:
    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level, self._time = float(per_minute), now

    def wait(self, now: float) -> float:
        """Return the seconds until the bucket holds 1."""
        self._refill(now)
        missing = 1.0 - self._level
        # Rounding may leave a little missing at the end of a wait.
        return missing * 60 / self.per_minute if missing > 1e-6 else 0.0

    def take(self, now: float, amount: float) -> None:
        self._refill(now)
        self._level -= amount

    def _refill(self, now: float) -> None:
        self._level = min(self._level + (now - self._time) * self.per_minute / 60, float(self.per_minute))
        self._time = now
