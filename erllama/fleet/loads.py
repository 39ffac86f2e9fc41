"""The load of replicas: the prompt tokens that they have to compute before a new request, and their requests.

A router knows the requests that it has sent itself, at once. Replicas report their totals from time to time, which
include the requests of other routers. Not thread-safe; `PrefixRouter` guards it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Load(NamedTuple):
    """The load of a replica.

    Attributes:
        tokens: prompt tokens that it computes before a new request: those of running requests that it has not
            cached, and whole prompts of requests that wait for a slot.
        requests: requests that run or wait.
    """

    tokens: int
    requests: int


@dataclass(slots=True)
class _Sent:
    """A request that was sent: `computes` is the part of the prompt that the replica has to compute."""

    replica: str
    prompt: int
    computes: int
    has_begun: bool = False  # the prompt is computed


class LoadTable:
    """The loads of replicas, as one router knows them."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}
        self._by_replica: dict[str, dict[str, _Sent]] = {}
        self._slots: dict[str, int] = {}
        self._others: dict[str, Load] = {}  # of requests that other routers have sent

    def sent(self, request: str, replica: str, prompt: int, cached: int) -> None:
        """Count a request that was sent.

        Args:
            prompt: its tokens.
            cached: those that the replica has.
        """
        self.ended(request)
        entry = self._sent[request] = _Sent(replica, prompt, max(prompt - cached, 0))
        self._by_replica.setdefault(replica, {})[request] = entry

    def begun(self, request: str) -> None:
        """Note that the prompt of a request is computed."""
        entry = self._sent.get(request)
        if entry is not None:
            entry.has_begun = True

    def ended(self, request: str) -> None:
        """Note the end of a request."""
        entry = self._sent.pop(request, None)
        if entry is not None:
            self._by_replica.get(entry.replica, {}).pop(request, None)

    def report(self, replica: str, slots: int, total: Load) -> None:
        """Note the totals that a replica has reported.

        Args:
            slots: requests that run at once.
        """
        self._slots[replica] = slots
        own = self._own(replica)
        self._others[replica] = Load(max(total.tokens - own.tokens, 0), max(total.requests - own.requests, 0))

    def forget(self, replica: str) -> None:
        """Remove a replica that is gone. Its requests are counted until they end, but for no replica."""
        self._slots.pop(replica, None)
        self._others.pop(replica, None)
        self._by_replica.pop(replica, None)

    def of(self, replica: str) -> Load:
        """Return the load of a replica."""
        own, others = self._own(replica), self._others.get(replica, Load(0, 0))
        return Load(own.tokens + others.tokens, own.requests + others.requests)

    def _own(self, replica: str) -> Load:
        sent = self._by_replica.get(replica, {}).values()
        slots, tokens = self._slots.get(replica), 0
        for number, entry in enumerate(sent):
            if entry.has_begun:
                continue
            waits = slots is not None and number >= slots
            tokens += entry.prompt if waits else entry.computes
        return Load(tokens, len(sent))
