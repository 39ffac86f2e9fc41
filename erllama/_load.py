"""Loads models: from GGUF files onto libllama, and from backends of the caller's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Never

from erllama import _registry
from erllama._fingerprint import fingerprint
from erllama._info import Shape
from erllama._model import Model
from erllama.cache import Cache, Policy
from erllama.engine import Backend, RequestOptions
from erllama.errors import OptionError, boolean, integer, reject_unknown, shown

_LOAD_OPTIONS = (
    "id",
    "cache",
    "policy",
    "cache_salt",
    "n_seq_max",
    "prefill_chunk_size",
    "parked_cells",
    "max_pending",
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
    "warmup",
    "on_progress",
)
_SHAPE_OPTIONS = ("n_seq_max", "prefill_chunk_size", "parked_cells", "max_pending")
_BACKEND_OPTIONS = ("id", "cache", "policy", "cache_salt", *_SHAPE_OPTIONS)
# Sequences beside those that run, to park finished ones in, where they cost nothing.
_PARKED_SEQUENCES = 12

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
    n_seq_max: int = 4,
    prefill_chunk_size: int | None = None,
    parked_cells: int | None = None,
    max_pending: int = 1024,
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
    warmup: bool = True,
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
        n_seq_max: most requests that run at once; others wait. They share the context's cells.
        prefill_chunk_size: most tokens of prompts computed in one tick beside replies that are being
            written, so the bound of how long a prompt holds them up; None for n_batch / 4, at least 64.
        parked_cells: most cells that finished requests keep while others compute; whoever goes on from
            one of them copies nothing, but every token of every reply takes a little longer for them.
            None for an eighth of n_ctx.
        max_pending: most requests that wait; more are refused with QueueFull.
        n_ctx: tokens the context holds, all requests together, rounded up to a multiple of 256; None for the
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
        warmup: decode one token before returning, so that the first request does not wait for threads to
            start and for memory to be touched for the first time.
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
    from erllama.engine.backends.llama import MAX_SEQUENCES, LlamaBackend, LlamaOptions, check_file

    n_running = integer("n_seq_max", n_seq_max, 1, MAX_SEQUENCES)
    options = LlamaOptions(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_sequences=n_running,
        n_spare_sequences=min(_PARKED_SEQUENCES, MAX_SEQUENCES - n_running),
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
    boolean("warmup", warmup)
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

    shape = Shape(n_running, prefill_chunk_size, parked_cells, max_pending)
    return _load(make, id, cache, Policy.of(policy), cache_salt, shape, warmup=warmup)


def load_backend(
    backend: Backend,
    *,
    id: str | None = None,
    cache: Cache | None = None,
    policy: Policy | Mapping[str, object] | None = None,
    cache_salt: str | None = None,
    n_seq_max: int | None = None,
    prefill_chunk_size: int | None = None,
    parked_cells: int | None = None,
    max_pending: int = 1024,
    **unknown: Never,
) -> Model:
    """Make a model of a backend of your own; it is closed when the model is unloaded.

    Args:
        backend: an object with the methods of `erllama.engine.Backend`.
        id, cache, policy, cache_salt, prefill_chunk_size, parked_cells, max_pending: as for `load_model`.
        n_seq_max: most requests that run at once; None for 4, or as many as the backend has sequences.
    """
    reject_unknown(unknown, _BACKEND_OPTIONS, "load_backend")
    missing = [name for name in _BACKEND_PARTS if not hasattr(backend, name)]
    if missing:
        raise OptionError(f"{shown(backend)} is no backend: it has no {', '.join(missing)}")
    shape = Shape(n_seq_max, prefill_chunk_size, parked_cells, max_pending)
    return _load(lambda: backend, id, _checked_cache(cache), Policy.of(policy), cache_salt, shape)


def _load(
    make: Callable[[], Backend],
    id: str | None,
    cache: Cache,
    policy: Policy,
    cache_salt: str | None,
    shape: Shape,
    *,
    warmup: bool = False,
) -> Model:
    RequestOptions(cache_salt=cache_salt)  # checks it before anything is loaded
    model_id = _registry.reserve(id)
    try:
        backend = make()
        try:
            model = Model(backend, model_id, cache, policy, cache_salt, shape.for_limits(backend.limits))
        except BaseException:
            backend.close()
            raise
        if warmup and backend.limits.can_generate:
            try:
                model._runner.warm_up()
            except BaseException:
                model._runner.stop()
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
