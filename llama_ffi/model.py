"""A model loaded by libllama: weights, vocabulary and metadata; no context yet."""

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
_GUESSED = re.compile(r"^\(guessed\) ")
_BAD_OVERRIDE = "Bad metadata override type for key '{}', "


class LoadCancelledError(LlamaError):
    """The load was cancelled by its progress callback."""


class UnusedOverrideError(LlamaError):
    """libllama has no use for a metadata override: it reads no such key, or reads it as another type.

    Attributes:
        key: of the override.
        reason: what libllama said of its type; empty where it read no such key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"the metadata override {key!r} is of no use: {reason or 'libllama reads no such key'}")
        self.key, self.reason = key, reason


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What libllama read of a model's architecture; sizes in elements unless named otherwise."""

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

    Close it with `close()` or leave it to garbage collection; contexts made
    from it keep the weights alive until they are closed themselves.

    Args:
        path: the GGUF file (the first part of a split one).
        n_gpu_layers: layers to put on devices; -1, or more than it has, for all.
        devices: numbers of the devices to put layers on, as `devices()` counts them; None for libllama's choice.
        split_mode: how several share: "none" (one of them has all), "layer" or "row".
        main_gpu: with "none", which of them, by its place in `devices`.
        tensor_split: the share of each of `devices`, in any unit; None to go by their free memory.
        overrides: metadata in place of the file's, typed by value; keys and texts of at most 127 bytes.
        mmap: map the file instead of reading it.
        mlock: keep the weights from being swapped out.
        vocab_only: read the vocabulary and metadata, no weights.
        on_progress: called in the calling thread with the fraction loaded, first
            0.0 and last 1.0, some times a second; returning False cancels the load.

    Raises:
        LlamaError: libllama cannot load the file; the message says why.
        LoadCancelledError: `on_progress` returned False.
        UnusedOverrideError: an override has no effect; found out before any weight is read.

    Attributes:
        said: what libllama logged while it loaded.
        adapters_lock: held where an adapter is loaded or freed, and by contexts that compute in other threads:
            libllama reads the list of a model's adapters in the midst of that.
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
        # cffi frees what it made with its last name, so these keep what the options point to.
        numbers = ffi.new("int32_t[]", list(devices or ()))
        shares = ffi.new("float[]", list(tensor_split or ()))
        given, *_texts = _overrides(overrides or {})
        options.devices, options.n_devices = numbers, -1 if devices is None else len(devices)
        options.tensor_split = shares if tensor_split is not None else ffi.NULL
        options.overrides, options.n_overrides = given, len(overrides or {})
        pointer, self.said = _load(str(path).encode("utf-8", "surrogateescape"), options, on_progress)
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
        """Let go of the model; its memory is freed once no context uses it. Idempotent."""
        self._finalizer()

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(self) -> Handle:
        """For contexts: a hold on the native model, to be released by them."""
        if self.closed:
            raise LlamaError("this model is closed")
        return self._handle.hold()

    @property
    def description(self) -> str:
        """libllama's one-line description, e.g. "llama 1B Q4_0"."""
        buffer = ffi.new("char[]", 256)
        with self._held() as model:
            check(lib.erl_model_desc(model, buffer, 256), "reading the model")
        return text(buffer)

    @property
    def file_type(self) -> str:
        """How most of the weights are quantised, as "Q4_K - Medium" or "all F32"."""
        with self._held() as model:
            return _GUESSED.sub("", text(lib.erl_model_file_type(model)))

    @property
    def metadata(self) -> dict[str, str]:
        """The scalar entries of the GGUF metadata, as text. Arrays: see `gguf.read_metadata`."""
        with self._held() as model:
            count = check(lib.erl_model_meta_count(model), "reading metadata")
            return {
                _string(lib.erl_model_meta_key, model, i): _string(lib.erl_model_meta_value, model, i)
                for i in range(count)
            }

    def chat_template(self, name: str | None = None) -> str | None:
        """The model's own chat template, or the named one; None where it has none."""
        with self._held() as model:
            found = lib.erl_model_chat_template(model, name.encode() if name else ffi.NULL)
            return text(found) if found else None

    def _held(self) -> AbstractContextManager[object]:
        if self.closed:
            raise LlamaError("this model is closed")
        return self._handle.held()


def _string(read: Callable[..., int], model: object, i: int) -> str:
    """What a libllama call writes that answers with the length it would need."""
    size = 512
    while True:
        buffer = ffi.new("char[]", size)
        n = check(read(model, i, buffer, size), "reading metadata")
        if n < size:
            return text(buffer)
        size = n + 1


def _overrides(given: Mapping[str, int | float | bool | str]) -> list[object]:
    """libllama's form of them, followed by the texts that it points to."""
    found = ffi.new("erl_override[]", max(len(given), 1))
    texts: list[object] = []
    for override, (key, value) in zip(found, given.items(), strict=False):
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
    return [found, *texts]


def _load(path: bytes, options: object, on_progress: Callable[[float], object] | None) -> tuple[object, str]:
    """Load in a thread of its own, so that this one can report progress and be interrupted."""
    job = ffi.gc(lib.erl_load_new(), lib.erl_load_free)
    outcome: dict[str, object] = {}

    def run() -> None:
        outcome["model"] = lib.erl_model_load(path, options, job)
        outcome["error"] = last_error()

    def wanted() -> bool:
        return on_progress is None or on_progress(float(lib.erl_load_progress(job))) is not False

    thread = threading.Thread(target=run, name="erllama-load", daemon=True)
    problems: list[str] = []
    cancelled = not wanted()
    if cancelled:
        raise LoadCancelledError("the load was cancelled")
    thread.start()
    try:
        loading = True
        while loading:
            thread.join(_POLL_SECONDS)
            loading = thread.is_alive()
            problems += drain_log()
            if not cancelled and not wanted():
                cancelled = True
                lib.erl_load_cancel(job)
    except BaseException:
        lib.erl_load_cancel(job)
        thread.join()
        if outcome.get("model"):
            lib.erl_model_free(outcome["model"])
        raise
    problems += drain_log()
    model, said = outcome["model"], text(lib.erl_load_said(job))
    unused = text(lib.erl_load_unused(job))
    if model and (cancelled or unused):
        lib.erl_model_free(model)
    if cancelled:
        raise LoadCancelledError("the load was cancelled")
    if unused:
        reason = said.partition(_BAD_OVERRIDE.format(unused))[2].partition("\n")[0]
        raise UnusedOverrideError(unused, reason)
    if not model:
        raise LlamaError(str(outcome["error"]) or "; ".join(problems[-3:]) or "libllama gave no reason")
    return model, said
