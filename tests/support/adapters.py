"""Models for tests of adapters: a stub whose KV depends on its adapters, and its expected replies."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import erllama
from erllama.engine import Batch
from erllama.engine.backends.stub import StubBackend

N_EXAMPLES = int(os.environ.get("ERLLAMA_ADAPTERS", "60"))
PROMPT = [5 + i * 7 % 250 for i in range(150)]
# Control tokens, and bytes that are not characters: the text of a reply does not identify them.
TEXTLESS_TOKENS = [0, 1, 2, *range(3 + 0x80, 259)]
UsedAdapters = tuple[tuple[str, float], ...]  # digests of adapters, and scales


class NativeAdapter:
    def __init__(self, content: bytes) -> None:
        self.digest = hashlib.sha256(content).hexdigest()


class AdaptedStub(StubBackend):
    """A stub whose KV depends on the set of adapters with which each token is computed.

    Attributes:
        loaded: native adapters that are loaded and not freed.
        used: the set in effect.
        gate: an event for which each decode waits.
        sets: the set of each decode.
        violations: forbidden calls that it received.
    """

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.loaded: list[object] = []
        self.used: UsedAdapters = ()
        self.gate = threading.Event()
        self.gate.set()
        self.violations: list[str] = []
        self.in_use: list[object] = []
        self.sets: list[UsedAdapters] = []

    def check_adapter(self, path: Path) -> None:
        if not path.exists() or not path.read_bytes().startswith(b"adapter"):
            raise erllama.AdapterLoadError(f"{path} is not an adapter")

    def load_adapter(self, path: Path) -> object:
        self.loaded.append(NativeAdapter(path.read_bytes()))
        return self.loaded[-1]

    def use_adapters(self, adapters: Sequence[tuple[object, float]]) -> None:
        if not all(adapter in self.loaded for adapter, _ in adapters):
            self.violations.append("used after it was freed")
        self.in_use = [adapter for adapter, _ in adapters]
        self.used = tuple(
            (adapter.digest, scale) for adapter, scale in adapters if isinstance(adapter, NativeAdapter)
        )

    def free_adapter(self, adapter: object) -> None:
        if adapter in self.in_use or adapter not in self.loaded:
            self.violations.append("freed while in use, or twice")
        self.loaded.remove(adapter)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        assert self.gate.wait(60)
        self.sets.append(self.used)
        mark = zlib.crc32(repr(self.used).encode()) >> 1 if self.used else 0
        return super().decode(batch._replace(tokens=batch.tokens.astype(np.int64) + mark))  # type: ignore[arg-type]


def adapter_set(scales: Mapping[Path, float]) -> UsedAdapters:
    """Return the set of some adapters as a backend receives it."""
    in_effect = [(hashlib.sha256(path.read_bytes()).hexdigest(), scale) for path, scale in scales.items() if scale]
    return tuple(sorted(in_effect))


@cache
def cold_stub(prompt: tuple[int, ...], adapters: UsedAdapters, n: int) -> tuple[int, ...]:
    """Return the reply of a stub without a cache that uses one set from its first decode on."""
    backend = AdaptedStub(n_ctx=512)
    backend.used = adapters
    with erllama.Cache(ram=0) as cache, erllama.load_backend(backend, cache=cache) as model:
        return model.complete(prompt, max_tokens=n, temperature=0.0).tokens


@contextmanager
def load_llama(path: Path, **options: object) -> Iterator[erllama.Model]:
    defaults: dict[str, object] = {"n_ctx": 1024, "n_threads": 1, "n_ubatch": 64, "warmup": False, **options}
    with erllama.Cache(block_size=32) as cache:
        with erllama.load_model(path, **{"cache": cache, **defaults}) as model:  # type: ignore[arg-type]
            yield model


def greedy_reply(
    model: erllama.Model, prompt: Sequence[int] = PROMPT, n: int = 6, **options: object
) -> erllama.Completion:
    return model.complete(prompt, max_tokens=n, temperature=0.0, **options)  # type: ignore[arg-type]


def logprob_distance(one: object, other: object) -> float:
    """Return the largest difference of the first token's logprobs; missing ones count as the lowest one."""
    a, b = (dict(row[0].top) for row in (one, other))  # type: ignore[index]
    least_a, least_b = min(a.values()), min(b.values())
    return max(abs(a.get(token, least_a) - b.get(token, least_b)) for token in a.keys() | b.keys())
