"""Sampling a token from logits: this library against libllama, on the same rows, with one thread each."""

from __future__ import annotations

import json
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import Figure, Findings, Setup, Target, in_turn
from benchmarks.peer import compile_program, run_program
from erllama.engine import SamplerFactory, SamplingOptions
from erllama.engine.sampling.batch import sample_rows

VOCABULARIES = (32_000, 128_256, 262_144)  # the sizes of Llama 2, Llama 3 and Gemma 3
SMALL = 1_000  # a vocabulary so small that only the calls count
TARGETED = 128_256
N_ROWS = 16  # 8 MB with 128,256 tokens: more than the cache of a core
N_TOGETHER = 64  # rows of a tick of many requests
N_PEAKS = 48  # more than top-k keeps
EVICT = 64 << 20  # bytes
SEED = 1


class Case(NamedTuple):
    """A case to measure with each vocabulary.

    `temperature` 0 is the greedy sampler of both sides. `n_evict` is the bytes written between two samples.
    `n_rounds` is the number of passes over all rows in a run. `together` samples all rows in one call, as a tick
    does.
    """

    name: str
    what: str
    peer: str
    temperature: float
    repeat_penalty: float
    n_evict: int
    n_rounds: int
    target: Target | None
    together: bool = False


STEPS = "top-k 40, top-p, min-p, temperature"
PENALISED = f"penalties, {STEPS}"
CHAIN, GREEDY = "libllama's chain", "libllama's greedy sampler"
CASES = (
    Case("sampling", PENALISED, CHAIN, 0.8, 1.1, 0, 60, Target("<=", 1.0)),
    Case("sampling-cold", f"{PENALISED}; caches emptied before each", CHAIN, 0.8, 1.1, EVICT, 8, None),
    Case("sampling-plain", STEPS, CHAIN, 0.8, 1.0, 0, 60, Target("<=", 1.0)),
    Case("sampling-plain-cold", f"{STEPS}; caches emptied before each", CHAIN, 0.8, 1.0, EVICT, 8, None),
    Case("sampling-greedy", "greedy", GREEDY, 0.0, 1.0, 0, 60, None),
)
ROWS = f"{N_TOGETHER} rows together"
CASES_TOGETHER = (
    Case("sampling-rows", f"{ROWS}: {PENALISED}", CHAIN, 0.8, 1.1, 0, 15, None, together=True),
    Case("sampling-rows-plain", f"{ROWS}: {STEPS}", CHAIN, 0.8, 1.0, 0, 15, None, together=True),
    Case("sampling-rows-greedy", f"{ROWS}: greedy", GREEDY, 0.0, 1.0, 0, 15, None, together=True),
)


class _Ids:
    """A vocabulary without texts: sampling needs only ids."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.is_eog = np.zeros(n_tokens, np.bool_)

    def piece(self, token: int) -> bytes:
        return b"%d" % token

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        return np.array([int(source)], np.int32)

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return b"".join(map(self.piece, map(int, tokens)))


def sampling(setup: Setup) -> Findings:
    """Compare the chain and greedy sampling, row by row and for many rows together, for several vocabularies."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as place:
        compile_program("peer_sampling", Path(place), setup.backend)
        for n_vocab in VOCABULARIES[:1] if setup.quick else (SMALL, *VOCABULARIES):
            for cases, n_rows in ((CASES, N_ROWS), (CASES_TOGETHER, N_TOGETHER)):
                if n_vocab == SMALL and cases is CASES:
                    continue
                rows = make_rows(n_vocab, n_rows)
                rows.tofile(Path(place) / "logits.f32")
                context(rows).tofile(Path(place) / "context.i32")
                findings.figures += [_compare(setup, case, rows, Path(place)) for case in cases]
    return findings


def make_rows(n_vocab: int, n_rows: int) -> NDArray[np.float32]:
    """Return rows of logits like those of a model: noise, and a few dozen peaks that follow Zipf's law.

    Returns:
        shape (n_rows, n_vocab). The noise's largest of 128,256 is at about 11, the peaks go from 16 to 11.4.
    """
    dice = np.random.default_rng(SEED)
    rows = dice.normal(0, 2.5, (n_rows, n_vocab)).astype(np.float32)
    peaks = 16 - 1.2 * np.log(np.arange(1, N_PEAKS + 1))
    for row in rows:
        row[dice.choice(n_vocab, N_PEAKS, replace=False)] = peaks
    return rows


