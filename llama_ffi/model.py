"""A model loaded by libllama: weights, vocabulary and metadata, without a context.

`erllama.engine.backends.llama_file` loads models, and contexts hold them.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import LlamaError, check, drain_log, ffi, last_error, lib, start, text
from erllama.llama_ffi.vocabulary import Vocabulary

_POLL_SECONDS = 0.02
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}
_GUESSED_PREFIX = re.compile(r"^\(guessed\) ")
_BAD_OVERRIDE = "Bad metadata override type for key '{}', "


class LoadCancelledError(LlamaError):
    """The load was cancelled by its progress callback."""


class UnusedOverrideError(LlamaError):
    """A metadata override has no effect: libllama does not read the key, or reads it as another type.

    Attributes:
        key: the key of the override.
        reason: libllama's message about the type; empty if it does not read the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(
            f"the metadata override {key!r} has no effect: {reason or 'libllama does not read this key'}"
        )
        self.key, self.reason = key, reason


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a model's architecture as libllama read it. Sizes are in elements unless named otherwise."""

    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_swa: int
    rope_type: int
    n_bytes: int
    n_params: int
    recurrent: bool
    hybrid: bool
    diffusion: bool
    has_encoder: bool
    has_decoder: bool
    n_embd_out: int
    n_cls_out: int


class LlamaModel:
    """A GGUF file loaded by libllama.

    Close it with `close()` or leave it to garbage collection. Contexts of the model keep the weights alive until
    the contexts are closed.

    Args:
        path: the GGUF file (the first part of a split one).
        n_gpu_layers: layers to put on devices; -1, or more than the model has, for all.
        devices: numbers of the devices for layers, which index `devices()`; None for libllama's choice.
        split_mode: how devices share the model: "none" (one device has all layers), "layer" or "row".
        main_gpu: with "none", the index in `devices` of the device that has all layers.
        tensor_split: the share of each of `devices`, in any unit; None to split by free memory.
        overrides: metadata that replaces the file's, typed by value. Keys and texts have at most 127 bytes.
        mmap: map the file instead of reading it.
        mlock: lock the weights in memory.
        vocab_only: read the vocabulary and metadata, no weights.
        on_progress: called in the calling thread with the loaded fraction, from 0.0 to 1.0, several times a second.
            Returning False cancels the load.

    Raises:
        LlamaError: libllama cannot load the file; the message says why.
        LoadCancelledError: `on_progress` returned False.
        UnusedOverrideError: an override has no effect. Raised before any weight is read.

    Attributes:
        log: the lines that libllama logged during the load.
        adapters_lock: taken to load or free an adapter, and by contexts that compute in other threads, because a
            computation reads the model's list of adapters.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_gpu_layers: int = -1,
        devices: Sequence[int] | None = None,
        split_mode: str = "layer",
        main_gpu: int = 0,
        tensor_split: Sequence[float] | None = None,
        overrides: Mapping[str, int | float | bool | str] | None = None,
        mmap: bool = True,
        mlock: bool = False,
        vocab_only: bool = False,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        start()
        self.path = Path(path)
        options = ffi.new("erl_model_options *")
        options.n_gpu_layers = n_gpu_layers
        options.split_mode, options.main_gpu = _SPLIT_MODES[split_mode], main_gpu
        options.mmap, options.mlock, options.vocab_only = mmap, mlock, vocab_only
        # cffi frees an object with its last reference. These variables keep the objects that the options point to.
        numbers = ffi.new("int32_t[]", list(devices or ()))
        shares = ffi.new("float[]", list(tensor_split or ()))
        native_overrides, *_texts = _overrides(overrides or {})
        options.devices, options.n_devices = numbers, -1 if devices is None else len(devices)
        options.tensor_split = shares if tensor_split is not None else ffi.NULL
        options.overrides, options.n_overrides = native_overrides, len(overrides or {})
        pointer, self.log = _load(str(path).encode("utf-8", "surrogateescape"), options, on_progress)
        self._handle = Handle(pointer, lib.erl_model_free, "model")
        finalizer = weakref.finalize(self, self._handle.release)
        finalizer.atexit = False  # as for contexts
        self._finalizer: Callable[[], object] = finalizer
        shape = ffi.new("erl_model_shape *")
        check(lib.erl_model_shape_of(pointer, shape), "reading the model")
        self.shape = ModelShape(
            shape.n_ctx_train,
            shape.n_embd,
            shape.n_layer,
            shape.n_head,
            shape.n_head_kv,
            shape.n_swa,
            shape.rope_type,
            shape.n_bytes,
            shape.n_params,
            bool(shape.recurrent),
            bool(shape.hybrid),
            bool(shape.diffusion),
            bool(shape.has_encoder),
            bool(shape.has_decoder),
            shape.n_embd_out,
            shape.n_cls_out,
        )
        self.vocab_only = vocab_only
        self.vocabulary = Vocabulary(self._handle)
        # Reentrant: a garbage collection inside may free an adapter.
        self.adapters_lock = threading.RLock()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive  # type: ignore[attr-defined]

    def close(self) -> None:
        """Release the model. Its memory is freed when no context uses it. Idempotent."""
        self._finalizer()

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self) -> Handle:
        """Add a hold on the native model, for a context, which must release it."""
        if self.closed:
            raise LlamaError("this model is closed")
        return self._handle.hold()

    @property
    def description(self) -> str:
        """libllama's one-line description, e.g. "llama 1B Q4_0"."""
        buffer = ffi.new("char[]", 256)
        with self._use() as model:
            check(lib.erl_model_desc(model, buffer, 256), "reading the model")
        return text(buffer)

    @property
    def file_type(self) -> str:
        """The quantization of most weights, such as "Q4_K - Medium" or "all F32"."""
        with self._use() as model:
            return _GUESSED_PREFIX.sub("", text(lib.erl_model_file_type(model)))

    @property
    def metadata(self) -> dict[str, str]:
        """The scalar entries of the GGUF metadata, as text. `gguf.read_header` also reads arrays."""
        with self._use() as model:
            count = check(lib.erl_model_meta_count(model), "reading metadata")
            return {
                _string(lib.erl_model_meta_key, model, i): _string(lib.erl_model_meta_value, model, i)
                for i in range(count)
            }

    def chat_template(self, name: str | None = None) -> str | None:
        """Return the model's default chat template, or the named one; None if there is none."""
        with self._use() as model:
            found = lib.erl_model_chat_template(model, name.encode() if name else ffi.NULL)
            return text(found) if found else None

    def _use(self) -> AbstractContextManager[object]:
        if self.closed:
            raise LlamaError("this model is closed")
        return self._handle.use()


