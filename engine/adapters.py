"""The adapters of one model: the set in effect, the requests that use each, and when one is freed.

Also the protocol of a backend that has adapters, an optional part of a backend. A request gets the set in effect
when it is submitted, or another one, and keeps it to its end. `Adapters` may be used from any thread, except `use`
and `free_unused`, which only the model thread calls. The backend also loads, uses and frees adapters in the model
thread alone; it checks files in any thread.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from erllama._runtime.log import logger
from erllama.checks import real
from erllama.engine.backend import Backend
from erllama.errors import AdapterUnloaded

log = logger("erllama.engine")

# libllama sums the parts of two adapters in the order of its arguments. It sums those of more adapters in an order
# that depends on where in memory they lie: then only the same loaded adapters produce the same bits.
_MAX_IN_ORDER = 2
_PROCESS = secrets.token_bytes(16)
_MAX_SCALE = float(np.finfo(np.float32).max)  # scales are 32-bit numbers
_numbers = count()


@runtime_checkable
class AdapterBackend(Protocol):
    """A backend that also has adapters. It chooses the type of its loaded adapters; the engine only passes them."""

    def check_adapter(self, path: Path) -> None:
        """Check by its header that a file is an adapter for this model. Called from any thread.

        Raises:
            AdapterLoadError: it is not, or cannot be read.
        """
        ...

    def load_adapter(self, path: Path) -> object:
        """Load a file that passed `check_adapter`. It has no effect until it is used.

        Raises:
            AdapterLoadError: it cannot be loaded.
        """
        ...

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        """Decode with these adapters, each with its scale, and no others. `clear` does not change the set.

        The KV of sequences stays as it is.

        Raises:
            BackendError: the set could not be changed; which set is used is then unknown.
        """
        ...

    def free_adapter(self, adapter: object) -> None:
        """Free an adapter that is not used. `close` frees the others."""
        ...


class LoadedAdapter:
    """One adapter in the backend's memory.

    Attributes:
        native: the backend's object.
        path: its file.
        digest: SHA-256 of the file, in hex.
        scale: the scale for requests submitted from now on, as its owner set it; changed by `Adapters` alone.
        number: unique in this process.
    """

    __slots__ = ("digest", "native", "number", "path", "scale")

    def __init__(self, native: object, path: Path, digest: str, scale: float) -> None:
        self.native, self.path, self.digest, self.scale = native, path, digest, scale
        self.number = next(_numbers)


class ActiveAdapter(NamedTuple):
    """An adapter in effect. Its scale, as a 32-bit number, is not 0."""

    adapter: LoadedAdapter
    scale: float


# Sorted by content, then by scale, independent of the order of loading. Empty for the plain model.
AdapterSet = tuple[ActiveAdapter, ...]


def check_scale(scale: object) -> float:
    """Return a scale as a number that libllama accepts. Raises OptionError for any other value."""
    return real("scale", scale, -_MAX_SCALE, _MAX_SCALE)


def adapter_set(adapters: Iterable[tuple[LoadedAdapter, float]]) -> AdapterSet:
    """Return the set of adapters with their scales, which are rounded to 32 bits. One of scale 0 has no effect."""
    rounded = [ActiveAdapter(adapter, float(np.float32(scale))) for adapter, scale in adapters]
    in_effect = [active for active in rounded if active.scale != 0]
    return tuple(sorted(in_effect, key=lambda a: (a.adapter.digest, a.scale, a.adapter.number)))


def describe(adapters: AdapterSet) -> str:
    """Return a set's contents and scales, as a part of the namespace of its KV."""
    return " ".join(f"{adapter.digest}:{scale!r}" for adapter, scale in adapters)


def derive_recipe(base: bytes, adapters: AdapterSet) -> bytes:
    """Return the recipe, 16 bytes, of KV computed with a set, from the backend's own recipe."""
    if len(adapters) <= _MAX_IN_ORDER:
        return base
    numbers = ",".join(str(adapter.number) for adapter, _ in adapters)
    return hashlib.sha256(base + _PROCESS + numbers.encode()).digest()[:16]


