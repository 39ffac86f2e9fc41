"""The base of all native contexts: their lifetime, and how to stop a computation."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Self

from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import LlamaError, check, ffi, lib


class Times(NamedTuple):
    """Seconds of a computation, and seconds of CPU time of the thread that called it."""

    elapsed: float
    cpu: float


class NativeContext:
    """A context of libllama. One lock guards its calls.

    Args:
        pointer: the native context.
        model: a hold on the model, released when the context is freed.
        adapters: holds on the adapters in use, released when the context is freed.
    """

    def __init__(self, pointer: object, model: Handle, adapters: Sequence[Handle] = ()) -> None:
        self._lock = threading.RLock()
        self._handle = Handle(pointer, _make_free(model, adapters), "context")
        # Not at interpreter exit: a thread may be inside a decode then, and the system frees the memory anyway.
        finalizer = weakref.finalize(self, _release, self._handle, self._lock)
        finalizer.atexit = False
        self._finalizer: Callable[[], object] = finalizer
        self._open = True
        self._computed = ffi.new("erl_computed *")  # the results of the last computation

    @property
    def closed(self) -> bool:
        return not self._open

    def close(self) -> None:
        """Stop a running computation and release the context. Idempotent."""
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

        Thread-safe. libllama checks for it between operations on the CPU.
        """
        # Without the lock, which a running decode has. The hold protects against a close in another thread.
        with suppress(LlamaError), self._handle.use() as native:
            lib.erl_context_abort(native, on)

    def set_threads(self, n_threads: int) -> None:
        """Set the number of threads of later computations.

        Args:
            n_threads: 1 to the greater one of the context's n_threads and n_threads_batch.

        Raises:
            LlamaError: the number is out of range.
        """
        with self._lock:
            check(lib.erl_context_threads(self._native(), n_threads), "setting the number of threads")

    def times(self) -> Times:
        """Return the times of the last computation, which did not fail."""
        return Times(self._computed.elapsed_ns / 1e9, self._computed.cpu_ns / 1e9)

    def _native(self) -> object:
        if not self._open:
            raise LlamaError("this context is closed")
        return self._handle.pointer


def _make_free(model: Handle, adapters: Sequence[Handle]) -> Callable[[object], None]:
    """Return a function that frees a native context, then releases its current adapters and its model."""

    def free(pointer: object) -> None:
        lib.erl_context_free(pointer)
        for adapter in adapters:
            adapter.release()
        model.release()

    return free


def _release(handle: Handle, lock: threading.RLock) -> None:
    with lock:  # a computation in another thread ends first
        handle.release()
