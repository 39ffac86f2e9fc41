"""A decoding context: the KV cells of some sequences, and the decode that fills them.

One thread at a time may use a context. A lock makes a second thread wait, so that it cannot corrupt the context.
Arguments that would make libllama abort (ids out of range, batches too large, logits before a decode) raise
`LlamaError` instead. `erllama.engine.backends.llama` calls this.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Unpack

import numpy as np

from erllama.llama_ffi.adapter import LlamaAdapter
from erllama.llama_ffi.context_options import RopeOptions, create_context, set_rope_options
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


_INT32, _INT8 = np.dtype(np.int32), np.dtype(np.int8)
_MORE_ROWS, _DONE = 4, 5  # results of erl_decode
_MAX_FLOAT32 = float(np.finfo(np.float32).max)


class LlamaContext(NativeContext):
    """A llama_context over a model.

    Args:
        model: an open model with weights.
        n_ctx: KV cells, rounded up to a multiple of 256 by libllama.
        n_batch: maximum number of tokens in one `decode`; at most n_ctx.
        n_ubatch: maximum number of tokens that libllama computes at once; at most n_batch.
        n_seq_max: sequences, numbered 0 to n_seq_max - 1.
        n_threads: threads for decodes of one token per sequence.
        n_threads_batch: threads for longer batches.
        flash_attn: True, False, or None for libllama's choice.
        type_k, type_v: ggml type numbers of the K and V cells (see `ggml_type`).
        offload_kqv: keep the KV cells on the GPU.
        swa_full: allocate cells for the whole context in sliding-window layers.
        kv_unified: use one pool of cells for all sequences, so that they can share cells.
        rope: how positions are encoded; see RopeOptions.

    Attributes:
        n_logits: the rows of logits of the last decode.
        log: the lines that libllama logged while it created the context.
        has_memory: whether sequences persist between decodes. Models that only encode have no memory.

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
        _check_memory(model, n_ctx, type_k, type_v)
        model_handle = model.hold()
        try:
            options = ffi.new("erl_context_options *")
            options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, n_batch, n_ubatch
            options.n_seq_max = n_seq_max
            options.n_threads, options.n_threads_batch = n_threads, n_threads_batch
            options.flash_attn = -1 if flash_attn is None else int(flash_attn)
            options.type_k, options.type_v = type_k, type_v
            set_rope_options(options, **rope)
            options.offload_kqv, options.swa_full, options.kv_unified = offload_kqv, swa_full, kv_unified
            options.pooling = -1
            pointer = create_context(model_handle, options)
        except BaseException:
            model_handle.release()
            raise
        self._model = model_handle
        self._adapters: list[Handle] = []  # each is held
        super().__init__(pointer, model_handle, self._adapters)
        self.n_ctx = int(lib.erl_context_n_ctx(pointer))
        self.n_batch = int(lib.erl_context_n_batch(pointer))
        self.n_ubatch = int(lib.erl_context_n_ubatch(pointer))
        self.n_seq_max = n_seq_max
        self.has_memory = check(lib.erl_context_has_memory(pointer), "making a context") == 1
        self.type_k, self.type_v = type_k, type_v
        self.n_vocab = model.vocabulary.n_tokens
        self.log = text(lib.erl_context_log(pointer))
        self.n_logits = 0
        self._reserved_rows = n_seq_max
        self._buffer: NDArray[np.float32] | None = None  # a view of libllama's buffer for logits
        self._buffer_pointer: object = ffi.NULL  # to that buffer; it moves only when more rows are needed
        self._no_logits = np.empty((0, self.n_vocab), np.float32)
        self._view, self._n_view = self._no_logits, 0  # of its first rows, as the last decode returned it
        self._arrays: tuple[object, ...] = (None,) * 4  # the arguments of the last decode
        self._pointers: tuple[object, ...] = ()  # pointers to these arguments
        self._argmax, self._n_argmax = ffi.new("int32_t[]", n_seq_max), n_seq_max  # the results of `argmax`
        self._results = _Results.of((np.empty((0, 0), np.intp), np.empty((0, 0), np.float32)))

    def close(self) -> None:
        """Stop a running decode and release the context.

        It is freed with the last view of its logits. Idempotent.
        """
        super().close()
        self._buffer, self._view, self._n_view = None, self._no_logits, 0

    # --- decoding ---------------------------------------------------------------------

    def decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        output: NDArray[np.int8],
    ) -> NDArray[np.float32]:
        """Compute one batch: fill KV cells, and compute logits for the rows where `output` is not 0.

        Args:
            tokens, positions, sequences: int32 arrays, shape (n,), 1 <= n <= n_batch;
                the positions of a sequence continue from the positions that it holds.
            output: int8 array, shape (n,).

        Returns:
            the logits, as `logits()` returns them; shape (0, n_vocab) if no row is marked.

        Raises:
            NoCellsError: not enough free cells; no row was computed.
            AbortedError: `abort()` was called; part of the batch may be in the cells.
            DecodeError: libllama failed; the context may be in any state.
            LlamaError: an argument is out of range; no row was computed.
        """
        n = len(tokens)
        if not 1 <= n <= self.n_batch:
            raise LlamaError(f"a batch of {n} tokens; it must hold 1 to n_batch={self.n_batch}")
        with self._lock:
            native = self._native()
            # The arrays are usually the same objects while replies are generated token by token.
            known = self._arrays
            if not (tokens is known[0] and positions is known[1] and sequences is known[2] and output is known[3]):
                self._set_arrays(tokens, positions, sequences, output)
            n_rows, self.n_logits = self._n_view, 0
            code = lib.erl_decode(native, n, *self._pointers, n_rows, self._reserved_rows, self._computed)
            if code == 0 and n_rows:
                self.n_logits = n_rows
                return self._view
            if code == _MORE_ROWS:
                if not self._release_logits():
                    # libllama moves its output buffer when it needs more rows than before.
                    raise LlamaError(
                        "a batch with more rows of logits than before needs a larger buffer, but views of the "
                        "present buffer exist; copy and delete them first"
                    )
                code = lib.erl_decode(native, n, *self._pointers, 0, n, self._computed)
            if code in (0, _DONE):
                self.n_logits = self._computed.n_rows
                self._reserved_rows = max(self.n_logits, self._reserved_rows)
                drain_log()
                return self._rows() if self.n_logits else self._no_logits
            reason = last_error()
            problems = "; ".join(drain_log()[-3:])
        if code == 1:
            raise NoCellsError(f"no free cells for a batch of {n} tokens in a context of {self.n_ctx}")
        if code == 2:
            raise AbortedError("the decode was aborted")
        if code == 3:
            raise LlamaError(reason)
        raise DecodeError(f"decode failed with code {code}: {reason or problems or 'libllama gave no reason'}")

    def _set_arrays(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        output: NDArray[np.int8],
    ) -> None:
        """Check the shapes and types of a batch, and keep pointers to it. `erl_decode` checks the values."""
        n = len(tokens)
        self._pointers = (
            _pointer("tokens", tokens, n, _INT32, "int32_t[]"),
            _pointer("positions", positions, n, _INT32, "int32_t[]"),
            _pointer("sequences", sequences, n, _INT32, "int32_t[]"),
            _pointer("output", output, n, _INT8, "int8_t[]"),
        )
        self._arrays = (tokens, positions, sequences, output)

    def logits(self) -> NDArray[np.float32]:
        """Return the logits of the last decode, in place.

        Returns:
            read-only float32 array, shape (rows with output, n_vocab), a view of libllama's buffer. The next decode
            overwrites it. It stays valid after `close()`.

        Raises:
            LlamaError: the last decode computed no logits.
        """
        with self._lock:
            self._native()
            if not self.n_logits:
                raise LlamaError("no logits; first decode a batch whose `output` marks a row")
            return self._rows()

    def _rows(self) -> NDArray[np.float32]:
        if self._buffer is None:
            self._buffer_pointer = self._computed.logits
            owner = _LogitsOwner(self._handle, self._buffer_pointer, (self._reserved_rows, self.n_vocab))
            self._buffer = np.asarray(owner)
        if self._n_view != self.n_logits:
            self._view, self._n_view = self._buffer[: self.n_logits], self.n_logits
        return self._view

    def _release_logits(self) -> bool:
        """Drop this object's view of libllama's output buffer. Returns whether no other view exists."""
        self._view, self._n_view = self._no_logits, 0
        if self._buffer is None:
            return True
        buffer = weakref.ref(self._buffer)  # the base of every view
        self._buffer = None
        self._buffer = buffer()
        return self._buffer is None

    # --- the largest logits -----------------------------------------------------------

    def argmax(self, rows: NDArray[np.float32]) -> list[int]:
        """Return the position of the largest number of each row, the first of equal ones.

        Args:
            rows: float32, shape (n, width), width >= 1. No copy is made of the logits of the last decode.

        Returns:
            n positions. -1 if the largest number is not finite, or any number is NaN.
        """
        with self._lock:
            if rows is self._view:
                pointer, n, width = self._buffer_pointer, self._n_view, self.n_vocab
            else:
                pointer, n, width = _pointer_to(rows)
            if n > self._n_argmax:
                self._argmax, self._n_argmax = ffi.new("int32_t[]", n), n
            code = lib.erl_argmax(pointer, n, width, self._argmax)
            if code:
                check(code, "selecting logits")
            positions: list[int] = ffi.unpack(self._argmax, n)
        return positions

    def top_k(self, rows: NDArray[np.float32], out: tuple[NDArray[np.intp], NDArray[np.float32]]) -> None:
        """Write the k largest numbers of each row, largest first, ties by rising position.

        A NaN counts as the largest number. Of a row with NaN, only the first result is defined.

        Args:
            rows: as for `argmax`.
            out: arrays for the positions and the numbers; C-contiguous, each shape (n, k) with a k of 1 to width.
                Fastest if it is the object of the last call.
        """
        with self._lock:
            if rows is self._view:
                pointer, n, width = self._buffer_pointer, self._n_view, self.n_vocab
            else:
                pointer, n, width = _pointer_to(rows)
            if out is not self._results.out:
                self._results = _Results.of(out)
            _, n_out, k, positions, numbers = self._results
            if n_out != n or not 1 <= k <= width:
                raise LlamaError(f"results of shape ({n_out}, {k}), for {n} rows of {width} numbers")
            code = lib.erl_top_k(pointer, n, width, k, positions, numbers)
            if code:
                check(code, "selecting logits")

    def set_adapters(self, adapters: Sequence[tuple[LlamaAdapter, float]]) -> None:
        """Set the adapters and their scales for the next decodes. They replace all earlier adapters.

        The KV cells stay unchanged. Each adapter lives until it is replaced here, or the context is freed.

        Raises:
            LlamaError: an adapter is closed, listed twice or of another model, or a scale is not finite. The
                adapters stay unchanged.
        """
        handles: list[Handle] = []
        with self._lock:
            native = self._native()
            try:
                for adapter, scale in adapters:
                    if not abs(scale) <= _MAX_FLOAT32:
                        raise LlamaError(f"a scale of {scale}; it must be a finite float32")
                    handles.append(adapter.hold(self._model))
                if len({id(handle) for handle in handles}) < len(handles):
                    raise LlamaError("an adapter is listed twice; list each once, with one scale")
                natives = ffi.new("struct llama_adapter_lora *[]", [handle.pointer for handle in handles] or 1)
                scales = ffi.new("float[]", [scale for _, scale in adapters] or 1)
                check(lib.erl_context_adapters(native, natives, scales, len(handles)), "setting adapters")
            except BaseException:
                for handle in handles:
                    handle.release()
                raise
            replaced, self._adapters[:] = self._adapters[:], handles
        for handle in replaced:
            handle.release()

    # --- memory -----------------------------------------------------------------------

    def clear(self) -> None:
        """Drop all sequences."""
        with self._lock:
            check(lib.erl_memory_clear(self._native(), False), "clearing the memory")

    def cut(self, sequence: int, start: int, end: int = -1) -> bool:
        """Drop positions [start, end) of a sequence; end < 0 means to its end.

        Returns:
            False if libllama refuses. True does not guarantee that the rest is usable: sliding-window memory
            returns True when it is not.
        """
        self._check_sequence(sequence)
        with self._lock:
            return check(lib.erl_memory_cut(self._native(), sequence, start, end), "cutting a sequence") == 1

    def copy(self, source: int, target: int, start: int = 0, end: int = -1) -> None:
        """Share the cells of `source` at positions [start, end) with `target`. No data moves.

        Needs `kv_unified`, so that all sequences use the same pool.
        """
        self._check_sequence(source)
        self._check_sequence(target)
        with self._lock:
            check(lib.erl_memory_copy(self._native(), source, target, start, end), "copying a sequence")

    def first_position(self, sequence: int) -> int:
        """Return the lowest position of a sequence; -1 if it is empty."""
        self._check_sequence(sequence)
        with self._lock:
            return check(lib.erl_memory_first(self._native(), sequence), "reading a sequence")

    def last_position(self, sequence: int) -> int:
        """Return the highest position of a sequence; -1 if it is empty."""
        self._check_sequence(sequence)
        with self._lock:
            return check(lib.erl_memory_last(self._native(), sequence), "reading a sequence")

    def state(self, sequence: int) -> NDArray[np.uint8]:
        """Return the state of a sequence, as libllama serializes it.

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
                    f"reading the state of sequence {sequence} returned {written} of {size} bytes: {last_error()}"
                )
            return state

    def set_state(self, sequence: int, state: bytes | bytearray | memoryview) -> None:
        """Replace the state of a sequence by one that `state()` returned.

        libllama trusts the bytes, so the caller must have checked them.

        Raises:
            LlamaError: the state does not fit this context. The sequence is then empty.
        """
        self._check_sequence(sequence)
        size = memoryview(state).nbytes
        with self._lock:
            native = self._native()
            read = lib.erl_state_set(native, sequence, ffi.from_buffer("uint8_t[]", state), size)
            if read <= 0 or read != size:
                raise self._not_set(
                    native, sequence, f"a state of {size} bytes does not fit", f"libllama read {read} bytes"
                )

    def set_states(self, sequence: int, states: Sequence[memoryview]) -> None:
        """Replace the state of a sequence by several that follow each other, joined into one.

        For many small states this is faster than setting them one by one, because libllama looks at every cell of
        the context each time. Takes a copy of their bytes, so it is slower for large ones. The caller must have
        checked the bytes.

        Args:
            states: at least one, from `state()`, of consecutive positions, with full attention and one position
                per cell.

        Raises:
            LlamaError: the states cannot be joined, or do not fit this context. The sequence is then empty.
        """
        self._check_sequence(sequence)
        if not states:
            raise LlamaError("no states to join; pass at least one")
        buffers = [ffi.from_buffer("uint8_t[]", state) for state in states]
        pointers = ffi.new("uint8_t *[]", buffers)
        sizes = ffi.new("uint64_t[]", [len(buffer) for buffer in buffers])
        with self._lock:
            native = self._native()
            if lib.erl_state_set_joined(native, sequence, pointers, sizes, len(buffers)) != 1:
                raise self._not_set(native, sequence, f"{len(buffers)} states do not fit", "they cannot be joined")

    def _not_set(self, native: object, sequence: int, problem: str, otherwise: str) -> LlamaError:
        """Empty a sequence whose state could not be set, and return the error."""
        reason = last_error()
        problems = drain_log()
        lib.erl_memory_cut(native, sequence, -1, -1)
        return LlamaError(f"{problem}: " + (reason or "; ".join(problems[-2:]) or otherwise))

    def _check_sequence(self, sequence: int) -> None:
        if not 0 <= sequence < self.n_seq_max:
            raise LlamaError(f"sequence {sequence} is outside 0 to n_seq_max - 1 = {self.n_seq_max - 1}")


def _pointer(name: str, array: NDArray[np.integer], n: int, dtype: np.dtype[np.integer], kind: str) -> object:
    if array.dtype != dtype or array.shape != (n,) or not array.flags.c_contiguous:
        raise LlamaError(f"{name} must be a contiguous {dtype.name} array of shape ({n},)")
    return ffi.from_buffer(kind, array)


class _Results(NamedTuple):
    """The arrays of the last `top_k`, their shape, and pointers to them."""

    out: tuple[NDArray[np.intp], NDArray[np.float32]]
    n: int
    k: int
    positions: object
    numbers: object

    @staticmethod
    def of(out: tuple[NDArray[np.intp], NDArray[np.float32]]) -> _Results:
        positions, numbers = out
        for array, dtype in ((positions, np.intp), (numbers, np.float32)):
            if array.dtype != dtype or array.shape != positions.shape or array.ndim != 2:
                raise LlamaError(f"results of type {array.dtype} and shape {array.shape}")
        n, k = positions.shape
        return _Results(
            out,
            n,
            k,
            ffi.from_buffer("intptr_t[]", positions, require_writable=True),
            ffi.from_buffer("float[]", numbers, require_writable=True),
        )


def _pointer_to(rows: NDArray[np.float32]) -> tuple[object, int, int]:
    """Return a pointer to rows of numbers, and their shape."""
    n, width = rows.shape
    if not width:
        raise LlamaError("rows without numbers have no largest number")
    return ffi.from_buffer("float[]", np.ascontiguousarray(rows, np.float32)), n, width


class _LogitsOwner:
    """The owner of the memory behind a logits view. It holds the context until the last view is deleted."""

    __slots__ = ("__array_interface__", "_handle")

    def __init__(self, handle: Handle, pointer: object, shape: tuple[int, int]) -> None:
        self._handle = handle.hold()
        # numpy's protocol: an array made from this object keeps it as its base.
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(np.float32).str,
            "shape": shape,
            "data": (int(ffi.cast("uintptr_t", pointer)), True),
        }

    def __del__(self) -> None:
        self._handle.release()


def cell_bytes(model: LlamaModel, type_k: int, type_v: int) -> int:
    """Return the bytes of one token's K and V in all layers, each with full attention; 0 without attention."""
    shape = model.shape
    if not shape.n_head:
        return 0
    row = shape.n_embd // shape.n_head * shape.n_head_kv
    bytes_per_element = sum(
        lib.erl_ggml_type_bytes(kind) / lib.erl_ggml_block_size(kind) for kind in (type_k, type_v)
    )
    return int(shape.n_layer * row * bytes_per_element)


def _check_memory(model: LlamaModel, n_ctx: int, type_k: int, type_v: int) -> None:
    """Raise LlamaError for more cells than fit into this machine's memory.

    The system does not refuse such an allocation. It ends the process when the cells are first written. The size is
    known only for full attention, where all cells have the same size.
    """
    shape = model.shape
    if shape.recurrent or shape.hybrid or shape.n_swa > 0 or not shape.n_head:
        return
    n_bytes = n_ctx * cell_bytes(model, type_k, type_v)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > memory:
        raise LlamaError(
            f"n_ctx={n_ctx} needs {n_bytes / 2**30:.1f} GiB for its cells and this machine has "
            f"{memory / 2**30:.1f} GiB; use a smaller n_ctx, or smaller KV types"
        )
