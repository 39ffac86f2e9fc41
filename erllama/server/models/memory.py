"""The memory limit of a server: its default, and the error for a model that does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from erllama._model.info import devices
from erllama.cache.pressure.memory import MemoryUsage, open_sources, readings
from erllama.cache.sizes import format_size
from erllama.engine.backends.memory_estimate import MemoryEstimate, estimate_memory
from erllama.errors import Error, MemoryLimitExceeded
from erllama.server.models.entry import ModelEntry

log = logging.getLogger("erllama.server")

# The rest is for the server itself, the cache in RAM, and what the estimate of a model lacks.
_USABLE = 0.9


def default_memory_limit() -> int:
    """Return nine tenths of the available memory of this machine, within its cgroups' limits, and of its GPUs."""
    free = [
        max(reading.total - reading.used, 0)
        for source in open_sources("system")
        for reading in readings(source)
        if isinstance(reading, MemoryUsage)
    ]
    on_gpus = 0
    try:
        on_gpus = sum(device.free_bytes for device in devices() if device.kind == "gpu")
    except Error as error:
        log.warning("the memory of GPUs is unknown: %s", error)
    return int(_USABLE * (min(free, default=0) + on_gpus))


def needed_memory(entry: ModelEntry) -> MemoryEstimate:
    """Return the memory that a model needs on this machine; zeros if RPC servers take an unknown part of it.

    Raises:
        ModelLoadError: the file is missing, or is not GGUF.
    """
    estimate = estimate_memory(entry.path, entry.options)
    return MemoryEstimate(estimate.n_ctx, 0, 0, 0, 0) if entry.options.get("rpc_servers") else estimate


def not_enough_memory(
    name: str, needed: MemoryEstimate, limit: int, users: Sequence[tuple[str, int]], is_busy: bool
) -> MemoryLimitExceeded:
    """Return the error for a model that does not fit.

    Args:
        users: names of the models that take memory, and their bytes.
        is_busy: whether it fits once these models are idle.
    """
    message = (
        f"the model {name!r} needs about {format_size(needed.total)} (weights "
        f"{format_size(needed.weights)}, context of {needed.n_ctx} tokens {format_size(needed.kv + needed.state)}, "
        f"computing {format_size(needed.compute)}), and the memory limit is {format_size(limit)}"
    )
    if users:
        # Their names are for the log alone: a client may not know of models that its key must not use.
        log.warning("memory of loaded models: %s", ", ".join(f"{name!r} {format_size(n)}" for name, n in users))
        message += f", of which other models use {format_size(sum(n for _, n in users))}"
    remedy = "try again once these are idle" if is_busy else "use a smaller n_ctx, or a higher memory_limit"
    return MemoryLimitExceeded(f"{message}; {remedy}", needed.total, limit, is_busy)
