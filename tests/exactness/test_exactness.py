"""Replies from cached KV equal cold replies to the last bit, on the real libllama.

Small micro-batches and blocks, so that prompts of some hundred tokens cross
many of both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.llama_ffi import LlamaContext
from support.examples import examples
from support.recording_backend import RecordingBackend, llama_backend, prompt_of, same_bits, short_of_cells
from support.subprocesses import must_run

BLOCK, UBATCH, REPLY = 32, 64, 64
GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 1.5, "seed": 7}

seeds = st.integers(0, 2**32 - 1)
sampling = st.sampled_from([GREEDY, SEEDED])


class Bench:
    """A recording model whose cache can be emptied, and a reference without a cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backend = RecordingBackend(llama_backend(path, n_ubatch=UBATCH))
        self.cold_backend = RecordingBackend(llama_backend(path, n_ubatch=UBATCH))
        self.no_cache = erllama.Cache(ram=0)
        self.cold_model = erllama.load_backend(self.cold_backend, cache=self.no_cache)

    def model(self, cache: erllama.Cache) -> erllama.Model:
        # The backend outlives the models made from it.
        self.backend.forget()
        self.backend.close = lambda: None  # type: ignore[method-assign]
        self.backend.abort(False)
        return erllama.load_backend(self.backend, cache=cache)

    def cold(
        self, prompt: NDArray[np.int32], **options: object
    ) -> tuple[erllama.Completion, list[NDArray[np.float32]]]:
        self.cold_model.evict()  # the context is empty
        self.cold_backend.forget()
        reply = self.cold_model.complete(prompt, max_tokens=REPLY, **options)  # type: ignore[arg-type]
        assert reply.cache.kind == "cold"
        return reply, self.cold_backend.logits

    def close(self) -> None:
        self.cold_model.unload()
        self.backend.inner.close()
        self.no_cache.close()


@pytest.fixture(scope="module")
def bench(tiny_gguf: Path) -> Iterator[Bench]:
    found = Bench(tiny_gguf)
    yield found
    found.close()


def warm(bench: Bench, model: erllama.Model, prompt: NDArray[np.int32], **options: object) -> erllama.Completion:
    bench.backend.forget()
    return model.complete(prompt, max_tokens=REPLY, **options)  # type: ignore[arg-type]


def unload(model: erllama.Model) -> None:
    model.unload()


class History:
    """Requests that ran before the one under test, drawn to share prefixes with it."""

    steps = st.lists(
        st.tuples(
            st.floats(0, 1),  # how much of the prompt the earlier request shares
            st.integers(0, 90),  # how many other tokens follow
            st.booleans(),  # also reproducible
        ),
        max_size=4,
    )


@settings(max_examples=examples(25))
@given(seeds, st.integers(1, 400), History.steps, sampling, st.booleans())
def test_reproducible_replies_always_have_the_bits_of_a_cold_run(
    bench: Bench,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n: int,
    history: list[tuple[float, int, bool]],
    options: dict[str, float],
    on_disk: bool,
) -> None:
    prompt = prompt_of(seed, n)
    expected, expected_logits = bench.cold(prompt, **options)
    where: dict[str, object] = {"ram": 0, "disk": tmp_path_factory.mktemp("kv")} if on_disk else {}
    with erllama.Cache(block_size=BLOCK, **where) as cache:  # type: ignore[arg-type]
        model = bench.model(cache)
        for share, more, reproducible in history:
            earlier = np.concatenate([prompt[: round(share * n)], prompt_of(seed + 1, more)])
            if len(earlier):
                warm(bench, model, earlier, reproducible=reproducible, **options)
                cache.flush()
        for kind in (None, "again"):
            reply = warm(bench, model, prompt, reproducible=True, **options)
            assert reply.tokens == expected.tokens
            assert same_bits(bench.backend.logits, expected_logits)
            if kind == "again" and n > 1 and not history:
                assert reply.cache.kind == "exact"
        assert cache.counters()["restore_errors"] == cache.counters()["disk_errors"] == 0
        unload(model)


