"""What several test modules share: models of a size, recording backends, child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Barrier

import numpy as np
from numpy.typing import NDArray

import erllama
from erllama.engine import Backend, Batch, Limits
from erllama.engine.backends.llama import LlamaBackend, LlamaOptions

SHARED = Path(__file__).resolve().parents[2] / "shared"


def llama_backend(path: Path, **options: object) -> LlamaBackend:
    defaults: dict[str, object] = {"n_ctx": 1024, "n_threads": 1}
    return LlamaBackend(path, LlamaOptions(**{**defaults, **options}), f"test {path.name}")  # type: ignore[arg-type]


class RecordingBackend:
    """A backend that passes everything on and keeps the slices and logits of the decodes."""

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
    """Decode number `at` finds no cells: its request starts anew in an empty context."""
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


def run_python(
    code: str,
    *arguments: object,
    timeout: float = 120,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, away from the checkout, so that the installed package is what it imports."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd or "/",
        env={**os.environ, **(environment or {})},
        check=False,
    )


def must_run(code: str, *arguments: object, timeout: float = 120) -> str:
    finished = run_python(code, *arguments, timeout=timeout)
    assert finished.returncode == 0, f"exit {finished.returncode}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def in_threads(work: Callable[[int], object], n: int) -> None:
    """Call `work` with 0 to n - 1, all at once, each in a thread of its own; what one raises is raised."""
    together = Barrier(n)

    def begun(number: int) -> None:
        together.wait()
        work(number)

    with ThreadPoolExecutor(n) as threads:
        for done in [threads.submit(begun, number) for number in range(n)]:
            done.result()


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what other threads bring about; it fails only where they do not."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


class Letters:
    """A vocabulary of `n_tokens` characters, beginning with those of ASCII; the last ends a reply."""

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
