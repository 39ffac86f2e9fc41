"""Loads models: from GGUF files onto libllama, and from backends of the caller's own."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Never

from erllama._model import registry as _registry
from erllama._model.fingerprint import Fingerprint
from erllama._model.info import Shape
from erllama._model.model import Model
from erllama._model.vocabulary_model import VocabularyModel
from erllama.cache import Cache, Policy
from erllama.checks import boolean, integer, reject_unknown, shown
from erllama.engine import Backend, RequestOptions
from erllama.engine.backends.file_identity import identity
from erllama.errors import ModelLoadError, OptionError

_SHAPE_OPTIONS = ("n_seq_max", "prefill_chunk_size", "parked_cells", "max_pending")
_BACKEND_OPTIONS = ("id", "cache", "policy", "cache_salt", *_SHAPE_OPTIONS)
# Sequences beside those that run, to park finished ones in, where they cost nothing.
_PARKED_SEQUENCES = 12

_BACKEND_PARTS = sorted(name for name in vars(Backend) if not name.startswith("_"))

_shared_cache_lock = threading.RLock()
_shared_cache: Cache | None = None


def _after_fork_in_child() -> None:
    # A thread that was not forked may have held it.
    global _shared_cache_lock
    _shared_cache_lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)


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
    devices: Sequence[str] | None = None,
    split_mode: str = "layer",
    main_gpu: int | None = None,
    tensor_split: Sequence[float] | None = None,
    flash_attn: bool | str = "auto",
    kv_type_k: str = "f16",
    kv_type_v: str = "f16",
    rope_scaling: str | None = None,
    rope_freq_base: float | None = None,
    rope_freq_scale: float | None = None,
    yarn_ext_factor: float | None = None,
    yarn_attn_factor: float | None = None,
    yarn_beta_fast: float | None = None,
    yarn_beta_slow: float | None = None,
    yarn_orig_ctx: int | None = None,
    swa_full: bool = False,
    overrides: Mapping[str, int | float | bool | str] | None = None,
    mmap: bool = True,
    mlock: bool = False,
    vocab_only: bool = False,
    fingerprint: str = "safe",
    own_fingerprint: str | bytes | None = None,
    warmup: bool = True,
    on_progress: Callable[[float], object] | None = None,
    **unknown: Never,
) -> Model:
    """Load a GGUF model.

    Args:
        path: the file; the first part of a split model.
        id: a name for it in this process; one is made up if None. A model that was given one stays loaded until
            it is unloaded; another is unloaded, with a ResourceWarning, when its last reference is dropped.
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
        n_threads: threads for decoding; None for the processors this process may use, by its affinity and its
            cgroups' CPU quotas.
        n_threads_batch: threads for prefill; None for the same.
        n_gpu_layers: layers on GPUs; -1, or more than the model has, for all.
        devices: names of the devices that compute beside the CPU, as `erllama.devices()` tells them; None for all
            GPUs, ["CPU"] or [] for none.
        split_mode: how several devices share a model: "layer" by layers, "row" by rows of the weights where
            their driver can, "none" not at all.
        main_gpu: with split_mode="none", which of the devices has the model, counted from 0; None for the first.
        tensor_split: the share of each device, in any unit; None to go by their free memory.
        flash_attn: True, False, or "auto" for libllama's choice.
        kv_type_k, kv_type_v: "f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1" or "iq4_nl"; a quantised
            kv_type_v needs flash attention.
        rope_scaling: "none", "linear" or "yarn"; None for the model's own, as for the options that follow.
        rope_freq_base: base of RoPE's frequencies.
        rope_freq_scale: what positions are multiplied by: 0.25 for four times the context.
        yarn_ext_factor: how much YaRN extrapolates, 0.0 to 1.0.
        yarn_attn_factor: what attention is multiplied by; only with yarn_ext_factor=0, else it is computed.
        yarn_beta_fast, yarn_beta_slow: rotations within yarn_orig_ctx above which a dimension is left as it is,
            and below which it is scaled like the rest.
        yarn_orig_ctx: tokens of the context that the model was trained on.
        swa_full: give layers with a sliding window cells for the whole context, too.
        overrides: metadata in place of the file's, as {"llama.rope.freq_base": 10000.0}, typed by value.
        mmap: map the file instead of reading it.
        mlock: keep the weights from being swapped out.
        vocab_only: read no weights: a model that tokenizes, renders chat templates and tells of itself.
        fingerprint: how the cache names the file's content: "safe" by all of it, "gguf_chunked" by its metadata and
            the beginning of each tensor, "fast_unsafe" by own_fingerprint alone.
        own_fingerprint: with "fast_unsafe", the text or bytes that name the content.
        warmup: decode one token before returning, so that the first request does not wait for threads to
            start and for memory to be touched for the first time.
        on_progress: called with the fraction done, 0.0 to 1.0; returning False cancels. Where the file must be read
            for its fingerprint, that is the first half.

    Raises:
        ModelLoadError: the file cannot be loaded.
        LoadCancelled: `on_progress` returned False.
        OptionError: an option is unknown, ill-typed, out of range, or contradicts another, the devices or the file.
        AlreadyLoaded: the id is taken.
        LibraryNotBuilt: the package was not built.
    """
    given = locals()
    reject_unknown(unknown, _LOAD_OPTIONS, "load_model")
    if not isinstance(path, str | Path) or not str(path):
        raise OptionError(f"path={path!r}; give the path of a GGUF file")
    # Imported here: the cache and custom backends work where libllama was never built.
    from erllama.engine.backends.llama import LlamaBackend
    from erllama.engine.backends.llama_file import VocabularyFile, check_file
    from erllama.engine.backends.llama_library import MAX_SEQUENCES
    from erllama.engine.backends.llama_options import LlamaOptions

    n_running = integer("n_seq_max", n_seq_max, 1, MAX_SEQUENCES)
    names = {field.name for field in fields(LlamaOptions)}
    options = LlamaOptions(
        **{name: value for name, value in given.items() if name in names},
        n_sequences=n_running,
        n_spare_sequences=min(_PARKED_SEQUENCES, MAX_SEQUENCES - n_running),
    )
    naming = Fingerprint(fingerprint, own_fingerprint)
    boolean("warmup", warmup)
    if on_progress is not None and not callable(on_progress):
        raise OptionError(f"on_progress={on_progress!r}; give a function of one number, or None")
    if boolean("vocab_only", vocab_only):
        _refuse_without_weights(given)
    cache = _checked_cache(cache)
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"path={path!r}: {error}") from None

    if vocab_only:

        def make_vocabulary(model_id: str) -> Model:
            return VocabularyModel(VocabularyFile(file, options, on_progress), model_id, cache, cache_salt)

        return _load(make_vocabulary, id, cache_salt)

    def make() -> Backend:
        check_file(file)
        progress = _Progress(on_progress)
        before = identity(file)
        fingerprint = naming.of(file, cache, progress.reading)
        backend = LlamaBackend(file, options, fingerprint, progress.loading, before)
        if identity(file) != before:
            backend.close()
            raise ModelLoadError(f"{file} was changed while it was loaded; load it again when it is complete")
        return backend

    shape = Shape(n_running, prefill_chunk_size, parked_cells, max_pending)
    return _load(_model_of(make, cache, Policy.of(policy), cache_salt, shape), id, cache_salt, warmup=warmup)


_LOAD_OPTIONS = {
    parameter.name: parameter.default
    for parameter in inspect.signature(load_model).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}
_VOCABULARY_OPTIONS = ("id", "cache", "cache_salt", "overrides", "vocab_only", "on_progress")


def _refuse_without_weights(given: Mapping[str, object]) -> None:
    for name, default in _LOAD_OPTIONS.items():
        if name not in _VOCABULARY_OPTIONS and given[name] is not default and given[name] != default:
            raise OptionError(
                f"{name}={given[name]!r} with vocab_only=True, which reads no weights and computes nothing; "
                f"leave one of them out. It takes {', '.join(_VOCABULARY_OPTIONS)}"
            )


class _Progress:
    """One fraction for two things: reading files for their fingerprint, where they must be, and loading them."""

    def __init__(self, report: Callable[[float], object] | None) -> None:
        self._report = report
        self._done = 0.0

    def reading(self, fraction: float) -> object:
        self._done = 0.5
        return self._report(fraction / 2) if self._report else None

    def loading(self, fraction: float) -> object:
        return self._report(self._done + (1 - self._done) * fraction) if self._report else None


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
    make = _model_of(lambda: backend, _checked_cache(cache), Policy.of(policy), cache_salt, shape)
    return _load(make, id, cache_salt)


def _model_of(
    make: Callable[[], Backend], cache: Cache, policy: Policy, cache_salt: str | None, shape: Shape
) -> Callable[[str], Model]:
    def model(model_id: str) -> Model:
        backend = make()
        try:
            return Model(backend, model_id, cache, policy, cache_salt, shape.for_limits(backend.limits))
        except BaseException:
            backend.close()
            raise

    return model


def _load(make: Callable[[str], Model], id: str | None, cache_salt: str | None, *, warmup: bool = False) -> Model:
    RequestOptions(cache_salt=cache_salt)  # checks it before anything is loaded
    reservation, model = _registry.Reservation(), None
    try:
        model = make(_registry.reserve(id, reservation))
        if warmup and model._backend.limits.can_generate:
            model._runner.warm_up()
        _registry.add(model, reservation)
        return model
    except BaseException:
        if model is not None:
            model.unload()
        _registry.give_up(reservation)
        raise


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
