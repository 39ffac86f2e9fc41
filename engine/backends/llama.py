"""The backend over libllama: one model, one context, a scratch sequence for moving blocks.

A block leaves the context by way of the scratch sequence: its cells are tagged
as the scratch's, without a copy, and the scratch's state is exactly the KV of
those positions. It comes back the same way. Errors of the binding become this
library's.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Batch, InfillTokens, Limits, NamespaceValue
from erllama.engine.embedding import Embedder
from erllama.errors import (
    BackendError,
    CellsExhausted,
    LibraryNotBuilt,
    LoadCancelled,
    ModelLoadError,
    OptionError,
    PromptError,
    StateError,
    boolean,
    choice,
    integer,
    real,
)

try:
    from erllama import llama_ffi
except ImportError as error:
    raise LibraryNotBuilt(
        f"the binding of libllama is not there ({error}); build it with `make setup` in a checkout, "
        "or install erllama with pip, which builds it"
    ) from error

KV_TYPES = ("f16", "f32", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")
_DEFAULT_N_CTX = 4096
_MAX_N_CTX = 2**30
_N_CTX_STEP = 256
_EMBEDDED_TOGETHER = 64  # texts: more take more memory in every computation, and n_ubatch is soon full
_TEMPLATE = "tokenizer.chat_template"
MAX_SEQUENCES = llama_ffi.max_sequences() - 1  # one is the scratch sequence
# How libllama's state of one sequence begins: magic, sequence, streams, cells;
# then, for each cell, its position, the number of its sequences, and the sequence.
_STATE_HEAD = struct.Struct("<IiII")
_STATE_MAGIC = 0xAF143CD8
_ROPE_ONE_POSITION = (-1, 0, 2)  # none, norm, neox: one position a cell


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How a model file is loaded and its context made. None is libllama's or the model's own choice.

    Attributes:
        n_ctx: cells, in tokens, rounded up to a multiple of 256; None for the model's
            training context, at most 4096.
        n_batch: most tokens of one decode.
        n_ubatch: tokens computed at once, and the length of a prefill slice.
        n_sequences: sequences that the context can hold.
        n_spare_sequences: as many more, where a sequence takes no memory of its own.
        n_threads: threads for decoding; None for the processors this process may use.
        n_threads_batch: threads for prefill; None for the same as n_threads.
        n_gpu_layers: layers on a GPU; -1 for all.
        flash_attn: True, False, or "auto" for libllama's choice.
        kv_type_k, kv_type_v: type of the K and V cells, one of KV_TYPES.
        rope_freq_base, rope_freq_scale: None for the model's own.
        mmap: map the file instead of reading it.
        mlock: keep the weights from being swapped out.
    """

    n_ctx: int | None = None
    n_batch: int = 2048
    n_ubatch: int = 512
    n_sequences: int = 1
    n_spare_sequences: int = 0
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int = -1
    flash_attn: bool | str = "auto"
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    mmap: bool = True
    mlock: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.n_ctx is not None:
            put("n_ctx", integer("n_ctx", self.n_ctx, 1, _MAX_N_CTX))
        for name in ("n_batch", "n_ubatch"):
            put(name, integer(name, getattr(self, name), 1, _MAX_N_CTX))
        put("n_sequences", integer("n_sequences", self.n_sequences, 1, MAX_SEQUENCES))
        most = MAX_SEQUENCES - self.n_sequences
        put("n_spare_sequences", integer("n_spare_sequences", self.n_spare_sequences, 0, most))
        for name in ("n_threads", "n_threads_batch"):
            if getattr(self, name) is not None:
                put(name, integer(name, getattr(self, name), 1, 512))
        put("n_gpu_layers", integer("n_gpu_layers", self.n_gpu_layers, -1, 2**31 - 1))
        if not isinstance(self.flash_attn, bool) and self.flash_attn != "auto":
            raise OptionError(f"flash_attn={self.flash_attn!r}; it takes True, False or 'auto'")
        for name in ("kv_type_k", "kv_type_v"):
            choice(name, getattr(self, name), KV_TYPES)
        for name in ("rope_freq_base", "rope_freq_scale"):
            if getattr(self, name) is not None:
                put(name, real(name, getattr(self, name), 1e-6))
        for name in ("mmap", "mlock"):
            boolean(name, getattr(self, name))
        if self.kv_type_v not in ("f16", "f32", "bf16") and self.flash_attn is False:
            raise OptionError(
                f"kv_type_v={self.kv_type_v!r} needs flash attention; leave flash_attn at 'auto', or use 'f16'"
            )


