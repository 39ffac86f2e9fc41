"""The request router that Ray Serve runs in each process that sends requests to replicas.

It asks the process's `PrefixRouter` for the order of the replicas. Ray probes the queues, retries, and replaces
replicas. Calls for one replica, such as cancellations, have its name as the argument `to`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from erllama.fleet.event_subscriber import EventSubscriber
from erllama.fleet.prefix_router import PrefixRouter, shared_router


def make_router(fleet: str, policy: str, weight: float, kv_events: bool) -> PrefixRouter:
    """Return the router of a fleet in this process; make it at the first call."""

    def make() -> PrefixRouter:
        router = PrefixRouter(policy, weight)
        if kv_events:
            router.subscribe = EventSubscriber(router.apply).set_replicas
        return router

    return shared_router(fleet, make)


class FleetRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray is not installed beside mypy
    """Routes requests by cached prefix and load."""

    # Ray's default of 0.1 s passes the replica with the prefix over when its machine is busy. One that has ended is
    # noticed at once, whatever the limit.
    queue_len_response_deadline_s = 5.0
    max_queue_len_response_deadline_s = 30.0
    _router: PrefixRouter

    def initialize_state(self, fleet: str, policy: str, weight: float, kv_events: bool) -> None:
        """Set the router of the process; Ray passes the arguments of `RequestRouterConfig`."""
        self._router = make_router(fleet, policy, weight, kv_events)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Set the replicas that serve requests, and what they report."""
        super().update_replicas(replicas)
        names = [replica.replica_id.unique_id for replica in replicas]
        stats = {replica.replica_id.unique_id: replica.routing_stats or {} for replica in replicas}
        self._router.update(names, stats)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas in the order in which a request tries them."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is None:
            return [list(candidate_replicas)]
        wanted = pending_request.kwargs.get("to")
        if wanted is not None:
            return [[by_name[wanted]]] if wanted in by_name else [list(candidate_replicas)]
        ranks = self._router.rank(_name(pending_request), list(by_name))
        return [[by_name[name] for name in names] for names in ranks]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """Note where a request went."""
        name = _name(pending_request)
        if name is not None:
            self._router.sent(name, replica_id.unique_id)


def _name(request: PendingRequest) -> str | None:
    """Return the name of a request of `FleetRunner`; None for another call."""
    args: Sequence[Any] = request.args
    return args[0] if request.metadata.call_method == "run" and args and isinstance(args[0], str) else None
