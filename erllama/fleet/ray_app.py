"""The Ray Serve application: a deployment of replicas, and an ingress in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from erllama._model.load import load_model
from erllama.cache import Cache
from erllama.checks import seconds
from erllama.events import KvEvents
from erllama.fleet.config import FleetConfig
from erllama.fleet.ingress import open_ingress
from erllama.fleet.ray_calls import RayCalls
from erllama.fleet.ray_router import FleetRequestRouter, make_router
from erllama.fleet.replica import Replica
from erllama.fleet.transport import WirePrefix
from erllama.server.application import app as server_app

# Calls that are no requests, such as cancellations, get through when a replica has as many requests as it takes.
_SPARE_CALLS = 64
_WARM_SECONDS = 60.0


class FleetReplica:
    """The deployment that computes: one model and one cache per replica."""

    def __init__(self, config: FleetConfig) -> None:
        context = serve.get_replica_context()
        self._name = str(context.replica_tag)
        options: Any = config.model_options()
        cache_options: Any = config.cache_options(context.rank.rank)
        events = _event_options() if config.kv_events else None
        cache = Cache(**cache_options)
        try:
            model = load_model(config.model, id=config.id, cache=cache, kv_events=events, **options)
        except BaseException:
            cache.close()
            raise
        self._replica = Replica(model, self._name)
        if events is not None:
            self._replica.events, self._replica.replay = events.addresses

    async def run(self, request: str, body: bytes, identity: str) -> AsyncIterator[tuple[str, list[bytes]]]:
        """Run a request; see `Replica.run`. Every item has the name of the replica."""
        replies = self._replica.run(request, body, identity)
        try:
            async for bodies in replies:
                yield self._name, bodies
        finally:
            await replies.aclose()  # type: ignore[attr-defined]

    async def cancel(self, request: str, to: str | None = None) -> None:
        """End a request early."""
        self._replica.cancel(request)

    async def call(self, body: bytes, to: str | None = None) -> bytes:
        """Answer an encoded call."""
        return await self._replica.call(body)

    async def describe(self, to: str | None = None) -> tuple[str, bytes]:
        """Return the identity of the model, and its description."""
        return self._replica.describe()

    async def name(self, to: str | None = None) -> str:
        """Return the name of the replica."""
        return self._name

    async def introduce(self, to: str | None = None) -> tuple[str, bytes]:
        """Return the name of the replica, and its encoded `Started`, with its counts."""
        return self._name, self._replica.describe()[1]

    async def warm(self, prefixes: list[tuple[str | None, bytes]], to: str | None = None) -> int:
        """Load prefixes from the cache into memory."""
        found = [WirePrefix(*each) for each in prefixes]
        return await asyncio.to_thread(self._replica.warm, found, _WARM_SECONDS)

    async def record_routing_stats(self) -> dict[str, object]:
        """Return the replica's load; Ray passes it to all routers."""
        return (await asyncio.to_thread(self._replica.report)).as_stats()

    def check_health(self) -> None:
        """Raise an error if the model has ended; Ray then replaces the replica."""
        self._replica.check_health()

    def __del__(self) -> None:
        replica: Replica | None = getattr(self, "_replica", None)
        if replica is not None:
            replica.close()


def _event_options() -> KvEvents:
    """Return options that publish on free ports of the address by which the cluster's nodes reach this one."""
    host = ray.util.get_node_ip_address()
    host = f"[{host}]" if ":" in host else host
    return KvEvents(f"tcp://{host}:*", trusted_network=True).with_ports()


@serve.ingress()
class FleetIngress:
    """The deployment that takes HTTP requests, renders and tokenizes."""

    def __init__(self, config: FleetConfig, replicas: DeploymentHandle) -> None:
        router = make_router(*_router_options(config).values())
        self._router = router
        self._model = open_ingress(config, RayCalls(replicas), router)
        options: Any = dict(config.server)
        self._app = server_app(self._model, **options)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def routing_counts(self) -> dict[str, int]:
        """Return what the router of this ingress has done; see `RouterCounts`."""
        return self._router.counts()._asdict()

    def check_health(self) -> None:
        """Raise an error if the model was unloaded; Ray then replaces the ingress."""
        self._model._runner.check()

    def __del__(self) -> None:
        model = getattr(self, "_model", None)
        if model is not None:
            model.unload()
            model.cache.close()


def _router_options(config: FleetConfig) -> dict[str, Any]:
    return {
        "fleet": config.id,
        "policy": config.policy,
        "weight": config.weight,
        "kv_events": config.kv_events,
    }


def make_application(config: FleetConfig) -> serve.Application:
    """Return the Ray Serve application of a checked configuration."""
    stats_period = seconds("report_interval", config.report_interval)
    scale: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        scale = {"autoscaling_config": _autoscaling(config, config.max_replicas)}
    replicas = serve.deployment(
        FleetReplica,
        name="FleetReplica",
        ray_actor_options=dict(config.replica_resources),
        logging_config=LoggingConfig(enable_access_log=False),  # the server of the ingress has its own
        max_ongoing_requests=config.slots + config.max_waiting + _SPARE_CALLS,
        graceful_shutdown_timeout_s=seconds("drain", config.drain) + seconds("save", config.save),
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(
            request_router_class=FleetRequestRouter,
            request_router_kwargs=_router_options(config),
            request_routing_stats_period_s=stats_period,
        ),
        **scale,
    )
    ingress = serve.deployment(
        FleetIngress,
        name="FleetIngress",
        num_replicas=config.ingresses,
        ray_actor_options=dict(config.ingress_resources),
        logging_config=LoggingConfig(enable_access_log=False),
        max_ongoing_requests=config.max_pending,
    )
    return ingress.bind(config, replicas.bind(config))


def _autoscaling(config: FleetConfig, max_replicas: int) -> AutoscalingConfig:
    upscale = seconds("upscale_delay", config.upscale_delay)
    return AutoscalingConfig(
        min_replicas=config.min_replicas,
        max_replicas=max_replicas,
        target_ongoing_requests=config.target_requests or float(config.slots),
        upscale_delay_s=upscale,
        downscale_delay_s=seconds("downscale_delay", config.downscale_delay),
        look_back_period_s=max(min(upscale, 30.0), 1.0),
        metrics_interval_s=max(min(upscale / 2, 10.0), 0.5),
    )


def application_of(options: Mapping[str, object]) -> serve.Application:
    """Return the application of `serve run`: see `erllama.fleet.app`."""
    if "config" in options and len(options) == 1:
        return make_application(FleetConfig.of_file(str(options["config"])))
    return make_application(FleetConfig.of(options))
