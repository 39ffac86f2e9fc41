"""A context: KV memory for some sequences, and the decode that fills it.

A context belongs to one thread at a time; a lock makes a second one wait
instead of corrupting it. What libllama would answer with an abort (ids out of
range, batches too large, logits before a decode) is checked here first.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Protocol, TypedDict, Unpack

import numpy as np

from erllama.llama_ffi.adapter import LlamaAdapter
from erllama.llama_ffi.handle import Handle
from erllama.llama_ffi.library import (
    AbortedError,
    DecodeError,
    LlamaError,
    NoCellsError,
    check,
    drain_log,
    ffi,
    last_error,
    lib,
    text,
)
from erllama.llama_ffi.model import LlamaModel
from erllama.llama_ffi.native_context import NativeContext

if TYPE_CHECKING:
    from numpy.typing import NDArray


_ROPE_SCALINGS = {None: -1, "none": 0, "linear": 1, "yarn": 2}
_INT32, _INT8 = np.dtype(np.int32), np.dtype(np.int8)
_MOST_FLOAT32 = float(np.finfo(np.float32).max)


class RopeOptions(TypedDict, total=False):
    """How a context writes positions; what is left out is the model's own.

    rope_freq_base, rope_freq_scale: 0 for the model's own.
    rope_scaling: "none", "linear" or "yarn"; None for the model's own.
    yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow: -1 for the model's own.
    yarn_orig_ctx: tokens; 0 for the model's own.
    """

    rope_freq_base: float
    rope_freq_scale: float
    rope_scaling: str | None
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int


class _ContextOptions(Protocol):
    rope_freq_base: float
    rope_freq_scale: float
    rope_scaling: int
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int


def put_rope(options: _ContextOptions, **rope: Unpack[RopeOptions]) -> None:
    """Fill in what a context's options have of it: all of it, since libllama's own choices are not zeros."""
    options.rope_freq_base = rope.get("rope_freq_base", 0.0)
    options.rope_freq_scale = rope.get("rope_freq_scale", 0.0)
    options.rope_scaling = _ROPE_SCALINGS[rope.get("rope_scaling")]
    options.yarn_ext_factor = rope.get("yarn_ext_factor", -1.0)
    options.yarn_attn_factor = rope.get("yarn_attn_factor", -1.0)
    options.yarn_beta_fast = rope.get("yarn_beta_fast", -1.0)
    options.yarn_beta_slow = rope.get("yarn_beta_slow", -1.0)
    options.yarn_orig_ctx = rope.get("yarn_orig_ctx", 0)


def new_context(model: Handle, options: object) -> object:
    """A context over a model that is held, or LlamaError with libllama's reason."""
    pointer = lib.erl_context_new(model.pointer, options)
    reason = last_error()
    problems = drain_log()
    if not pointer:
        raise LlamaError(reason or "; ".join(problems[-3:]) or "libllama could not make a context")
    return pointer


