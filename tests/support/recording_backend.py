"""Backends for tests: libllama on a model file, a recorder, and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.engine import Backend, Batch, BlockRestorer, Limits, PackedBlock
from erllama.engine.backends.llama import LlamaBackend, LlamaOptions
from erllama.errors import StateError


def llama_backend(path: Path, **options: object) -> LlamaBackend:
    defaults: dict[str, object] = {"n_ctx": 1024, "n_threads": 1}
    return LlamaBackend(path, LlamaOptions(**{**defaults, **options}), f"test {path.name}")  # type: ignore[arg-type]


class RecordingBackend:
    """Forwards all calls to a backend, and records the slices and logits of the decodes."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.slices: list[tuple[int, int]] = []
        self.restored: list[tuple[int, int]] = []
        self.logits: list[NDArray[np.float32]] = []
        self.vocabulary = inner.vocabulary
        self.namespace: Mapping[str, str | int | float | bool | None] = inner.namespace
        self.recipe = inner.recipe
        self.limits: Limits = inner.limits

    def forget(self) -> None:
        self.slices, self.logits, self.restored = [], [], []

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = self.inner.decode(batch)
        self.slices.append((int(batch.positions[0]), int(batch.positions[-1]) + 1))
        self.logits.extend(row.copy() for row in logits)
        return logits

    def pack(self, sequence: int, start: int, end: int) -> NDArray[np.uint8]:
        return self.inner.pack(sequence, start, end)

    def restore(self, sequence: int, start: int, end: int, payload: memoryview) -> None:
        self.inner.restore(sequence, start, end, payload)
        self.restored.append((start, end))

    def restore_blocks(self, sequence: int, blocks: Sequence[PackedBlock]) -> None:
        """Restore blocks together if the backend can, else one by one."""
        if isinstance(self.inner, BlockRestorer):
            self.inner.restore_blocks(sequence, blocks)
            self.restored.extend((block.start, block.end) for block in blocks)
        else:
            try:
                for block in blocks:
                    self.restore(sequence, *block)
            except StateError:
                self.cut(sequence, blocks[0].start)
                raise

    def share(self, source: int, target: int, end: int) -> None:
        self.inner.share(source, target, end)

    def cut(self, sequence: int, end: int) -> None:
        self.inner.cut(sequence, end)

    def drop(self, sequence: int) -> None:
        self.inner.drop(sequence)

    def clear(self) -> None:
        self.inner.clear()

    def abort(self, on: bool) -> None:
        self.inner.abort(on)

    def close(self) -> None:
        self.inner.close()


@contextmanager
def short_of_cells(backend: RecordingBackend, at: int) -> Iterator[None]:
    """Make decode number `at` find no cells, so that its request starts again in an empty context."""
    decode, calls = backend.decode, count(1)

    def decode_but_once(batch: Batch) -> NDArray[np.float32]:
        if next(calls) == at:
            raise erllama.CellsExhausted("injected: none left")
        return decode(batch)

    backend.decode = decode_but_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        backend.decode = decode  # type: ignore[method-assign]


def same_bits(a: list[NDArray[np.float32]], b: list[NDArray[np.float32]]) -> bool:
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


class LetterVocabulary:
    """A vocabulary of `n_tokens` characters, starting with ASCII. The last one ends a reply."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.is_eog = np.arange(n_tokens) == n_tokens - 1

    def piece(self, token: int) -> bytes:
        return b"" if self.is_eog[token] else chr(token).encode("utf-8", "surrogatepass")

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        text = source if isinstance(source, str) else source.decode()
        return np.array([ord(letter) for letter in text], np.int32)

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return b"".join(self.piece(int(token)) for token in tokens)


def prompt_of(seed: int, n: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, 259, n).astype(np.int32)


stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


def first_by_position(text: str, stops: list[str], behind: bool = False) -> tuple[str, str | None]:
    """Return the text before the first stop string and the stop string, by checking every position.

    Args:
        behind: whether the text follows another phase. Its leading white space then belongs to no phase.
    """
    begin = len(text) - len(text.lstrip()) if behind else 0
    for at in range(len(text)):
        for stop in sorted(stops, key=len):
            if text.startswith(stop, at) and (at >= begin or stop.strip()):
                return text[:at], stop
    return text, None
