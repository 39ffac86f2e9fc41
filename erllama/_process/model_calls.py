"""The calls of another process on a model that runs here, such as for its embedder, adapters and cache."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from erllama._process.protocol import messages as m
from erllama._process.protocol.wire_values import pack_ids, unpack_grammar, unpack_ids
from erllama.cache import Cache
from erllama.engine import Backend, Embedder, EmbeddingBackend, ModelThread
from erllama.engine.adapters import ActiveAdapter, AdapterBackend, AdapterSet, LoadedAdapter
from erllama.engine.backends.fingerprint import content_digest
from erllama.errors import AdapterUnloaded, BackendError, ModelLoadError, Unsupported


class ModelCalls:
    """Answers calls. Safe from any thread; a call may take long.

    Args:
        backend, cache, runner: the model.
    """

    def __init__(self, backend: Backend, cache: Cache, runner: ModelThread) -> None:
        self._backend, self._cache, self._runner = backend, cache, runner
        self._adapters: dict[int, LoadedAdapter] = {}
        self._embedder: Embedder | None = None
        self._embedder_lock = threading.Lock()

    def close(self) -> None:
        """Close the embedder, if there is one."""
        if self._embedder is not None:
            self._embedder.close()

    def adapter_set(self, named: tuple[tuple[int, float], ...]) -> AdapterSet:
        """Return the set of a request: adapters by their numbers, with its scales. Raises AdapterUnloaded."""
        for number, _ in named:
            if number not in self._adapters:
                raise AdapterUnloaded("an adapter of the request could not be loaded again; see the log")
        return tuple(ActiveAdapter(self._adapters[number], scale) for number, scale in named)

    def answer(self, message: m.AnyCall) -> m.Returned:
        """Return the answer to a call. Raises what the model raises."""
        runner, call = self._runner, message.call
        match message:
            case m.EndSession(session_id=session_id, cache_salt=cache_salt):
                return m.Returned(call, flag=runner.end_session(session_id, cache_salt))
            case m.Evict():
                runner.evict()
            case m.CompileGrammar(grammar=grammar):
                runner.compile(unpack_grammar(grammar))
            case m.CheckAdapter(path=path):
                self._adapter_backend().check_adapter(Path(path))
            case m.LoadAdapter():
                self._load_adapter(message)
            case m.FreeAdapter(number=number):
                adapter = self._adapters.pop(number, None)
                if adapter is not None:
                    runner.unload_adapter(adapter)
            case m.OpenEmbedder():
                return m.Returned(call, limits=self._open_embedder().limits)
            case m.Embed(texts=texts, pooling=pooling):
                rows = self._open_embedder().embed([unpack_ids(text) for text in texts], pooling)
                packed = tuple((row.astype("<f4", copy=False).tobytes(), row.shape) for row in rows)
                return m.Returned(call, arrays=packed)
            case m.Pair(query=query, document=document):
                ids = self._open_embedder().pair(query, document).astype("<i4", copy=False)
                return m.Returned(call, raw=ids.tobytes())
            case m.CloseEmbedder():
                with self._embedder_lock:
                    embedder, self._embedder = self._embedder, None
                if embedder is not None:
                    embedder.close()
            case m.Tokenize(text=text, add_special=add_special, parse_special=parse_special):
                ids = self._backend.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)
                return m.Returned(call, raw=ids.astype("<i4", copy=False).tobytes())
            case m.Detokenize(tokens=tokens, special=special):
                return m.Returned(
                    call, raw=self._backend.vocabulary.detokenize(unpack_ids(tokens), special=special)
                )
            case m.CachedPrefix(namespace=namespace, tokens=tokens):
                return m.Returned(call, number=runner.cached_prefix(namespace, unpack_ids(tokens)))
            case m.StoredContext(key=key, namespace=namespace):
                context = runner.stored_context(key, namespace)
                return m.Returned(call, raw=None if context is None else pack_ids(context))
            case m.ReportCache():
                return m.Returned(call, report=self._cache.member_report().as_plain())
            case m.FlushCache(timeout=timeout):
                flushed = self._cache.flush(timeout)
                return m.Returned(call, flag=flushed, report=self._cache.member_report().as_plain())
            case m.EvictBytes(n_bytes=n_bytes, tiers=tiers):
                return m.Returned(call, number=self._cache.evict_bytes(n_bytes, tiers))
            case _:
                raise BackendError(f"the model's process does not know {type(message).__name__}")
        return m.Returned(call)

    def _adapter_backend(self) -> AdapterBackend:
        if not isinstance(self._backend, AdapterBackend):
            raise Unsupported(
                f"the model takes no adapters: its backend, {type(self._backend).__name__}, has no `load_adapter`; "
                "use load_model, or a backend that has one"
            )
        return self._backend

    def _load_adapter(self, message: m.LoadAdapter) -> None:
        """Load an adapter that requests name by its number. Its own scale is 0: requests bring theirs."""
        if message.number in self._adapters:
            return  # the parent calls again if an earlier process ended during the call
        path = Path(message.path)
        is_complete = partial(self._has_digest, path, message.digest)
        adapter = self._runner.load_adapter(path, message.digest, 0.0, is_complete)
        self._adapters[message.number] = adapter

    def _has_digest(self, path: Path, digest: str) -> bool:
        """Return whether a file is the one that the parent means: it may have been changed since the last start."""
        try:
            return content_digest(path, self._cache) == digest
        except ModelLoadError:
            return False

    def _open_embedder(self) -> Embedder:
        with self._embedder_lock:
            if self._embedder is None:
                if not isinstance(self._backend, EmbeddingBackend):
                    raise Unsupported(
                        f"the model cannot embed: its backend, {type(self._backend).__name__}, has no `embedder`; "
                        "use load_model, or a backend that has one"
                    )
                self._embedder = self._backend.embedder()
            return self._embedder

    def abort_embedder(self) -> m.Returned:
        """End the running computation of the embedder."""
        if self._embedder is not None:
            self._embedder.abort()
        return m.Returned(-1)
