"""Reference-counted native objects.

A `Handle` owns one native object and frees it when its last holder releases it, in any order: a model that is
closed while a context uses it lives until the context is closed, and a context lives until the last view of its
logits is deleted. After a fork, the child frees no native object.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from erllama.llama_ffi.library import LlamaError, Process


class Handle:
    """A native pointer with the number of its holders and the function that frees it."""

    __slots__ = ("_free", "_generation", "_holders", "_lock", "_pointer", "kind")

    def __init__(self, pointer: object, free: Callable[[object], None], kind: str) -> None:
        self._pointer: object | None = pointer
        self._free = free
        self._holders = 1
        # Reentrant: a garbage collection inside may release another hold on this handle.
        self._lock = threading.RLock()
        self._generation = Process.generation
        self.kind = kind

    @property
    def pointer(self) -> object:
        """The native pointer, for an immediate call by a holder."""
        if self._generation != Process.generation:
            raise LlamaError(
                f"this {self.kind} belongs to the process that forked this one; "
                "load models in the child, or start it with multiprocessing's 'spawn' method"
            )
        if self._pointer is None:
            raise LlamaError(f"this {self.kind} is closed")
        return self._pointer

    def hold(self) -> Handle:
        """Add a holder; every hold needs one `release`."""
        with self._lock:
            if self._pointer is None:
                raise LlamaError(f"this {self.kind} is closed")
            self._holders += 1
        return self

    @contextmanager
    def use(self) -> Iterator[object]:
        """Yield the pointer, which stays valid within the `with` block even if every other holder releases it."""
        self.hold()
        try:
            yield self.pointer
        finally:
            self.release()

    def release(self) -> None:
        """Remove a holder. The last one frees the native object."""
        with self._lock:
            self._holders -= 1
            if self._holders > 0 or self._pointer is None:
                return
            pointer, self._pointer = self._pointer, None
        if self._generation == Process.generation:
            self._free(pointer)
