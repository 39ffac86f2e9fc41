"""Loads models when requests need them, and unloads them: `Lifecycle`.

A request holds a model from `use` to `release`, and a held model stays loaded. Loads and unloads run in threads,
one task for each, and go on if the clients that wait for them leave. Models together stay within the memory limit,
by their estimates: idle models make room for others, the least recently used first. If that is not enough, busy
ones take no further requests until they have finished and made room. So no model waits forever.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable

from erllama._model.model import Model
from erllama.engine.backends.memory_estimate import MemoryEstimate
from erllama.errors import Error, MemoryLimitExceeded, ModelUnloaded
from erllama.server.conduct.durations import FOREVER
from erllama.server.conduct.errors import ApiError, as_api_error
from erllama.server.models.configured import ConfiguredModel, UnloadReason, serve
from erllama.server.models.entry import ModelEntry
from erllama.server.models.memory import fitted
from erllama.server.models.room import NotAwaitedError, Room
from erllama.server.models.served import ServedModel

log = logging.getLogger("erllama.server")

# Loads the model of an entry. Calls the function with the loaded fraction, and cancels if that returns False.
Loader = Callable[[ModelEntry, Callable[[float], bool]], Model]
Estimator = Callable[[ModelEntry], MemoryEstimate]

# Counts of an engine that `GET /metrics` adds up over all models.
_ENGINE_COUNTS = ("ticks", "decoded_tokens", "drafted_tokens", "accepted_tokens", "drafts")


class Lifecycle:
    """Loads and unloads the models of one server. Used by its event loop, except for `load_at_start` and `close`.

    Args:
        load: loads the model of an entry, in a thread.
        estimate: returns the memory that the model of an entry needs, in a thread, before it is loaded.
        memory_limit: bytes for all models.
        memory_wait: seconds for which a load waits until other models make room.

    Attributes:
        room: the memory of all models.
        known: all models, with those that leave the configuration while requests use them.
        loads, load_failures: how many there were, by name of the model.
        unloads: by name and reason.
        ended_counts: counts of the engines of models that were unloaded.
        on_loaded: called with each model that was loaded.
    """

    def __init__(self, load: Loader, estimate: Estimator, memory_limit: int, memory_wait: float) -> None:
        self.known: list[ConfiguredModel] = []
        self.room = Room(self.known, memory_limit, memory_wait, self.unload_when_idle, self.keep_loaded)
        self.loads: Counter[str] = Counter()
        self.load_failures: Counter[str] = Counter()
        self.unloads: Counter[tuple[str, UnloadReason]] = Counter()
        self.ended_counts: Counter[str] = Counter()
        self.on_loaded: Callable[[ServedModel], None] = lambda served: None
        self._load_entry, self._estimate = load, estimate
        # What `close` unloads. A load that nobody awaits any more may end after the event loop.
        self._alive: set[Model] = set()
        self._closing = False
        self._closing_lock = threading.Lock()

    # --- requests ------------------------------------------------------------------------------

    async def use(self, model: ConfiguredModel, keep_alive: float | None = None) -> ServedModel:
        """Return a model, loaded if need be, and hold it until `release`.

        Args:
            keep_alive: seconds after its last request until it is unloaded, from now on; None to leave that.

        Raises:
            ApiError: the model cannot be loaded, or does not fit the memory.
        """
        if model.is_ready and _has_failed(model):
            self.unload_when_idle(model, "failed")
        if model.is_ready:
            model.n_running += 1
        else:
            await self._wait_for(model)
        assert model.served is not None
        self._stop_timer(model)
        model.last_used = time.monotonic()
        if keep_alive is not None:
            model.requested_keep_alive = keep_alive
        return model.served

    def release(self, model: ConfiguredModel) -> None:
        """End the hold of one request."""
        model.n_running -= 1
        model.last_used = time.monotonic()
        self._settle(model)

    async def _wait_for(self, model: ConfiguredModel) -> None:
        """Wait until a model is loaded and held for the caller."""
        waiter = asyncio.get_running_loop().create_future()
        model.waiters.append(waiter)
        self.start_load(model)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(model)  # it was held at the same moment
            raise
        finally:
            if waiter in model.waiters:
                model.waiters.remove(waiter)
                self.room.changed.notify()

    def _admit_waiters(self, model: ConfiguredModel) -> None:
        """Hold a loaded model for the requests that wait for it."""
        for waiter in model.waiters:
            if not waiter.done():
                model.n_running += 1
                waiter.set_result(None)
        model.waiters.clear()

    def _settle(self, model: ConfiguredModel) -> None:
        """Unload a model that no request uses any more, if it is to be unloaded, or start its timer."""
        self._stop_timer(model)
        self.room.changed.notify()
        if model.entry is None or model.served is None or model.n_running:
            return
        if model.unload_reason is not None:
            self._start_unload(model, model.unload_reason)
        elif model.keep_alive == 0:
            self._start_unload(model, "keep_alive")
        elif model.keep_alive < FOREVER:
            now = time.monotonic()
            model.expires = max(model.last_used + model.keep_alive, now)
            loop = asyncio.get_running_loop()
            model.timer = loop.call_later(model.expires - now, self.unload_when_idle, model, "keep_alive")

    @staticmethod
    def _stop_timer(model: ConfiguredModel) -> None:
        if model.timer is not None:
            model.timer.cancel()
        model.timer = model.expires = None

    # --- loading -------------------------------------------------------------------------------

    def load_at_start(self) -> None:
        """Load the models that are to be loaded before the server starts. Call it before the event loop runs.

        Raises:
            MemoryLimitExceeded: they do not fit the memory.
            Error: a model cannot be loaded.
        """
        for model in self.known:
            if model.entry is not None and model.entry.load == "start":
                needed = self._estimate(model.entry)
                self.room.take(model, needed)
                self._add_loaded(model, self._load_now(model, needed))

    def start(self) -> None:
        """Start the timers of the models that are loaded. Call it in the event loop."""
        for model in self.known:
            self._settle(model)

    def start_load(self, model: ConfiguredModel) -> None:
        """Load a model in the background, unless it is loaded, or is being loaded or unloaded."""
        if model.state == "unloaded":
            loading = self._load(model, is_awaited=bool(model.waiters))
            model.loading = asyncio.get_running_loop().create_task(loading)

    async def _load(self, model: ConfiguredModel, *, is_awaited: bool) -> None:
        """Load a model, unless the requests that wait for it leave before there is room."""
        entry, began = model.entry, time.monotonic()
        assert entry is not None
        try:
            await self._end_predecessor(model, is_awaited=is_awaited)
            needed = await asyncio.to_thread(self._estimate, entry)
            await self.room.make(model, needed, is_awaited=is_awaited)
            try:
                loaded = await asyncio.to_thread(self._load_now, model, needed)
            except BaseException:
                model.n_bytes = 0
                raise
        except NotAwaitedError:
            self._end_load(model)
            return
        except Exception as error:
            self._fail(model, error)
            return
        model.loading = None
        self._add_loaded(model, loaded)
        log.info("%s is loaded, in %.1f s", model.name, time.monotonic() - began)
        self._admit_waiters(model)
        self._settle(model)

    async def _end_predecessor(self, model: ConfiguredModel, *, is_awaited: bool) -> None:
        """Wait until the model that had the same name before is unloaded."""
        while model.predecessor is not None:
            if model.predecessor not in self.known:
                model.predecessor = None
            else:
                await self.room.changed.wait()
                if is_awaited and not model.waiters:
                    raise NotAwaitedError

    def _load_now(self, model: ConfiguredModel, needed: MemoryEstimate) -> Model:
        """Load a model with the context that its memory was estimated for, in a thread."""

        def goes_on(fraction: float) -> bool:
            model.progress = fraction
            return not self._closing

        entry = model.entry
        assert entry is not None
        model.progress = 0.0
        loaded = self._load_entry(fitted(entry, needed), goes_on)
        with self._closing_lock:
            self._alive.add(loaded)
            if not self._closing:
                return loaded
        loaded.unload()
        raise ModelUnloaded(f"the server stops, and does not load {entry.id!r}")

    def _add_loaded(self, model: ConfiguredModel, loaded: Model) -> None:
        assert model.entry is not None
        model.served = serve(model.entry, ServedModel(loaded))
        model.error, model.last_used = "", time.monotonic()
        self.loads[model.name] += 1
        self.on_loaded(model.served)

    def _fail(self, model: ConfiguredModel, error: Exception) -> None:
        """Answer the requests that wait for a model that cannot be loaded. The next request tries again."""
        model.error = _reason(model, error)
        self.load_failures[model.name] += 1
        level = logging.WARNING if isinstance(error, MemoryLimitExceeded) else logging.ERROR
        log.log(
            level, "%s cannot be loaded: %s", model.name, error, exc_info=not isinstance(error, Error | OSError)
        )
        waiters, model.waiters = model.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(_answer(model, error))
        self._end_load(model)

    def _end_load(self, model: ConfiguredModel) -> None:
        """Note that a load has ended without a loaded model."""
        model.loading = None
        self._note_unloaded(model)

    # --- unloading -----------------------------------------------------------------------------

    def unload_when_idle(self, model: ConfiguredModel, reason: UnloadReason) -> None:
        """Unload a model once no request uses it. Until then, further requests for it wait.

        Requests that have waited for it load it again. One that is being loaded serves the requests that wait for
        it first. No effect on one that is not loaded.
        """
        if model.entry is None or model.state not in ("loaded", "loading"):
            return
        model.unload_reason = reason
        self._settle(model)

    def unload_least_recent(self) -> None:
        """Unload the idle model that was used least recently, if there is one. For times when memory runs short."""
        idle = [each for each in self.known if each.is_ready and each.entry is not None and not each.n_running]
        if idle:
            self.unload_when_idle(min(idle, key=lambda each: each.last_used), "pressure")

    def keep_loaded(self, model: ConfiguredModel) -> None:
        """Undo `unload_when_idle` for a model that is still in use."""
        model.unload_reason = None
        if model.served is not None:
            self._admit_waiters(model)
            self._settle(model)

    def _start_unload(self, model: ConfiguredModel, reason: UnloadReason) -> None:
        served, model.served = model.served, None
        assert served is not None
        unloading = self._unload(model, served, reason)
        model.unloading = asyncio.get_running_loop().create_task(unloading)

    async def _unload(self, model: ConfiguredModel, served: ServedModel, reason: UnloadReason) -> None:
        metrics = served.model.metrics
        self.ended_counts.update({name: getattr(metrics, name) for name in _ENGINE_COUNTS})
        try:
            await asyncio.to_thread(served.model.unload)
        except Exception:
            log.exception("%s failed to unload", model.name)
        self._alive.discard(served.model)
        self.unloads[model.name, reason] += 1
        log.info("%s is unloaded: %s", model.name, reason)
        model.unloading = model.requested_keep_alive = None
        self._note_unloaded(model)

    def _note_unloaded(self, model: ConfiguredModel) -> None:
        """Free the memory of a model that is not loaded, and load it again if requests wait for it.

        One that is no longer configured is forgotten.
        """
        model.n_bytes, model.progress = 0, 0.0
        if model.unload_reason != "configuration":
            model.unload_reason = None
        if model.waiters:
            self.start_load(model)
        elif model.unload_reason == "configuration" and model in self.known:
            self.known.remove(model)
        self.room.changed.notify()

    def leave(self, model: ConfiguredModel) -> None:
        """Unload a model that is no longer configured, once the requests that use it or wait for it have ended."""
        self.unload_when_idle(model, "configuration")
        if model.state == "unloaded":
            self.known.remove(model)
        model.unload_reason = "configuration"

    def close(self) -> None:
        """Unload all models, and cancel loads. Call it after the event loop has ended. Idempotent."""
        with self._closing_lock:
            self._closing = True
        for loaded in list(self._alive):
            loaded.unload()
            self._alive.discard(loaded)

    def cancel_loads(self) -> None:
        """Let the loads in progress end with an error, so that the server can stop."""
        self._closing = True


def _has_failed(model: ConfiguredModel) -> bool:
    """Return whether a loaded model cannot compute any more, such as one whose process ended too often."""
    if model.entry is None or model.served is None:
        return False
    try:
        model.served.model._runner.check()
    except Error:
        return True
    return False


def _answer(model: ConfiguredModel, error: Exception) -> ApiError:
    """Return the answer for a request whose model cannot be loaded."""
    if isinstance(error, MemoryLimitExceeded) or not isinstance(error, Error | OSError):
        return as_api_error(error)
    reason = _reason(model, error)
    return ApiError("internal", f"the model {model.name!r} cannot be loaded: {reason}", "model_load_failed")


def _reason(model: ConfiguredModel, error: Exception) -> str:
    """Return why a model cannot be loaded, without the directories of its file."""
    if not isinstance(error, Error | OSError):
        return "the server failed unexpectedly; its log has the cause"
    assert model.entry is not None
    directory = f"{model.entry.path.parent}/"  # of its other parts, too
    return str(error).replace(directory, "")
