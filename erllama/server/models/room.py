"""Makes room for models within the memory limit: `Room`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from erllama.engine.backends.memory_estimate import MemoryEstimate
from erllama.errors import MemoryLimitExceeded
from erllama.server.models.configured import ConfiguredModel, UnloadReason
from erllama.server.models.memory import not_enough_memory


class NotAwaitedError(Exception):
    """The requests that wanted a model have left before there was room for it."""


class Change:
    """Wakes tasks when the state of some model changes. Used by one event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all tasks that wait."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next `notify`."""
        await self._event.wait()


class Room:
    """The memory of all models of a server, by their estimates. Used by its event loop.

    Args:
        models: all models, a list that its owner changes.
        limit: bytes for all of them.
        wait: seconds for which `make` waits until other models are idle.
        unload: unloads a model once it is idle.
        keep: undoes `unload` for a model that is still loaded.

    Attributes:
        limit: bytes for all models.
        changed: notified whenever the state of a model changes.
    """

    def __init__(
        self,
        models: Sequence[ConfiguredModel],
        limit: int,
        wait: float,
        unload: Callable[[ConfiguredModel, UnloadReason], None],
        keep: Callable[[ConfiguredModel], None],
    ) -> None:
        self.limit = limit
        self.changed = Change()
        self._models, self._wait, self._unload, self._keep = models, wait, unload, keep
        self._lock = asyncio.Lock()  # one load makes room at a time, in the order in which they came

    @property
    def used(self) -> int:
        """Bytes of the models that are loaded, being loaded or being unloaded."""
        return sum(model.n_bytes for model in self._models)

    def take(self, model: ConfiguredModel, needed: MemoryEstimate) -> None:
        """Reserve the memory of a model, without making room.

        Raises:
            MemoryLimitExceeded: it does not fit.
        """
        if needed.total > self.limit - self.used:
            raise self._refused(model, needed, is_busy=False)
        model.n_bytes = needed.total

    async def make(self, model: ConfiguredModel, needed: MemoryEstimate, *, is_awaited: bool) -> None:
        """Reserve the memory of a model. Other models make room, the least recently used first.

        Args:
            is_awaited: whether the load is for the requests that wait for it.

        Raises:
            MemoryLimitExceeded: the model is larger than the limit, or others were in use for longer than `wait`.
            NotAwaitedError: the requests that waited for it have left.
        """
        if needed.total > self.limit:
            raise self._refused(model, needed, is_busy=False)
        if self._lock.locked() or needed.total > self.limit - self.used:  # in the order of requests
            deadline = asyncio.get_running_loop().time() + self._wait
            try:
                async with asyncio.timeout_at(deadline):
                    await self._lock.acquire()
                try:
                    await self._make(model, needed, deadline, is_awaited=is_awaited)
                finally:
                    self._lock.release()
            except TimeoutError:
                raise self._refused(model, needed, is_busy=True) from None
        model.n_bytes = needed.total

    async def _make(
        self, model: ConfiguredModel, needed: MemoryEstimate, deadline: float, *, is_awaited: bool
    ) -> None:
        """Wait until there is room. The deadline does not hold while unloads in progress make enough of it."""
        try:
            while needed.total > self.limit - self.used:
                if is_awaited and not model.waiters:
                    raise NotAwaitedError
                self._choose(needed)
                coming = sum(each.n_bytes for each in self._models if each.unloading)
                is_enough = needed.total <= self.limit - self.used + coming
                async with asyncio.timeout_at(None if is_enough else deadline):
                    await self.changed.wait()
        finally:
            for each in self._models:
                if each.unload_reason == "memory" and each.state == "loaded":
                    self._keep(each)

    def _choose(self, needed: MemoryEstimate) -> None:
        """Choose the models that make room: idle ones, then busy ones, the least recently used first."""
        missing = needed.total - (self.limit - self.used)
        missing -= sum(each.n_bytes for each in self._models if each.unloading or each.unload_reason is not None)
        ready = [each for each in self._models if each.is_ready and each.entry is not None]
        for each in sorted(ready, key=lambda each: (each.n_running > 0, each.last_used)):
            if missing <= 0:
                return
            missing -= each.n_bytes
            self._unload(each, "memory")

    def _refused(self, model: ConfiguredModel, needed: MemoryEstimate, *, is_busy: bool) -> MemoryLimitExceeded:
        users = [(each.name, each.n_bytes) for each in self._models if each.n_bytes and each is not model]
        return not_enough_memory(model.name, needed, self.limit, users, is_busy)
