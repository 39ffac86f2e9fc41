"""A backend without a model: deterministic, fast, and as strict as a real backend.

The "KV" of a position is a number that depends on all tokens up to it, and the logits depend on the KV of all
positions of a sequence. So a single wrong position changes the reply. The vocabulary has the bytes and an end
token. All sequences take cells from one pool and may share them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import NamespaceValue
from erllama.engine.backend import Batch, Limits
from erllama.errors import BackendError, CellsExhausted, OptionError, StateError

EOG = 256
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HEADER = struct.Struct("<QII")


class StubVocabulary:
    """Ids 0 to 255 are bytes; 256 ends a generation."""

    n_tokens = EOG + 1
    longest_piece = 1

    def __init__(self) -> None:
        self.is_eog: NDArray[np.bool_] = np.arange(self.n_tokens) == EOG

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        raw = source.encode() if isinstance(source, str) else source
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < EOG else b""

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return b"".join(self.piece(int(token)) for token in tokens)


class StubBackend:
    """Computes replies from hashes.

    Args:
        seed: stubs with equal seeds are the same model.
        n_ctx, n_batch, n_ubatch, n_sequences: sizes, as of a real backend. n_ctx is the size of the pool.
        can_trim: False behaves like memory that cannot be cut: `cut` raises, and only the state at the end of a
            sequence can be packed.
        eog_bias: added to the logit of the end token.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_ubatch: int = 128,
        n_sequences: int = 12,
        can_trim: bool = True,
        eog_bias: float = 0.0,
    ) -> None:
        if min(n_ctx, n_batch, n_ubatch, n_sequences) < 1:
            raise OptionError("n_ctx, n_batch, n_ubatch and n_sequences must be at least 1")
        self.limits = Limits(
            n_ctx, n_batch, n_ubatch, StubVocabulary.n_tokens, can_trim, n_sequences=n_sequences, cell_bytes=8
        )
        self.vocabulary = StubVocabulary()
        self.namespace: Mapping[str, NamespaceValue] = {"backend": "stub", "seed": seed, "can_trim": can_trim}
        self.recipe = hashlib.sha256(f"stub {n_ubatch}".encode()).digest()[:16]
        self.tokens_decoded = 0
        self._seed = np.uint64(seed)
        self._eog_bias = eog_bias
        self._kv = np.zeros(n_ctx, np.uint64)  # by cell
        self._n_holders = np.zeros(n_ctx, np.int32)  # the number of sequences that hold a cell
        self._table = np.zeros((n_sequences, n_ctx), np.int32)  # the cell of each position of a sequence
        self._lengths = [0] * n_sequences
        self._places = (2 * np.arange(n_ctx, dtype=np.uint64) + 1) * _MIX
        self._aborted = self._closed = False

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if self._aborted or self._closed:
            raise BackendError("the backend is closed" if self._closed else "the decode was aborted")
        if not 1 <= len(batch.tokens) <= self.limits.n_batch:
            raise BackendError(f"a batch of {len(batch.tokens)} tokens; n_batch is {self.limits.n_batch}")
        if not np.all((batch.sequences >= 0) & (batch.sequences < self.limits.n_sequences)):
            raise BackendError(f"a sequence outside 0 to {self.limits.n_sequences - 1}")
        free = np.flatnonzero(self._n_holders == 0)
        if len(free) < len(batch.tokens):
            raise CellsExhausted(f"{len(free)} free cells for {len(batch.tokens)} tokens")
        self.tokens_decoded += len(batch.tokens)
        rows = []
        for cell, token, position, sequence, output in zip(
            free.tolist(), *(array.tolist() for array in batch), strict=False
        ):
            if position != self._lengths[sequence]:
                raise BackendError(f"position {position} does not follow {self._lengths[sequence]} positions")
            before = int(self._kv[self._table[sequence, position - 1]]) if position else int(self._seed)
            digest = hashlib.blake2b(struct.pack("<QI", before, token), digest_size=8).digest()
            self._kv[cell] = int.from_bytes(digest, "little")
            self._append_cells(sequence, position, np.array([cell], np.int32))
            if output:
                rows.append(self._logits(sequence))
        return np.array(rows, np.float32).reshape(len(rows), self.limits.n_vocab)

    def _append_cells(self, sequence: int, start: int, cells: NDArray[np.int32]) -> None:
        """Append cells to a sequence that holds `start` positions."""
        self._table[sequence, start : start + len(cells)] = cells
        self._n_holders[cells] += 1
        self._lengths[sequence] = start + len(cells)

    def _values(self, sequence: int, start: int, end: int) -> NDArray[np.uint64]:
        values: NDArray[np.uint64] = self._kv[self._table[sequence, start:end]]
        return values

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        length = self._lengths[sequence]
        summed = np.bitwise_xor.reduce(self._values(sequence, 0, length) * self._places[:length])
        logits = np.random.Generator(np.random.PCG64(int(summed))).standard_normal(self.limits.n_vocab, np.float32)
        logits *= np.float32(3)
        logits[EOG] += np.float32(self._eog_bias)
        return logits

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        length = self._lengths[sequence]
        if not 0 <= start < end <= length:
            raise BackendError(f"positions {start} to {end} of a sequence that holds {length}")
        if not self.limits.can_trim and end != length:
            raise BackendError(f"this memory can only be packed at its end, {length}, not at {end}")
        header = _HEADER.pack(int(self._seed), start, end)
        return np.frombuffer(header + self._values(sequence, start, end).tobytes(), np.uint8).copy()

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        raw = bytes(payload)
        if len(raw) != _HEADER.size + 8 * (end - start) or _HEADER.unpack_from(raw) != (self._seed, start, end):
            raise StateError("the payload has other positions")
        if self._lengths[sequence] != start:
            raise StateError(f"positions from {start} on, in a sequence that holds {self._lengths[sequence]}")
        free = np.flatnonzero(self._n_holders == 0)[: end - start]
        if len(free) < end - start:
            raise StateError(f"{len(free)} free cells for {end - start} positions")
        self._kv[free] = np.frombuffer(raw, np.uint64, offset=_HEADER.size)
        self._append_cells(sequence, start, free.astype(np.int32))

    def share(self, source: int, target: int, end: int) -> None:
        if not self.limits.can_trim:
            raise BackendError("sequences can share this memory only as a whole")
        if not 0 <= end <= self._lengths[source] or self._lengths[target]:
            raise BackendError(
                f"positions 0 to {end} of a sequence that holds {self._lengths[source]}, "
                f"for one that holds {self._lengths[target]}"
            )
        self._append_cells(target, 0, self._table[source, :end].copy())

    def cut(self, sequence: int, end: int) -> None:
        if not self.limits.can_trim:
            raise BackendError("this memory cannot be cut")
        self._release(sequence, min(end, self._lengths[sequence]))

    def _release(self, sequence: int, end: int) -> None:
        self._n_holders[self._table[sequence, end : self._lengths[sequence]]] -= 1
        self._lengths[sequence] = end

    def drop(self, sequence: int) -> None:
        self._release(sequence, 0)

    def clear(self) -> None:
        for sequence in range(len(self._lengths)):
            self._release(sequence, 0)

    @property
    def cells_used(self) -> int:
        """The number of cells in use."""
        return int(np.count_nonzero(self._n_holders))

    def abort(self, on: bool) -> None:
        self._aborted = on

    def close(self) -> None:
        self._closed = True
