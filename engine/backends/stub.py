"""A backend without a model: deterministic, instant, and as strict as a real one.

Every position's "KV" is a number that depends on all tokens up to it, and the
logits depend on the KV of every position held, so a single wrong position
changes the reply. Its vocabulary is the bytes and an end token.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Batch, Limits, NamespaceValue
from erllama.errors import BackendError, OptionError, StateError

EOG = 256
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HEADER = struct.Struct("<QII")


class StubVocabulary:
    """Ids 0 to 255 are bytes; 256 ends generation."""

    n_tokens = EOG + 1

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
        seed: two stubs with one seed are the same model.
        n_ctx, n_batch, n_ubatch, n_sequences: sizes, as a real backend's.
        can_trim: False behaves as memory that cannot be cut: `cut` refuses,
            and state can be packed only at a sequence's end.
        eog_bias: added to the end token's logit.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        n_ctx: int = 4096,
        n_batch: int = 512,
        n_ubatch: int = 128,
        n_sequences: int = 1,
        can_trim: bool = True,
        eog_bias: float = 0.0,
    ) -> None:
        if min(n_ctx, n_batch, n_ubatch, n_sequences) < 1:
            raise OptionError("n_ctx, n_batch, n_ubatch and n_sequences must be at least 1")
        self.limits = Limits(n_ctx, n_batch, n_ubatch, StubVocabulary.n_tokens, can_trim)
        self.vocabulary = StubVocabulary()
        self.namespace: Mapping[str, NamespaceValue] = {"backend": "stub", "seed": seed, "can_trim": can_trim}
        self.recipe = hashlib.sha256(f"stub {n_ubatch}".encode()).digest()[:16]
        self.tokens_decoded = 0
        self._seed = np.uint64(seed)
        self._eog_bias = eog_bias
        self._cells = np.zeros((n_sequences, n_ctx), np.uint64)
        self._held = [0] * n_sequences
        self._places = (2 * np.arange(n_ctx, dtype=np.uint64) + 1) * _MIX
        self._aborted = False

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        if self._aborted:
            raise BackendError("the decode was aborted")
        if not 1 <= len(batch.tokens) <= self.limits.n_batch:
            raise BackendError(f"a batch of {len(batch.tokens)} tokens; n_batch is {self.limits.n_batch}")
        self.tokens_decoded += len(batch.tokens)
        rows = []
        for token, position, sequence, output in zip(*(array.tolist() for array in batch), strict=True):
            if position != self._held[sequence]:
                raise BackendError(f"position {position} after {self._held[sequence]} held")
            if position >= self.limits.n_ctx:
                raise BackendError(f"no cell for position {position}")
            before = int(self._cells[sequence, position - 1]) if position else int(self._seed)
            digest = hashlib.blake2b(struct.pack("<QI", before, token), digest_size=8).digest()
            self._cells[sequence, position] = int.from_bytes(digest, "little")
            self._held[sequence] = position + 1
            if output:
                rows.append(self._logits(sequence))
        return np.array(rows, np.float32).reshape(len(rows), self.limits.n_vocab)

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        held = self._held[sequence]
        summed = np.bitwise_xor.reduce(self._cells[sequence, :held] * self._places[:held])
        logits = np.random.Generator(np.random.PCG64(int(summed))).standard_normal(self.limits.n_vocab, np.float32)
        logits *= np.float32(3)
        logits[EOG] += np.float32(self._eog_bias)
        return logits

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        held = self._held[sequence]
        if not 0 <= start < end <= held:
            raise BackendError(f"positions {start} to {end} of a sequence that holds {held}")
        if not self.limits.can_trim and end != held:
            raise BackendError(f"this memory can be packed at its end, {held}, not at {end}")
        header = _HEADER.pack(int(self._seed), start, end)
        return np.frombuffer(header + self._cells[sequence, start:end].tobytes(), np.uint8).copy()

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        raw = bytes(payload)
        if len(raw) != _HEADER.size + 8 * (end - start) or _HEADER.unpack_from(raw) != (self._seed, start, end):
            raise StateError("the payload is not of these positions")
        if self._held[sequence] != start:
            raise StateError(f"positions from {start} on, in a sequence that holds {self._held[sequence]}")
        self._cells[sequence, start:end] = np.frombuffer(raw, np.uint64, offset=_HEADER.size)
        self._held[sequence] = end

    def cut(self, sequence: int, end: int) -> None:
        if not self.limits.can_trim:
            raise BackendError("this memory cannot be cut")
        self._held[sequence] = min(end, self._held[sequence])

    def drop(self, sequence: int) -> None:
        self._held[sequence] = 0

    def clear(self) -> None:
        self._held = [0] * len(self._held)

    def abort(self, on: bool) -> None:
        self._aborted = on

    def close(self) -> None:
        self._aborted = True
