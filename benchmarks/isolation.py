"""A model in its own process against one in this process: decode, the time of a token for a reader, and a crash.

`python -m benchmarks isolation`. Both models are loaded at once and measured in turn.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import erllama
from benchmarks.engines import N_BATCH, N_UBATCH, SHORT_PROMPT, Prompts
from benchmarks.measure import Figure, Findings, Setup, Target, in_turn

N_STREAMS = 8
# Turns of one run. They are short and many, because the speed of a machine drifts by more than the difference.
TURNS = 5
MORE_US = 60.0  # allowed per token, for a reader


class Pair:
    """One model twice: in this process, and in a process of its own."""

    def __init__(self, setup: Setup, n_ctx: int) -> None:
        self.file = setup.model
        self._directory = tempfile.TemporaryDirectory(dir=_memory())
        options = {"n_ctx": n_ctx, "n_threads": setup.threads, "n_batch": N_BATCH, "n_ubatch": N_UBATCH}
        self.cache = erllama.Cache(ram=None, ram_file=self._directory.name)
        # No token ends a reply.
        with erllama.load_model(setup.model, vocab_only=True) as described:
            is_eog = described._backend.vocabulary.is_eog
            self.banned = [token for token in range(described.n_vocab) if is_eog[token]]
        load = partial(erllama.load_model, setup.model, cache=self.cache, n_seq_max=N_STREAMS, **options)
        self.here, self.there = load(), load(process=True)

    def gaps(self, model: erllama.Model, prompt: list[int], n: int) -> list[float]:
        """Return the seconds between the tokens of a stream."""
        with model.stream(prompt, max_tokens=n, temperature=0, banned_tokens=self.banned) as stream:
            times = [time.perf_counter() for event in stream if isinstance(event, erllama.TextDelta)]
        return [after - before for before, after in pairwise(times)]

    def close(self) -> None:
        """Unload both."""
        self.here.unload()
        self.there.unload()
        self.cache.close()
        self._directory.cleanup()


def isolation(setup: Setup) -> Findings:
    """Compare a model in its own process with one in this process, and measure the wait after a crash."""
    n, prompts, findings = setup.of(64, 16), Prompts(), Findings()
    turns = setup.of(TURNS, 1) * setup.runs
    pair = Pair(setup, 8 * 1024)
    try:
        for model in (pair.here, pair.there):
            _together(pair, model, prompts, 8)

        def one(model: erllama.Model) -> float:
            return 1 / statistics.median(pair.gaps(model, prompts.of(SHORT_PROMPT), n))

        speeds = in_turn(partial(one, pair.there), partial(one, pair.here), turns)
        findings.figures.append(
            Figure(
                "isolation-1",
                "one stream with a reader, in its own process",
                "in this process",
                "tokens/s",
                *speeds,
                Target(">=", 0.98),
                notes=("1 / the median time between tokens",),
            )
        )
        more = [(1 / there - 1 / here) * 1e6 for there, here in zip(*speeds, strict=True)]
        findings.figures.append(
            Figure(
                "isolation-latency",
                "more time per token for a reader, in its own process",
                f"{MORE_US:g} us",
                "us",
                more,
                [MORE_US] * len(more),
                Target("<=", 1.0),
            )
        )
        speeds = in_turn(
            lambda: _together(pair, pair.there, prompts, n),
            lambda: _together(pair, pair.here, prompts, n),
            turns,
        )
        findings.figures.append(
            Figure(
                "isolation-8",
                f"{N_STREAMS} streams with readers, in its own process",
                "in this process",
                "tokens/s",
                *speeds,
                Target(">=", 1.0),
            )
        )
        crashes = [_crash(pair, prompts.of(setup.of(2000, 300)), setup.of(128, 16)) for _ in range(setup.runs)]
        findings.figures.append(
            Figure(
                "isolation-crash",
                f"next token after a kill, in a context of {setup.of(2000, 300)} tokens",
                "load time and a tenth of the cold prefill",
                "s",
                [crash[0] for crash in crashes],
                [crash[1] for crash in crashes],
                Target("<=", 1.0),
            )
        )
    finally:
        pair.close()
    return findings


def _together(pair: Pair, model: erllama.Model, prompts: Prompts, n: int) -> float:
    """Return the tokens per second of several streams."""
    asked = [prompts.of(SHORT_PROMPT) for _ in range(N_STREAMS)]
    readers = [threading.Thread(target=pair.gaps, args=(model, prompt, n)) for prompt in asked]
    began = time.perf_counter()
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return N_STREAMS * n / (time.perf_counter() - began)


def _crash(pair: Pair, prompt: list[int], n: int) -> tuple[float, float]:
    """Kill the process during a reply. Return the wait for the next token, and what it may take."""
    model = pair.there
    with model.stream(prompt, max_tokens=n, temperature=0, banned_tokens=pair.banned) as stream:
        times = []
        for event in stream:
            times.append(time.perf_counter())
            if len(times) == n // 2:
                os.kill(model.info.pid, signal.SIGKILL)
            if isinstance(event, erllama.Done):
                prefill = event.completion
    began = time.perf_counter()
    options = {"n_ctx": 8 * 1024, "n_threads": model.info.n_threads}
    with erllama.load_model(pair.file, cache=pair.cache, process=True, **options):  # type: ignore[arg-type]
        load = time.perf_counter() - began
    cold = pair.here.complete(prompt, max_tokens=1, cache_salt=str(time.time())).timings.prefill
    assert prefill.restarts == 1
    return max(after - before for before, after in pairwise(times)), load + cold / 10


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


SCENARIOS = {"isolation": isolation}