@settings(max_examples=examples(25))
@given(seeds, st.integers(1, 300), st.integers(1, REPLY + 10), sampling)
def test_a_restarted_reproducible_reply_keeps_its_bits(
    bench: Bench, seed: int, n: int, at: int, options: dict[str, float]
) -> None:
    """The backend has no cells at decode number `at`, so everything is computed again."""
    prompt = prompt_of(seed, n)
    expected, expected_logits = bench.cold(prompt, **options)
    with erllama.Cache(block_size=BLOCK) as cache:
        model = bench.model(cache)
        with short_of_cells(bench.backend, at):
            reply = warm(bench, model, prompt, reproducible=True, **options)
        unload(model)
    assert reply.tokens == expected.tokens
    assert same_bits(bench.backend.logits, expected_logits)


@settings(max_examples=examples(25))
@given(seeds, st.integers(1, 400), sampling)
def test_an_exact_hit_has_the_bits_of_the_cold_run_by_default(
    bench: Bench, seed: int, n: int, options: dict[str, float]
) -> None:
    prompt = prompt_of(seed, n)
    expected, expected_logits = bench.cold(prompt, **options)
    with erllama.Cache(block_size=BLOCK) as cache:
        model = bench.model(cache)
        first = warm(bench, model, prompt, **options)
        second = warm(bench, model, prompt, **options)
        unload(model)
    assert (first.cache.kind, second.cache.kind) == ("cold", "exact" if n > 1 else "cold")
    assert second.cache.tokens == n - 1
    assert first.tokens == second.tokens == expected.tokens
    assert same_bits(bench.backend.logits, expected_logits)


@settings(max_examples=examples(25))
@given(seeds, st.integers(1, 300), st.integers(0, 300), st.integers(0, 120), st.integers(0, 40))
def test_partial_hits_have_the_bits_of_a_context_kept_in_memory(
    bench: Bench, seed: int, n_shared: int, n_first: int, n_second: int, n_reply: int
) -> None:
    """The reference replays the same slices in one context, without cache, packing or restoring."""
    shared = prompt_of(seed, n_shared)
    first = np.concatenate([shared, prompt_of(seed + 1, n_first)])
    second = np.concatenate([shared, prompt_of(seed + 2, n_second)])
    with erllama.Cache(block_size=BLOCK) as cache:
        model = bench.model(cache)
        bench.backend.forget()
        context_tokens = model.complete(first, max_tokens=n_reply, **GREEDY).context_tokens  # type: ignore[arg-type]
        first_slices = list(bench.backend.slices)
        reply = warm(bench, model, second, **GREEDY)
        second_slices, logits = list(bench.backend.slices), list(bench.backend.logits)
        unload(model)
    held = np.array(context_tokens[: first_slices[-1][1]], np.int32)
    limit = min(len(held), len(second) - 1)
    differing = np.flatnonzero(held[:limit] != second[:limit])
    agree = int(differing[0]) if len(differing) else limit
    assert reply.cache.tokens == agree, "the hit covers all common tokens"

    tokens = np.array(reply.context_tokens, np.int32)
    with llama_context(bench) as context:
        replay(context, held, first_slices, len(first))
        context.cut(0, agree)
        assert same_bits(replay(context, tokens, second_slices, len(second)), logits)
    if any(end == agree for _, end in first_slices):
        # Nothing was trimmed, so it equals, bit for bit, a cold prefill cut at the same places.
        with llama_context(bench) as context:
            cold_slices = [(start, end) for start, end in first_slices if end <= agree] + second_slices
            assert same_bits(replay(context, tokens, cold_slices, len(second)), logits)


def llama_context(bench: Bench) -> LlamaContext:
    backend = bench.backend.inner
    return LlamaContext(
        backend.model,  # type: ignore[attr-defined]
        n_ctx=1024,
        n_ubatch=UBATCH,
        n_seq_max=2,
        n_threads=1,
        n_threads_batch=1,
    )


