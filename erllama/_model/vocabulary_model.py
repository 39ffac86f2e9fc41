"""A model that was loaded for its vocabulary alone.

It is a `Model` of which tokenizing, chat templates, `info` and `metadata` work;
whatever needs weights is refused with VocabularyOnly, without any thread.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Never, cast

from erllama._model.info import Shape
from erllama._model.model import Model
from erllama.cache import Cache, Policy, namespace_key
from erllama.engine import Backend, CacheHit, EngineMetrics, ModelThread, Phase
from erllama.errors import VocabularyOnly

if TYPE_CHECKING:
    from erllama.engine.backends.llama_file import VocabularyFile


class VocabularyModel(Model):
    """A `Model` that refuses to compute.

    Args:
        file: closed when the model is unloaded.
        id, cache, cache_salt: as of `Model`; what conversations were computed as is looked up in the cache.
    """

    def __init__(self, file: VocabularyFile, id: str, cache: Cache, cache_salt: str | None) -> None:
        # It has what a backend tells of itself, and nothing here asks for more.
        super().__init__(cast("Backend", file), id, cache, Policy(), cache_salt, Shape(0, None, None, 0))
        self._n_seq_max = 0

    def _make_runner(self, shape: Shape) -> ModelThread:
        return _NoRunner(self.id, self._backend)

    # Before anything is said of the prompt or the conversation.

    def _prompt_ids(self, *_: object) -> Never:
        self._check_loaded()
        raise _refusal(self.id)

    def _turn(self, *_: object) -> Never:
        self._check_loaded()
        raise _refusal(self.id)


class _NoRunner(ModelThread):
    """In a runner's place: tells that nothing runs, and refuses everything that would."""

    def __init__(self, name: str, backend: Backend) -> None:
        self._name, self._backend = name, backend
        self._failure = None
        self._stopping = False
        self._process = os.getpid()
        self._nothing = EngineMetrics()

    def __getattr__(self, name: str) -> Never:
        # The scheduler, the queue, and whatever else a runner has.
        if name.startswith("__"):
            raise AttributeError(name)
        self.check()
        raise _refusal(self._name)

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
    def cache_problem(self) -> str:
        return ""

    @property
    def metrics(self) -> EngineMetrics:
        return self._nothing

    def namespace(self, cache_salt: str | None) -> bytes:
        return namespace_key({**self._backend.namespace, "cache_salt": cache_salt})

    def begin_to_stop(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping = True
        self._backend.close()

    def check_caller(self) -> Never:
        self.check()
        raise _refusal(self._name)


def _refusal(name: str) -> VocabularyOnly:
    return VocabularyOnly(
        f"model {name!r} was loaded with vocab_only=True: it has no weights and computes nothing; "
        "load it without vocab_only"
    )
