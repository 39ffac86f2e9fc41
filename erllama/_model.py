"""What a user holds: a loaded model, and streams of its replies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Never

import numpy as np
from numpy.typing import NDArray

from erllama import _registry
from erllama._fingerprint import fingerprint
from erllama.cache import Cache, Policy
from erllama.engine import (
    Backend,
    CacheHit,
    Completion,
    Done,
    Event,
    Phase,
    Request,
    RequestOptions,
    Runner,
    SamplingOptions,
    Ticket,
)
from erllama.errors import OptionError, PromptError, PromptTooLong, boolean, reject_unknown

Prompt = str | Sequence[int] | NDArray[np.integer]

_LOAD_OPTIONS = (
    "id",
    "cache",
    "policy",
    "cache_salt",
    "n_ctx",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "n_threads_batch",
    "n_gpu_layers",
    "flash_attn",
    "kv_type_k",
    "kv_type_v",
    "rope_freq_base",
    "rope_freq_scale",
    "mmap",
    "mlock",
    "on_progress",
)
_REQUEST_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "reproducible",
    "cache_salt",
    "parent_key",
)

_BACKEND_PARTS = sorted(name for name in vars(Backend) if not name.startswith("_"))

_shared_cache_lock = threading.Lock()
_shared_cache: Cache | None = None


def load_model(
    path: str | Path,
    *,
    id: str | None = None,
    cache: Cache | None = None,
    policy: Policy | Mapping[str, object] | None = None,
    cache_salt: str | None = None,
    n_ctx: int | None = None,
    n_batch: int = 2048,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    n_gpu_layers: int = -1,
    flash_attn: bool | str = "auto",
    kv_type_k: str = "f16",
    kv_type_v: str = "f16",
    rope_freq_base: float | None = None,
    rope_freq_scale: float | None = None,
    mmap: bool = True,
    mlock: bool = False,
    on_progress: Callable[[float], object] | None = None,
    **unknown: Never,
) -> Model:
    """Load a GGUF model.

    Args:
        path: the file; the first part of a split model.
        id: a name for it in this process; one is made up if None.
        cache: where its prompts are kept; None for one in RAM, shared by every
            model loaded without a cache of its own.
        policy: what of its contexts is saved, and when; None for all of it.
        cache_salt: keeps its requests' KV apart from that of requests with another salt, or none; a
            request can give its own.
        n_ctx: tokens the context holds, rounded up to a multiple of 256; None for the
            model's training context, at most 4096.
        n_batch: most tokens of one decode.
        n_ubatch: tokens computed at once.
        n_threads: threads for decoding; None for the processors this process may use.
        n_threads_batch: threads for prefill; None for the same.
        n_gpu_layers: layers on a GPU; -1 for all.
        flash_attn: True, False, or "auto".
        kv_type_k, kv_type_v: "f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1" or "iq4_nl".
        rope_freq_base, rope_freq_scale: None for the model's own.
        mmap: map the file instead of reading it.
        mlock: keep the weights from being swapped out.
        on_progress: called with the fraction loaded, 0.0 to 1.0; returning False cancels.

    Raises:
        ModelLoadError: the file cannot be loaded.
        OptionError: an option is unknown, ill-typed or out of range.
        AlreadyLoaded: the id is taken.
        LibraryNotBuilt: the package was not built.
    """
    reject_unknown(unknown, _LOAD_OPTIONS, "load_model")
    if not isinstance(path, str | Path) or not str(path):
        raise OptionError(f"path={path!r}; give the path of a GGUF file")
    # Imported here: the cache and custom backends work where libllama was never built.
    from erllama.engine.backends.llama import LlamaBackend, LlamaOptions, check_file

    options = LlamaOptions(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        rope_freq_base=rope_freq_base,
        rope_freq_scale=rope_freq_scale,
        mmap=mmap,
        mlock=mlock,
    )
    if on_progress is not None and not callable(on_progress):
        raise OptionError(f"on_progress={on_progress!r}; give a function of one number, or None")
    cache = _checked_cache(cache)
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"path={path!r}: {error}") from None

    def make() -> Backend:
        check_file(file)
        return LlamaBackend(file, options, fingerprint(file, cache), on_progress)

    return _load(make, id, cache, Policy.of(policy), cache_salt)


def load_backend(
    backend: Backend,
    *,
    id: str | None = None,
    cache: Cache | None = None,
    policy: Policy | Mapping[str, object] | None = None,
    cache_salt: str | None = None,
    **unknown: Never,
) -> Model:
    """Make a model of a backend of your own; it is closed when the model is unloaded.

    Args:
        backend: an object with the methods of `erllama.engine.Backend`.
        id, cache, policy, cache_salt: as for `load_model`.
    """
    reject_unknown(unknown, ("id", "cache", "policy", "cache_salt"), "load_backend")
    missing = [name for name in _BACKEND_PARTS if not hasattr(backend, name)]
    if missing:
        raise OptionError(f"{_shown(backend)} is no backend: it has no {', '.join(missing)}")
    return _load(lambda: backend, id, _checked_cache(cache), Policy.of(policy), cache_salt)


def _load(
    make: Callable[[], Backend], id: str | None, cache: Cache, policy: Policy, cache_salt: str | None
) -> Model:
    RequestOptions(cache_salt=cache_salt)  # checks it before anything is loaded
    model_id = _registry.reserve(id)
    try:
        backend = make()
        try:
            model = Model(backend, model_id, cache, policy, cache_salt)
        except BaseException:
            backend.close()
            raise
    except BaseException:
        _registry.give_up(model_id)
        raise
    _registry.add(model)
    return model


def _checked_cache(cache: object) -> Cache:
    global _shared_cache
    if isinstance(cache, Cache):
        return cache
    if cache is not None:
        raise OptionError(f"cache={cache!r}; give an erllama.Cache, or leave it out for one in RAM")
    with _shared_cache_lock:
        if _shared_cache is None or _shared_cache.closed:
            _shared_cache = Cache()
        return _shared_cache


class Model:
    """A loaded model. Made by `load_model` or `load_backend`; safe to use from any thread.

    Attributes:
        id: its name in this process.
        cache: where its prompts are kept.
        policy: what of its contexts is saved, and when.
    """

    def __init__(self, backend: Backend, id: str, cache: Cache, policy: Policy, cache_salt: str | None) -> None:
        self.id = id
        self.cache = cache
        self.policy = policy
        self._cache_salt = cache_salt
        self._backend = backend
        self._runner = Runner(backend, cache, policy, id)

    def __repr__(self) -> str:
        state = "unloaded" if self._runner.stopped else self.phase
        return f"<erllama.Model {self.id!r}, {state}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    # --- replies -----------------------------------------------------------------------

    def complete(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
        reproducible: bool = False,
        cache_salt: str | None = None,
        parent_key: bytes | None = None,
        **unknown: Never,
    ) -> Completion:
        """Complete a prompt and wait for the whole reply.

        Args:
            prompt: text, or token ids. Text is tokenized with the model's BOS and
                with special tokens read as such.
            max_tokens: most tokens of the reply; None for as many as the context holds.
            temperature: 0 takes the most likely token; higher is more random.
            top_k: draw from the k most likely tokens; 0 for all.
            top_p: draw from the fewest tokens whose probabilities sum to this; 1 for all.
            min_p: draw from tokens at least this times as likely as the most likely; 0 for all.
            seed: fixes the draws; None draws a seed, told in the result.
            reproducible: reuse only KV that gives, bit for bit, the reply of a cold run.
            cache_salt: share cached KV only with requests of the same salt; None for the model's.
            parent_key: the `finish_key` of the reply that the prompt goes on from; where that is still
                being saved, it is waited for.

        Raises:
            PromptError: the prompt is empty, or an id is outside the vocabulary.
            PromptTooLong: it does not fit the context.
            OptionError: an option is unknown, ill-typed or out of range.
            ModelUnloaded: the model is, or was during the request, unloaded.
            BackendError, SamplingError: the model could not compute a reply.
        """
        reject_unknown(unknown, _REQUEST_OPTIONS, "complete")
        ticket = self._submit(
            prompt,
            max_tokens,
            SamplingOptions(temperature, top_k, top_p, min_p, seed),
            reproducible,
            cache_salt,
            parent_key,
        )
        return _wait(ticket)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int | None = None,
        reproducible: bool = False,
        cache_salt: str | None = None,
        parent_key: bytes | None = None,
        **unknown: Never,
    ) -> Stream:
        """Complete a prompt and get the reply as it comes; options and errors as for `complete`.

        The prompt and options are checked at once; errors of the run come with the events.
        """
        reject_unknown(unknown, _REQUEST_OPTIONS, "stream")
        return Stream(
            self._submit(
                prompt,
                max_tokens,
                SamplingOptions(temperature, top_k, top_p, min_p, seed),
                reproducible,
                cache_salt,
                parent_key,
            )
        )

    def prefill(
        self,
        prompt: Prompt,
        *,
        cache_salt: str | None = None,
        parent_key: bytes | None = None,
        **unknown: Never,
    ) -> Completion:
        """Read a prompt into the cache and sample nothing; errors as for `complete`."""
        reject_unknown(unknown, ("prompt", "cache_salt", "parent_key"), "prefill")
        return _wait(self._submit(prompt, 0, SamplingOptions(), False, cache_salt, parent_key))

    def evict(self) -> None:
        """Save what the context holds, wait until it is stored, and let go of KV that no request uses.

        A request in flight is saved as far as it is, and goes on.
        """
        self._runner.evict()

    def _submit(
        self,
        prompt: Prompt,
        max_tokens: int | None,
        sampling: SamplingOptions,
        reproducible: bool,
        cache_salt: str | None,
        parent_key: bytes | None,
    ) -> Ticket:
        salt = self._cache_salt if cache_salt is None else cache_salt
        options = RequestOptions(max_tokens, sampling, boolean("reproducible", reproducible), salt, parent_key)
        return self._runner.submit(Request(self._prompt_ids(prompt), options))

    def _prompt_ids(self, prompt: object) -> NDArray[np.int32]:
        self._check_loaded()
        # An empty text is refused even where the tokenizer would put a BOS before it: it is a mistake more
        # often than a wish, and who wishes it can give the id.
        if isinstance(prompt, str) and prompt:
            ids = self._backend.vocabulary.tokenize(prompt, add_special=True, parse_special=True)
        else:
            ids = self._checked_ids([] if isinstance(prompt, str) else prompt)
        if not len(ids):
            raise PromptError("the prompt is empty; give at least one token")
        n_ctx = self._backend.limits.n_ctx
        if len(ids) > n_ctx:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens and the context holds {n_ctx}; "
                "shorten it, or load the model with a larger n_ctx"
            )
        return ids

    def _checked_ids(self, ids: object) -> NDArray[np.int32]:
        found = None
        if isinstance(ids, np.ndarray | list | tuple | range):
            with suppress(ValueError, OverflowError, TypeError):  # ragged lists and the like
                found = np.asarray(ids)
        if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise PromptError(f"{_shown(ids)} is neither text nor a sequence of token ids")
        n_vocab = self._backend.vocabulary.n_tokens
        outside = (found < 0) | (found >= n_vocab)
        if outside.any():
            at = int(np.argmax(outside))
            raise PromptError(f"token id {found[at]} at {at} is outside the vocabulary; ids are 0 to {n_vocab - 1}")
        return np.ascontiguousarray(found, np.int32)

    # --- text --------------------------------------------------------------------------

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False, **unknown: Never
    ) -> NDArray[np.int32]:
        """Token ids of a text, int32, shape (n,).

        Args:
            text: text, or its bytes.
            add_special: add the BOS and EOS that the model asks for.
            parse_special: read the text of special tokens as those tokens.
        """
        reject_unknown(unknown, ("add_special", "parse_special"), "tokenize")
        self._check_loaded()
        if not isinstance(text, str | bytes):
            raise PromptError(f"{_shown(text)} is no text")
        return self._backend.vocabulary.tokenize(
            text,
            add_special=boolean("add_special", add_special),
            parse_special=boolean("parse_special", parse_special),
        )

    def detokenize(
        self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False, **unknown: Never
    ) -> str:
        """The text of token ids; bytes that are no UTF-8 appear as U+FFFD.

        Args:
            tokens: ids, shape (n,).
            special: write special tokens out instead of leaving them out.
        """
        reject_unknown(unknown, ("special",), "detokenize")
        self._check_loaded()
        raw = self._backend.vocabulary.detokenize(self._checked_ids(tokens), special=boolean("special", special))
        return raw.decode("utf-8", "replace")

    # --- state: reading these never waits -------------------------------------------------

    @property
    def n_ctx(self) -> int:
        """Tokens the context holds."""
        return self._backend.limits.n_ctx

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""
        return self._backend.vocabulary.n_tokens

    @property
    def phase(self) -> Phase:
        """What the model does now: "idle", "prefilling" or "generating"."""
        return self._runner.phase

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._runner.pending

    @property
    def last_cache_hit(self) -> CacheHit | None:
        """How warm the latest request's prompt was; None before the first."""
        return self._runner.last_hit

    def unload(self) -> None:
        """End the model: requests in flight and waiting fail with ModelUnloaded. Idempotent."""
        self._runner.stop()
        _registry.remove(self)

    def _check_loaded(self) -> None:
        self._runner.check()


class Stream:
    """A reply as it comes: iterate it for events, the last of which is `Done`.

    Leaving a `with`, or dropping the stream, cancels what is still running.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._events: Iterator[Event] = ticket.events()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the reply at the next token; `Done` still comes, with finish_reason "cancelled". Idempotent."""
        self._ticket.cancel()

    def result(self) -> Completion:
        """Wait for the end and return the whole reply; raises the error of a failed one."""
        return _wait(self._ticket)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        ticket = getattr(self, "_ticket", None)
        if ticket is not None and not ticket.done:
            ticket.cancel()


def _wait(ticket: Ticket) -> Completion:
    try:
        return ticket.result()
    except BaseException:
        ticket.cancel()
        raise


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = ["Done", "Model", "Stream", "load_backend", "load_model"]