def context(rows: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return previous tokens, int32, shape (64,): some likely ones of the first row, and others."""
    dice = np.random.default_rng(SEED + 1)
    likely = rows[0].argsort()[-N_PEAKS:]
    return np.concatenate([dice.choice(likely, 32), dice.integers(0, rows.shape[1], 32)]).astype(np.int32)


def _compare(setup: Setup, case: Case, rows: NDArray[np.float32], place: Path) -> Figure:
    n_rounds, n_vocab = setup.of(case.n_rounds, 2), rows.shape[1]
    options = SamplingOptions(
        case.temperature, top_k=40, top_p=0.95, min_p=0.05, seed=SEED, repeat_penalty=case.repeat_penalty
    )
    arguments = ("logits.f32", "context.i32", n_vocab, case.temperature, case.repeat_penalty, SEED, n_rounds)
    command = ["./peer_sampling", *map(str, arguments), str(case.n_evict)]
    if case.temperature == 0:
        sampler, before = SamplerFactory(_Ids(n_vocab), 4096).make(options), context(rows)
        if _theirs(command, place).tokens != [sampler.sample(row, before) for row in rows]:
            raise SystemExit("erllama's and libllama's greedy samplers choose differently")
    shown = "temperature=0" if case.temperature == 0 else f"{case.temperature}, top_k=40, top_p=0.95, min_p=0.05"
    if case.repeat_penalty != 1:
        shown += f", repeat_penalty={case.repeat_penalty}, repeat_last_n=64"
    notes = [
        f"a run: median of {n_rounds} rounds over {len(rows)} rows of noise with {N_PEAKS} peaks; one thread",
        "libllama's samples start, as in llama-server, by filling an array of candidates from the logits; "
        "this is timed",
    ]
    if case.n_evict:
        notes.append(
            f"{case.n_evict >> 20} MiB are written before each sample, as a decode would do; this is not timed"
        )
    ours, theirs = in_turn(
        partial(_together, options, rows, n_rounds)
        if case.together
        else partial(_ours, options, rows, n_rounds, case.n_evict),
        lambda: _theirs(command, place).microseconds,
        setup.runs,
    )
    n_in_tick = len(rows) if case.together else 8
    notes.append(f"with {n_in_tick} rows: {n_in_tick * statistics.median(ours):.0f} us per tick")
    call = f"factory.make(SamplingOptions({shown}, seed={SEED})).sample(logits, context)"
    if case.together:
        call = f"sample_rows(samplers, logits, contexts, allowed), samplers of SamplingOptions({shown})"
    return Figure(
        f"{case.name}-{n_vocab}",
        f"sampling, {n_vocab:,} tokens: {case.what}",
        case.peer,
        "us",
        ours,
        theirs,
        case.target if n_vocab == TARGETED else None,
        (call, shlex.join(command)),
        notes,
    )


def _ours(options: SamplingOptions, rows: NDArray[np.float32], n_rounds: int, n_evict: int) -> float:
    """Return the microseconds of a sample."""
    sample, before = SamplerFactory(_Ids(rows.shape[1]), 4096).make(options).sample, context(rows)
    evict = np.zeros(n_evict, np.uint8)[::64]
    rounds: list[float] = []
    for _ in range(n_rounds + 1):
        spent = 0
        for row in rows:
            evict += 1
            began = time.perf_counter_ns()
            sample(row, before)
            spent += time.perf_counter_ns() - began
        rounds.append(spent / len(rows))
    return statistics.median(rounds[1:]) / 1e3  # the first round is a warm-up


def _together(options: SamplingOptions, rows: NDArray[np.float32], n_rounds: int) -> float:
    """Return the microseconds per row of sampling all rows in one call, each with its own seed."""
    factory, n = SamplerFactory(_Ids(rows.shape[1]), 4096), len(rows)
    samplers = [factory.make(replace(options, seed=SEED + i)) for i in range(n)]
    contexts, allowed = [context(rows)] * n, [None] * n
    rounds: list[float] = []
    for _ in range(n_rounds + 1):
        began = time.perf_counter_ns()
        sample_rows(samplers, rows, contexts, allowed)
        rounds.append((time.perf_counter_ns() - began) / n)
    return statistics.median(rounds[1:]) / 1e3  # the first round is a warm-up


class _Theirs(NamedTuple):
    """The result of libllama's sampler. `tokens` are those of the last round, one per row."""

    microseconds: float
    tokens: list[int]


def _theirs(command: list[str], place: Path) -> _Theirs:
    found = json.loads(run_program(command, place))
    return _Theirs(statistics.median(found["nanoseconds"]) / 1e3, found["tokens"])


SCENARIOS: dict[str, Callable[[Setup], Findings]] = {"sampling": sampling}
