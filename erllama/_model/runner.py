"""The protocol of an object that runs a model's requests.

`Model` and its collaborators reach the engine through this protocol alone. Three classes implement it:
`erllama.engine.ModelThread`, which runs requests in its own thread; `erllama._process.runner.ProcessRunner`, which
runs them in a process of the model's own; and `erllama._model.vocabulary_runner.VocabularyRunner`, which refuses
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from erllama.engine import CacheHit, EngineMetrics, Grammar, Phase, Ticket
from erllama.engine.adapters import Adapters, LoadedAdapter


class ModelRunner(Protocol):
    """Runs the requests of one model. Safe to use from any thread."""

    # --- state: reading never waits

    @property
    def phase(self) -> Phase:
        """What the model does now."""
        ...

    @property
    def pending(self) -> int:
        """Number of waiting requests."""
        ...

    @property
    def running(self) -> int:
        """Number of admitted requests."""
        ...

    @property
    def last_hit(self) -> CacheHit | None:
        """Cache hit of the latest request; None before the first."""
        ...

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since the model was loaded."""
        ...

    @property
    def cache_problem(self) -> str:
        """Why the cache is not used; empty while it is used."""
        ...

    @property
    def is_ours(self) -> bool:
        """Whether the runner belongs to this process; False in a fork."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether the runner has stopped, or is stopping."""
        ...

    @property
    def pid(self) -> int:
        """Number of the process that computes; 0 while it is being replaced."""
        ...

    @property
    def restarts(self) -> int:
        """How many times the model's process was replaced; 0 for a model in this process."""
        ...

    @property
    def adapters(self) -> Adapters:
        """The model's adapters."""
        ...

    def namespace(self, cache_salt: str | None) -> bytes:
        """Return the root key of the cache entries that a request with this salt may use."""
        ...

    def cached_prefix(self, namespace: bytes, tokens: NDArray[np.int32]) -> int:
        """Return how many tokens of a prompt, int32, shape (n,), the cache has. Does not wait for the model."""
        ...

    def stored_context(self, key: bytes, namespace: bytes) -> NDArray[np.int32] | None:
        """Return the tokens of the stored context that ends with a block, int32, shape (n,); None if not stored."""
        ...

    # --- checks

    def check(self) -> None:
        """Raise ModelUnloaded if the model is unloaded."""
        ...

    def check_computes(self) -> None:
        """Raise ModelUnloaded if the model is unloaded, or VocabularyOnly if it has no weights."""
        ...

    def check_caller(self) -> None:
        """Raise the errors of `check_computes`, and CalledFromModelThread in the model's own thread."""
        ...

    # --- requests: the errors of `check_caller` apply

    def submit(self, ticket: Ticket) -> None:
        """Queue a request.

        Raises:
            QueueFull: the queue is full.
            SessionBusy: a request of the same session is running or waiting.
        """
        ...

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar in the caller's thread and keep it for later requests."""
        ...

    def end_session(self, session_id: str, cache_salt: str | None) -> bool:
        """Release the cells of a session; return False if the session has none."""
        ...

    def load_adapter(self, path: Path, digest: str, scale: float, is_complete: Callable[[], bool]) -> LoadedAdapter:
        """Load a checked adapter file and put it into effect."""
        ...

    def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Remove an adapter from later requests. Idempotent."""
        ...

    def warm_up(self) -> None:
        """Decode one token before the first request."""
        ...

    def evict(self) -> None:
        """Save the context, wait until it is stored, and release unused cells."""
        ...

    # --- shutdown

    def begin_to_stop(self) -> None:
        """Refuse new requests and start the shutdown. Returns at once. Idempotent."""
        ...

    def stop(self) -> None:
        """Fail all requests with ModelUnloaded, save their contexts, and close the backend. Idempotent."""
        ...
