"""The models of a server by the names that clients use: `ModelPool`."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from erllama._model.load import load_model
from erllama._model.model import Model
from erllama.cache import Cache
from erllama.cache.pressure.pressure import Pressure, PressureWatch
from erllama.errors import Error, OptionError
from erllama.server.conduct.durations import FOREVER
from erllama.server.conduct.errors import ApiError
from erllama.server.models.configured import ConfiguredModel
from erllama.server.models.description import (
    ModelDescription,
    describe_file,
    describe_loaded,
    no_description,
)
from erllama.server.models.entry import ModelEntry
from erllama.server.models.lifecycle import Estimator, Lifecycle, Loader
from erllama.server.models.memory import default_memory_limit, needed_memory
from erllama.server.models.served import ServedModel

log = logging.getLogger("erllama.server")

_PRESSURE_INTERVAL = 5.0  # seconds between readings of memory


class Changes(NamedTuple):
    """What `ModelPool.reconfigure` changed: names of models."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


class ModelPool:
    """The models of a server, loaded or not.

    Args:
        models: loaded models, which the server never unloads, and entries, which it loads and unloads.
        cache: of the models that it loads; None for that of the first loaded model.
        load: loads the model of an entry; None for `load_model`.
        estimate: returns the memory that the model of an entry needs; None for `needed_memory`.
        keep_alive: seconds after its last request until a model is unloaded, where its entry has no own.
        memory_limit: bytes for all models that it loads, by their estimates; None for nine tenths of what is
            available now.
        memory_wait: seconds for which a request waits until models in use make room for its model.
        memory_pressure: used fraction of the machine's memory, or of a cgroup's limit, from which idle models are
            unloaded, the least recently used first; 1.0 for never.

    Attributes:
        models: the models, in the order of the configuration.
        lifecycle: loads and unloads them.

    Raises:
        OptionError: there is no model, or two have the same name or alias.
    """

    def __init__(
        self,
        models: Iterable[ServedModel | ModelEntry],
        *,
        cache: Cache | None = None,
        load: Loader | None = None,
        estimate: Estimator | None = None,
        keep_alive: float = FOREVER,
        memory_limit: int | None = None,
        memory_wait: float = 30.0,
        memory_pressure: float = 1.0,
    ) -> None:
        given = list(models)
        has_entries = any(isinstance(each, ModelEntry) for each in given)
        if has_entries and memory_limit is None:
            memory_limit = default_memory_limit()
        self._keep_alive, self._memory_pressure = keep_alive, memory_pressure
        self._given_cache = cache
        estimate = estimate or partial(needed_memory, limit=memory_limit)
        self.lifecycle = Lifecycle(load or self._load, estimate, memory_limit or 0, memory_wait)
        self.models: Sequence[ConfiguredModel] = ()
        self._by_name: dict[str, ConfiguredModel] = {}
        self._descriptions: dict[str, tuple[object, ModelDescription]] = {}
        self._describing = threading.Lock()
        self._watch: PressureWatch | None = None
        self._set([self._configured(each) for each in given])

    def _configured(self, given: ServedModel | ModelEntry) -> ConfiguredModel:
        if isinstance(given, ModelEntry):
            return ConfiguredModel(given, None, self._keep_alive)
        return ConfiguredModel(None, given)

    def _set(self, models: Sequence[ConfiguredModel]) -> None:
        """Serve these models."""
        by_name = _by_name(models)
        self.models, self._by_name = tuple(models), by_name
        self.lifecycle.known += [each for each in models if each not in self.lifecycle.known]

    @property
    def cache(self) -> Cache:
        """The cache of the server's models."""
        if self._given_cache is not None:
            return self._given_cache
        return next(each.served.model.cache for each in self.models if each.served is not None)

    def _load(self, entry: ModelEntry, on_progress: Callable[[float], bool]) -> Model:
        return load_entry(entry, self._given_cache, on_progress)

    # --- names ---------------------------------------------------------------------------------

    def find(self, name: str | None, allowed: Sequence[ConfiguredModel]) -> ConfiguredModel:
        """Return the model of a name; for None or "", the first that the client may use.

        Args:
            allowed: the models that the client may use. An error names only these.

        Raises:
            ApiError: no model has the name.
        """
        if not name and allowed:
            return allowed[0]
        name = name or "for this key"
        # Ollama's clients add a tag.
        found = self._by_name.get(name) or self._by_name.get(name.removesuffix(":latest"))
        if found is None and (other := self._by_name.get("*")) in allowed:
            found = other
        if found is None:
            known = ", ".join(each.name for each in allowed) or "none for this key"
            raise ApiError(
                "not_found", f"there is no model {name!r}; this server has {known}", "model_not_found", "model"
            )
        return found

    def loaded(self) -> list[ServedModel]:
        """Return the models that are loaded now."""
        return [each.served for each in self.models if each.served is not None]

    # --- use -----------------------------------------------------------------------------------

    async def use(self, model: ConfiguredModel, keep_alive: float | None = None) -> ServedModel:
        """Return a model, loaded if need be, and hold it until `release`; as `Lifecycle.use`."""
        return await self.lifecycle.use(model, keep_alive)

    def release(self, model: ConfiguredModel) -> None:
        """End the hold of one request."""
        self.lifecycle.release(model)

    def unload(self, model: ConfiguredModel) -> None:
        """Unload a model once the requests that use it have ended. The next request loads it again.

        Raises:
            ApiError: the model was loaded before it was passed to the server.
        """
        if model.entry is None:
            raise ApiError(
                "invalid_request",
                f"{model.name!r} was not loaded by the server, so the server does not unload it",
                "model_not_managed",
                "model",
            )
        self.lifecycle.unload_when_idle(model, "request")

    async def describe(self, model: ConfiguredModel) -> ModelDescription:
        """Return what the APIs say about a model. Reads the header of the file of one that is not loaded."""
        if model.served is not None:
            return describe_loaded(model.served)
        assert model.entry is not None
        return await asyncio.to_thread(self._describe_file, model.entry)

    async def describe_all(
        self, models: Iterable[ConfiguredModel]
    ) -> list[tuple[ConfiguredModel, ModelDescription]]:
        """Return models with their descriptions."""
        return [(each, await self.describe(each)) for each in models]

    def _describe_file(self, entry: ModelEntry) -> ModelDescription:
        """Return the description of a file, which is read again when it was changed."""
        version: object = None
        with self._describing:  # several lists at once read a file once
            try:
                status = entry.path.stat()
                version = (entry.path, status.st_mtime_ns, status.st_size, dict(entry.options))
                known = self._descriptions.get(entry.id)
                if known is not None and known[0] == version:
                    return known[1]
                found = describe_file(entry)
            except (Error, OSError) as error:
                log.warning("%s cannot be described: %s", entry.id, error)
                found = no_description(entry)
            self._descriptions[entry.id] = version, found
            return found

    # --- configuration -------------------------------------------------------------------------

    def reconfigure(self, entries: Iterable[ModelEntry]) -> Changes:
        """Serve other models from now on. Call it in the event loop.

        A model whose file and options are the same stays loaded, and running requests are not affected. One that
        is removed, or has another file or options, is unloaded once the requests that use it or wait for it have
        ended.
        New ones are loaded in the background if they are to be loaded at the start.

        Raises:
            OptionError: there is no model, or two have the same name or alias. Nothing has changed then.
        """
        before = {each.name: each for each in self.models}
        models = [each for each in self.models if each.entry is None]
        new: list[ConfiguredModel] = []
        adopted: list[tuple[ConfiguredModel, ModelEntry]] = []
        for entry in entries:
            old = before.get(entry.id)
            if old is not None and old.entry is not None and old.entry.is_same_load(entry):
                adopted.append((old, entry))
                models.append(old)
            else:
                new.append(self._configured(entry))
                models.append(new[-1])
        aliases = {id(old): entry.aliases for old, entry in adopted}
        _by_name(models, aliases)  # raises OptionError
        left = [each for each in self.models if each not in models]
        to_load = [each for each in new if each.entry is not None and each.entry.load == "start"]
        for old, entry in adopted:
            assert old.entry is not None
            if old.entry.load != "start" == entry.load:
                to_load.append(old)
            old.adopt(entry, self._keep_alive)
        for old in left:
            self.lifecycle.leave(old)
        for each in new:
            latest = reversed(self.lifecycle.known)  # an earlier one may be in use still
            each.predecessor = next((old for old in latest if old.name == each.name), None)
        self._set(models)
        for each in to_load:
            self.lifecycle.start_load(each)
        self.lifecycle.start()  # keep_alive may have changed
        names, left_names = {each.name for each in models}, {each.name for each in left}
        return Changes(
            tuple(each.name for each in new if each.name not in left_names),
            tuple(each.name for each in left if each.name not in names),
            tuple(each.name for each in new if each.name in left_names),
        )

    # --- start and end -------------------------------------------------------------------------

    def load_at_start(self) -> None:
        """Load the models that are to be loaded before the server starts. Call it before the event loop runs.

        Raises:
            MemoryLimitExceeded: they do not fit the memory.
            Error: a model cannot be loaded.
        """
        self.lifecycle.load_at_start()

    def start(self) -> None:
        """Start the timers of loaded models, and the watch of the machine's memory. Call it in the event loop."""
        self.lifecycle.start()
        if self._memory_pressure >= 1.0 or all(each.entry is None for each in self.models):
            return
        loop = asyncio.get_running_loop()

        def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.lifecycle.unload_least_recent)
            return 0

        mark = self._memory_pressure
        options = Pressure(interval=_PRESSURE_INTERVAL, high_watermark=mark, low_watermark=mark)
        self._watch = PressureWatch(options, evict)
        self._watch.start()

    def cancel_loads(self) -> None:
        """Let loads in progress end with an error, so that the server can stop."""
        self.lifecycle.cancel_loads()

    def close(self) -> None:
        """Unload the models that the server has loaded. Call it after the event loop has ended. Idempotent."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self.lifecycle.close()


def load_entry(entry: ModelEntry, cache: Cache | None, on_progress: Callable[[float], bool]) -> Model:
    """Load the model of an entry with its options; as `load_model`, without the check of the free memory.

    The server's memory limit decides whether a model fits.
    """
    options: Any = {"check_memory": False, **entry.options}
    return load_model(entry.path, id=entry.id, cache=cache, on_progress=on_progress, **options)


def _by_name(
    models: Sequence[ConfiguredModel], aliases: Mapping[int, tuple[str, ...]] | None = None
) -> dict[str, ConfiguredModel]:
    """Return models by their names and aliases. A single model without an alias answers under any name.

    Args:
        aliases: by id() of a model, in the place of its own.

    Raises:
        OptionError: there is no model, or two have the same name or alias.
    """
    if not models:
        raise OptionError("a server needs at least one model")
    found: dict[str, ConfiguredModel] = {}
    for model in models:
        own = (aliases or {}).get(id(model), model.aliases)
        names = (model.name, *own) if own or len(models) > 1 else (model.name, "*")
        for name in names:
            if found.setdefault(name, model) is not model:
                raise OptionError(f"two models have the name {name!r}; give one another name")
    return found