def replay(
    context: LlamaContext, tokens: NDArray[np.int32], slices: list[tuple[int, int]], n_prompt: int
) -> list[NDArray[np.float32]]:
    """Decode slices of `tokens` on sequence 0. Returns the logits from the last token of the prompt on."""
    rows = []
    for start, end in slices:
        n = end - start
        output = np.zeros(n, np.int8)
        output[-1] = end >= n_prompt
        context.decode(tokens[start:end], np.arange(start, end, dtype=np.int32), np.zeros(n, np.int32), output)
        if end >= n_prompt:
            rows.append(context.logits()[0].copy())
    return rows


PROGRAM = """
import json, sys, erllama
path, directory, reproducible, cases = sys.argv[1], sys.argv[2], sys.argv[3] == "True", json.loads(sys.argv[4])
with erllama.Cache(disk=directory) as cache:
    with erllama.load_model(path, cache=cache, n_ctx=2048, n_threads=1) as model:
        for prompt in cases:
            reply = model.complete(prompt, max_tokens=64, temperature=1.0, seed=3, reproducible=reproducible)
            print(json.dumps([reply.cache.kind, reply.cache.tier, reply.cache.tokens, reply.tokens]))
"""


def in_new_process(path: Path, directory: Path, reproducible: bool, *prompts: list[int]) -> list[list[object]]:
    lines = must_run(PROGRAM, path, directory, reproducible, json.dumps(prompts)).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"flash_attn": False},
        {"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
        {"n_ubatch": 48},  # blocks do not fit it
        {"n_ubatch": 16},  # smaller than a block
        {"n_batch": 40, "n_ubatch": 512},
        {"n_threads": 2},
        {"rope_freq_base": 5000.0},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_kind_of_context_is_exact(tiny_gguf: Path, options: dict[str, object]) -> None:
    backend = RecordingBackend(llama_backend(tiny_gguf, **{"n_ubatch": UBATCH, **options}))
    rounds = [prompt_of(1, 200), prompt_of(1, 200)[:130], prompt_of(1, 200), prompt_of(1, 350), prompt_of(1, 200)]
    logits: dict[bool, list[list[NDArray[np.float32]]]] = {}
    kinds = []
    with erllama.Cache(ram=0) as none, erllama.Cache(block_size=BLOCK) as cache:
        with erllama.load_backend(backend, cache=none) as model:
            backend.close = lambda: None  # type: ignore[method-assign]
            logits[False] = []
            for prompt in rounds:
                model.evict()
                backend.forget()
                model.complete(prompt, max_tokens=REPLY, temperature=0)
                logits[False].append(backend.logits)
        backend.abort(False)
        with erllama.load_backend(backend, cache=cache) as model:
            logits[True] = []
            for prompt in rounds:
                backend.forget()
                kinds.append(model.complete(prompt, max_tokens=REPLY, temperature=0, reproducible=True).cache.kind)
                logits[True].append(backend.logits)
        assert cache.counters()["restore_errors"] == cache.counters()["faults"] == 0
    backend.inner.close()
    assert all(same_bits(a, b) for a, b in zip(logits[False], logits[True], strict=True))
    assert kinds[0] == "cold"
    assert kinds[2] in ("exact", "partial")
    if options.get("n_ubatch") != 48:
        assert kinds[4] in ("exact", "partial")


def test_contexts_with_incompatible_kv_share_nothing(tiny_gguf: Path) -> None:
    with erllama.Cache() as cache:
        for options in ({}, {"kv_type_k": "q8_0"}, {"flash_attn": False}, {"rope_freq_base": 5000.0}):
            with erllama.load_model(tiny_gguf, cache=cache, n_ctx=512, n_threads=1, **options) as model:  # type: ignore[arg-type]
                for kind in ("cold", "exact"):
                    assert model.complete(prompt_of(1, 100), max_tokens=2).cache.kind == kind
        with erllama.load_model(tiny_gguf, cache=cache, n_ctx=1024, n_batch=64, n_threads=1) as model:
            assert model.complete(prompt_of(1, 100), max_tokens=2).cache.kind == "exact"


def test_a_new_process_returns_the_cold_reply_from_disk(tiny_gguf: Path, tmp_path: Path) -> None:
    """Default sizes: blocks of 256, micro-batches of 512."""
    prompt = prompt_of(5, 1000).tolist()
    longer = prompt + prompt_of(6, 60).tolist()
    trimmed = prompt[:700] + prompt_of(7, 30).tolist()
    kv = tmp_path / "kv"
    cold = [
        in_new_process(tiny_gguf, tmp_path / f"cold{i}", True, p)[0]
        for i, p in enumerate((prompt, longer, trimmed))
    ]
    assert [reply[0] for reply in cold] == ["cold"] * 3

    first = in_new_process(tiny_gguf, kv, False, prompt)
    assert first[0][0] == "cold"
    assert first[0][3] == cold[0][3]
    again, partial, cut = in_new_process(tiny_gguf, kv, True, prompt, longer, trimmed)
    assert again[:3] == ["exact", "disk", 999]
    # Resumed at a multiple of the micro-batch, where a cold run cuts as well.
    assert partial[:3] == ["partial", "ram", 512]
    assert cut[:3] == ["partial", "ram", 512]
    assert [again[3], partial[3], cut[3]] == [reply[3] for reply in cold]
    assert in_new_process(tiny_gguf, kv, False, prompt)[0][:3] == ["exact", "disk", 999]


def test_by_default_every_common_token_is_reused(tiny_gguf: Path, tmp_path: Path) -> None:
    prompt = prompt_of(5, 1000).tolist()
    in_new_process(tiny_gguf, tmp_path, False, prompt)
    longer, cut, other = in_new_process(
        tiny_gguf,
        tmp_path,
        False,
        prompt + prompt_of(6, 60).tolist(),
        [*prompt[:701], 3, 4],
        prompt_of(8, 300).tolist(),
    )
    assert longer[0] == "partial"
    assert longer[2] >= 1000  # type: ignore[operator]
    assert cut[2] >= 701  # type: ignore[operator]
    assert other[0] == "cold"


@settings(max_examples=examples(25))
@given(
    st.lists(st.tuples(st.sampled_from([0, 0, 50]), st.integers(1, 120), st.booleans()), min_size=2, max_size=6),
    st.integers(1, 120),
    st.integers(1, 40),
)
@example([(0, 20, True), (50, 64, True), (0, 65, False)], 20, 7)
def test_reproducible_replies_keep_their_bits_under_preemption(
    crowded: erllama.Model, earlier: list[tuple[int, int, bool]], n: int, step: int
) -> None:
    """Parked contexts are dropped while others compute, so later tokens lie in cells before earlier ones."""
    tokens = [5 + i * step % 250 for i in range(170)]

    def reply(start: int, n: int, reproducible: bool) -> erllama.Completion:
        return crowded.complete(
            tokens[start : start + n],
            max_tokens=3,
            reproducible=reproducible,
            logprobs=20,
            cache_salt=salt,
            **GREEDY,
        )

    salt = f"cold {n} {step}"
    cold = reply(0, n, True)
    salt = repr((earlier, n, step))
    for request in earlier:
        reply(*request)
    assert reply(0, n, True).logprobs == cold.logprobs


@pytest.fixture(scope="module")
def crowded(tiny_gguf: Path) -> Iterator[erllama.Model]:
    with erllama.Cache(block_size=16) as cache:
        options = {"n_ctx": 512, "n_ubatch": 32, "n_seq_max": 3, "n_threads": 1, "warmup": False}
        with erllama.load_model(tiny_gguf, cache=cache, **options) as model:  # type: ignore[arg-type]
            yield model
