"""`GET /erllama/status`: the tiers of the cache, how much of the prompts it had over time, pins, and the models.

A client with a key sees the models that its key may use. Paths are left out: the answer goes to other machines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Sequence

from starlette.responses import Response

import erllama
from erllama._model.info import ModelInfo
from erllama.cache import Cache, TierStatus
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.keys import ApiKey
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.hit_history import INTERVAL_SECONDS, Counts, HitHistory
from erllama.server.models import ConfiguredModel
from erllama.server.replies.openai_errors import ERRORS

# Tiers in the memory of a process. Each model in a process of its own adds its own.
_IN_MEMORY = ("live", "ram")


def endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoint of this module."""
    summary = "Describe the cache and the models."
    return [Endpoint("GET", "/erllama/status", NoBody, answer, ERRORS, summary, computes=False)]


async def answer(call: Call, body: NoBody) -> Response:
    """Answer with the status."""
    pool = call.server.models
    models = await pool.describe_all(call.allowed_models())
    # Models that are loaded on request have the pool's cache.
    used = [pool.cache if model.served is None else model.served.model.cache for model, _ in models]
    caches = list({id(cache): cache for cache in used}.values())
    names = {model.name for model, _ in models}
    # In a thread: models in processes of their own report what they have.
    tiers, pins = await asyncio.to_thread(lambda: (_tiers(caches), _pins(caches, _models_of_pins(call.key, names))))
    values: Json = {
        "version": erllama.__version__,
        "time": time.time(),
        "tiers": tiers,
        **_hits(call.server.history, names),
        "models": [_model(model, described.info) for model, described in models],
        "pins": pins,
    }
    return json_response(values)


def _tiers(caches: Iterable[Cache]) -> list[Json]:
    """Return the tiers, from fast to slow. Each directory is one, and so is the memory of all processes."""
    groups: dict[tuple[object, ...], list[TierStatus]] = {}
    for cache in caches:
        for status in cache.tiers():
            place = (status.tier,) if status.tier in _IN_MEMORY else (status.tier, status.location)
            groups.setdefault(place, []).append(status)
    return [_tier(statuses) for statuses in groups.values()]


def _tier(statuses: Sequence[TierStatus]) -> Json:
    return {
        "tier": statuses[0].tier,
        "places": len(statuses),
        "bytes": sum(status.n_bytes for status in statuses),
        "limit": sum(status.budget for status in statuses),
        "blocks": sum(status.n_blocks for status in statuses),
        "read_only": all(status.read_only for status in statuses),
        "failed": any(status.error is not None for status in statuses),
    }


def _models_of_pins(key: ApiKey | None, names: Collection[str]) -> Collection[str] | None:
    """Return the models whose pins a key sees; None for all: those of other programs and removed models, too.

    A key with a salt of its own sees none, since pins have names, and may be of another salt.
    """
    if key is not None and key.cache_salt is not None:
        return ()
    return None if key is None or key.models is None else names


def _pins(caches: Iterable[Cache], models: Collection[str] | None) -> list[Json]:
    """Return the pins of some models; None for all."""
    return [pin.as_plain() for cache in caches for pin in cache.pins() if models is None or pin.model in models]


def _hits(history: HitHistory, models: Collection[str]) -> Json:
    """Return the counts of requests of some models: all of them, and those of each interval."""
    intervals = [(began, _sum(counts, models)) for began, counts in history.intervals]
    return {
        "totals": _sum(history.totals, models)._asdict(),
        "history": {
            "interval_seconds": INTERVAL_SECONDS,
            "intervals": [{"began": began, **sums._asdict()} for began, sums in intervals if sums.requests],
        },
    }


def _sum(counts: dict[str, Counts], models: Collection[str]) -> Counts:
    found = Counts()
    for model, each in counts.items():
        if model in models:
            found = found.plus(each)
    return found


def _model(model: ConfiguredModel, info: ModelInfo) -> Json:
    served = model.served
    values: Json = {
        "name": model.name,
        "aliases": [alias for alias in model.aliases if alias != "*"],
        "state": "restarting" if served is not None and not info.pid else model.state,
        "memory_bytes": model.memory,
        "n_ctx": info.n_ctx,
        "slots": {
            "total": info.n_seq_max,
            "running": model.n_slots_in_use,
            "waiting": model.n_waiting,
        },
        "expires_in": model.expires_in,
        "restarts": 0 if served is None else served.model.restarts,
        "uses_cache": not info.cache_problem,
    }
    if model.state == "loading":
        values["progress"] = round(model.progress, 3)
    return values
