"""The adapters of one model: which of them are in effect, which requests use which, and when one may be freed.

Also what is asked of a backend that has adapters: an optional part of one. A
request takes the set that is in effect when it is submitted, and keeps it to
its end. `Adapters` may be used from any thread, `use` and `free_unused` apart,
which are the model thread's, as all is that the backend does with adapters but
to check them.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from erllama._runtime.log import logger
from erllama.checks import real
from erllama.engine.backend import Backend
from erllama.errors import AdapterUnloaded

log = logger("erllama.engine")

# libllama sums the parts of two adapters in the order given, and those of more in one that depends on where in
# memory they lie: there, the same bits come only of the same loaded ones.
_MOST_IN_ORDER = 2
_PROCESS = secrets.token_bytes(16)
_MOST_SCALE = float(np.finfo(np.float32).max)  # scales are 32-bit numbers
_numbers = count()


@runtime_checkable
class AdapterBackend(Protocol):
    """A backend that has adapters, too. What it loads is its own affair: an object that it gets back."""

    def check_adapter(self, path: Path) -> None:
        """Whether a file is an adapter for this model, by its header; from any thread.

        Raises:
            AdapterLoadError: it is not, or cannot be read.
        """
        ...

    def load_adapter(self, path: Path) -> object:
        """Load a file that was found good; without effect until it is used.

        Raises:
            AdapterLoadError: it cannot be loaded after all.
        """
        ...

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        """Decode with these, each by its scale, and no others; `clear` does not change that.

        What sequences hold stays as it is.

        Raises:
            BackendError: it cannot be done; which are used is unknown then.
        """
        ...

    def free_adapter(self, adapter: object) -> None:
        """Free one that is not used; those that are left are freed by `close`."""
        ...


class LoadedAdapter:
    """One adapter in the backend's memory.

    Attributes:
        native: the backend's object.
        path: of its file.
        digest: SHA-256 of that, in hex.
        scale: of requests that are submitted now, as its owner gave it; changed by `Adapters` alone.
        number: no other in this process has it.
    """

    __slots__ = ("digest", "native", "number", "path", "scale")

    def __init__(self, native: object, path: Path, digest: str, scale: float) -> None:
        self.native, self.path, self.digest, self.scale = native, path, digest, scale
        self.number = next(_numbers)


class Attached(NamedTuple):
    """An adapter in effect; its scale, as a 32-bit number, is not 0."""

    adapter: LoadedAdapter
    scale: float


# In one order, whatever that of loading: by content, then by scale. Empty for the model as it is.
AdapterSet = tuple[Attached, ...]


def checked_scale(scale: object) -> float:
    """A scale as a number that libllama can take, or OptionError."""
    return real("scale", scale, -_MOST_SCALE, _MOST_SCALE)


def named(adapters: AdapterSet) -> str:
    """What a namespace says of a set: contents and scales."""
    return " ".join(f"{adapter.digest}:{scale!r}" for adapter, scale in adapters)


def recipe(base: bytes, adapters: AdapterSet) -> bytes:
    """A backend's recipe, 16 bytes, for what is computed with a set."""
    if len(adapters) <= _MOST_IN_ORDER:
        return base
    numbers = ",".join(str(adapter.number) for adapter, _ in adapters)
    return hashlib.sha256(base + _PROCESS + numbers.encode()).digest()[:16]


class Adapters:
    """The adapters of one model.

    Attributes:
        loaded: those that are not unloaded, in the order of loading.
        current: the set that requests get which are submitted now.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.RLock()
        self._users: dict[object, AdapterSet] = {}  # of requests that run or wait
        self._unused: list[LoadedAdapter] = []
        self._in_use: AdapterSet | None = ()  # None where nobody knows
        self._closed = False
        self.loaded: tuple[LoadedAdapter, ...] = ()
        self.current: AdapterSet = ()

    @property
    def unused(self) -> bool:
        """Whether there are some to be freed."""
        return bool(self._unused)

    # --- what callers do

    def attach(self, native: object, path: Path, digest: str, scale: float) -> LoadedAdapter:
        """Put one into effect that the backend has just loaded; where the model has ended, it is as unloaded."""
        adapter = LoadedAdapter(native, path, digest, scale)
        with self._lock:
            if not self._closed:
                self._change((*self.loaded, adapter))
        return adapter

    def detach(self, adapter: LoadedAdapter) -> None:
        """Let requests to come do without it. It is freed once none uses it. Idempotent."""
        with self._lock:
            if adapter in self.loaded:
                self._change(tuple(other for other in self.loaded if other is not adapter))
                self._free_if_unused(adapter)

    def set_scale(self, adapter: LoadedAdapter, scale: float) -> None:
        """For requests to come.

        Raises:
            AdapterUnloaded: it is.
        """
        with self._lock:
            if adapter not in self.loaded:
                raise AdapterUnloaded(f"the adapter {adapter.path} is unloaded; load it again to use it")
            adapter.scale = scale
            self._change(self.loaded)

    def _change(self, loaded: tuple[LoadedAdapter, ...]) -> None:
        rounded = [Attached(adapter, float(np.float32(adapter.scale))) for adapter in loaded]
        in_effect = [attached for attached in rounded if attached.scale != 0]
        self.loaded = loaded
        self.current = tuple(sorted(in_effect, key=lambda a: (a.adapter.digest, a.scale, a.adapter.number)))

    # --- what requests do

    def enter(self, user: object) -> AdapterSet:
        """Return the set of a request that is submitted now, which `user` stands for until its `leave`."""
        if not self.current:
            return ()
        with self._lock:
            # In one step, so that whatever interrupts the caller, `leave` undoes it.
            adapters = self._users[user] = self.current
            return adapters

    def leave(self, user: object) -> None:
        """A request has ended, or was not submitted after all. Idempotent."""
        if user in self._users:
            with self._lock:
                for adapter, _ in self._users.pop(user, ()):
                    self._free_if_unused(adapter)

    def _free_if_unused(self, adapter: LoadedAdapter) -> None:
        used = any(adapter is other for adapters in self._users.values() for other, _ in adapters)
        if not used and adapter not in self.loaded and adapter not in self._unused and not self._closed:
            self._unused.append(adapter)

    # --- what the model thread does

    def use(self, adapters: AdapterSet) -> None:
        """See to it that the next decode computes with a set."""
        if adapters != self._in_use:
            self._in_use = None
            self._with_adapters().use_adapters([(adapter.native, scale) for adapter, scale in adapters])
            self._in_use = adapters

    def free_unused(self) -> None:
        """Free those that are unloaded, and that no request uses any more."""
        with self._lock:
            unused, self._unused = self._unused, []
        for adapter in unused:
            try:
                if self._in_use is None or any(used is adapter for used, _ in self._in_use):
                    self.use(())
                self._with_adapters().free_adapter(adapter.native)
            except BaseException:
                log.exception("an unloaded adapter could not be freed; it stays until the model is unloaded")

    def close(self) -> None:
        """The model ends: all are unloaded, and freed by the backend's own end."""
        with self._lock:
            self._closed = True
            self._unused = []
            self._change(())

    def _with_adapters(self) -> AdapterBackend:
        assert isinstance(self._backend, AdapterBackend)
        return self._backend
