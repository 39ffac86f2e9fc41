"""Models for the tests of the engine: recorded, paused at a decode, endless, or without a cache."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache, Policy
from erllama.engine import Backend, Batch, ModelThread
from erllama.engine.backends.stub import StubBackend
from erllama.engine.metrics import EngineMetrics
from support.recording_backend import RecordingBackend, llama_backend

SIZE = 32  # tokens of a block


def random_prompt(seed: int, n: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, 250, n).astype(np.int32)


class GatedBackend(StubBackend):
    """Records the shape of every batch, and can be paused before each decode."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"eog_bias": -100.0, **options})  # type: ignore[arg-type]
        self.batches: list[list[tuple[int, int]]] = []  # of (sequence, rows)
        self.allowed = threading.Semaphore(0)
        self.held = False
        self.at_decode = threading.Event()

    def hold(self) -> None:
        self.held = True

    def release(self) -> None:
        self.held = False
        self.allowed.release()

    def step(self) -> None:
        """Allow one decode, and wait for the next."""
        self.at_decode.clear()
        self.allowed.release()
        assert self.at_decode.wait(120)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.at_decode.set()
        if self.held:
            self.allowed.acquire()
        numbers, rows = np.unique(batch.sequences, return_counts=True)
        self.batches.append(list(zip(numbers.tolist(), rows.tolist(), strict=True)))
        return super().decode(batch)


def load_stub(backend: StubBackend | RecordingBackend, **options: object) -> erllama.Model:
    return erllama.load_backend(backend, **{"cache": Cache(block_size=SIZE), **options})  # type: ignore[arg-type]


def start_thread(backend: Backend, cache: Cache, policy: Policy | None = None, **sizes: int) -> ModelThread:
    usual = {"n_seq_max": 4, "prefill_chunk_size": 64, "parked_cells": 64, "max_pending": 8}
    return ModelThread(backend, cache, policy or Policy(), "test", **{**usual, **sizes})


def cold_reply(
    prompt: NDArray[np.int32], can_trim: bool = True, n_ctx: int = 4096, **options: object
) -> erllama.Completion:
    """Return the reply of a new model without a cache."""
    backend = StubBackend(eog_bias=-100, can_trim=can_trim, n_ctx=n_ctx)
    with erllama.Cache(ram=0) as none, load_stub(backend, cache=none) as model:
        return model.complete(prompt, **options)  # type: ignore[arg-type]


def engine_metrics(model: erllama.Model) -> EngineMetrics:
    return model._runner.metrics


class EndlessBackend(RecordingBackend):
    """libllama with a vocabulary in which no token ends a reply."""

    def __init__(self, path: Path, **options: object) -> None:
        inner = llama_backend(path, n_ubatch=64, **options)
        inner.vocabulary.is_eog = np.zeros(inner.vocabulary.n_tokens, np.bool_)
        super().__init__(inner)


def assert_equal_but_for_near_ties(tokens: tuple[int, ...], expected: erllama.Completion) -> None:
    """Check that greedy replies agree up to a place where two tokens were almost equally likely."""
    assert expected.logprobs is not None
    for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=True)):
        if a != b:
            (_, first), (second, runner_up) = expected.logprobs[i].top
            assert a == second
            assert first - runner_up < 0.05, "not a near-tie"
            return
