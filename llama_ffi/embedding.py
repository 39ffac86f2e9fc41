"""An embedding context: token sequences in, rows of numbers out, without state between calls.

It shares the weights of a model with other contexts. One thread at a time may use it, and a lock makes a second
thread wait. Arguments that would make libllama abort (sequences that are too long, ids out of range) raise
`LlamaError`. `erllama.engine.backends.llama_embedding` calls this.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from erllama.llama_ffi.context_options import RopeOptions, create_context, set_rope_options
from erllama.llama_ffi.library import (
    AbortedError,
    DecodeError,
    LlamaError,
    check,
    drain_log,
    ffi,
    last_error,
    lib,
    max_sequences,
)
from erllama.llama_ffi.model import LlamaModel
from erllama.llama_ffi.native_context import NativeContext

# The numbers of llama.h.
POOLINGS = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
_NAMES = {number: name for name, number in POOLINGS.items()}


def own_pooling(model: LlamaModel) -> str | None:
    """Return the pooling that a model's file names; None if it names none."""
    metadata = model.metadata
    found = metadata.get(f"{metadata.get('general.architecture')}.pooling_type", "")
    return _NAMES.get(int(found)) if found.isdecimal() and int(found) else None


class EmbeddingContext(NativeContext):
    """A llama_context whose rows are embeddings.

    Args:
        model: an open model with weights.
        pooling: how the rows of a sequence become one row: "mean", "cls" (the first row), "last", or "rank"
            (scores, for a model that ranks); "none" for a row per token.
        n_tokens: maximum number of tokens in one `embed`, and so in one sequence. All are computed at once, and
            libllama keeps a row of logits for each token, as wide as the vocabulary.
        n_sequences: maximum number of sequences in one `embed`.
        The other arguments are those of LlamaContext.

    Attributes:
        width: the length of a row: the size of an embedding, or the number of scores.

    Raises:
        LlamaError: libllama refused; the message says why.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        pooling: str,
        n_tokens: int,
        n_sequences: int = 1,
        n_threads: int = 4,
        flash_attn: bool | None = None,
        type_k: int = 1,
        type_v: int = 1,
        **rope: Unpack[RopeOptions],
    ) -> None:
        if model.vocab_only:
            raise LlamaError("this model was loaded with vocab_only=True: it has no weights to embed with")
        if pooling not in POOLINGS:
            raise LlamaError(f"pooling={pooling!r}; use one of {', '.join(POOLINGS)}")
        if not 1 <= n_sequences <= max_sequences() or min(n_tokens, n_threads) < 1:
            raise LlamaError(
                f"n_tokens={n_tokens}, n_threads={n_threads}, n_sequences={n_sequences}; they must be at least 1, "
                f"and n_sequences at most {max_sequences()}"
            )
        _check_memory(model, n_tokens)
        model_handle = model.hold()
        try:
            options = ffi.new("erl_context_options *")
            options.n_ctx = options.n_batch = options.n_ubatch = n_tokens
            options.n_seq_max = n_sequences
            options.n_threads = options.n_threads_batch = n_threads
            options.flash_attn = -1 if flash_attn is None else int(flash_attn)
            options.type_k, options.type_v = type_k, type_v
            set_rope_options(options, **rope)
            # Unified, because otherwise libllama splits sequences of different lengths, and pools each part.
            options.offload_kqv = options.kv_unified = options.embeddings = True
            options.pooling = POOLINGS[pooling]
            with model.adapters_lock:
                pointer = create_context(model_handle, options)
        except BaseException:
            model_handle.release()
            raise
        self._adapters_lock = model.adapters_lock
        super().__init__(pointer, model_handle)
        self.pooling = pooling
        self.n_tokens, self.n_sequences = n_tokens, n_sequences
        self.width = model.shape.n_cls_out if pooling == "rank" else model.shape.n_embd_out
        # A model that only encodes has learned positions, and cannot exceed their number.
        encodes = check(lib.erl_context_has_memory(pointer), "making a context") == 0
        self._longest = min(n_tokens, model.shape.n_ctx_train) if encodes else n_tokens

    def embed(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Compute several independent sequences together.

        Args:
            sequences: token ids, int32, each of shape (n,), n >= 1; together at most n_tokens.

        Returns:
            one float32 array per sequence, in order: shape (width,), or (n, width) without pooling.

        Raises:
            AbortedError: `abort()` was called.
            DecodeError: libllama failed.
            LlamaError: an argument is out of range; no row was computed.
        """
        lengths = [len(sequence) for sequence in sequences]
        n = sum(lengths)
        if not 1 <= len(sequences) <= self.n_sequences or n > self.n_tokens:
            raise LlamaError(
                f"{len(sequences)} sequences of {n} tokens together; "
                f"pass 1 to {self.n_sequences} sequences, and at most {self.n_tokens} tokens"
            )
        if not 1 <= min(lengths) <= max(lengths) <= self._longest:
            raise LlamaError(
                f"a sequence of {min(lengths)} to {max(lengths)} tokens; each must have 1 to {self._longest}"
            )
        tokens = np.concatenate(sequences).astype(np.int32, casting="same_kind")
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        numbers = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        pooled = self.pooling != "none"
        rows = np.empty((len(lengths) if pooled else n, self.width), np.float32)
        with self._lock, self._adapters_lock:
            code = lib.erl_embed(
                self._native(),
                n,
                ffi.from_buffer("int32_t[]", tokens),
                ffi.from_buffer("int32_t[]", positions),
                ffi.from_buffer("int32_t[]", numbers),
                len(lengths),
                ffi.from_buffer("float[]", rows, require_writable=True),
                self.width,
                self._computed,
            )
            reason = last_error()
            problems = "; ".join(drain_log()[-3:])
        if code == 2:
            raise AbortedError("the computation was aborted")
        if code == 3:
            raise LlamaError(reason)
        if code != 0:
            raise DecodeError(
                f"embedding failed with code {code}: {reason or problems or 'libllama gave no reason'}"
            )
        return list(rows) if pooled else np.split(rows, np.cumsum(lengths)[:-1])


def _check_memory(model: LlamaModel, n_tokens: int) -> None:
    """Raise LlamaError for more rows than fit into this machine's memory. The system does not refuse them."""
    n_bytes = 4 * n_tokens * (model.vocabulary.n_tokens + model.shape.n_embd)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > memory:
        raise LlamaError(
            f"embedding {n_tokens} tokens at once needs {n_bytes / 2**30:.1f} GiB for their rows and this machine "
            f"has {memory / 2**30:.1f} GiB; embed shorter texts"
        )
