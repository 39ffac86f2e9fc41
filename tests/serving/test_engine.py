"""Concurrent requests: each gets the reply that it gets alone, and shared prefixes are computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import erllama
from erllama.cache import Block, Cache
from erllama.engine.backends.stub import StubBackend
from erllama.engine.scheduling.batches import prefill_budget
from erllama.engine.scheduling.cells import Cells
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_mamba
from support.engine_models import (
    SIZE,
    EndlessBackend,
    GatedBackend,
    assert_equal_but_for_near_ties,
    cold_reply,
    engine_metrics,
    load_stub,
    random_prompt,
)
from support.examples import examples
from support.faulty.tiers import SmallTier
from support.recording_backend import RecordingBackend, llama_backend

# --- the same reply, alone or among others --------------------------------------------------------


@settings(max_examples=examples(25))
@given(st.integers(0, 1000), st.booleans(), st.sampled_from([600, 1024, 8192]))
def test_seeded_replies_are_the_same_alone_and_among_others(seed: int, can_trim: bool, n_ctx: int) -> None:
    dice = np.random.default_rng(seed)
    common = random_prompt(seed, int(dice.integers(1, 200)))
    requests = [
        (
            np.concatenate([common[: dice.integers(0, len(common) + 1)], random_prompt(i, dice.integers(1, 90))]),
            {
                "max_tokens": int(dice.integers(0, 60)),
                "seed": i,
                "temperature": float(dice.choice([0, 1, 2])),
            },
        )
        for i in range(8)
    ]
    with load_stub(StubBackend(eog_bias=-100, can_trim=can_trim, n_ctx=n_ctx), n_seq_max=8) as model:
        streams = [model.stream(prompt, **options) for prompt, options in requests]  # type: ignore[arg-type]
        replies = [stream.result() for stream in streams]
        model.cache.check_integrity()
        assert model.cache.counters()["faults"] == model.cache.counters()["restore_errors"] == 0
    for (prompt, options), reply in zip(requests, replies, strict=True):
        assert reply.tokens == cold_reply(prompt, can_trim, n_ctx, **options).tokens


def test_greedy_replies_on_libllama_are_the_same_among_others(tiny_gguf: Path) -> None:
    """The batch changes the last bits of logits, so replies differ only where two tokens are nearly tied."""
    prompts = [np.concatenate([random_prompt(0, 100), random_prompt(i, 30)]) for i in range(8)]
    options: dict[str, object] = {"n_ctx": 2048, "n_threads": 1, "n_seq_max": 8, "cache": Cache(ram=0)}
    with erllama.load_model(tiny_gguf, **options) as model:  # type: ignore[arg-type]
        expected = []
        for prompt in prompts:
            expected.append(model.complete(prompt, max_tokens=24, temperature=0, logprobs=2))
            model.evict()
        streams = [model.stream(prompt, max_tokens=24, temperature=0) for prompt in prompts]
        for stream, reply in zip(streams, expected, strict=True):
            assert_equal_but_for_near_ties(stream.result().tokens, reply)


def test_the_reported_seed_reproduces_the_reply() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        first = model.complete([1, 2, 3], max_tokens=20, temperature=2.0)
        assert model.complete([1, 2, 3], max_tokens=20, temperature=2.0, seed=first.seed).tokens == first.tokens


# --- shared prefixes ------------------------------------------------------------------------------


@pytest.mark.parametrize("can_trim", [True, False])
def test_concurrent_requests_compute_their_common_prefix_once(can_trim: bool) -> None:
    prefix = random_prompt(1, 1024)
    prompts = [np.concatenate([prefix, random_prompt(10 + i, 32)]) for i in range(8)]
    backend = GatedBackend(n_ctx=16384, can_trim=can_trim)
    with load_stub(backend, n_seq_max=8) as model:
        backend.hold()
        streams = [model.stream(prompt, max_tokens=4, seed=1) for prompt in prompts]
        backend.release()
        replies = [stream.result() for stream in streams]
    assert sum(reply.timings.prefill_tokens for reply in replies) == 1024 + 8 * 32
    assert backend.tokens_decoded == 1024 + 8 * 32 + 8 * 3
    assert [reply.cache.tokens for reply in replies] == [0] + [1024] * 7
    assert {reply.cache.tier for reply in replies[1:]} == {"live" if can_trim else "ram"}


def test_libllama_shares_cells_and_replies_stay_right(tiny_gguf: Path) -> None:
    backend = RecordingBackend(llama_backend(tiny_gguf, n_sequences=9, n_ctx=2048))
    prefix = random_prompt(1, 512)
    prompts = [np.concatenate([prefix, random_prompt(10 + i, 32)]) for i in range(8)]
    with load_stub(backend, n_seq_max=8) as model:
        streams = [model.stream(prompt, max_tokens=4, temperature=0) for prompt in prompts]
        replies = [stream.result() for stream in streams]
    assert sum(reply.timings.prefill_tokens for reply in replies) == 512 + 8 * 32


def test_followers_continue_when_their_leader_ends() -> None:
    backend = GatedBackend(n_ubatch=64, n_batch=64)
    prefix = random_prompt(1, 500)
    with load_stub(backend, n_seq_max=4) as model:
        backend.hold()
        leader = model.stream(np.concatenate([prefix, [1]]), max_tokens=4)
        assert backend.at_decode.wait(120)
        followers = [model.stream(np.concatenate([prefix, [2, i]]), max_tokens=4, seed=1) for i in range(3)]
        backend.step()
        backend.step()
        leader.cancel()
        backend.release()
        assert leader.result().finish_reason == "cancelled"
        for i, follower in enumerate(followers):
            prompt = np.concatenate([prefix, [2, i]]).astype(np.int32)
            assert follower.result().tokens == cold_reply(prompt, max_tokens=4, seed=1).tokens
    assert backend.tokens_decoded < 2 * 500, "tokens that the leader computed were not computed again"


def test_a_conversation_continues_in_its_cells() -> None:
    backend = StubBackend(eog_bias=-100)
    with load_stub(backend) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=10)
        after = backend.tokens_decoded
        second = model.complete([*first.context_tokens, 5, 6, 7], max_tokens=1)
        assert second.cache == erllama.CacheHit("partial", "live", 109)
        assert backend.tokens_decoded == after + 4, "the last token and three more"


def test_cells_of_another_tenant_are_not_shared() -> None:
    prompt = random_prompt(1, 100)
    with load_stub(StubBackend(eog_bias=-100)) as model:
        model.complete(prompt, max_tokens=2, cache_salt="a")
        assert model.complete(prompt, max_tokens=2, cache_salt="b").cache.kind == "cold"
        assert model.complete(prompt, max_tokens=2).cache.kind == "cold"
        assert model.complete(prompt, max_tokens=2, cache_salt="a").cache.kind == "exact"


def test_parked_cells_stay_within_their_limit_while_others_compute() -> None:
    backend = GatedBackend(n_ctx=4096)
    with load_stub(backend, parked_cells=100, n_seq_max=2) as model:
        for i in range(5):
            model.complete(random_prompt(i, 60), max_tokens=5)
        backend.hold()
        stream = model.stream(random_prompt(99, 10), max_tokens=3)
        backend.at_decode.clear()
        assert backend.at_decode.wait(120)
        assert backend.cells_used <= 100 + 10
        backend.release()
        stream.result()
        assert model.complete(random_prompt(0, 60), max_tokens=1).cache.tier == "ram", (
            "the dropped cells are in the cache"
        )


def test_parked_cells_over_the_limit_go_before_a_request_starts() -> None:
    """They exceed the limit, so they go before it starts, and its KV has the bits of a cold run."""
    backend = StubBackend(eog_bias=-100)
    with load_stub(backend, parked_cells=100, n_seq_max=2) as model:
        for i in range(3):
            model.complete(random_prompt(i, 200), max_tokens=1)
        again = model.complete(random_prompt(2, 200), max_tokens=1, reproducible=True)
        assert again.cache.kind == "exact"


def test_a_parked_prefix_is_shared_without_losing_its_rest() -> None:
    """A short question on a long parked context leaves that context unchanged."""
    backend = StubBackend(eog_bias=-100)
    with load_stub(backend, parked_cells=4096) as model:
        context = random_prompt(1, 400)
        model.complete(context, max_tokens=1)
        assert model.complete([*context[:50], 1, 2], max_tokens=1).cache == erllama.CacheHit("partial", "live", 50)
        assert model.complete(context, max_tokens=1).cache == erllama.CacheHit("exact", "live", 399)


# --- batches ----------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_block_other_requests() -> None:
    backend = GatedBackend(n_ubatch=128, n_batch=512)
    with load_stub(backend, prefill_chunk_size=48, n_seq_max=4) as model:
        backend.hold()
        short = [model.stream([i, i + 1], max_tokens=60) for i in range(3)]
        backend.at_decode.clear()
        while engine_metrics(model).decoded_tokens < 3:
            backend.step()
        n_before = len(backend.batches)
        long = model.stream(random_prompt(1, 1000), max_tokens=2)
        backend.release()
        assert len(long.result().tokens) == 2
        for stream in short:
            stream.result()
    beside = [
        batch for batch in backend.batches[n_before + 1 :] if len(batch) == 4 and max(n for _, n in batch) > 1
    ]
    assert len(beside) >= 1000 // 48, "each tick has a row of every reply, and a slice of the prompt"
    assert all(sum(n for _, n in batch) <= 48 + 3 for batch in beside)


@pytest.mark.parametrize(("n_prompt", "slices"), [(256, [52, 51, 51, 51, 51]), (61, [61]), (62, [31, 31])])
def test_a_prompt_beside_replies_takes_ticks_of_one_micro_batch(n_prompt: int, slices: list[int]) -> None:
    """Rows of replies are part of the micro-batch, and all ticks compute about as much of the prompt."""
    backend = GatedBackend(n_ubatch=64, n_batch=256)
    with load_stub(backend, n_seq_max=4) as model:
        backend.hold()
        short = [model.stream([i, i + 1], max_tokens=60) for i in range(3)]
        backend.at_decode.clear()
        while engine_metrics(model).decoded_tokens < 3:
            backend.step()
        long = model.stream(random_prompt(1, n_prompt), max_tokens=1)
        backend.release()
        for stream in [long, *short]:
            stream.result()
    beside = [batch for batch in backend.batches if len(batch) == 4]
    assert [batch[-1][1] for batch in beside] == slices


@pytest.mark.parametrize(("n_batch", "n_ubatch", "chunk"), [(64, 16, 8), (64, 16, 20), (64, 64, 64), (33, 8, 2)])
def test_a_prompt_is_read_beside_any_number_of_replies(n_batch: int, n_ubatch: int, chunk: int) -> None:
    limits = StubBackend(n_ctx=4096, n_batch=n_batch, n_ubatch=n_ubatch).limits
    for n_rows in range(n_batch):
        assert 1 <= prefill_budget(limits, chunk, n_rows, 1000) <= n_batch - n_rows


def test_the_chunk_size_is_capped_by_the_backend_batch() -> None:
    backend = GatedBackend(n_ubatch=64, n_batch=64)
    with load_stub(backend, n_seq_max=12) as model:
        streams = [model.stream(random_prompt(i, 200), max_tokens=5) for i in range(12)]
        for stream in streams:
            stream.result()
    assert max(sum(n for _, n in batch) for batch in backend.batches) <= 64


def test_reproducible_requests_run_alone_in_the_context() -> None:
    backend = GatedBackend()
    with load_stub(backend, n_seq_max=4) as model:
        streams = [model.stream(random_prompt(i, 50), max_tokens=20, seed=1, reproducible=i == 2) for i in range(5)]
        replies = [stream.result() for stream in streams]
        for i, reply in enumerate(replies):
            assert reply.tokens == cold_reply(random_prompt(i, 50), max_tokens=20, seed=1).tokens
    # Only a request that runs alone is cut before its last token. The last such slice is the reproducible one's.
    start = max(i for i, batch in enumerate(backend.batches) if [rows for _, rows in batch] == [49])
    assert all(len(batch) == 1 for batch in backend.batches[start : start + 21]), "no other request until its end"
    assert max(len(batch) for batch in backend.batches[start + 21 :]) == 2


# --- cells run out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize("ram", ["1GiB", 0])
def test_requests_for_three_times_the_cells_all_reply_correctly(can_trim: bool, ram: object) -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100, can_trim=can_trim, n_sequences=16)
    requests = [(random_prompt(i, 20 + 9 * i), {"max_tokens": 120, "seed": i}) for i in range(16)]
    assert sum(len(prompt) + 120 for prompt, _ in requests) > 3 * 1024
    with erllama.Cache(block_size=SIZE, ram=ram) as cache:  # type: ignore[arg-type]
        with load_stub(backend, n_seq_max=16, cache=cache) as model:
            streams = [model.stream(prompt, **options) for prompt, options in requests]  # type: ignore[arg-type]
            replies = [stream.result() for stream in streams]
            assert engine_metrics(model).preempted > 0
            assert cache.counters()["faults"] == cache.counters()["restore_errors"] == 0
    for (prompt, options), reply in zip(requests, replies, strict=True):
        assert reply.finish_reason == "length"
        assert reply.tokens == cold_reply(prompt, can_trim, **options).tokens


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_lfm2])
def test_requests_for_three_times_the_cells_on_libllama(write: Callable[..., Path], tmp_path: Path) -> None:
    """Greedy replies are the same as alone for every kind of memory, except for near-ties."""
    path = write(tmp_path / "model.gguf", seed=1)
    prompts = [random_prompt(i, 50) for i in range(16)]
    with load_stub(EndlessBackend(path, n_ctx=512, n_sequences=1), cache=Cache(ram=0)) as model:
        expected = []
        for prompt in prompts:
            expected.append(model.complete(prompt, max_tokens=150, temperature=0, logprobs=2))
            model.evict()
    with load_stub(EndlessBackend(path, n_ctx=512, n_sequences=8), n_seq_max=8) as model:
        streams = [model.stream(prompt, max_tokens=150, temperature=0) for prompt in prompts]
        replies = [stream.result() for stream in streams]
        assert sum(len(reply.context_tokens) for reply in replies) > 3 * 512
        # Recurrent memory uses no cells that could run out.
        assert engine_metrics(model).preempted > 0 or write is write_mamba
        assert model.cache.counters()["restore_errors"] == model.cache.counters()["faults"] == 0
    for reply, alone_reply in zip(replies, expected, strict=True):
        assert reply.finish_reason == "length"
        assert_equal_but_for_near_ties(reply.tokens, alone_reply)


def test_a_preempted_request_resumes_with_the_same_state() -> None:
    """The request admitted last is preempted in the middle of its reply."""
    expected = {
        i: cold_reply(random_prompt(i, 150), max_tokens=140, seed=i, temperature=2.0, logprobs=1) for i in range(3)
    }
    stop = expected[2].text[-20:]
    backend = GatedBackend(n_ctx=768)
    with load_stub(backend, n_seq_max=3) as model:
        backend.hold()
        streams = [
            model.stream(
                random_prompt(i, 150),
                max_tokens=140,
                seed=i,
                temperature=2.0,
                logprobs=1,
                stop=stop if i == 2 else (),
            )
            for i in range(3)
        ]
        backend.release()
        texts = ["".join(e.text for e in stream if isinstance(e, erllama.TextDelta)) for stream in streams]
        replies = [stream.result() for stream in streams]
        assert engine_metrics(model).preempted > 0
    for i in range(2):
        assert replies[i].tokens == expected[i].tokens
        assert replies[i].logprobs == expected[i].logprobs
        assert texts[i] == replies[i].text == expected[i].text
    assert replies[2].stop_sequence == stop
    assert texts[2] == replies[2].text == expected[2].text[: expected[2].text.index(stop)]


def test_only_requests_that_could_never_fit_are_refused() -> None:
    with load_stub(StubBackend(n_ctx=128, eog_bias=-100)) as model:
        assert model.complete(random_prompt(1, 128)).finish_reason == "context_full"
        with pytest.raises(erllama.PromptTooLong, match="129 tokens and the context holds 128"):
            model.complete(random_prompt(1, 129))


def test_a_prompt_without_room_for_a_reply_is_reported() -> None:
    with load_stub(StubBackend(n_ctx=128, eog_bias=-100)) as model:
        reply = model.complete(random_prompt(1, 120), max_tokens=100)
        assert (reply.finish_reason, len(reply.tokens)) == ("context_full", 9)


# --- counting cells ----------------------------------------------------------------------------------------


@st.composite
def cell_steps(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    numbers = st.integers(0, 4)
    step = st.tuples(st.sampled_from(["extend", "share", "cut", "drop"]), numbers, numbers, st.integers(0, 12))
    return draw(st.lists(step, max_size=40))


@settings(max_examples=examples(75))
@given(cell_steps())
def test_cell_counts_match_a_cell_by_cell_model(steps: list[tuple[str, int, int, int]]) -> None:
    cells = Cells(10_000)
    serial: Iterator[int] = iter(range(10_000))
    held: dict[int, list[int]] = {number: [] for number in range(5)}
    for kind, a, b, n in steps:
        if kind == "extend":
            cells.extend(a, n)
            held[a] += [next(serial) for _ in range(n)]
        elif kind == "share" and not held[b] and a != b:
            end = min(n, len(held[a]))
            cells.share(a, b, end)
            held[b] = held[a][:end]
        elif kind == "cut":
            cells.cut(a, n)
            held[a] = held[a][:n]
        elif kind == "drop":
            cells.drop(a)
            held[a] = []
        assert cells.used == len(set().union(*held.values()))
        assert [cells.n_tokens(number) for number in range(5)] == [len(held[number]) for number in range(5)]
        for group in ({0}, {1, 2}, {0, 3, 4}):
            inside = set().union(*(held[number] for number in group))
            outside = set().union(*(held[number] for number in range(5) if number not in group))
            assert cells.exclusive(group) == len(inside - outside)


class Stuck(SmallTier):
    """Writes no block before it is released."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.go_on = threading.Event()

    def write(self, block: Block, payload: memoryview) -> None:
        assert self.go_on.wait(120)
        super().write(block, payload)


def test_kv_that_waits_to_be_written_is_found_in_ram_by_a_new_model(tmp_path: Path) -> None:
    prompt, tier = random_prompt(0, 4 * SIZE), Stuck(str(tmp_path))
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        try:
            with erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
                assert model.complete(prompt, max_tokens=1).cache.tier is None
            with erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
                assert model.complete(prompt, max_tokens=1).cache.tier == "ram"
        finally:
            tier.go_on.set()
        assert cache.flush()
        with erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
            assert model.complete(prompt, max_tokens=1).cache.tier == "remote"
