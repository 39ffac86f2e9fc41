"""What all native contexts have in common: how long they live, and how a computation is stopped."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import LlamaError, lib


class NativeContext:
    """A context of libllama's, whose calls are made under one lock.

    Args:
        pointer: the native context.
        model: held for as long as it lives.
        adapters: likewise, those that are in it when it is freed.
    """

    def __init__(self, pointer: object, model: Handle, adapters: Sequence[Handle] = ()) -> None:
        self._lock = threading.RLock()
        self._handle = Handle(pointer, _freeing(model, adapters), "context")
        # Not at interpreter exit: a thread may be inside a decode then, and the system frees everything anyway.
        finalizer = weakref.finalize(self, _let_go, self._handle, self._lock)
        finalizer.atexit = False
        self._finalizer: Callable[[], object] = finalizer
        self._open = True

    @property
    def closed(self) -> bool:
        return not self._open

    def close(self) -> None:
        """Stop a computation that is running and let go. Idempotent."""
        if self._open:
            self.abort()
        self._open = False
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def abort(self, on: bool = True) -> None:
        """Make the running computation, and later ones, stop early; `abort(False)` allows them again.

        Safe from any thread. libllama honours it between operations on the CPU.
        """
        # Without the lock, which a decode holds, so the context is held against a close in another thread.
        with suppress(LlamaError), self._handle.held() as native:
            lib.erl_context_abort(native, on)

    def _native(self) -> object:
        if not self._open:
            raise LlamaError("this context is closed")
        return self._handle.pointer


def _freeing(model: Handle, adapters: Sequence[Handle]) -> Callable[[object], None]:
    """What frees a native context, and then lets go of the adapters that it has by then, and of its model."""

    def free(pointer: object) -> None:
        lib.erl_context_free(pointer)
        for adapter in adapters:
            adapter.release()
        model.release()

    return free


def _let_go(handle: Handle, lock: threading.RLock) -> None:
    with lock:  # a computation in another thread ends first
        handle.release()