class Adapters:
    """The adapters of one model.

    Attributes:
        loaded: the adapters that are not unloaded, in the order of loading.
        current: the set that a request gets if it is submitted now.
        on_change: called with the new set when it changes, in any thread; None for no call. Must not raise.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.RLock()
        self._users: dict[object, AdapterSet] = {}  # the sets of requests that run or wait
        self._unused: list[LoadedAdapter] = []
        self._in_use: AdapterSet | None = ()  # None if unknown
        self._closed = False
        self.loaded: tuple[LoadedAdapter, ...] = ()
        self.current: AdapterSet = ()
        self.on_change: Callable[[AdapterSet], object] | None = None

    @property
    def unused(self) -> bool:
        """Whether there are adapters to free."""
        return bool(self._unused)

    # --- called by any thread

    def attach(self, native: object, path: Path, digest: str, scale: float) -> LoadedAdapter:
        """Use a newly loaded adapter for new requests. If the model has ended, it counts as unloaded."""
        adapter = LoadedAdapter(native, path, digest, scale)
        with self._lock:
            if not self._closed:
                self._change((*self.loaded, adapter))
        return adapter

    def detach(self, adapter: LoadedAdapter) -> None:
        """Stop using an adapter for new requests. It is freed once no request uses it. Idempotent."""
        with self._lock:
            if adapter in self.loaded:
                self._change(tuple(other for other in self.loaded if other is not adapter))
                self._free_if_unused(adapter)

    def set_scale(self, adapter: LoadedAdapter, scale: float) -> None:
        """Change the scale for new requests.

        Raises:
            AdapterUnloaded: the adapter is unloaded.
        """
        with self._lock:
            if adapter not in self.loaded:
                raise AdapterUnloaded(f"the adapter {adapter.path} is unloaded; load it again to use it")
            adapter.scale = scale
            self._change(self.loaded)

    def _change(self, loaded: tuple[LoadedAdapter, ...]) -> None:
        current = adapter_set((adapter, adapter.scale) for adapter in loaded)
        self.loaded, self.current = loaded, current
        if self.on_change is not None and not self._closed:
            self.on_change(current)

    # --- called for each request

    def acquire(self, user: object, adapters: AdapterSet | None = None) -> AdapterSet:
        """Return the set of a request that is submitted now. `user` identifies the request until its `release`.

        Args:
            adapters: the set, made by `adapter_set`; None for the one in effect.

        Raises:
            AdapterUnloaded: an adapter of the set is unloaded, and no request uses it.
        """
        if not (self.current if adapters is None else adapters):
            return ()
        with self._lock:
            if adapters is None:
                adapters = self.current
            else:
                self._check_not_freed(adapters)
            # In one step, so that `release` undoes it whenever the caller is interrupted.
            self._users[user] = adapters
            self._unused = [unused for unused in self._unused if not _has(adapters, unused)]
            return adapters

    def _check_not_freed(self, adapters: AdapterSet) -> None:
        """Raise AdapterUnloaded if an adapter of a set is no longer in the backend's memory, or is being freed."""
        for adapter, _ in adapters:
            used = any(_has(others, adapter) for others in self._users.values())
            if not used and adapter not in self.loaded and adapter not in self._unused:
                raise AdapterUnloaded(f"the adapter {adapter.path} is unloaded; load it again to use it")

    def release(self, user: object) -> None:
        """Release the set of a request that has ended, or was not submitted after all. Idempotent."""
        if user in self._users:
            with self._lock:
                for adapter, _ in self._users.pop(user, ()):
                    self._free_if_unused(adapter)

    def _free_if_unused(self, adapter: LoadedAdapter) -> None:
        used = any(_has(adapters, adapter) for adapters in self._users.values())
        if not used and adapter not in self.loaded and adapter not in self._unused and not self._closed:
            self._unused.append(adapter)

    # --- called by the model thread

    def use(self, adapters: AdapterSet) -> None:
        """Make the next decode use a set."""
        if adapters != self._in_use:
            self._in_use = None
            self._adapter_backend().use_adapters([(adapter.native, scale) for adapter, scale in adapters])
            self._in_use = adapters

    def free_unused(self) -> None:
        """Free the unloaded adapters that no request uses."""
        with self._lock:
            unused, self._unused = self._unused, []
        for adapter in unused:
            try:
                if self._in_use is None or _has(self._in_use, adapter):
                    self.use(())
                self._adapter_backend().free_adapter(adapter.native)
            except BaseException:
                log.exception("an unloaded adapter could not be freed; it stays until the model is unloaded")

    def close(self) -> None:
        """Unload all adapters when the model ends. The backend's `close` frees them."""
        with self._lock:
            self._closed = True
            self._unused = []
            self._change(())

    def _adapter_backend(self) -> AdapterBackend:
        assert isinstance(self._backend, AdapterBackend)
        return self._backend


def _has(adapters: AdapterSet, adapter: LoadedAdapter) -> bool:
    return any(adapter is other for other, _ in adapters)
