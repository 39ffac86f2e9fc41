"""The memory limit of a server: its default, and the error for a model that does not fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from erllama.cache.pressure.memory import available_memory
from erllama.cache.sizes import format_size
from erllama.engine.backends.memory_estimate import MemoryEstimate, estimate_memory
from erllama.errors import Error, MemoryLimitExceeded
from erllama.models.fit import FIT, USABLE, describe_estimate, fitting_n_ctx, free_memory
from erllama.server.models.entry import ModelEntry

log = logging.getLogger("erllama.server")


def default_memory_limit() -> int:
    """Return nine tenths of the available memory of this machine, within its cgroups' limits, and of its GPUs."""
    try:
        return int(USABLE * free_memory({}))
    except Error as error:
        log.warning("the memory of GPUs is unknown: %s", error)
    return int(USABLE * available_memory())


def needed_memory(entry: ModelEntry, limit: int | None = None) -> MemoryEstimate:
    """Return the memory that a model needs on this machine; zeros if RPC servers take an unknown part of it.

    Args:
        limit: bytes for all models, which bounds the context of n_ctx="fit"; None for the free memory.

    Raises:
        ModelLoadError: the file is missing, or is not GGUF.
        MemoryLimitExceeded: n_ctx="fit", and no context fits.
    """
    options = dict(entry.options)
    if options.get("n_ctx") == FIT:
        options["n_ctx"] = fitting_n_ctx(entry.path, options, limit)
    estimate = estimate_memory(entry.path, options)
    return MemoryEstimate(estimate.n_ctx, 0, 0, 0, 0) if options.get("rpc_servers") else estimate


def fitted(entry: ModelEntry, needed: MemoryEstimate) -> ModelEntry:
    """Return an entry with n_ctx="fit" replaced by the context that its memory was estimated for."""
    if entry.options.get("n_ctx") != FIT:
        return entry
    return replace(entry, options={**entry.options, "n_ctx": needed.n_ctx})


def not_enough_memory(
    name: str, needed: MemoryEstimate, limit: int, users: Sequence[tuple[str, int]], is_busy: bool
) -> MemoryLimitExceeded:
    """Return the error for a model that does not fit.

    Args:
        users: names of the models that take memory, and their bytes.
        is_busy: whether it fits once these models are idle.
    """
    message = (
        f"the model {name!r} needs about {describe_estimate(needed)}, and the memory limit is {format_size(limit)}"
    )
    if users:
        # Their names are for the log alone: a client may not know of models that its key must not use.
        log.warning("memory of loaded models: %s", ", ".join(f"{name!r} {format_size(n)}" for name, n in users))
        message += f", of which other models use {format_size(sum(n for _, n in users))}"
    remedy = "try again once these are idle" if is_busy else "use a smaller n_ctx, or a higher memory_limit"
    return MemoryLimitExceeded(f"{message}; {remedy}", needed.total, limit, is_busy)