class LlamaContext(NativeContext):
    """A llama_context over a model.

    Args:
        model: an open model with weights.
        n_ctx: KV cells, rounded up to a multiple of 256 by libllama.
        n_batch: most tokens of one `decode`; at most n_ctx.
        n_ubatch: most tokens libllama computes at once; at most n_batch.
        n_seq_max: sequences, numbered 0 to n_seq_max - 1.
        n_threads: threads for decodes of one token a sequence.
        n_threads_batch: threads for longer batches.
        flash_attn: True, False, or None for libllama's own choice.
        type_k, type_v: ggml type numbers of the K and V cells (see `ggml_type`).
        offload_kqv: keep the KV cells on the GPU.
        swa_full: give sliding-window layers cells for the whole context.
        kv_unified: one pool of cells for all sequences, so that they can share.
        rope: how positions are written; see RopeOptions.

    Attributes:
        n_logits: rows of logits that the last decode left.
        said: what libllama logged while it made the context.
        has_memory: whether sequences are held from one decode to the next; not by models that only encode.

    Raises:
        LlamaError: libllama refused; the message says why.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        n_ctx: int,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        n_threads: int = 4,
        n_threads_batch: int = 4,
        flash_attn: bool | None = None,
        type_k: int = 1,
        type_v: int = 1,
        offload_kqv: bool = True,
        swa_full: bool = False,
        kv_unified: bool = True,
        **rope: Unpack[RopeOptions],
    ) -> None:
        if model.vocab_only:
            raise LlamaError("this model was loaded with vocab_only=True: it has no weights to decode with")
        if min(n_ctx, n_batch, n_ubatch, n_seq_max, n_threads, n_threads_batch) < 1:
            raise LlamaError("n_ctx, n_batch, n_ubatch, n_seq_max and the thread counts must be at least 1")
        limit = lib.erl_max_sequences()
        if n_seq_max > limit:
            raise LlamaError(f"n_seq_max={n_seq_max}; this libllama allows at most {limit} sequences")
        _check_room(model, n_ctx, type_k, type_v)
        held = model.hold()
        try:
            options = ffi.new("erl_context_options *")
            options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, n_batch, n_ubatch
            options.n_seq_max = n_seq_max
            options.n_threads, options.n_threads_batch = n_threads, n_threads_batch
            options.flash_attn = -1 if flash_attn is None else int(flash_attn)
            options.type_k, options.type_v = type_k, type_v
            put_rope(options, **rope)
            options.offload_kqv, options.swa_full, options.kv_unified = offload_kqv, swa_full, kv_unified
            options.pooling = -1
            pointer = new_context(held, options)
        except BaseException:
            held.release()
            raise
        self._model = held
        self._adapters: list[Handle] = []  # held
        super().__init__(pointer, held, self._adapters)
        self.n_ctx = int(lib.erl_context_n_ctx(pointer))
        self.n_batch = int(lib.erl_context_n_batch(pointer))
        self.n_ubatch = int(lib.erl_context_n_ubatch(pointer))
        self.n_seq_max = n_seq_max
        self.has_memory = check(lib.erl_context_has_memory(pointer), "making a context") == 1
        self.type_k, self.type_v = type_k, type_v
        self.n_vocab = model.vocabulary.n_tokens
        self.said = text(lib.erl_context_said(pointer))
        self.n_logits = 0
        self._reserved_rows = n_seq_max
        self._logits_at = ffi.new("float **")  # where libllama keeps them; moves only when it must hold more rows
        self._buffer: NDArray[np.float32] | None = None  # a view of all of it
        self._no_logits = np.empty((0, self.n_vocab), np.float32)
        self._arrays: tuple[object, ...] = (None,) * 4  # of the last decode
        self._pointers: tuple[object, ...] = ()  # to them

    def close(self) -> None:
        """Stop a decode that is running and let go; freed once no logits view is left. Idempotent."""
        super().close()
        self._buffer = None

    # --- decoding ---------------------------------------------------------------------

    def decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        output: NDArray[np.int8],
    ) -> NDArray[np.float32]:
        """Compute one batch; KV lands in the cells, logits where `output` is not 0.

        Args:
            tokens, positions, sequences: int32 arrays, shape (n,), 1 <= n <= n_batch;
                the positions of a sequence follow on from what it holds.
            output: int8 array, shape (n,).

        Returns:
            the logits, as `logits()` gives them; shape (0, n_vocab) where no row is marked.

        Raises:
            NoCellsError: not enough free cells; nothing was computed.
            AbortedError: `abort()` was called; part of the batch may be in the cells.
            DecodeError: libllama failed; the context may be in any state.
            LlamaError: an argument is out of range; nothing was computed.
        """
        n = len(tokens)
        if not 1 <= n <= self.n_batch:
            raise LlamaError(f"a batch of {n} tokens; it must hold 1 to n_batch={self.n_batch}")
        # Numbers out of range are refused by erl_decode.
        arrays = (tokens, positions, sequences, output)
        if all(map(is_, arrays, self._arrays)):  # as where replies are written, tick by tick
            pointers = self._pointers
        else:
            self._pointers = pointers = (
                _pointer("tokens", tokens, n, _INT32, "int32_t[]"),
                _pointer("positions", positions, n, _INT32, "int32_t[]"),
                _pointer("sequences", sequences, n, _INT32, "int32_t[]"),
                _pointer("output", output, n, _INT8, "int8_t[]"),
            )
            self._arrays = arrays
        rows = int(np.count_nonzero(output))
        with self._lock:
            native = self._native()
            self.n_logits = 0
            if rows > self._reserved_rows and not self._let_go_of_logits():
                # libllama moves its output buffer when it must hold more rows than ever before.
                raise LlamaError(
                    f"a batch with {rows} rows of logits needs a larger buffer while views of the present one "
                    "are alive; copy and drop them first"
                )
            code = lib.erl_decode(native, n, *pointers, self._logits_at)
            if code == 0:
                self.n_logits = rows
                self._reserved_rows = max(rows, self._reserved_rows)
                if lib.erl_log_pending():
                    drain_log()
                return self._rows() if rows else self._no_logits
            reason = last_error()
            problems = "; ".join(drain_log()[-3:])
        if code == 1:
            raise NoCellsError(f"no free cells for a batch of {n} tokens in a context of {self.n_ctx}")
        if code == 2:
            raise AbortedError("the decode was aborted")
        if code == 3:
            raise LlamaError(reason)
        raise DecodeError(f"decode failed with code {code}: {reason or problems or 'libllama gave no reason'}")

    def logits(self) -> NDArray[np.float32]:
        """The logits of the last decode, in place.

        Returns:
            read-only float32 array, shape (rows with output, n_vocab), a view of
            libllama's own buffer. The next decode overwrites what it shows; it
            stays safe to look at after `close()`.

        Raises:
            LlamaError: the last decode left no logits.
        """
        with self._lock:
            self._native()
            if not self.n_logits:
                raise LlamaError("there are no logits: decode a batch whose `output` marks a row first")
            return self._rows()

    def _rows(self) -> NDArray[np.float32]:
        if self._buffer is None:
            lease = _Lease(self._handle, self._logits_at[0], (self._reserved_rows, self.n_vocab))
            self._buffer = np.asarray(lease)
        return self._buffer[: self.n_logits]

    def _let_go_of_logits(self) -> bool:
        """Whether nobody looks at libllama's output buffer any more."""
        if self._buffer is None:
            return True
        buffer = weakref.ref(self._buffer)  # every view of it has it as its base
        self._buffer = None
        self._buffer = buffer()
        return self._buffer is None

    def set_adapters(self, adapters: Sequence[tuple[LlamaAdapter, float]]) -> None:
        """Compute with these adapters, each by its scale, and no others, from the next decode on.

        What the cells hold stays as it is. Each adapter lives until it is replaced here, or the context is freed.

        Raises:
            LlamaError: one is closed, given twice or of another model, or a scale is not finite; nothing changes.
        """
        held: list[Handle] = []
        with self._lock:
            native = self._native()
            try:
                for adapter, scale in adapters:
                    if not abs(scale) <= _MOST_FLOAT32:
                        raise LlamaError(f"a scale of {scale}; it must be a finite 32-bit number")
                    held.append(adapter.hold(self._model))
                if len({id(handle) for handle in held}) < len(held):
                    raise LlamaError("an adapter is given twice; give each once, with one scale")
                natives = ffi.new("struct llama_adapter_lora *[]", [handle.pointer for handle in held] or 1)
                scales = ffi.new("float[]", [scale for _, scale in adapters] or 1)
                check(lib.erl_context_adapters(native, natives, scales, len(held)), "setting adapters")
            except BaseException:
                for handle in held:
                    handle.release()
                raise
            before, self._adapters[:] = self._adapters[:], held
        for handle in before:
            handle.release()

    # --- memory -----------------------------------------------------------------------

    def clear(self) -> None:
        """Forget every sequence."""
        with self._lock:
            check(lib.erl_memory_clear(self._native(), False), "clearing the memory")

    def cut(self, sequence: int, start: int, end: int = -1) -> bool:
        """Drop positions [start, end) of a sequence (end < 0: to its end).

        Returns:
            False where libllama refuses. True is no promise that the rest is
            still usable: sliding-window memory says True and is wrong.
        """
        self._check_sequence(sequence)
        with self._lock:
            return check(lib.erl_memory_cut(self._native(), sequence, start, end), "cutting a sequence") == 1

    def copy(self, source: int, target: int, start: int = 0, end: int = -1) -> None:
        """Let `target` share the cells of `source` at positions [start, end); no data moves.

        Needs `kv_unified`, where every sequence lives in the same pool.
        """
        self._check_sequence(source)
        self._check_sequence(target)
        with self._lock:
            check(lib.erl_memory_copy(self._native(), source, target, start, end), "copying a sequence")

    def first_position(self, sequence: int) -> int:
        """The lowest position a sequence holds; -1 when it is empty."""
        self._check_sequence(sequence)
        with self._lock:
            return check(lib.erl_memory_first(self._native(), sequence), "reading a sequence")

    def last_position(self, sequence: int) -> int:
        """The highest position a sequence holds; -1 when it is empty."""
        self._check_sequence(sequence)
        with self._lock:
            return check(lib.erl_memory_last(self._native(), sequence), "reading a sequence")

    def state(self, sequence: int) -> NDArray[np.uint8]:
        """Everything a sequence holds, as libllama serialises it.

        Returns:
            uint8 array, shape (bytes,), owned by the caller.
        """
        self._check_sequence(sequence)
        with self._lock:
            native = self._native()
            size = lib.erl_state_size(native, sequence)
            if size <= 0:
                raise LlamaError(f"reading the state of sequence {sequence} failed: {last_error()}")
            state = np.empty(size, np.uint8)
            written = lib.erl_state_get(
                native, sequence, ffi.from_buffer("uint8_t[]", state, require_writable=True), size
            )
            if written != size:
                raise LlamaError(
                    f"reading the state of sequence {sequence} gave {written} of {size} bytes: {last_error()}"
                )
            return state

    def set_state(self, sequence: int, state: bytes | bytearray | memoryview) -> None:
        """Replace what a sequence holds by a state that `state()` gave.

        The bytes must be ones that were checked: libllama trusts them.

        Raises:
            LlamaError: they do not fit this context; the sequence is then empty.
        """
        self._check_sequence(sequence)
        size = memoryview(state).nbytes
        with self._lock:
            native = self._native()
            read = lib.erl_state_set(native, sequence, ffi.from_buffer("uint8_t[]", state), size)
            if read <= 0 or read != size:
                reason = last_error()
                problems = drain_log()
                lib.erl_memory_cut(native, sequence, -1, -1)
                raise LlamaError(
                    f"a state of {size} bytes does not fit: "
                    + (reason or "; ".join(problems[-2:]) or f"libllama read {read} bytes of it")
                )

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.n_seq_max:
            raise LlamaError(f"sequence {sequence} is outside 0 to n_seq_max - 1 = {self.n_seq_max - 1}")


