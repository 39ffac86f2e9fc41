"""Base of the rules for backends: creating a backend to test, decoding slices, and comparing logits."""

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
from erllama.testing.rules import require

Logits = NDArray[np.float32]
Ids = NDArray[np.int32]


class BatchPart(NamedTuple):
    """Tokens of one sequence in a batch."""

    sequence: int
    start: int
    ids: Ids


class BackendRules:
    """Base class of the rules for backends.

    Attributes:
        tolerance: the largest difference between logits of the same tokens in other batches or other cells, as a
            fraction of the largest logit. Rules that require equal bits ignore it.
        token_ids: ids to decode, without tokens that end or control generation.
        texts: texts that `tokenize` and `detokenize` must preserve.
        checks_positions: whether the backend refuses positions that are not consecutive.
        n_calls: number of calls in the rule that makes random calls. Fewer take less time and find fewer faults.
        n_tokens: maximum length of the prompts in the rules about long prompts, if `n_ctx` has room for them.
    """

    tolerance: float = 0.01
    token_ids: Sequence[int] = range(3, 60)
    texts: Sequence[str] = ("", "a", "Hello, world!", "two  spaces\n\tand a tab", "naïve – 漢字 🙂")
    checks_positions: bool = True
    n_calls: int = 300
    n_tokens: int = 600  # more than two blocks of the cache

    def make_backend(self) -> Backend:
        """Return an empty backend, each time from the same model and with the same sizes."""
        raise NotImplementedError("derive from BackendConformance and define make_backend()")

    # --- helpers ------------------------------------------------------------------------------------

    @contextmanager
    def _backend(self, *, sequences: int = 1, trim: bool = False) -> Iterator[Backend]:
        """Yield a backend, and close it at the end. Raise SkipTest if a rule does not apply to it."""
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
        """Return `n` random ids. Lists of one seed have a common prefix."""
        return np.random.Generator(np.random.PCG64(seed)).choice(np.array(self.token_ids, np.int32), n)

    def _logits_alone(self, backend: Backend, ids: Ids, ends: Sequence[int]) -> Logits:
        """Return the logits after `ids`, computed in slices that end at `ends` in an otherwise empty backend."""
        backend.clear()
        for start, end in pairwise([0, *ends]):
            logits = decode_slice(backend, 0, start, ids[start:end])
        backend.clear()
        return logits

    def _fill(self, backend: Backend, sequence: int, ids: Ids, *, start: int = 0) -> Logits:
        """Decode many tokens, with one slice that ends 3 tokens before the end. Return the last logits."""
        step = min(backend.limits.n_batch, backend.limits.n_ubatch)
        cuts = sorted({*range(0, len(ids), step), max(len(ids) - 3, 0), len(ids)})
        for a, b in pairwise(cuts):
            logits = decode_slice(backend, sequence, start + a, ids[a:b])
        return logits

    def _require_close(self, found: Logits, expected: Logits, what: str) -> None:
        require(found.shape == expected.shape, f"{what}: logits of shape {found.shape}, not {expected.shape}")
        apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
        require(
            bool(apart <= self.tolerance * largest),
            f"{what}: logits differ by {apart:.3g}, the largest is {largest:.3g}; tolerance={self.tolerance}",
        )


def decode(backend: Backend, parts: Sequence[BatchPart], *, interleaved: bool = True) -> list[Logits]:
    """Decode one batch, and return the logits of each part's last row; `interleaved`: take rows in turn."""
    queues = [[(p.sequence, p.start + at, int(token)) for at, token in enumerate(p.ids)] for p in parts]
    last = {queue[-1] for queue in queues}
    turns = zip_longest(*queues) if interleaved else queues
    rows = [row for turn in turns for row in turn if row is not None]
    sequences, positions, tokens = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    output = np.array([row in last for row in rows], np.int8)
    logits = backend.decode(Batch(tokens, positions, sequences, output))
    order = [row[0] for row in rows if row in last]
    require(len(logits) == len(order), f"{len(logits)} rows of logits for {len(order)} with output")
    return [logits[order.index(part.sequence)][None].copy() for part in parts]


def decode_slice(
    backend: Backend, sequence: int, start: int, ids: Ids, *, output: Sequence[int] | None = None
) -> Logits:
    """Decode `ids` at positions from `start` on. Return logits of the rows `output`, or of the last row."""
    flags = np.zeros(len(ids), np.int8)
    flags[[len(ids) - 1] if output is None else list(output)] = 1
    positions = np.arange(start, start + len(ids), dtype=np.int32)
    sequences = np.full(len(ids), sequence, np.int32)
    # A copy, because the next call may overwrite the logits.
    return backend.decode(Batch(np.ascontiguousarray(ids), positions, sequences, flags)).copy()


def restore(backend: Backend, sequence: int, start: int, end: int, payload: NDArray[np.uint8]) -> None:
    """Restore from a buffer that is cleared afterwards, because a cache may reuse its buffers."""
    buffer = bytearray(payload.tobytes())
    backend.restore(sequence, start, end, memoryview(buffer).toreadonly())
    buffer[:] = bytes(len(buffer))


def run_in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@contextmanager
def raises(kind: type[BackendError], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{what}: not refused; it must raise {kind.__name__}")


def require_same_bits(found: Logits, expected: Logits, what: str) -> None:
    require(found.shape == expected.shape, f"{what}: logits of shape {found.shape}, not {expected.shape}")
    apart = np.abs(found - expected).max()
    require(
        found.tobytes() == expected.tobytes(), f"{what}: logits have other bits and differ by up to {apart:.3g}"
    )
