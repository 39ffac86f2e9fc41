"""The router of one process: decides which replica gets a request. Imports no Ray.

The runner of the ingress announces each request before it sends it. Ray's request router, in another thread, asks
for the order of the replicas and reports where the request went. A third thread adds KV events. So all share one
`PrefixRouter`, found by the name of the fleet.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import msgspec
from msgspec import Struct

from erllama._runtime.log import logger
from erllama.fleet.event_subscriber import Addresses
from erllama.fleet.hot_prefixes import HotPrefix, HotPrefixes
from erllama.fleet.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from erllama.fleet.loads import Load, LoadTable
from erllama.fleet.prefix_index import NO_PREFIX, CachedPrefix, PrefixIndex, Tokens
from erllama.fleet.ranking import Candidate, rank

log = logger("erllama.fleet")

POLICIES = ("prefix", "round_robin", "random")


class ReplicaReport(Struct, frozen=True):
    """What a replica reports about itself.

    Attributes:
        identity: names its model and the layout of its KV; replicas of one fleet have the same.
        slots: requests that run at once.
        load: its total load.
        events: address of its KV events, such as "tcp://10.0.0.5:40001"; None without them.
        replay: address from which missed events are read again; None without one.
    """

    identity: str
    slots: int
    load: Load
    events: str | None = None
    replay: str | None = None

    @classmethod
    def of(cls, stats: Mapping[str, object]) -> ReplicaReport | None:
        """Return the report in a replica's routing statistics; None if they have none."""
        try:
            return msgspec.convert(dict(stats), cls)
        except msgspec.ValidationError:
            return None

    def as_stats(self) -> dict[str, object]:
        """Return the report as routing statistics."""
        found: dict[str, object] = msgspec.to_builtins(self)
        return found


@dataclass(slots=True)
class _Request:
    """A request that is about to be sent, or runs: `cached` is what replicas have of its prompt."""

    keys: Sequence[bytes]
    salt: str | None
    n_tokens: int
    cached: dict[str, CachedPrefix] = field(default_factory=dict)
    is_looked_up: bool = False


class RouterCounts(NamedTuple):
    """What a router has done since it started, in requests and tokens.

    Attributes:
        requests: requests that were routed.
        prompt_tokens, expected_tokens: their prompts, and what the chosen replicas were expected to have of them.
        spilled: requests that went to another replica than the one with the longest prefix.
        ignored_events: KV events without effect.
        refused_replicas: replicas that run another model.
    """

    requests: int
    prompt_tokens: int
    expected_tokens: int
    spilled: int
    ignored_events: int
    refused_replicas: int