def _string(read: Callable[..., int], model: object, i: int) -> str:
    """Return the text that a libllama call writes. The call returns the length that it needs."""
    size = 512
    while True:
        buffer = ffi.new("char[]", size)
        n = check(read(model, i, buffer, size), "reading metadata")
        if n < size:
            return text(buffer)
        size = n + 1


def _overrides(overrides: Mapping[str, int | float | bool | str]) -> list[object]:
    """Return the native array of overrides, followed by the texts that it points to."""
    native = ffi.new("erl_override[]", max(len(overrides), 1))
    texts: list[object] = []
    for override, (key, value) in zip(native, overrides.items(), strict=False):
        texts.append(ffi.new("char[]", key.encode()))
        override.key = texts[-1]
        if isinstance(value, bool):
            override.type, override.integer = 2, int(value)
        elif isinstance(value, int):
            override.type, override.integer = 0, value
        elif isinstance(value, float):
            override.type, override.real = 1, value
        else:
            texts.append(ffi.new("char[]", value.encode()))
            override.type, override.text = 3, texts[-1]
    return [native, *texts]


def _load(path: bytes, options: object, on_progress: Callable[[float], object] | None) -> tuple[object, str]:
    """Load in a separate thread, so that the calling thread can report progress and be interrupted."""
    job = ffi.gc(lib.erl_load_new(), lib.erl_load_free)
    outcome: dict[str, object] = {}

    def run() -> None:
        outcome["model"] = lib.erl_model_load(path, options, job)
        outcome["error"] = last_error()

    def should_continue() -> bool:
        return on_progress is None or on_progress(float(lib.erl_load_progress(job))) is not False

    thread = threading.Thread(target=run, name="erllama-load", daemon=True)
    problems: list[str] = []
    cancelled = not should_continue()
    if cancelled:
        raise LoadCancelledError("the load was cancelled")
    thread.start()
    try:
        loading = True
        while loading:
            thread.join(_POLL_SECONDS)
            loading = thread.is_alive()
            problems += drain_log()
            if not cancelled and not should_continue():
                cancelled = True
                lib.erl_load_cancel(job)
    except BaseException:
        lib.erl_load_cancel(job)
        thread.join()
        if outcome.get("model"):
            lib.erl_model_free(outcome["model"])
        raise
    problems += drain_log()
    model, log = outcome["model"], text(lib.erl_load_log(job))
    unused = text(lib.erl_load_unused(job))
    if model and (cancelled or unused):
        lib.erl_model_free(model)
    if cancelled:
        raise LoadCancelledError("the load was cancelled")
    if unused:
        reason = log.partition(_BAD_OVERRIDE.format(unused))[2].partition("\n")[0]
        raise UnusedOverrideError(unused, reason)
    if not model:
        raise LlamaError(str(outcome["error"]) or "; ".join(problems[-3:]) or "libllama gave no reason")
    return model, log
