"""Replicas that stop: their running requests have some time to end, and then continue elsewhere. Not thread-safe.

A replica that leaves the set of running replicas first drains, then is due, and is forgotten once its last request
has ended or moved. A replica that comes back before that drains no longer.
"""

from __future__ import annotations

from collections.abc import Collection

SERVING, DRAINING, DUE, GONE = "serving", "draining", "due", "gone"


class DrainTable:
    """The replicas that serve requests, and those that stop.

    Args:
        seconds: how long a stopping replica's requests may run before they move.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._serving: set[str] = set()
        self._deadlines: dict[str, float] = {}  # of those that drain
        self._requests: dict[str, str] = {}  # by request: its replica

    def update(self, serving: Collection[str], now: float) -> tuple[set[str], set[str]]:
        """Set the replicas that serve requests. Return those that are new, and those that have left."""
        new, left = set(serving) - self._serving, self._serving - set(serving)
        self._serving = set(serving)
        for replica in new:
            self._deadlines.pop(replica, None)
        for replica in left:
            if replica in self._requests.values():
                self._deadlines[replica] = now + self._seconds
        return new, left

    def begin(self, request: str, replica: str, now: float) -> None:
        """Note that a replica runs a request. It may have left since the request was sent."""
        self._requests[request] = replica
        if replica not in self._serving:
            self._deadlines.setdefault(replica, now + self._seconds)

    def end(self, request: str) -> None:
        """Note that a request has ended, or was moved."""
        replica = self._requests.pop(request, None)
        if replica is not None and replica not in self._requests.values():
            self._deadlines.pop(replica, None)

    def state(self, replica: str, now: float) -> str:
        """Return SERVING, DRAINING, DUE for one whose requests move now, or GONE."""
        if replica in self._serving:
            return SERVING
        deadline = self._deadlines.get(replica)
        if deadline is None:
            return GONE
        return DUE if now >= deadline else DRAINING

    def due(self, now: float) -> list[str]:
        """Return the requests that move to another replica now, in the order of their beginning."""
        return [request for request, replica in self._requests.items() if self.state(replica, now) == DUE]

    def next_deadline(self) -> float | None:
        """Return when the next requests are due; None if no replica drains."""
        return min(self._deadlines.values(), default=None)