class LlamaVocabulary:
    """A model's vocabulary.

    Attributes:
        special_texts: what a chat template gets: the texts of special tokens, as "bos_token".
        infill_tokens: what marks a gap in a text; None where the model has no such tokens.
    """

    def __init__(self, vocabulary: llama_ffi.Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.n_tokens = vocabulary.n_tokens
        self.is_eog = vocabulary.is_eog
        special = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
        self.special_texts = {name: vocabulary.text(id) for name, id in special.items() if id is not None}
        self.infill_tokens: InfillTokens | None = None
        pre, suf, mid = vocabulary.fim_pre, vocabulary.fim_suf, vocabulary.fim_mid
        if pre is not None and suf is not None and mid is not None:
            begin = (vocabulary.bos,) if vocabulary.add_bos and vocabulary.bos is not None else ()
            self.infill_tokens = InfillTokens(begin, pre, suf, mid)

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        with _translated(PromptError):
            return self._vocabulary.tokenize(source, add_special=add_special, parse_special=parse_special)

    def piece(self, token: int) -> bytes:
        try:
            return self._vocabulary.piece(token)
        except llama_ffi.LlamaError as error:
            raise PromptError(str(error)) from error

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        with _translated(PromptError):
            return self._vocabulary.detokenize(tokens, special=special)


class LlamaBackend:
    """A GGUF model on libllama.

    Args:
        path: the GGUF file.
        options: how to load it.
        fingerprint: names the file's content, for the cache.
        on_progress: called with the fraction loaded; returning False cancels.

    Raises:
        ModelLoadError: the file cannot be loaded, or its context not made.
        LibraryNotBuilt: the binding is missing.
    """

    def __init__(
        self,
        path: Path,
        options: LlamaOptions,
        fingerprint: str,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        self.path = path
        model = load_file(path, options, on_progress)
        try:
            self._model = model
            self.vocabulary = LlamaVocabulary(model.vocabulary)
            shape = model.shape
            if shape.has_encoder or not shape.has_decoder or shape.diffusion:
                raise ModelLoadError(f"{path}: a model that does not generate text one token at a time")
            # Only full attention may be cut anywhere; seq_rm's own answer cannot be trusted for the rest.
            can_trim = not (shape.recurrent or shape.hybrid or shape.n_swa > 0)
            whole_state = shape.recurrent and not shape.hybrid
            n_sequences = options.n_sequences + (options.n_spare_sequences if can_trim else 0)
            threads = options.n_threads or _processors()
            threads_batch = options.n_threads_batch or threads
            self._scratch = n_sequences
            self._options, self._n_threads_batch = options, threads_batch
            self._make_context = partial(
                llama_ffi.LlamaContext,
                model,
                n_ctx=_padded(options.n_ctx or min(shape.n_ctx_train or _DEFAULT_N_CTX, _DEFAULT_N_CTX)),
                n_batch=options.n_batch,
                n_ubatch=min(options.n_ubatch, options.n_batch),
                n_seq_max=n_sequences + 1,
                n_threads=threads,
                n_threads_batch=threads_batch,
                flash_attn=options.flash_attn if isinstance(options.flash_attn, bool) else None,
                type_k=llama_ffi.ggml_type(options.kv_type_k),
                type_v=llama_ffi.ggml_type(options.kv_type_v),
                rope_freq_base=options.rope_freq_base or 0.0,
                rope_freq_scale=options.rope_freq_scale or 0.0,
            )
            with _translated(ModelLoadError, f"{path}: no context can be made"):
                self._context = self._make_context()
        except BaseException:
            model.close()
            raise
        context = self._context
        encodes = not context.has_memory
        if encodes:
            context.close()  # no decode will come: an embedder makes one of its own
        self.limits = Limits(
            # Who only encodes has learned its positions, and has no more of them.
            min(context.n_ctx, shape.n_ctx_train) if encodes else context.n_ctx,
            context.n_batch,
            context.n_ubatch,
            context.n_vocab,
            can_trim,
            whole_state,
            max(shape.n_swa, 0),
            n_sequences,
            0 if encodes else llama_ffi.cell_bytes(model, context.type_k, context.type_v),
            can_generate=not encodes,
        )
        self._state_known = True  # False after a decode that failed, for memory that cannot be cut back
        self._broken = False  # a decode failed in a way that nobody planned: the context may be in any state
        self._aborting = False
        self._checks_positions = can_trim and shape.rope_type in _ROPE_ONE_POSITION
        build = llama_ffi.build_info()
        gpus = (
            [d.name + " " + d.description for d in llama_ffi.devices() if d.is_gpu] if options.n_gpu_layers else []
        )
        self.namespace: Mapping[str, NamespaceValue] = {
            "backend": "llama",
            "model": fingerprint,
            "libllama": build["source"],
            "state": llama_ffi.state_version(),
            "kv_type_k": options.kv_type_k,
            "kv_type_v": options.kv_type_v,
            # What "auto" comes to depends on the devices.
            "flash_attn": options.flash_attn,
            "devices": "; ".join(gpus),
            "rope_freq_base": options.rope_freq_base,
            "rope_freq_scale": options.rope_freq_scale,
            # Some RoPE scalings choose their factors by the size of the context.
            "rope_n_ctx": context.n_ctx if any(".rope.scaling." in key for key in model.metadata) else None,
        }
        self.recipe = hashlib.sha256(
            json.dumps(
                [
                    context.n_ubatch,
                    threads,
                    threads_batch,
                    options.n_gpu_layers,
                    build["key"],
                    llama_ffi.system_info(),
                    # The cells of a sliding window are laid out by these.
                    (context.n_ctx, n_sequences) if shape.n_swa > 0 else None,
                ]
            ).encode()
        ).digest()[:16]

    @property
    def chat_templates(self) -> dict[str, str]:
        """The file's, by name: "default", and others such as "tool_use"."""
        with _translated(BackendError):
            metadata = self._model.metadata
        return {
            key.removeprefix(_TEMPLATE).removeprefix(".") or "default": source
            for key, source in metadata.items()
            if source and (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."))
        }

    @property
    def description(self) -> str:
        """What it is, in libllama's words, as "llama 1B Q4_0"."""
        return self._model.description

    @property
    def model(self) -> llama_ffi.LlamaModel:
        """The loaded model, for its metadata."""
        return self._model

    def embedder(self) -> Embedder:
        """For embeddings: contexts of its own on the same weights, which it holds."""
        from erllama.engine.backends.llama_embedding import LlamaEmbedder

        options, limits = self._options, self.limits

        def make_context(pooling: str, n_tokens: int) -> llama_ffi.EmbeddingContext:
            return llama_ffi.EmbeddingContext(
                self._model,
                pooling=pooling,
                n_tokens=n_tokens,
                n_sequences=n_sequences,
                n_threads=self._n_threads_batch,
                flash_attn=options.flash_attn if isinstance(options.flash_attn, bool) else None,
                type_k=llama_ffi.ggml_type(options.kv_type_k),
                type_v=llama_ffi.ggml_type(options.kv_type_v),
                rope_freq_base=options.rope_freq_base or 0.0,
                rope_freq_scale=options.rope_freq_scale or 0.0,
            )

        # Windows and recurrent states take memory for each sequence.
        n_sequences = _EMBEDDED_TOGETHER if limits.can_trim or not limits.can_generate else 1
        with _translated(BackendError):
            return LlamaEmbedder(
                self._model,
                make_context,
                n_tokens=limits.n_ctx,
                n_batch=limits.n_ubatch,
                n_sequences=min(n_sequences, llama_ffi.max_sequences()),
            )

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        known, self._state_known = self._state_known, self.limits.can_trim
        try:
            logits = self._context.decode(batch.tokens, batch.positions, batch.sequences, batch.output)
        except llama_ffi.NoCellsError as error:
            self._state_known = known
            raise CellsExhausted(str(error)) from error
        except llama_ffi.LlamaError as error:
            self._broken = isinstance(error, llama_ffi.DecodeError)
            if batch.positions.max(initial=0) >= self.limits.n_ctx:
                raise CellsExhausted(str(error)) from error
            raise BackendError(str(error)) from error
        self._state_known = known
        return logits

    def _held(self, sequence: int) -> int:
        return self._context.last_position(sequence) + 1

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        if not self._state_known:
            raise BackendError("a decode failed, and nobody knows what this memory holds; drop the sequence")
        with _translated(BackendError):
            held = self._held(sequence)
            if not 0 <= start < end <= held:
                raise BackendError(f"positions {start} to {end} of a sequence that holds {held}")
            try:
                self._context.copy(sequence, self._scratch, start, end)
                return self._context.state(self._scratch)
            finally:
                self._context.cut(self._scratch, 0)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        if self._checks_positions:
            _check_state(payload, start, end)
        with _translated(StateError):
            held = self._held(sequence)
            if held != start and not (self.limits.whole_state and held == 0):
                raise StateError(f"positions from {start} on, in a sequence that holds {held}")
            try:
                self._context.set_state(self._scratch, payload)
                if self._context.last_position(self._scratch) != end - 1:
                    raise StateError(f"the state does not end at position {end - 1}")
                self._context.copy(self._scratch, sequence)
            finally:
                self._context.cut(self._scratch, 0)

    def share(self, source: int, target: int, end: int) -> None:
        if not self.limits.can_trim:
            raise BackendError("this model's memory is shared by sequences whole or not at all")
        with _translated(BackendError):
            if not 0 <= end <= self._held(source) or self._held(target):
                raise BackendError(
                    f"positions 0 to {end} of a sequence that holds {self._held(source)}, "
                    f"for one that holds {self._held(target)}"
                )
            self._context.copy(source, target, 0, end)

    def cut(self, sequence: int, end: int) -> None:
        with _translated(BackendError):
            if not self.limits.can_trim or not self._context.cut(sequence, end):
                raise BackendError("this model's memory cannot be cut")

    def drop(self, sequence: int) -> None:
        with _translated(BackendError):
            self._context.cut(sequence, 0)

    def clear(self) -> None:
        with _translated(BackendError):
            if self._broken:
                self._context.close()
                self._context = self._make_context()
                self._context.abort(self._aborting)
                self._broken = False
            self._context.clear()
        self._state_known = True

    def abort(self, on: bool) -> None:
        self._aborting = on
        self._context.abort(on)

    def close(self) -> None:
        self._context.close()
        self._model.close()


def _padded(n_ctx: int) -> int:
    """As libllama rounds it, but before it derives other sizes from it."""
    return -(-n_ctx // _N_CTX_STEP) * _N_CTX_STEP


def load_file(
    path: Path, options: LlamaOptions, on_progress: Callable[[float], object] | None = None
) -> llama_ffi.LlamaModel:
    """Check a GGUF file's header and load it.

    Raises:
        ModelLoadError: it is missing, not a file, not GGUF, damaged, or unknown to libllama.
        LoadCancelled: `on_progress` returned False.
    """
    check_file(path)
    try:
        llama_ffi.check_header(path)
        return llama_ffi.LlamaModel(
            path,
            n_gpu_layers=options.n_gpu_layers,
            mmap=options.mmap,
            mlock=options.mlock,
            on_progress=on_progress,
        )
    except llama_ffi.LoadCancelledError as error:
        raise LoadCancelled(f"{path}: {error}") from None
    except llama_ffi.LlamaError as error:
        raise ModelLoadError(
            f"{path} cannot be loaded: {error}. Is the file complete and of a known kind?"
        ) from error


def check_file(path: Path) -> None:
    """Raise ModelLoadError unless `path` is a readable file that begins as GGUF does."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise ModelLoadError(f"{path} is no regular file; give a GGUF file")
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelLoadError(f"{path} does not exist; give the path of a GGUF file") from None
    except IsADirectoryError:
        raise ModelLoadError(f"{path} is a directory; give the GGUF file in it") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None
    if not magic:
        raise ModelLoadError(f"{path} is empty; give a complete GGUF file")
    if magic != b"GGUF":
        raise ModelLoadError(
            f"{path} is not a GGUF file: it begins with {magic!r}. Convert the model to GGUF first"
        )


def _check_state(payload: memoryview, start: int, end: int) -> None:
    """Refuse a state that is not of positions [start, end), before libllama trusts its sizes."""
    n = end - start
    if payload.nbytes < _STATE_HEAD.size + 12 * n:
        raise StateError(f"{payload.nbytes} bytes are too few for the state of {n} tokens")
    magic, _, n_streams, n_cells = _STATE_HEAD.unpack_from(payload)
    cells = np.frombuffer(payload, "<i4", 3 * n, _STATE_HEAD.size).reshape(n, 3)
    if (magic, n_streams, n_cells) != (_STATE_MAGIC, 1, n):
        raise StateError(f"not the state of {n} tokens of one sequence")
    # In the order of the cells, which need not be that of the positions.
    if not np.array_equal(np.sort(cells[:, 0]), np.arange(start, end)) or not np.all(cells[:, 1] == 1):
        raise StateError(f"the state is not of positions {start} to {end - 1}")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _translated(kind: type[BackendError | ModelLoadError | PromptError], context: str = "") -> Iterator[None]:
    """Turn the binding's errors into `kind`."""
    try:
        yield
    except llama_ffi.LlamaError as error:
        raise kind(f"{context}: {error}" if context else str(error)) from error
