"""Reference model of a backend: the tokens of each sequence, and the logits expected for them.

A second instance computes the expected logits from an empty context. Used by the rules for backends and by
`BackendMachine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, zip_longest
from typing import NamedTuple

import numpy as np

from erllama.engine.backend import Backend, Batch
from erllama.errors import CellsExhausted, StateError
from erllama.testing.backends.rules import Logits, raises
from erllama.testing.rules import expect_success, require

_MAX_EXPECTED = 400  # maximum number of cached expected results


class PackedRange(NamedTuple):
    """A payload, its positions, and all tokens up to their end."""

    start: int
    end: int
    tokens: tuple[int, ...]
    payload: bytes


class BackendModel:
    """Calls a backend, and compares its results with the expected ones.

    Args:
        backend: the backend under test, empty.
        cold: another instance. It computes the expected logits in sequence 0, from an empty context.
        tolerance: as of `BackendRules`.
    """

    def __init__(self, backend: Backend, cold: Backend, tolerance: float) -> None:
        self.backend, self.limits = backend, backend.limits
        self._cold, self._tolerance = cold, tolerance
        self._cold_tokens: tuple[int, ...] = ()
        self._expected: dict[tuple[int, ...], Logits] = {}
        self._cell_ids = count()
        self.tokens: list[list[int]] = [[] for _ in range(self.limits.n_sequences)]
        # An id for the cell of each position. Sequences that share a cell have the same id.
        self._cells: list[list[int]] = [[] for _ in range(self.limits.n_sequences)]
        self._payloads: dict[
            int, tuple[tuple[int, ...], bytes]
        ] = {}  # tokens and payload of whole sequences, as last packed

    @property
    def free(self) -> int:
        """The number of cells that no sequence holds."""
        return self.limits.n_ctx - len(set().union(*self._cells))

    @property
    def max_slice(self) -> int:
        """The maximum number of tokens of one slice."""
        return min(self.limits.n_batch, self.limits.n_ubatch)

    def expected(self, tokens: Sequence[int]) -> Logits:
        """Return the logits after these tokens from the second instance, shape (n_vocab,)."""
        target = tuple(tokens)
        if target not in self._expected:
            n_held = len(self._cold_tokens)
            if not (n_held < len(target) and target[:n_held] == self._cold_tokens):
                self._cold.clear()
                n_held = 0
            while n_held < len(target):
                end = min(n_held + self.max_slice, len(target))
                logits = self._cold.decode(
                    _batch([(0, n_held + i, t) for i, t in enumerate(target[n_held:end])])[0]
                )
                n_held = end
            self._cold_tokens = target
            if len(self._expected) >= _MAX_EXPECTED:
                del self._expected[next(iter(self._expected))]
            self._expected[target] = logits[0].copy()
        return self._expected[target]

    def decode(
        self, parts: Sequence[tuple[int, Sequence[int]]], *, interleaved: bool = True, extra_output: bool = False
    ) -> list[Logits]:
        """Decode parts (sequence, ids) as one batch, and compare each output row.

        Args:
            interleaved: take rows of the parts in turn.
            extra_output: make every second row an output row, in addition to the last of each part.

        Returns:
            the logits of each part's last row; empty if the batch did not fit and was refused.
        """
        queues = [
            [(sequence, len(self.tokens[sequence]) + at, token) for at, token in enumerate(ids)]
            for sequence, ids in parts
        ]
        rows = [
            row for turn in (zip_longest(*queues) if interleaved else queues) for row in turn if row is not None
        ]
        last = {queue[-1][:2] for queue in queues}
        output = [row[:2] in last or (extra_output and at % 2 == 0) for at, row in enumerate(rows)]
        batch, original = _batch(rows, output)
        if len(rows) > self.free:
            # Memory that cannot be cut may need fewer cells than positions, so the reference model cannot
            # predict whether the batch fits.
            if self.limits.can_trim:
                with raises(CellsExhausted, f"{len(rows)} tokens for {self.free} cells"):
                    self.backend.decode(batch)
                self.compare(())
            return []
        with expect_success(f"decode() must compute {len(rows)} rows of sequences {sorted({s for s, _ in parts})}"):
            logits = self.backend.decode(batch)
            found = logits.copy()
        for name in Batch._fields:
            require(
                np.array_equal(getattr(batch, name), getattr(original, name)),
                f"decode() changed the batch's {name}",
            )
        n_rows = sum(output)
        require(found.dtype == np.float32, f"decode() returns {found.dtype}; logits are float32")
        require(
            found.shape == (n_rows, self.limits.n_vocab),
            f"decode() returns logits of shape {found.shape} for {n_rows} output rows of {self.limits.n_vocab}",
        )
        require(bool(np.isfinite(found).all()), "decode() returns logits that are not finite")
        results: dict[int, Logits] = {}
        found_rows = iter(found)
        for (sequence, position, token), has_output in zip(rows, output, strict=True):
            require(position == len(self.tokens[sequence]), "positions of the model are wrong")
            self.tokens[sequence].append(token)
            self._cells[sequence].append(next(self._cell_ids))
            if has_output:
                results[sequence] = next(found_rows)
                self._compare_row(results[sequence], sequence, len(rows))
        self.compare({sequence for sequence, _ in parts})
        return [results[sequence] for sequence, _ in parts]

    def _compare_row(self, found: Logits, sequence: int, n_rows: int) -> None:
        tokens = self.tokens[sequence]
        expected = self.expected(tokens)
        apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
        require(
            bool(apart <= self._tolerance * largest),
            f"decode() of position {len(tokens) - 1} of sequence {sequence}, in a batch of {n_rows} rows: "
            f"logits are {apart:.3g} from those that the second instance computes, "
            f"where the largest is {largest:.3g}; tolerance={self._tolerance}",
        )

    def prefill(self, sequence: int, ids: Sequence[int]) -> None:
        """Decode many tokens at the end of a sequence, slice by slice."""
        for at in range(0, len(ids), self.max_slice):
            self.decode([(sequence, ids[at : at + self.max_slice])])

    def pack(self, sequence: int, start: int, end: int) -> PackedRange:
        with expect_success(
            f"pack() must return positions {start} to {end} of a sequence of {len(self.tokens[sequence])}"
        ):
            payload = self.backend.pack(sequence, start, end)
        require(
            payload.dtype == np.uint8 and payload.ndim == 1,
            f"pack() returns {payload.dtype}, {payload.shape}",
        )
        self.compare(())
        return PackedRange(start, end, tuple(self.tokens[sequence][:end]), payload.tobytes())

    def restore(self, sequence: int, packed: PackedRange) -> bool:
        """Restore a packed range at the end of a sequence with the tokens before it. Return False without room."""
        n = packed.end - packed.start
        what = f"positions {packed.start} to {packed.end} into sequence {sequence}"
        buffer = bytearray(packed.payload)
        if n > self.free:
            if self.limits.can_trim:
                with raises(StateError, f"{n} positions for {self.free} cells"):
                    self.backend.restore(sequence, packed.start, packed.end, memoryview(buffer))
                self.compare(())
            return False
        with expect_success(f"restore() must accept {what}"):
            self.backend.restore(sequence, packed.start, packed.end, memoryview(buffer))
        require(bytes(buffer) == packed.payload, f"restore() of {what} changed the caller's payload")
        buffer[:] = bytes(len(buffer))  # a cache may reuse its buffer, too
        self.tokens[sequence] = list(packed.tokens)
        self._cells[sequence] = [*self._cells[sequence][: packed.start], *(next(self._cell_ids) for _ in range(n))]
        self.compare([sequence])
        return True

    def share(self, source: int, target: int, end: int) -> None:
        with expect_success(f"share() must add {end} positions of sequence {source} to {target}, which is empty"):
            self.backend.share(source, target, end)
        self.tokens[target], self._cells[target] = self.tokens[source][:end], self._cells[source][:end]
        self.compare([target])

    def cut(self, sequence: int, end: int) -> None:
        with expect_success(f"cut() must drop positions from {end} on"):
            self.backend.cut(sequence, end)
        del self.tokens[sequence][end:], self._cells[sequence][end:]
        self.compare([sequence])

    def drop(self, sequence: int) -> None:
        with expect_success(f"drop() must empty sequence {sequence}"):
            self.backend.drop(sequence)
        self.tokens[sequence], self._cells[sequence] = [], []
        self.compare([sequence])

    def clear(self) -> None:
        with expect_success("clear() must empty every sequence"):
            self.backend.clear()
        self.tokens = [[] for _ in self.tokens]
        self._cells = [[] for _ in self._cells]
        self._payloads.clear()

    def probe(self, sequence: int, token: int) -> None:
        """Decode one more token, compare, and cut it off. Requires memory that can be cut."""
        n_held = len(self.tokens[sequence])
        if self.decode([(sequence, [token])]):
            self.cut(sequence, n_held)

    def compare(self, changed: Sequence[int] | set[int]) -> None:
        """Check that all sequences except `changed` still pack to the same bytes."""
        for sequence, tokens in enumerate(self.tokens):
            if not tokens:
                self._payloads.pop(sequence, None)
                continue
            known = self._payloads.get(sequence)
            if sequence in changed or known is None or known[0] != tuple(tokens):
                with expect_success(f"pack() must return all {len(tokens)} positions of sequence {sequence}"):
                    raw = self.backend.pack(sequence, 0, len(tokens)).tobytes()
                self._payloads[sequence] = (tuple(tokens), raw)
            else:
                with expect_success(f"pack() must return all {len(tokens)} positions of sequence {sequence}"):
                    raw = self.backend.pack(sequence, 0, len(tokens)).tobytes()
                require(raw == known[1], f"sequence {sequence} changed by a call that did not name it")


def _batch(rows: Sequence[tuple[int, int, int]], output: Sequence[bool] | None = None) -> tuple[Batch, Batch]:
    """Return a batch of rows (sequence, position, token), and a copy. Default output: the last row."""
    flags = [at == len(rows) - 1 for at in range(len(rows))] if output is None else output

    def make() -> Batch:
        sequences, positions, tokens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        return Batch(tokens, positions, sequences, np.array(flags, np.int8))

    return make(), make()
