"""Pools of stub models whose sizes and loads a test controls."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import erllama
from erllama.engine.backends.memory_estimate import MemoryEstimate
from erllama.engine.backends.stub import StubBackend
from erllama.server.models import ConfiguredModel, ModelEntry, ModelPool


class StubPool:
    """A pool of stub models that are loaded on request; each takes 10 bytes unless it has the option `n_bytes`.

    Attributes:
        pool: the pool.
        n_loads: loads that began, by name.
        faults: errors of the next loads, by name.
        may_load: set unless loads are to wait.
    """

    def __init__(self, *entries: str | ModelEntry, memory_limit: int = 20, **options: object) -> None:
        self.cache = erllama.Cache()
        self.n_loads: Counter[str] = Counter()
        self.faults: dict[str, Exception] = {}
        self.may_load = threading.Event()
        self.may_load.set()
        self.pool = ModelPool(
            [stub_entry(each) if isinstance(each, str) else each for each in entries],
            cache=self.cache,
            load=self._load,
            estimate=lambda entry: MemoryEstimate(256, int(entry.options.get("n_bytes", 10)), 0, 0, 0),  # type: ignore[call-overload]
            memory_limit=memory_limit,
            **options,  # type: ignore[arg-type]
        )

    def _load(self, entry: ModelEntry, goes_on: Callable[[float], bool]) -> erllama.Model:
        self.n_loads[entry.id] += 1
        while not self.may_load.wait(0.01):
            if not goes_on(0.5):
                raise erllama.LoadCancelled("cancelled")
        if entry.id in self.faults:
            raise self.faults.pop(entry.id)
        return erllama.load_backend(StubBackend(), id=entry.id, cache=self.cache)

    def __getitem__(self, name: str) -> ConfiguredModel:
        return next(each for each in self.pool.models if each.name == name)

    def states(self) -> dict[str, str]:
        return {each.name: each.state for each in self.pool.models}

    def unloads(self) -> dict[tuple[str, str], int]:
        return dict(self.pool.lifecycle.unloads)

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        """Run a test in an event loop, and unload all models at its end."""
        try:
            asyncio.run(_within_time(test))
        finally:
            self.pool.cancel_loads()
            self.pool.close()
            self.cache.close()

    async def use(self, name: str, **options: float) -> erllama.Model:
        return (await self.pool.use(self[name], **options)).model

    async def touch(self, name: str) -> None:
        """Use a model and release it."""
        await self.use(name)
        self.pool.release(self[name])

    async def until(self, is_done: Callable[[], bool]) -> None:
        """Wait until something holds. The event loop goes on."""
        while not is_done():
            await asyncio.sleep(0.005)


async def _within_time(test: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(120):
        await test()


def stub_entry(name: str, aliases: Sequence[str] = (), load: str = "request", **options: object) -> ModelEntry:
    keep_alive = options.pop("keep_alive", None)
    return ModelEntry(
        path=Path(f"{name}.gguf"),
        aliases=tuple(aliases),
        load=load,  # type: ignore[arg-type]
        keep_alive=keep_alive,  # type: ignore[arg-type]
        options=options,
    )
