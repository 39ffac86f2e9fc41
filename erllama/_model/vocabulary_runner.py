"""The runner of a model that was loaded for its vocabulary alone.

Tokenizing, chat templates, `info` and `metadata` of such a model work. Its runner has no thread and refuses every
request with VocabularyOnly. `load_model(..., vocab_only=True)` creates it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Never

import numpy as np
from numpy.typing import NDArray

from erllama.cache import namespace_key
from erllama.checks import check_loaded
from erllama.engine import Backend, CacheHit, EngineMetrics, Grammar, Phase, Ticket
from erllama.engine.adapters import LoadedAdapter
from erllama.errors import VocabularyOnly


class VocabularyRunner:
    """A `ModelRunner` that reports an idle model and refuses to compute.

    Args:
        backend: the opened file; closed by `stop`.
        id: the model's id, for error messages.
    """

    restarts = 0

    def __init__(self, backend: Backend, id: str) -> None:
        self._backend, self._id = backend, id
        self._metrics = EngineMetrics()
        self._stopped = False
        self._process = os.getpid()

    # --- state

    @property
    def phase(self) -> Phase:
        return "idle"

    @property
    def pending(self) -> int:
        return 0

    @property
    def running(self) -> int:
        return 0

    @property
    def last_hit(self) -> CacheHit | None:
        return None

    @property
    def metrics(self) -> EngineMetrics:
        return self._metrics

    @property
    def cache_problem(self) -> str:
        return ""

    @property
    def is_ours(self) -> bool:
        return self._process == os.getpid()

    @property
    def pid(self) -> int:
        return self._process

    @property
    def stopped(self) -> bool:
        return self._stopped

    @property
    def adapters(self) -> Never:
        self.check_computes()

    def namespace(self, cache_salt: str | None) -> bytes:
        return namespace_key({**self._backend.namespace, "cache_salt": cache_salt})

    def cached_prefix(self, namespace: bytes, tokens: NDArray[np.int32]) -> Never:
        self.check_computes()

    def stored_context(self, key: bytes, namespace: bytes) -> Never:
        self.check_computes()

    # --- checks

    def check(self) -> None:
        check_loaded(self._id, self._process, stopped=self._stopped)

    def check_computes(self) -> Never:
        self.check()
        raise VocabularyOnly(
            f"model {self._id!r} was loaded with vocab_only=True: it has no weights to compute with; "
            "load it without vocab_only"
        )

    def check_caller(self) -> Never:
        self.check_computes()

    # --- requests, all of which need weights

    def submit(self, ticket: Ticket) -> Never:
        self.check_computes()

    def compile(self, grammar: Grammar) -> Never:
        self.check_computes()

    def end_session(self, session_id: str, cache_salt: str | None) -> Never:
        self.check_computes()

    def load_adapter(self, path: Path, digest: str, scale: float, is_complete: Callable[[], bool]) -> Never:
        self.check_computes()

    def unload_adapter(self, adapter: LoadedAdapter) -> Never:
        self.check_computes()

    def warm_up(self) -> Never:
        self.check_computes()

    def evict(self) -> Never:
        self.check_computes()

    # --- shutdown

    def begin_to_stop(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopped = True
        self._backend.close()
