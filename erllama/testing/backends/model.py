"""A simple model of a backend: the tokens that each sequence holds, and logits computed cold from those alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, zip_longest
from typing import NamedTuple

import numpy as np

from erllama.engine.backend import Backend, Batch
from erllama.errors import CellsExhausted, StateError
from erllama.testing.backends.rules import Logits, refused
from erllama.testing.rules import must, promised

_PROBES = 400  # most results of cold computations that are kept


class Packed(NamedTuple):
    """A payload: of which positions, and all tokens up to their end."""

    start: int
    end: int
    tokens: tuple[int, ...]
    payload: bytes


class BackendModel:
    """Calls a backend, and checks what it does against what it must do.

    Args:
        backend: the backend under test, holding nothing.
        cold: another instance. It computes prompts from nothing, in sequence 0: what is expected.
        tolerance: as of `BackendRules`.
    """

    def __init__(self, backend: Backend, cold: Backend, tolerance: float) -> None:
        self.backend, self.limits = backend, backend.limits
        self._cold, self._tolerance = cold, tolerance
        self._cold_tokens: tuple[int, ...] = ()
        self._expected: dict[tuple[int, ...], Logits] = {}
        self._numbers = count()
        self.tokens: list[list[int]] = [[] for _ in range(self.limits.n_sequences)]
        # A number for the cell of each position: sequences that share a cell have the same.
        self._cells: list[list[int]] = [[] for _ in range(self.limits.n_sequences)]
        self._payloads: dict[
            int, tuple[tuple[int, ...], bytes]
        ] = {}  # of whole sequences, as they were last packed

    @property
    def free(self) -> int:
        """Cells that no sequence holds."""
        return self.limits.n_ctx - len(set().union(*self._cells))

    @property
    def step(self) -> int:
        """Most tokens of one slice."""
        return min(self.limits.n_batch, self.limits.n_ubatch)

    def expected(self, tokens: Sequence[int]) -> Logits:
        """The logits after these tokens, computed from nothing; shape (n_vocab,)."""
        wanted = tuple(tokens)
        if wanted not in self._expected:
            held = len(self._cold_tokens)
            if not (held < len(wanted) and wanted[:held] == self._cold_tokens):
                self._cold.clear()
                held = 0
            while held < len(wanted):
                end = min(held + self.step, len(wanted))
                logits = self._cold.decode(_batch([(0, held + i, t) for i, t in enumerate(wanted[held:end])])[0])
                held = end
            self._cold_tokens = wanted
            if len(self._expected) >= _PROBES:
                del self._expected[next(iter(self._expected))]
            self._expected[wanted] = logits[0].copy()
        return self._expected[wanted]

    def decode(
        self, parts: Sequence[tuple[int, Sequence[int]]], *, mixed: bool = True, every: bool = False
    ) -> list[Logits]:
        """Decode parts (sequence, ids) as one batch, and compare each row that gives logits.

        Args:
            mixed: rows of the parts take turns.
            every: every second row gives logits, too, not only the last of each part.

        Returns:
            the logits of each part's last row; empty where the batch did not fit, and was refused rightly.
        """
        queues = [
            [(sequence, len(self.tokens[sequence]) + at, token) for at, token in enumerate(ids)]
            for sequence, ids in parts
        ]
        rows = [row for turn in (zip_longest(*queues) if mixed else queues) for row in turn if row is not None]
        last = {queue[-1][:2] for queue in queues}
        output = [row[:2] in last or (every and at % 2 == 0) for at, row in enumerate(rows)]
        batch, kept = _batch(rows, output)
        if len(rows) > self.free:
            # Memory that cannot be cut may need fewer cells than positions: whether it has room is not known here.
            if self.limits.can_trim:
                with refused(CellsExhausted, f"{len(rows)} tokens for {self.free} cells"):
                    self.backend.decode(batch)
                self.compare(())
            return []
        with promised(f"decode() must compute {len(rows)} rows of sequences {sorted({s for s, _ in parts})}"):
            logits = self.backend.decode(batch)
            found = logits.copy()
        for name in Batch._fields:
            must(np.array_equal(getattr(batch, name), getattr(kept, name)), f"decode() changed the batch's {name}")
        n_rows = sum(output)
        must(found.dtype == np.float32, f"decode() gives {found.dtype}; logits are float32")
        must(
            found.shape == (n_rows, self.limits.n_vocab),
            f"decode() gives logits of shape {found.shape} for {n_rows} rows with output of {self.limits.n_vocab}",
        )
        must(bool(np.isfinite(found).all()), "decode() gives logits that are not finite")
        results: dict[int, Logits] = {}
        wanted = iter(found)
        for (sequence, position, token), gives in zip(rows, output, strict=True):
            must(position == len(self.tokens[sequence]), "the model has lost count")
            self.tokens[sequence].append(token)
            self._cells[sequence].append(next(self._numbers))
            if gives:
                results[sequence] = next(wanted)
                self._compare_row(results[sequence], sequence, len(rows))
        self.compare({sequence for sequence, _ in parts})
        return [results[sequence] for sequence, _ in parts]

    def _compare_row(self, found: Logits, sequence: int, n_rows: int) -> None:
        tokens = self.tokens[sequence]
        expected = self.expected(tokens)
        apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
        must(
            bool(apart <= self._tolerance * largest),
            f"decode() of position {len(tokens) - 1} of sequence {sequence}, in a batch of {n_rows} rows: "
            f"logits are {apart:.3g} from those of the same tokens computed from nothing, "
            f"where the largest is {largest:.3g}; tolerance={self._tolerance}",
        )

    def prefill(self, sequence: int, ids: Sequence[int]) -> None:
        """Append many tokens, slice by slice."""
        for at in range(0, len(ids), self.step):
            self.decode([(sequence, ids[at : at + self.step])])

    def pack(self, sequence: int, start: int, end: int) -> Packed:
        with promised(f"pack() must give positions {start} to {end} of a sequence of {len(self.tokens[sequence])}"):
            payload = self.backend.pack(sequence, start, end)
        must(
            payload.dtype == np.uint8 and payload.ndim == 1, f"pack() gives {payload.dtype}, shape {payload.shape}"
        )
        self.compare(())
        return Packed(start, end, tuple(self.tokens[sequence][:end]), payload.tobytes())

    def restore(self, sequence: int, packed: Packed) -> bool:
        """Restore what was packed at the end of a sequence that goes before it; False where it had no room."""
        n = packed.end - packed.start
        what = f"positions {packed.start} to {packed.end} into sequence {sequence}"
        lent = bytearray(packed.payload)
        if n > self.free:
            if self.limits.can_trim:
                with refused(StateError, f"{n} positions for {self.free} cells"):
                    self.backend.restore(sequence, packed.start, packed.end, memoryview(lent))
                self.compare(())
            return False
        with promised(f"restore() must take {what}"):
            self.backend.restore(sequence, packed.start, packed.end, memoryview(lent))
        must(bytes(lent) == packed.payload, f"restore() of {what} changed the caller's payload")
        lent[:] = bytes(len(lent))  # it is gone now, as a cache's may be
        self.tokens[sequence] = list(packed.tokens)
        self._cells[sequence] = [*self._cells[sequence][: packed.start], *(next(self._numbers) for _ in range(n))]
        self.compare([sequence])
        return True

    def share(self, source: int, target: int, end: int) -> None:
        with promised(f"share() must let sequence {target}, which is empty, hold {end} positions of {source}"):
            self.backend.share(source, target, end)
        self.tokens[target], self._cells[target] = self.tokens[source][:end], self._cells[source][:end]
        self.compare([target])

    def cut(self, sequence: int, end: int) -> None:
        with promised(f"cut() must drop positions from {end} on"):
            self.backend.cut(sequence, end)
        del self.tokens[sequence][end:], self._cells[sequence][end:]
        self.compare([sequence])

    def drop(self, sequence: int) -> None:
        with promised(f"drop() must empty sequence {sequence}"):
            self.backend.drop(sequence)
        self.tokens[sequence], self._cells[sequence] = [], []
        self.compare([sequence])

    def clear(self) -> None:
        with promised("clear() must empty every sequence"):
            self.backend.clear()
        self.tokens = [[] for _ in self.tokens]
        self._cells = [[] for _ in self._cells]
        self._payloads.clear()

    def probe(self, sequence: int, token: int) -> None:
        """Compute one token more, compare, and cut it off again; only where memory can be cut."""
        held = len(self.tokens[sequence])
        if self.decode([(sequence, [token])]):
            self.cut(sequence, held)

    def compare(self, changed: Sequence[int] | set[int]) -> None:
        """Check that the sequences that a call did not name hold what they held: they pack to the same bytes."""
        for sequence, tokens in enumerate(self.tokens):
            if not tokens:
                self._payloads.pop(sequence, None)
                continue
            known = self._payloads.get(sequence)
            if sequence in changed or known is None or known[0] != tuple(tokens):
                with promised(f"pack() must give the {len(tokens)} positions that sequence {sequence} holds"):
                    raw = self.backend.pack(sequence, 0, len(tokens)).tobytes()
                self._payloads[sequence] = (tuple(tokens), raw)
            else:
                with promised(f"pack() must give the {len(tokens)} positions that sequence {sequence} holds"):
                    raw = self.backend.pack(sequence, 0, len(tokens)).tobytes()
                must(raw == known[1], f"sequence {sequence} changed by a call that did not name it")


def _batch(rows: Sequence[tuple[int, int, int]], output: Sequence[bool] | None = None) -> tuple[Batch, Batch]:
    """A batch of rows (sequence, position, token), and a copy; without `output`, the last row gives logits."""
    flags = [at == len(rows) - 1 for at in range(len(rows))] if output is None else output

    def make() -> Batch:
        sequences, positions, tokens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
        return Batch(tokens, positions, sequences, np.array(flags, np.int8))

    return make(), make()