class PrefixRouter:
    """Routes the requests of one process to the replicas of a fleet. Safe from any thread.

    Args:
        policy: "prefix"; "round_robin" and "random" ignore prefixes and loads.
        weight: of the prompt tokens that a replica has to compute before the request.
        index: finds prefixes.
        random: breaks ties.
        clock: returns the time in seconds.

    Attributes:
        on_change: called, in any thread, with the replicas that serve requests, after each update.
        subscribe: called with the addresses of the replicas' KV events, after each update. Its owner passes the
            events to `apply`.
    """

    def __init__(
        self,
        policy: str = "prefix",
        weight: float = 0.25,
        index: PrefixIndex | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._weight, self._clock = policy, weight, clock
        self._index = index or PrefixIndex(clock=clock)
        self._random = random or Random()
        self._loads = LoadTable()
        self._hot = HotPrefixes(self._index.block_tokens)
        self._lock = threading.RLock()
        self._requests: dict[str, _Request] = {}
        self._reports: dict[str, ReplicaReport] = {}
        self._serving: tuple[str, ...] = ()
        self._identity: str | None = None
        self._refused: set[str] = set()
        self._turn = 0
        self._n = [0, 0, 0, 0]
        self.on_change: Callable[[tuple[str, ...]], object] | None = None
        self.subscribe: Callable[[Mapping[str, Addresses]], object] | None = None

    # --- replicas ----------------------------------------------------------------------------------

    def use_identity(self, identity: str) -> None:
        """Set the identity of the model. Replicas with another one get no requests."""
        with self._lock:
            self._identity = identity
            for replica in self._reports:
                self._check(replica)

    def update(self, serving: Collection[str], stats: Mapping[str, Mapping[str, object]]) -> None:
        """Set the replicas that serve requests, and what they report.

        Args:
            stats: routing statistics by replica; empty for one that has not reported yet.
        """
        with self._lock:
            for replica in [name for name in self._reports if name not in serving]:
                del self._reports[replica]
                self._refused.discard(replica)
            for replica in set(self._serving) - set(serving):
                self._index.clear(replica)
                self._loads.forget(replica)
            self._serving = tuple(serving)
            for replica in serving:
                report = ReplicaReport.of(stats.get(replica, {}))
                if report is None:
                    continue
                if self._reports.get(replica) != report:
                    self._reports[replica] = report
                    self._loads.report(replica, report.slots, report.load)
                    self._check(replica)
            changed, subscribe = self.on_change, self.subscribe
            addresses = {
                name: Addresses(report.events, report.replay)
                for name, report in self._reports.items()
                if report.events and report.replay and name not in self._refused
            }
        if subscribe is not None:
            subscribe(addresses)
        if changed is not None:
            changed(tuple(serving))

    def refuse(self, replica: str) -> None:
        """Send no further requests to a replica: it has another model."""
        with self._lock:
            if replica not in self._refused:
                self._refused.add(replica)
                log.error("replica %s runs another model than the fleet and gets no requests", replica)

    def _check(self, replica: str) -> None:
        report = self._reports[replica]
        if self._identity is not None and report.identity != self._identity:
            self.refuse(replica)

    @property
    def serving(self) -> tuple[str, ...]:
        """The replicas that serve requests."""
        return self._serving

    def accepted(self) -> tuple[str, ...]:
        """Return the replicas that serve requests and run the fleet's model."""
        with self._lock:
            return tuple(name for name in self._serving if name not in self._refused)

    def reports(self) -> dict[str, ReplicaReport]:
        """Return what the replicas have reported last."""
        with self._lock:
            return dict(self._reports)

    def load(self, replica: str) -> Load:
        """Return the load of a replica."""
        with self._lock:
            return self._loads.of(replica)

    def apply(self, replica: str, events: Sequence[KvEvent]) -> None:
        """Add KV events of a replica to the index."""
        with self._lock:
            if replica not in self._serving:
                return
            for event in events:
                match event:
                    case BlockStored():
                        self._index.store(replica, event)
                    case BlockRemoved():
                        self._index.remove(replica, event)
                    case AllBlocksCleared():
                        self._index.clear(replica)

    # --- requests ----------------------------------------------------------------------------------

    def expect(self, request: str, tokens: Tokens, salt: str | None) -> None:
        """Announce a request that is about to be sent.

        Args:
            tokens: ids of the prompt, shape (n,). Not changed later.
        """
        with self._lock:
            keys = self._index.keys(tokens, salt)
            self._requests[request] = _Request(keys, salt, len(tokens))
            self._hot.count(keys, tokens, salt)

    def rank(self, request: str | None, replicas: Sequence[str]) -> list[list[str]]:
        """Return replicas in the order in which a request tries them, in groups of equal ones.

        Args:
            request: one that was announced; None for one without a prompt.
            replicas: those that may get it. Those with another model are left out, unless there is no other one:
            they
                refuse the request with an error.
        """
        with self._lock:
            fitting = [name for name in replicas if name not in self._refused] or list(replicas)
            if self._policy == "random":
                self._random.shuffle(fitting)
                return [[name] for name in fitting]
            if self._policy == "round_robin":
                self._turn += 1
                fitting.sort()
                start = self._turn % max(len(fitting), 1)
                return [[name] for name in fitting[start:] + fitting[:start]]
            groups = rank(self._candidates(request, fitting), self._weight, self._random)
            if request is not None and groups:
                self._reserve(request, groups[0])
            return groups

    def _reserve(self, request: str, best: Sequence[str]) -> None:
        """Count a request at the replica that it most likely goes to: others may be routed before it is sent."""
        known = self._requests.get(request)
        if known is None:
            return
        self._look_up(known)
        cached = known.cached.get(best[0], NO_PREFIX).total
        self._loads.sent(request, best[0], known.n_tokens, cached)
        if len(best) == 1:
            self._index.assume(best[0], known.keys)

    def _look_up(self, request: _Request | None) -> dict[str, CachedPrefix]:
        """Return what replicas have of a prompt; what they are assumed to have because of it does not count."""
        if request is None:
            return {}
        if not request.is_looked_up:
            request.cached, request.is_looked_up = self._index.match(request.keys), True
        return request.cached

    def _candidates(self, request: str | None, replicas: Sequence[str]) -> list[Candidate]:
        known = self._requests.get(request) if request is not None else None
        cached = self._look_up(known)
        return [Candidate(name, cached.get(name, NO_PREFIX), self._loads.of(name)) for name in replicas]

    def sent(self, request: str, replica: str) -> None:
        """Note that a request was sent to a replica, which will have its prompt soon."""
        with self._lock:
            known = self._requests.get(request)
            if known is None:
                return
            self._look_up(known)
            own = known.cached.get(replica, NO_PREFIX).total
            self._loads.sent(request, replica, known.n_tokens, own)
            self._index.assume(replica, known.keys)
            best = max((each.total for name, each in known.cached.items() if name in self._serving), default=0)
            for place, n in enumerate((1, known.n_tokens, own, int(best > own))):
                self._n[place] += n

    def begun(self, request: str) -> None:
        """Note that the prompt of a request is computed."""
        with self._lock:
            self._loads.begun(request)

    def ended(self, request: str, replica: str | None, context: Tokens | None) -> None:
        """Note that a request has ended.

        Args:
            context: ids of the prompt and the reply, which the replica now has; None if it has not.
        """
        with self._lock:
            self._loads.ended(request)
            known = self._requests.pop(request, None)
            if known is not None and replica in self._serving and context is not None:
                self._index.assume(replica, self._index.keys(context, known.salt))

    def longest(self, tokens: Tokens, salt: str | None) -> int:
        """Return the number of tokens of a prompt that the best replica has, as far as this router knows."""
        with self._lock:
            found = self._index.match(self._index.keys(tokens, salt))
            return max((each.total for name, each in found.items() if name in self._serving), default=0)

    def hottest(self, n: int) -> list[HotPrefix]:
        """Return the prefixes that most requests begin with."""
        with self._lock:
            return self._hot.hottest(n)

    def counts(self) -> RouterCounts:
        """Return what the router has done."""
        with self._lock:
            requests, prompt, expected, spilled = self._n
            return RouterCounts(requests, prompt, expected, spilled, self._index.ignored_events, len(self._refused))


_shared: dict[str, PrefixRouter] = {}
_shared_lock = threading.Lock()


def shared_router(fleet: str, make: Callable[[], PrefixRouter]) -> PrefixRouter:
    """Return the router of a fleet in this process; make it at the first call."""
    with _shared_lock:
        found = _shared.get(fleet)
        if found is None:
            found = _shared[fleet] = make()
        return found