def _pointer(name: str, array: NDArray[np.integer], n: int, dtype: np.dtype[np.integer], kind: str) -> object:
    if array.dtype != dtype or array.shape != (n,) or not array.flags.c_contiguous:
        raise LlamaError(f"{name} must be a contiguous {dtype.name} array of shape ({n},)")
    return ffi.from_buffer(kind, array)


class _Lease:
    """The memory behind a logits view: holds the context until the last view is gone."""

    __slots__ = ("__array_interface__", "_handle")

    def __init__(self, handle: Handle, pointer: object, shape: tuple[int, int]) -> None:
        self._handle = handle.hold()
        # numpy's own protocol: the array made of this keeps this object as its base.
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.float32).str,
            "shape": shape,
            "data": (int(ffi.cast("uintptr_t", pointer)), True),
        }

    def __del__(self) -> None:
        self._handle.release()


def cell_bytes(model: LlamaModel, type_k: int, type_v: int) -> int:
    """Bytes of one token's K and V in all layers, as if all had full attention; 0 for a model without any."""
    shape = model.shape
    if not shape.n_head:
        return 0
    row = shape.n_embd // shape.n_head * shape.n_head_kv
    bytes_per_element = sum(
        lib.erl_ggml_type_bytes(kind) / lib.erl_ggml_block_size(kind) for kind in (type_k, type_v)
    )
    return int(shape.n_layer * row * bytes_per_element)


def _check_room(model: LlamaModel, n_ctx: int, type_k: int, type_v: int) -> None:
    """Refuse cells that this machine's memory cannot hold: an allocation that large is not refused by
    the system, but ends the process when the cells are first written.

    Known only for full attention, whose cells are of one size.
    """
    shape = model.shape
    if shape.recurrent or shape.hybrid or shape.n_swa > 0 or not shape.n_head:
        return
    n_bytes = n_ctx * cell_bytes(model, type_k, type_v)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > memory:
        raise LlamaError(
            f"n_ctx={n_ctx} needs {n_bytes / 2**30:.1f} GiB for its cells and this machine has "
            f"{memory / 2**30:.1f} GiB; give a smaller n_ctx, or smaller KV types"
        )
