"""What the rules for backends are written with: a backend to be made, and calls that check what comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, zip_longest
from typing import NamedTuple
from unittest import SkipTest

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Backend, Batch
from erllama.errors import BackendError
from erllama.testing.rules import must

Logits = NDArray[np.float32]
Ids = NDArray[np.int32]


class Part(NamedTuple):
    """Tokens for one sequence of a batch."""

    sequence: int
    start: int
    ids: Ids


class BackendRules:
    """What all rules for backends have in common.

    Attributes:
        tolerance: how far logits may be apart where the same tokens were computed in
            other batches or lie in other cells, as a part of the largest of them. Where
            equal bits are asked for, there is none.
        token_ids: ids to decode; none that ends or controls generation.
        texts: what the vocabulary must give back as it was.
        checks_positions: whether positions that do not follow are refused.
        n_calls: of the rule that makes many calls in any order; fewer find less, and cost less.
        n_tokens: most tokens of the rules about long prompts, as far as `n_ctx` has room.
    """

    tolerance: float = 0.01
    token_ids: Sequence[int] = range(3, 60)
    texts: Sequence[str] = ("", "a", "Hello, world!", "two  spaces\n\tand a tab", "naïve – 漢字 🙂")
    checks_positions: bool = True
    n_calls: int = 300
    n_tokens: int = 600  # more than two blocks of the cache

    def make_backend(self) -> Backend:
        """A backend that holds nothing; each one from the same model, with the same sizes."""
        raise NotImplementedError("derive from BackendConformance and define make_backend()")

    # --- how ------------------------------------------------------------------------------------

    @contextmanager
    def _backend(self, *, sequences: int = 1, trim: bool = False) -> Iterator[Backend]:
        """One backend, closed at the end; skips where it does not hold what a rule is about."""
        backend = self.make_backend()
        try:
            if backend.limits.n_sequences < sequences:
                raise SkipTest(f"a rule for {sequences} sequences")
            if trim and not backend.limits.can_trim:
                raise SkipTest("a rule for memory that can be cut")
            yield backend
        finally:
            backend.close()

    def _ids(self, n: int, *, seed: int = 0) -> Ids:
        """`n` ids; those of a seed begin alike."""
        return np.random.Generator(np.random.PCG64(seed)).choice(np.array(self.token_ids, np.int32), n)

    def _alone(self, backend: Backend, ids: Ids, ends: Sequence[int]) -> Logits:
        """The logits of the last of `ids`, computed in slices that end at `ends`; the backend is cleared."""
        backend.clear()
        for start, end in pairwise([0, *ends]):
            logits = feed(backend, 0, start, ids[start:end])
        backend.clear()
        return logits

    def _fill(self, backend: Backend, sequence: int, ids: Ids, *, start: int = 0) -> Logits:
        """Append many tokens, in slices that end 3 short and at the end; returns the last logits."""
        step = min(backend.limits.n_batch, backend.limits.n_ubatch)
        cuts = sorted({*range(0, len(ids), step), max(len(ids) - 3, 0), len(ids)})
        for a, b in pairwise(cuts):
            logits = feed(backend, sequence, start + a, ids[a:b])
        return logits

    def _close(self, found: Logits, expected: Logits, what: str) -> None:
        must(found.shape == expected.shape, f"{what}: logits of shape {found.shape}, not {expected.shape}")
        apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
        must(
            bool(apart <= self.tolerance * largest),
            f"{what}: logits are {apart:.3g} apart where the largest is {largest:.3g}; tolerance={self.tolerance}",
        )


def decode(backend: Backend, parts: Sequence[Part], *, mixed: bool = True) -> list[Logits]:
    """The logits of each part's last row, from one batch; `mixed`, rows of the parts take turns."""
    queues = [[(p.sequence, p.start + at, int(token)) for at, token in enumerate(p.ids)] for p in parts]
    last = {queue[-1] for queue in queues}
    turns = zip_longest(*queues) if mixed else queues
    rows = [row for turn in turns for row in turn if row is not None]
    sequences, positions, tokens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    output = np.array([row in last for row in rows], np.int8)
    logits = backend.decode(Batch(tokens, positions, sequences, output))
    order = [row[0] for row in rows if row in last]
    must(len(logits) == len(order), f"{len(logits)} rows of logits for {len(order)} with output")
    return [logits[order.index(part.sequence)][None].copy() for part in parts]


def feed(backend: Backend, sequence: int, start: int, ids: Ids, *, output: Sequence[int] | None = None) -> Logits:
    """Decode `ids` at positions from `start` on; logits of the rows `output`, else of the last."""
    flags = np.zeros(len(ids), np.int8)
    flags[[len(ids) - 1] if output is None else list(output)] = 1
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    sequences = np.full(len(ids), sequence, np.int32)
    # A copy: the next call may overwrite what this one gave.
    return backend.decode(Batch(np.ascontiguousarray(ids), positions, sequences, flags)).copy()


def restore(backend: Backend, sequence: int, start: int, end: int, payload: NDArray[np.uint8]) -> None:
    """Restore from bytes that are gone afterwards, as a cache's may be."""
    lent = bytearray(payload.tobytes())
    backend.restore(sequence, start, end, memoryview(lent).toreadonly())
    lent[:] = bytes(len(lent))


def in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@contextmanager
def refused(kind: type[BackendError], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{what}: not refused; it must raise {kind.__name__}")


def same_bits(found: Logits, expected: Logits, what: str) -> None:
    must(found.shape == expected.shape, f"{what}: logits of shape {found.shape}, not {expected.shape}")
    apart = np.abs(found - expected).max()
    must(found.tobytes() == expected.tobytes(), f"{what}: logits have other bits, {apart:.3g} apart")
