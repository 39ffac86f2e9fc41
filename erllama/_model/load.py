"""Loads models: from GGUF files into libllama, and on custom backends.

Checks the options, reserves an id, makes the backend and its runner, and registers the model. `load_model` and
`load_backend` are the public functions.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never, cast

from erllama._model import registry as _registry
from erllama._model.model import Model
from erllama._model.runner import ModelRunner
from erllama._model.vocabulary_runner import VocabularyRunner
from erllama._process.backend_factory import BackendFactory
from erllama._process.launch import Launch
from erllama._process.options import ProcessOptions
from erllama.cache import Cache, Policy
from erllama.checks import boolean, integer, reject_unknown
from erllama.engine import Backend, Limits, ModelThread, RequestOptions
from erllama.engine.backends.fingerprint import Fingerprint
from erllama.engine.scheduling.options import SchedulingOptions
from erllama.errors import OptionError
from erllama.events.options import KvEvents
from erllama.events.publisher import Publisher, check_installed
from erllama.events.publishing import follow_adapters, start_publisher
from erllama.models import fit
from erllama.models.names import model_path

if TYPE_CHECKING:
    from erllama._process.remote_backend import RemoteBackend
    from erllama._process.runner import ProcessRunner
    from erllama.engine.backends.llama_options import LlamaOptions

_BACKEND_OPTIONS = (
    "id",
    "cache",
    "policy",
    "cache_salt",
    "n_seq_max",
    "prefill_chunk_size",
    "parked_cells",
    "max_pending",
    "process",
    "kv_events",
)
# Additional sequences for parked requests, if an empty sequence takes no memory.
_PARKED_SEQUENCES = 12

ProgressCallback = Callable[[float], object]

_shared_cache_lock = threading.RLock()
_shared_cache: Cache | None = None


def _after_fork_in_child() -> None:
    # Another thread, which does not exist in the child, may have held the lock.
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
    n_ctx: int | str | None = None,
    n_batch: int = 2048,
    n_ubatch: int = 512,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    n_gpu_layers: int = -1,
    devices: Sequence[str] | None = None,
    rpc_servers: Sequence[str] | None = None,
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
    check_memory: bool = True,
    on_progress: Callable[[float], object] | None = None,
    process: bool | Mapping[str, object] | ProcessOptions = False,
    kv_events: bool | str | Mapping[str, object] | KvEvents | None = None,
    **unknown: Never,
) -> Model:
    """Load a GGUF model.

    Args:
        path: the model file, or the first part of a split model; or the name of a model on this machine, such as
            "llama3.2:3b" or "hf:org/repo:Q4_K_M". A path always wins. Nothing is downloaded.
        id: a name for the model in this process; None generates one. A model that you name stays loaded until you
            unload it. A model with a generated id is unloaded, with a ResourceWarning, when its last reference is
            dropped.
        cache: the cache of its prompts. None for an in-memory cache, shared by all models loaded with None.
        policy: which parts of the model's contexts are saved, and when. None saves everything.
        cache_salt: separates the KV of its requests from that of requests with another salt or none. A request can
            override it.
        n_seq_max: maximum number of requests that run at once. Further requests wait. Running requests share the
            cells of the context.
        prefill_chunk_size: maximum number of prompt tokens computed per tick while other requests generate. It
            bounds how long a prompt delays their next token. None for n_batch / 4, at least 64.
        parked_cells: maximum number of cells that finished requests keep while others compute. A request that
            continues a parked one copies nothing, but parked cells make every token a little slower. None for an
            eighth of n_ctx.
        max_pending: maximum number of waiting requests. Further requests raise QueueFull.
        n_ctx: size of the context in tokens, shared by all requests, rounded up to a multiple of 256. "fit" for the
            largest one that fits nine tenths of the free memory, at most the model's training context. None for the
            model's training context, at most 4096.
        n_batch: maximum number of tokens per decode.
        n_ubatch: number of tokens computed at once.
        n_threads: threads for decoding. None for at most the number of physical cores that this process may use, by
            its affinity and its cgroups' CPU quotas, and fewer while other programs use them.
        n_threads_batch: threads for prefill. None for the same number.
        n_gpu_layers: layers on GPUs. -1, or more than the model has, for all.
        devices: names of the devices that compute besides the CPU, as `erllama.devices()` returns them. None for
            all GPUs; ["CPU"] or [] for none.
        rpc_servers: RPC servers, such as ["10.0.0.2:50052"], whose devices compute, too, with weights and KV there.
            Without `devices`, all their devices compute. Only for trusted networks.
        split_mode: how several devices share a model: "layer" splits by layers, "row" splits the rows of weights if
            the driver can, "none" uses one device.
        main_gpu: with split_mode="none", index of the device that holds the model, from 0. None for the first.
        tensor_split: share of each device, in any unit. None splits by free memory.
        flash_attn: True, False, or "auto" for libllama's choice.
        kv_type_k, kv_type_v: "f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1" or "iq4_nl". A quantized
            kv_type_v needs flash attention.
        rope_scaling: "none", "linear" or "yarn". Here and for the RoPE and YaRN options below, None for the model's
            own value.
        rope_freq_base: base of RoPE's frequencies.
        rope_freq_scale: factor of the positions: 0.25 for four times the context.
        yarn_ext_factor: how much YaRN extrapolates, 0.0 to 1.0.
        yarn_attn_factor: factor of attention. Only with yarn_ext_factor=0; otherwise it is computed.
        yarn_beta_fast, yarn_beta_slow: rotations within yarn_orig_ctx above which a dimension is not scaled, and
            below which it is scaled fully.
        yarn_orig_ctx: size in tokens of the context that the model was trained with.
        swa_full: allocate cells of the whole context for layers with a sliding window, too.
        overrides: metadata that overrides the file's, such as {"llama.rope.freq_base": 10000.0}. The Python type of
            a value sets its metadata type.
        mmap: map the file into memory instead of reading it.
        mlock: keep the weights from being swapped out.
        vocab_only: load the vocabulary and no weights. The model tokenizes, renders chat templates and has `info`
            and `metadata`.
        fingerprint: how the cache names the file's content: "safe" by all of it, "gguf_chunked" by its metadata and
            the beginning of each tensor, "fast_unsafe" by own_fingerprint alone.
        own_fingerprint: with "fast_unsafe", text or bytes that name the content.
        warmup: decode one token before returning. Otherwise the first request waits for threads to start and for
            memory pages to be mapped.
        check_memory: refuse a model that needs more memory than is free, by an estimate. False loads it anyway: the
            machine may swap, or end a process.
        on_progress: called with the fraction done, 0.0 to 1.0. Returning False cancels the load. If the file must
            be read for its fingerprint, that is the first half.
        process: run the model in a process of its own, which is replaced if it ends: replies continue, and this
            process survives. True, an erllama.ProcessOptions, or a mapping of its options.
        kv_events: publish which blocks are cached, for routers in front of several replicas. An address, True for
            the default address, an erllama.KvEvents, or a mapping of its options. None publishes no events. The
            events have the tokens of cached prompts.

    Raises:
        ModelLoadError: the file cannot be loaded.
        ModelNameError: no model on this machine has the name, or several begin with it.
        MemoryLimitExceeded: the model needs more memory than is free.
        EventsError: an address of `kv_events` cannot be used.
        MissingPackage: `kv_events`, and pyzmq is not installed.
        LoadCancelled: `on_progress` returned False.
        OptionError: an option is unknown, has the wrong type, is out of range, or contradicts another option, the
            devices or the file.
        AlreadyLoaded: the id is in use.
        ServerLost: an RPC server cannot be reached.
        Unsupported: `process`, and this system cannot do that, or this is such a process.
        LibraryNotBuilt: the package was not built.
    """
    reject_unknown(unknown, _LOAD_DEFAULTS, "load_model")
    supervision, events = ProcessOptions.of(process), KvEvents.of(kv_events)
    file = model_path(path)
    llama_options: dict[str, Any] = {
        "n_ctx": fit.checked_n_ctx(n_ctx),
        "n_batch": n_batch,
        "n_ubatch": n_ubatch,
        "n_threads": n_threads,
        "n_threads_batch": n_threads_batch,
        "n_gpu_layers": n_gpu_layers,
        "devices": devices,
        "rpc_servers": rpc_servers,
        "split_mode": split_mode,
        "main_gpu": main_gpu,
        "tensor_split": tensor_split,
        "flash_attn": flash_attn,
        "kv_type_k": kv_type_k,
        "kv_type_v": kv_type_v,
        "rope_scaling": rope_scaling,
        "rope_freq_base": rope_freq_base,
        "rope_freq_scale": rope_freq_scale,
        "yarn_ext_factor": yarn_ext_factor,
        "yarn_attn_factor": yarn_attn_factor,
        "yarn_beta_fast": yarn_beta_fast,
        "yarn_beta_slow": yarn_beta_slow,
        "yarn_orig_ctx": yarn_orig_ctx,
        "swa_full": swa_full,
        "overrides": overrides,
        "mmap": mmap,
        "mlock": mlock,
    }
    options, n_running = _checked_options(llama_options, n_seq_max)
    naming = Fingerprint(fingerprint, own_fingerprint)
    boolean("warmup", warmup)
    boolean("check_memory", check_memory)
    _check_callback(on_progress)
    if boolean("vocab_only", vocab_only):
        _refuse_weight_options(
            {
                **llama_options,
                "n_ctx": n_ctx,
                "check_memory": check_memory,
                "policy": policy,
                "n_seq_max": n_seq_max,
                "prefill_chunk_size": prefill_chunk_size,
                "parked_cells": parked_cells,
                "max_pending": max_pending,
                "fingerprint": fingerprint,
                "own_fingerprint": own_fingerprint,
                "warmup": warmup,
                "process": process,
                "kv_events": kv_events,
            }
        )
    cache = _checked_cache(cache)
    _check_events(events, cache)
    if vocab_only:
        return _load(partial(_vocabulary_model, file, options, on_progress, cache, cache_salt), id, cache_salt)
    scheduling = SchedulingOptions(n_running, prefill_chunk_size, parked_cells, max_pending)
    needs = {**llama_options, "n_seq_max": n_running}
    if n_ctx == fit.FIT:
        options = replace(options, n_ctx=fit.fitting_n_ctx(file, needs))
    elif check_memory:
        fit.check_fits(file, needs)
    if supervision is not None:
        launch = Launch(supervision, cache, Policy.of(policy), scheduling, warmup, events)
        make_remote = partial(launch.gguf_model, file, options, naming, on_progress)
        return _load(partial(_remote_model, make_remote, cache, Policy.of(policy), cache_salt), id, cache_salt)
    make = partial(_open_gguf, file, options, naming, cache, on_progress)
    return _load(
        partial(_running_model, make, cache, Policy.of(policy), cache_salt, scheduling, events),
        id,
        cache_salt,
        warmup=warmup,
    )


_LOAD_DEFAULTS = {
    parameter.name: parameter.default
    for parameter in inspect.signature(load_model).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def check_load_options(options: Mapping[str, object]) -> LlamaOptions:
    """Check options of `load_model` without a file.

    Returns:
        Those of libllama, for the check of a file's header.

    Raises:
        OptionError: an option is unknown, has the wrong type, is out of range, or contradicts another option or the
            devices.
        ServerLost: an RPC server cannot be reached.
    """
    reject_unknown(
        {name: options[name] for name in options if name not in _LOAD_DEFAULTS}, _LOAD_DEFAULTS, "load_model"
    )
    values: dict[str, Any] = {**_LOAD_DEFAULTS, **options}
    ProcessOptions.of(values["process"])
    KvEvents.of(values["kv_events"])
    Policy.of(values["policy"])
    RequestOptions(cache_salt=values["cache_salt"])
    Fingerprint(values["fingerprint"], values["own_fingerprint"])
    boolean("warmup", values["warmup"])
    boolean("check_memory", values["check_memory"])
    values["n_ctx"] = fit.checked_n_ctx(values["n_ctx"])
    llama_options, n_running = _checked_options(
        {name: values[name] for name in _LOAD_DEFAULTS if name in _llama_option_names()}, values["n_seq_max"]
    )
    scheduling = SchedulingOptions(
        n_running, values["prefill_chunk_size"], values["parked_cells"], values["max_pending"]
    )
    scheduling.for_limits(_largest_limits(llama_options))
    return llama_options


def _llama_option_names() -> tuple[str, ...]:
    from erllama.engine.backends.llama_options import LlamaOptions

    return tuple(each.name for each in fields(LlamaOptions))


def _largest_limits(options: LlamaOptions) -> Limits:
    """Return the limits of a context with these options, as large as any model allows."""
    from erllama.engine.backends.llama_options import MAX_N_CTX

    n_ctx = MAX_N_CTX if options.n_ctx is None else -(-options.n_ctx // 256) * 256  # rounded up, as libllama does
    n_sequences = options.n_sequences + options.n_spare_sequences
    return Limits(n_ctx, options.n_batch, options.n_ubatch, 0, False, n_sequences=n_sequences)


_VOCABULARY_OPTIONS = ("id", "cache", "cache_salt", "overrides", "vocab_only", "on_progress")


def _check_callback(on_progress: object) -> None:
    if on_progress is not None and not callable(on_progress):
        raise OptionError(f"on_progress={on_progress!r}; pass a function of one number, or None")


def _checked_options(llama_options: Mapping[str, Any], n_seq_max: int) -> tuple[LlamaOptions, int]:
    """Return the options of libllama and the number of requests that run at once."""
    # Imported here, because the cache and custom backends work without a built libllama.
    from erllama.engine.backends.llama_library import MAX_SEQUENCES
    from erllama.engine.backends.llama_options import LlamaOptions

    n_running = integer("n_seq_max", n_seq_max, 1, MAX_SEQUENCES)
    n_spare = min(_PARKED_SEQUENCES, MAX_SEQUENCES - n_running)
    return LlamaOptions(**llama_options, n_sequences=n_running, n_spare_sequences=n_spare), n_running


def _refuse_weight_options(options: Mapping[str, object]) -> None:
    """Raise OptionError for an option that differs from its default and has no effect with vocab_only=True."""
    for name, default in _LOAD_DEFAULTS.items():
        if name not in _VOCABULARY_OPTIONS and options[name] is not default and options[name] != default:
            raise OptionError(
                f"{name}={options[name]!r} with vocab_only=True, which reads no weights and computes no logits; "
                f"remove one of them. vocab_only=True takes {', '.join(_VOCABULARY_OPTIONS)}"
            )


def _open_gguf(
    file: Path, options: LlamaOptions, naming: Fingerprint, cache: Cache, on_progress: ProgressCallback | None
) -> Backend:
    # Imported here, because the cache and custom backends work without a built libllama.
    from erllama.engine.backends.open_gguf import open_gguf

    return open_gguf(file, options, naming, cache, on_progress)


def load_backend(
    backend: Backend | str,
    options: Mapping[str, object] | None = None,
    *,
    id: str | None = None,
    cache: Cache | None = None,
    policy: Policy | Mapping[str, object] | None = None,
    cache_salt: str | None = None,
    n_seq_max: int | None = None,
    prefill_chunk_size: int | None = None,
    parked_cells: int | None = None,
    max_pending: int = 1024,
    process: bool | Mapping[str, object] | ProcessOptions = False,
    kv_events: bool | str | Mapping[str, object] | KvEvents | None = None,
    **unknown: Never,
) -> Model:
    """Load a model on a custom backend. The backend is closed when the model is unloaded.

    Args:
        backend: an object with the methods of `erllama.engine.Backend`; or "module:function", a function that
            returns one.
        options: keyword arguments of that function: numbers, texts, bools, None, and lists and mappings of them.
        id, cache, policy, cache_salt, prefill_chunk_size, parked_cells, max_pending: as for `load_model`.
        n_seq_max: maximum number of requests that run at once. None for 4, or the number of the backend's sequences
            if that is smaller.
        process: run the backend in a process of its own, as for `load_model`. Needs "module:function".
        kv_events: as for `load_model`.
    """
    reject_unknown(unknown, _BACKEND_OPTIONS, "load_backend")
    supervision, events = ProcessOptions.of(process), KvEvents.of(kv_events)
    factory = BackendFactory.of(backend, options)
    scheduling = SchedulingOptions(n_seq_max, prefill_chunk_size, parked_cells, max_pending)
    cache = _checked_cache(cache)
    _check_events(events, cache)
    if supervision is None:
        make = partial(_running_model, factory.make, cache, Policy.of(policy), cache_salt, scheduling, events)
        return _load(make, id, cache_salt)
    launch = Launch(supervision, cache, Policy.of(policy), scheduling, False, events)
    make_remote = partial(launch.custom_model, factory)
    return _load(partial(_remote_model, make_remote, launch.cache, launch.policy, cache_salt), id, cache_salt)


def _remote_model(
    make: Callable[[str], tuple[ProcessRunner, RemoteBackend]],
    cache: Cache,
    policy: Policy,
    cache_salt: str | None,
    id: str,
) -> Model:
    """Return a model that runs in a process of its own; end the process if that fails."""
    runner, backend = make(id)
    try:
        return Model(backend, id, cache, policy, cache_salt, runner, backend.n_seq_max, _registry)
    except BaseException:
        runner.stop()
        raise


def _running_model(
    make: Callable[[], Backend],
    cache: Cache,
    policy: Policy,
    cache_salt: str | None,
    scheduling: SchedulingOptions,
    events: KvEvents | None,
    id: str,
) -> Model:
    """Return a model that runs in its own thread; close its backend if that fails."""
    backend = make()
    runner: ModelRunner | None = None
    publisher: Publisher | None = None
    try:
        sizes = scheduling.for_limits(backend.limits)
        publisher = start_publisher(events, cache, id, backend.namespace)
        on_stopped = publisher.close if publisher is not None else None
        runner = ModelThread(backend, cache, policy, id, **sizes._asdict(), on_stopped=on_stopped)
        follow_adapters(publisher, runner.adapters, backend.namespace)
        return Model(backend, id, cache, policy, cache_salt, runner, sizes.n_seq_max, _registry)
    except BaseException:
        if runner is not None:
            runner.stop()
        if publisher is not None:
            publisher.close()
        backend.close()
        raise


def _vocabulary_model(
    file: Path,
    options: LlamaOptions,
    on_progress: ProgressCallback | None,
    cache: Cache,
    cache_salt: str | None,
    id: str,
) -> Model:
    """Return a model of the file's vocabulary."""
    from erllama.engine.backends.llama_file import VocabularyFile

    # VocabularyFile has the attributes of a backend that describe it, and a VocabularyRunner uses no others.
    backend = cast("Backend", VocabularyFile(file, options, on_progress))
    return Model(backend, id, cache, Policy(), cache_salt, VocabularyRunner(backend, id), 0, _registry)


def _load(make: Callable[[str], Model], id: str | None, cache_salt: str | None, *, warmup: bool = False) -> Model:
    """Reserve an id, make the model, and register it; undo the completed steps if one fails."""
    RequestOptions(cache_salt=cache_salt)  # check the salt before anything is loaded
    reservation, model = _registry.IdReservation(), None
    try:
        model = make(_registry.reserve(id, reservation))
        if warmup:
            model._warm_up()
        _registry.add(model, reservation)
        return model
    except BaseException:
        if model is not None:
            model.unload()
        _registry.release(reservation)
        raise


def _check_events(events: KvEvents | None, cache: Cache) -> None:
    """Check options of events before the model is loaded, which takes long."""
    if events is not None:
        check_installed()
        events.check_block_size(cache.block_size)


def _checked_cache(cache: object) -> Cache:
    """Return the caller's cache; the shared in-memory cache for None."""
    global _shared_cache
    if isinstance(cache, Cache):
        return cache
    if cache is not None:
        raise OptionError(f"cache={cache!r}; pass an erllama.Cache, or leave it out for one in RAM")
    with _shared_cache_lock:
        if _shared_cache is None or _shared_cache.closed:
            _shared_cache = Cache()
        return _shared_cache
