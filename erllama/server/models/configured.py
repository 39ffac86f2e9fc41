"""A model of the server, loaded or not: `ConfiguredModel`."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from erllama.server.conduct.durations import FOREVER, parse_duration
from erllama.server.models.entry import ModelEntry
from erllama.server.models.served import ServedModel

State = Literal["unloaded", "loading", "loaded", "unloading"]
UnloadReason = Literal["keep_alive", "memory", "pressure", "request", "configuration", "failed"]


class ConfiguredModel:
    """The state of one model. `Lifecycle` changes it, in the server's event loop.

    Args:
        entry: what the configuration says; None for a model that was loaded before it was passed to the server,
            which never unloads it.
        served: the loaded model; None if it is not loaded.
        keep_alive: seconds after the last request until it is unloaded, where the entry has no own.

    Attributes:
        name: the name that clients use.
        aliases: further names.
        created: when the model became one of the server's, in seconds since 1970.
        n_bytes: estimated memory of the model while it is loaded, being loaded or being unloaded; 0 otherwise.
        n_running: requests that use the model, and keep it from being unloaded.
        last_used: when a request last began or ended, of `time.monotonic`.
        progress: the loaded fraction, 0.0 to 1.0, during a load.
        error: why the last load failed; "" if it did not.
        waiters: requests that wait for the model, each with a future.
        loading, unloading: the task that does so; None otherwise.
        unload_reason: why it is unloaded once no request uses it; None to keep it.
        predecessor: a model that must be unloaded first, since it has the same name.
        requested_keep_alive: what the latest request with a `keep_alive` asked for; None if none did.
        timer: unloads the model; None while it is in use or not loaded.
        expires: when the timer does so, of `time.monotonic`.
    """

    def __init__(
        self, entry: ModelEntry | None, served: ServedModel | None = None, keep_alive: float = FOREVER
    ) -> None:
        assert entry is not None or served is not None
        self.entry, self.served, self._keep_alive = entry, served, keep_alive
        self.aliases: tuple[str, ...] = entry.aliases if entry is not None else served.aliases  # type: ignore[union-attr]
        self.created = served.created if served is not None else int(time.time())
        self.n_bytes = 0
        self.n_running = 0
        self.last_used = 0.0
        self.progress = 0.0
        self.error = ""
        self.waiters: list[asyncio.Future[None]] = []
        self.loading: asyncio.Task[None] | None = None
        self.unloading: asyncio.Task[None] | None = None
        self.unload_reason: UnloadReason | None = None
        self.predecessor: ConfiguredModel | None = None
        self.requested_keep_alive: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.expires: float | None = None

    @property
    def name(self) -> str:
        """The name that clients use."""
        if self.entry is not None:
            return self.entry.id
        assert self.served is not None
        return self.served.name

    @property
    def file(self) -> str:
        """Name of the model's file; "" if it has none."""
        return self.entry.path.name if self.entry is not None else self.served.file  # type: ignore[union-attr]

    @property
    def state(self) -> State:
        """Whether the model is loaded, or what happens to it."""
        if self.unloading is not None:
            return "unloading"
        if self.served is not None:
            return "loaded"
        return "unloaded" if self.loading is None else "loading"

    @property
    def is_ready(self) -> bool:
        """Whether a request can use the model now."""
        return self.served is not None and self.unload_reason is None

    @property
    def keep_alive(self) -> float:
        """Seconds after the last request until the model is unloaded; infinite for never."""
        if self.entry is None:
            return FOREVER
        if self.requested_keep_alive is not None:
            return self.requested_keep_alive
        own = self.entry.keep_alive
        return self._keep_alive if own is None else parse_duration("keep_alive", own)

    @property
    def expires_in(self) -> float | None:
        """Seconds until the model is unloaded if no request comes; None if it is in use, or stays loaded."""
        return None if self.expires is None else max(self.expires - time.monotonic(), 0.0)

    @property
    def n_slots(self) -> int:
        """How many requests the model runs at once; 0 while it is not loaded."""
        return self.served.model.info.n_seq_max if self.served is not None else 0

    @property
    def n_slots_in_use(self) -> int:
        """How many requests the model runs now."""
        return self.served.model.queue_depth if self.served is not None else 0

    @property
    def n_waiting(self) -> int:
        """How many requests wait for the model, or in its queue."""
        return len(self.waiters) + (self.served.model.pending if self.served is not None else 0)

    @property
    def memory(self) -> int:
        """Bytes that the model takes: those that its backend reports, or the estimate."""
        if self.served is None:
            return self.n_bytes
        info = self.served.model.info
        return sum(buffer.n_bytes for buffer in info.buffers) or info.weights_bytes + info.kv_bytes or self.n_bytes

    def adopt(self, entry: ModelEntry, keep_alive: float) -> None:
        """Take the attributes of another entry with the same file and options."""
        self.entry, self.aliases, self._keep_alive = entry, entry.aliases, keep_alive
        if self.served is not None:
            self.served = serve(entry, self.served)


def serve(entry: ModelEntry, served: ServedModel) -> ServedModel:
    """Return a loaded model as an entry serves it."""
    return ServedModel(
        served.model,
        entry.aliases,
        entry.special_tokens_in_content,
        served.created,
        served.defaults,
        served.pooling,
        entry.path.name,
    )
