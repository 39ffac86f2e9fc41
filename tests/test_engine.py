"""Many requests at once: each gets the reply that it would get alone, and what they share is computed once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine import Batch, Ticket
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.stub import EOG, StubBackend
from erllama.engine.cells import Cells
from erllama.engine.metrics import EngineMetrics
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_mamba
from support import RecordingBackend, llama_backend, must_run

SIZE = 32  # tokens of a block


def random_prompt(seed: int, n: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, 250, n).astype(np.int32)


class Watched(StubBackend):
    """Keeps the shape of every batch; can be held before each decode."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"eog_bias": -100.0, **options})  # type: ignore[arg-type]
        self.batches: list[list[tuple[int, int]]] = []  # of (sequence, rows)
        self.allowed = threading.Semaphore(0)
        self.held = False
        self.at_decode = threading.Event()

    def hold(self) -> None:
        self.held = True

    def let_go(self) -> None:
        self.held = False
        self.allowed.release()

    def step(self) -> None:
        """Let one decode through, and wait for the next."""
        self.at_decode.clear()
        self.allowed.release()
        assert self.at_decode.wait(30)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.at_decode.set()
        if self.held:
            self.allowed.acquire()
        numbers, rows = np.unique(batch.sequences, return_counts=True)
        self.batches.append(list(zip(numbers.tolist(), rows.tolist(), strict=True)))
        return super().decode(batch)


def loaded(backend: StubBackend | RecordingBackend, **options: object) -> erllama.Model:
    return erllama.load_backend(backend, **{"cache": Cache(block_size=SIZE), **options})  # type: ignore[arg-type]


def alone(
    prompt: NDArray[np.int32], can_trim: bool = True, n_ctx: int = 4096, **options: object
) -> erllama.Completion:
    """The reply of a model that has never seen anything else."""
    backend = StubBackend(eog_bias=-100, can_trim=can_trim, n_ctx=n_ctx)
    with erllama.Cache(ram=0) as none, loaded(backend, cache=none) as model:
        return model.complete(prompt, **options)  # type: ignore[arg-type]


def metrics(model: erllama.Model) -> EngineMetrics:
    return model._runner.metrics


def eventually(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.001)


class Endless(RecordingBackend):
    """libllama with a vocabulary in which no token ends a reply."""

    def __init__(self, path: Path, **options: object) -> None:
        inner = llama_backend(path, n_ubatch=64, **options)
        inner.vocabulary.is_eog = np.zeros(inner.vocabulary.n_tokens, np.bool_)
        super().__init__(inner)


def assert_same_but_for_near_ties(tokens: tuple[int, ...], expected: erllama.Completion) -> None:
    """Greedy replies agree up to where two tokens were all but equally likely."""
    assert expected.logprobs is not None
    for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=True)):
        if a != b:
            (_, first), (second, runner_up) = expected.logprobs[i].top
            assert a == second
            assert first - runner_up < 0.05, "not a near-tie"
            return


# --- the same reply, alone or among others --------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from([600, 1024, 8192]))
def test_seeded_replies_are_the_same_alone_and_among_seven_others(seed: int, can_trim: bool, n_ctx: int) -> None:
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
    with loaded(StubBackend(eog_bias=-100, can_trim=can_trim, n_ctx=n_ctx), n_seq_max=8) as model:
        streams = [model.stream(prompt, **options) for prompt, options in requests]  # type: ignore[arg-type]
        replies = [stream.result() for stream in streams]
        model.cache.check_integrity()
        assert model.cache.counters()["faults"] == model.cache.counters()["restore_errors"] == 0
    for (prompt, options), reply in zip(requests, replies, strict=True):
        assert reply.tokens == alone(prompt, can_trim, n_ctx, **options).tokens


def test_on_libllama_greedy_replies_are_the_same_alone_and_among_others(tiny_gguf: Path) -> None:
    """Logits differ in their last bits with the batch; replies only where two tokens are all but equally likely."""
    prompts = [np.concatenate([random_prompt(0, 100), random_prompt(i, 30)]) for i in range(8)]
    options: dict[str, object] = {"n_ctx": 2048, "n_threads": 2, "n_seq_max": 8, "cache": Cache(ram=0)}
    with erllama.load_model(tiny_gguf, **options) as model:  # type: ignore[arg-type]
        expected = []
        for prompt in prompts:
            expected.append(model.complete(prompt, max_tokens=24, temperature=0, logprobs=2))
            model.evict()
        streams = [model.stream(prompt, max_tokens=24, temperature=0) for prompt in prompts]
        for stream, reply in zip(streams, expected, strict=True):
            assert_same_but_for_near_ties(stream.result().tokens, reply)


def test_a_reply_says_which_seed_it_used_and_that_gives_it_again() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        first = model.complete([1, 2, 3], max_tokens=20, temperature=2.0)
        assert model.complete([1, 2, 3], max_tokens=20, temperature=2.0, seed=first.seed).tokens == first.tokens


# --- shared prefixes ------------------------------------------------------------------------------


@pytest.mark.parametrize("can_trim", [True, False])
def test_eight_requests_at_once_read_their_common_prefix_once(can_trim: bool) -> None:
    prefix = random_prompt(1, 1024)
    prompts = [np.concatenate([prefix, random_prompt(10 + i, 32)]) for i in range(8)]
    backend = Watched(n_ctx=16384, can_trim=can_trim)
    with loaded(backend, n_seq_max=8) as model:
        backend.hold()
        streams = [model.stream(prompt, max_tokens=4, seed=1) for prompt in prompts]
        backend.let_go()
        replies = [stream.result() for stream in streams]
    assert sum(reply.timings.prefill_tokens for reply in replies) == 1024 + 8 * 32
    assert backend.tokens_decoded == 1024 + 8 * 32 + 8 * 3
    assert [reply.cache.tokens for reply in replies] == [0] + [1024] * 7
    assert {reply.cache.tier for reply in replies[1:]} == {"live" if can_trim else "ram"}


def test_on_libllama_too_cells_are_shared_and_replies_right(tiny_gguf: Path) -> None:
    backend = RecordingBackend(llama_backend(tiny_gguf, n_sequences=9, n_ctx=2048))
    prefix = random_prompt(1, 512)
    prompts = [np.concatenate([prefix, random_prompt(10 + i, 32)]) for i in range(8)]
    with loaded(backend, n_seq_max=8) as model:
        streams = [model.stream(prompt, max_tokens=4, temperature=0) for prompt in prompts]
        replies = [stream.result() for stream in streams]
    assert sum(reply.timings.prefill_tokens for reply in replies) == 512 + 8 * 32


def test_followers_of_a_leader_that_ends_go_on_by_themselves() -> None:
    backend = Watched(n_ubatch=64, n_batch=64)
    prefix = random_prompt(1, 500)
    with loaded(backend, n_seq_max=4) as model:
        backend.hold()
        leader = model.stream(np.concatenate([prefix, [1]]), max_tokens=4)
        assert backend.at_decode.wait(30)
        followers = [model.stream(np.concatenate([prefix, [2, i]]), max_tokens=4, seed=1) for i in range(3)]
        backend.step()
        backend.step()
        leader.cancel()
        backend.let_go()
        assert leader.result().finish_reason == "cancelled"
        for i, follower in enumerate(followers):
            prompt = np.concatenate([prefix, [2, i]]).astype(np.int32)
            assert follower.result().tokens == alone(prompt, max_tokens=4, seed=1).tokens
    assert backend.tokens_decoded < 2 * 500, "what the leader had read was not read again"


def test_a_conversation_goes_on_in_its_cells() -> None:
    backend = StubBackend(eog_bias=-100)
    with loaded(backend) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=10)
        after = backend.tokens_decoded
        second = model.complete([*first.context_tokens, 5, 6, 7], max_tokens=1)
        assert second.cache == erllama.CacheHit("partial", "live", 109)
        assert backend.tokens_decoded == after + 4, "the token drawn last, and three more"


def test_another_tenants_cells_are_not_shared() -> None:
    prompt = random_prompt(1, 100)
    with loaded(StubBackend(eog_bias=-100)) as model:
        model.complete(prompt, max_tokens=2, cache_salt="a")
        assert model.complete(prompt, max_tokens=2, cache_salt="b").cache.kind == "cold"
        assert model.complete(prompt, max_tokens=2).cache.kind == "cold"
        assert model.complete(prompt, max_tokens=2, cache_salt="a").cache.kind == "exact"


def test_parked_cells_keep_to_their_bound_while_others_compute() -> None:
    backend = Watched(n_ctx=4096)
    with loaded(backend, parked_cells=100, n_seq_max=2) as model:
        for i in range(5):
            model.complete(random_prompt(i, 60), max_tokens=5)
        backend.hold()
        stream = model.stream(random_prompt(99, 10), max_tokens=3)
        backend.at_decode.clear()
        assert backend.at_decode.wait(30)
        assert backend.cells_used <= 100 + 10
        backend.let_go()
        stream.result()
        assert model.complete(random_prompt(0, 60), max_tokens=1).cache.tier == "ram", "what went is in the cache"


def test_a_parked_prefix_is_shared_where_its_own_rest_is_kept() -> None:
    """A short question on a long parked context leaves that context as it is."""
    backend = StubBackend(eog_bias=-100)
    with loaded(backend, parked_cells=4096) as model:
        context = random_prompt(1, 400)
        model.complete(context, max_tokens=1)
        assert model.complete([*context[:50], 1, 2], max_tokens=1).cache == erllama.CacheHit("partial", "live", 50)
        assert model.complete(context, max_tokens=1).cache == erllama.CacheHit("exact", "live", 399)


# --- batches ----------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    backend = Watched(n_ubatch=128, n_batch=512)
    with loaded(backend, prefill_chunk_size=48, n_seq_max=4) as model:
        backend.hold()
        short = [model.stream([i, i + 1], max_tokens=60) for i in range(3)]
        backend.at_decode.clear()
        while metrics(model).decoded_tokens < 3:
            backend.step()
        n_before = len(backend.batches)
        long = model.stream(random_prompt(1, 1000), max_tokens=2)
        backend.let_go()
        assert len(long.result().tokens) == 2
        for stream in short:
            stream.result()
    beside = [
        batch for batch in backend.batches[n_before + 1 :] if len(batch) == 4 and max(n for _, n in batch) > 1
    ]
    assert len(beside) >= 1000 // 48, "each tick has a row of every reply, and a slice of the prompt"
    assert all(sum(n for _, n in batch) <= 48 + 3 for batch in beside)


def test_an_uninteresting_limit_is_the_backends_batch() -> None:
    backend = Watched(n_ubatch=64, n_batch=64)
    with loaded(backend, n_seq_max=12) as model:
        streams = [model.stream(random_prompt(i, 200), max_tokens=5) for i in range(12)]
        for stream in streams:
            stream.result()
    assert max(sum(n for _, n in batch) for batch in backend.batches) <= 64


def test_reproducible_requests_have_the_context_to_themselves() -> None:
    backend = Watched()
    with loaded(backend, n_seq_max=4) as model:
        streams = [model.stream(random_prompt(i, 50), max_tokens=20, seed=1, reproducible=i == 2) for i in range(5)]
        replies = [stream.result() for stream in streams]
        for i, reply in enumerate(replies):
            assert reply.tokens == alone(random_prompt(i, 50), max_tokens=20, seed=1).tokens
    # Cut before its last token: only who is alone is. The last such slice is the reproducible one's.
    start = max(i for i, batch in enumerate(backend.batches) if [rows for _, rows in batch] == [49])
    assert all(len(batch) == 1 for batch in backend.batches[start : start + 21]), "nobody else until its end"
    assert max(len(batch) for batch in backend.batches[start + 21 :]) == 2


# --- cells run out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize("ram", ["1GiB", 0])
def test_sixteen_requests_of_three_times_the_cells_all_come_out_right(can_trim: bool, ram: object) -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100, can_trim=can_trim, n_sequences=16)
    requests = [(random_prompt(i, 20 + 9 * i), {"max_tokens": 120, "seed": i}) for i in range(16)]
    assert sum(len(prompt) + 120 for prompt, _ in requests) > 3 * 1024
    with erllama.Cache(block_size=SIZE, ram=ram) as cache:  # type: ignore[arg-type]
        with loaded(backend, n_seq_max=16, cache=cache) as model:
            streams = [model.stream(prompt, **options) for prompt, options in requests]  # type: ignore[arg-type]
            replies = [stream.result() for stream in streams]
            assert metrics(model).preempted > 0
            assert cache.counters()["faults"] == cache.counters()["restore_errors"] == 0
    for (prompt, options), reply in zip(requests, replies, strict=True):
        assert reply.finish_reason == "length"
        assert reply.tokens == alone(prompt, can_trim, **options).tokens


@pytest.mark.parametrize("write", [write_llama, write_gemma3, write_mamba, write_lfm2])
def test_sixteen_requests_of_three_times_the_cells_on_libllama(write: Callable[..., Path], tmp_path: Path) -> None:
    """The same greedy replies as alone, whatever the kind of memory, but for near-ties."""
    path = write(tmp_path / "model.gguf", seed=1)
    prompts = [random_prompt(i, 50) for i in range(16)]
    with loaded(Endless(path, n_ctx=512, n_sequences=1), cache=Cache(ram=0)) as model:
        expected = []
        for prompt in prompts:
            expected.append(model.complete(prompt, max_tokens=150, temperature=0, logprobs=2))
            model.evict()
    with loaded(Endless(path, n_ctx=512, n_sequences=8), n_seq_max=8) as model:
        streams = [model.stream(prompt, max_tokens=150, temperature=0) for prompt in prompts]
        replies = [stream.result() for stream in streams]
        assert sum(len(reply.context_tokens) for reply in replies) > 3 * 512
        # Recurrent memory takes no cells that could run out.
        assert metrics(model).preempted > 0 or write is write_mamba
        assert model.cache.counters()["restore_errors"] == model.cache.counters()["faults"] == 0
    for reply, alone_reply in zip(replies, expected, strict=True):
        assert reply.finish_reason == "length"
        assert_same_but_for_near_ties(reply.tokens, alone_reply)


def test_who_comes_back_goes_on_with_the_same_text_stops_and_draws() -> None:
    """The youngest gives way in the middle of its reply."""
    expected = {
        i: alone(random_prompt(i, 150), max_tokens=140, seed=i, temperature=2.0, logprobs=1) for i in range(3)
    }
    stop = expected[2].text[-20:]
    backend = Watched(n_ctx=768)
    with loaded(backend, n_seq_max=3) as model:
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
        backend.let_go()
        texts = ["".join(e.text for e in stream if isinstance(e, erllama.TextDelta)) for stream in streams]
        replies = [stream.result() for stream in streams]
        assert metrics(model).preempted > 0
    for i in range(2):
        assert replies[i].tokens == expected[i].tokens
        assert replies[i].logprobs == expected[i].logprobs
        assert texts[i] == replies[i].text == expected[i].text
    assert replies[2].stop_sequence == stop
    assert texts[2] == replies[2].text == expected[2].text[: expected[2].text.index(stop)]


def test_only_what_could_never_fit_is_refused() -> None:
    with loaded(StubBackend(n_ctx=128, eog_bias=-100)) as model:
        assert model.complete(random_prompt(1, 128)).finish_reason == "context_full"
        with pytest.raises(erllama.PromptTooLong, match="129 tokens and the context holds 128"):
            model.complete(random_prompt(1, 129))


def test_a_prompt_that_leaves_no_room_for_its_reply_says_so() -> None:
    with loaded(StubBackend(n_ctx=128, eog_bias=-100)) as model:
        reply = model.complete(random_prompt(1, 120), max_tokens=100)
        assert (reply.finish_reason, len(reply.tokens)) == ("context_full", 9)


# --- streams -----------------------------------------------------------------------------------------


def test_a_stream_is_cancelled_from_another_thread_and_still_ends_with_done() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        stream = model.stream([1], max_tokens=None)
        next(stream)
        threading.Thread(target=stream.cancel).start()
        *_, last = stream
        assert isinstance(last, erllama.Done)
        assert last.completion.finish_reason == "cancelled"


def test_a_request_is_cancelled_while_it_waits() -> None:
    backend = Watched()
    with loaded(backend, n_seq_max=1) as model:
        backend.hold()
        first, second = model.stream([1], max_tokens=3), model.stream([2], max_tokens=3)
        second.cancel()
        backend.let_go()
        assert len(first.result().tokens) == 3
        reply = second.result()
        assert (reply.finish_reason, reply.tokens, reply.cache.kind) == ("cancelled", (), "cold")


def test_a_reader_that_stops_costs_its_reply_and_loses_nothing() -> None:
    with loaded(StubBackend(n_ctx=8192, eog_bias=-100)) as model:
        stream = model.stream([1], max_tokens=3000, seed=1)
        whole = stream.result()
        assert len(stream._ticket._unread) <= 256
        pieces = [event for event in stream if isinstance(event, erllama.TextDelta)]
        assert len(pieces) == 257, "the rest as one piece"
        assert "".join(piece.text for piece in pieces) == whole.text
        assert tuple(token for piece in pieces for token in piece.tokens) == whole.tokens


def test_completions_that_nobody_streams_keep_no_events() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        ticket = model._ticket([1], erllama.engine.RequestOptions(max_tokens=50))
        model._runner.submit(ticket)
        ticket.result()
        assert not ticket._unread


def test_a_tenth_of_replies_streams_while_the_rest_is_waited_for() -> None:
    with loaded(StubBackend(eog_bias=-100), n_seq_max=4) as model:
        streams = [model.stream([i], max_tokens=10, seed=i) for i in range(10)]
        replies = [model.complete([i], max_tokens=10, seed=i) for i in range(10)]
        assert [stream.result().tokens for stream in streams] == [reply.tokens for reply in replies]


# --- asyncio ------------------------------------------------------------------------------------------


def test_async_requests_take_no_threads() -> None:
    async def run(model: erllama.Model) -> list[erllama.Completion]:
        before = threading.active_count()
        tasks = [asyncio.ensure_future(model.acomplete([i], max_tokens=30, seed=i)) for i in range(50)]
        await asyncio.sleep(0)
        assert threading.active_count() <= before
        return list(await asyncio.gather(*tasks))

    with loaded(StubBackend(eog_bias=-100)) as model:
        replies = asyncio.run(run(model))
        assert [reply.tokens for reply in replies] == [
            model.complete([i], max_tokens=30, seed=i).tokens for i in range(50)
        ]


def test_async_streams_give_what_streams_give() -> None:
    async def run(model: erllama.Model) -> list[erllama.Event]:
        return [event async for event in model.astream("hello", max_tokens=30, seed=1)]

    with loaded(StubBackend(eog_bias=-100)) as model:
        *pieces, done = asyncio.run(run(model))
        assert isinstance(done, erllama.Done)
        expected = model.complete("hello", max_tokens=30, seed=1)
        assert done.completion.tokens == expected.tokens
        assert "".join(p.text for p in pieces if isinstance(p, erllama.TextDelta)) == expected.text


def test_the_loop_runs_on_while_a_model_computes() -> None:
    backend = Watched()

    async def run(model: erllama.Model) -> int:
        backend.hold()
        task = asyncio.ensure_future(model.acomplete([1], max_tokens=2))
        while not backend.at_decode.is_set():
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        backend.let_go()
        return len((await task).tokens)

    with loaded(backend) as model:
        assert asyncio.run(run(model)) == 2


@pytest.mark.parametrize("way", ["complete", "stream"])
def test_a_cancelled_task_cancels_its_request(way: str) -> None:
    async def consume(model: erllama.Model) -> None:
        if way == "complete":
            await model.acomplete([1])
        else:
            async for _ in model.astream([1]):
                pass

    async def run(model: erllama.Model) -> None:
        task = asyncio.ensure_future(consume(model))
        while not metrics(model).ticks:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while model.queue_depth:
            await asyncio.sleep(0.001)

    with loaded(StubBackend(n_ctx=65536, eog_bias=-100)) as model:
        asyncio.run(run(model))
        assert metrics(model).finished == {"cancelled": 1}


def test_leaving_an_async_stream_cancels_it() -> None:
    async def run(model: erllama.Model) -> erllama.Completion:
        async with model.astream([1]) as stream:
            async for _ in stream:
                break
        return await stream.result()

    with loaded(StubBackend(n_ctx=65536, eog_bias=-100)) as model:
        assert asyncio.run(run(model)).finish_reason == "cancelled"


def test_async_errors_are_the_same_errors() -> None:
    async def run(model: erllama.Model) -> None:
        with pytest.raises(erllama.OptionError):
            await model.acomplete([1], max_tokens=-1)
        with pytest.raises(erllama.DeadlineExceeded):
            await model.acomplete([1], timeout=0.0)
        with pytest.raises(erllama.DeadlineExceeded):
            async for _ in model.astream([1], timeout=0.0):
                pass
        assert (await model.aprefill([1, 2, 3])).tokens == ()

    with loaded(StubBackend(eog_bias=-100)) as model:
        asyncio.run(run(model))


def test_a_loop_that_ended_does_not_harm_the_model() -> None:
    async def run(model: erllama.Model) -> erllama.AsyncStream:
        return model.astream([1], max_tokens=200)

    with loaded(StubBackend(eog_bias=-100)) as model:
        stream = asyncio.run(run(model))
        eventually(lambda: stream._ticket.done)
        assert model.complete([2], max_tokens=1).finish_reason == "length"


# --- stop strings --------------------------------------------------------------------------------------


class Says(StubBackend):
    """Says a text, a byte a token, then ends."""

    def __init__(self, text: str) -> None:
        super().__init__(n_sequences=4)
        self.says = text.encode()

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        for row, position in enumerate(batch.positions[batch.output == 1]):
            at = int(position)  # of a prompt of one token
            logits[row] = -10.0
            logits[row, self.says[at] if at < len(self.says) else EOG] = 10.0
        return logits


@pytest.mark.parametrize(
    ("stop", "text", "matched"),
    [
        ("END", "One, two, ", "END"),
        (["two", "END"], "One, ", "two"),
        (["three", "hree"], "One, two, END, ", "three"),
        (["nothing"], "One, two, END, three, ü", None),
        ("ü", "One, two, END, three, ", "ü"),
        (["O"], "", "O"),
        ([", ü", "ü!"], "One, two, END, three", ", ü"),
    ],
)
def test_a_stop_string_ends_the_reply_and_is_never_streamed(
    stop: str | list[str], text: str, matched: str | None
) -> None:
    with loaded(Says("One, two, END, three, ü")) as model:
        stream = model.stream([1], stop=stop, temperature=0)
        pieces = [event.text for event in stream if isinstance(event, erllama.TextDelta)]
        reply = stream.result()
    assert "".join(pieces) == reply.text == text
    assert reply.stop_sequence == matched
    assert reply.finish_reason == "stop"


def test_what_was_held_back_comes_at_the_end() -> None:
    with loaded(Says("almost STO")) as model:
        stream = model.stream([1], stop="STOP", temperature=0)
        pieces = [event for event in stream if isinstance(event, erllama.TextDelta)]
        assert pieces[-1].text == "STO"
        assert "".join(bytes(piece.tokens).decode() for piece in pieces) == "almost STO", (
            "tokens come with their text"
        )
        assert stream.result().stop_sequence is None


# --- continuations and sessions ----------------------------------------------------------------------------


def test_an_unknown_parent_is_a_miss() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        reply = model.complete(random_prompt(1, 50), max_tokens=1, parent_key=bytes(32))
        assert reply.cache.kind == "cold"


def test_a_parents_save_is_waited_for_without_holding_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Watched(n_ctx=65536)
    with loaded(backend, n_seq_max=2, policy={"session_resume_wait_ms": 60_000}) as model:
        other = model.stream([1], max_tokens=None)
        next(other)
        key = b"k" * 32
        with model.cache.expecting(key):
            waiting = model.stream(random_prompt(1, 50), max_tokens=1, parent_key=key)
            ticks = metrics(model).ticks
            eventually(lambda: metrics(model).ticks > ticks + 50)
            assert not waiting._ticket.done
            assert model.queue_depth == 2
        assert waiting.result().finish_reason == "length"
        other.cancel()


def test_who_waits_for_a_save_is_cancelled_at_once_and_holds_up_nobody() -> None:
    with loaded(StubBackend(eog_bias=-100), policy={"session_resume_wait_ms": 3_600_000}) as model:
        key = b"k" * 32
        with model.cache.expecting(key):
            waiting = model.stream([1], parent_key=key)
            late = model.stream([1], parent_key=key, timeout=0.05)
            assert model.complete([2], max_tokens=3).finish_reason == "length"
            with pytest.raises(erllama.DeadlineExceeded):
                late.result()
            waiting.cancel()
            assert waiting.result().finish_reason == "cancelled"


def test_a_session_keeps_its_cells_when_others_are_parked_and_go() -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100)
    with erllama.Cache(ram=0) as none, loaded(backend, cache=none, parked_cells=0) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=10, session_id="ann")
        for i in range(20):
            model.complete(random_prompt(10 + i, 100), max_tokens=10)
        second = model.complete([*first.context_tokens, 1, 2], max_tokens=10, session_id="ann")
        assert second.cache == erllama.CacheHit("partial", "live", 109)
        assert model.end_session("ann")
        assert not model.end_session("ann")
        model.complete(random_prompt(50, 100), max_tokens=10)
        assert model.complete([*second.context_tokens, 1], max_tokens=1).cache.kind == "cold"


def test_cells_that_a_session_keeps_go_when_nothing_else_is_left() -> None:
    with loaded(StubBackend(n_ctx=256, eog_bias=-100)) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=10, session_id="ann")
        assert model.complete(random_prompt(2, 200), max_tokens=20).finish_reason == "length"
        second = model.complete([*first.context_tokens, 1, 2], max_tokens=10, session_id="ann")
        assert second.cache == erllama.CacheHit("partial", "ram", 109), "saved, and restored"


def test_a_session_that_is_in_use_is_busy() -> None:
    backend = Watched()
    with loaded(backend) as model:
        backend.hold()
        stream = model.stream([1, 2], max_tokens=5, session_id="ann")
        with pytest.raises(erllama.SessionBusy, match="'ann'"):
            model.complete([1, 2, 3], session_id="ann")
        with pytest.raises(erllama.SessionBusy):
            model.end_session("ann")
        other = model.stream([1, 2], max_tokens=5, session_id="bob")
        backend.let_go()
        stream.result()
        other.result()
        assert model.complete([1, 2, 3], max_tokens=1, session_id="ann").finish_reason == "length"


def test_a_tenants_sessions_are_its_own() -> None:
    backend = Watched()
    with loaded(backend) as model:
        backend.hold()
        first = model.stream(random_prompt(1, 50), max_tokens=5, session_id="chat", cache_salt="a")
        second = model.stream(random_prompt(2, 50), max_tokens=5, session_id="chat", cache_salt="b")
        backend.let_go()
        first.result()
        second.result()
        assert model.end_session("chat", cache_salt="a")
        assert not model.end_session("chat")
        assert model.end_session("chat", cache_salt="b")


def test_a_session_that_begins_anew_shares_what_others_have() -> None:
    with erllama.Cache(ram=0) as none, loaded(StubBackend(eog_bias=-100), cache=none, parked_cells=4096) as model:
        prompt = random_prompt(1, 200)
        model.complete([prompt[0], 9, 9, 9], max_tokens=5, session_id="ann")
        model.complete(prompt, max_tokens=5)
        assert model.complete(prompt, max_tokens=5, session_id="ann").cache == erllama.CacheHit(
            "exact", "live", 199
        )


def test_a_session_may_go_back() -> None:
    """The next request shares only a part: the rest of its cells is let go."""
    with loaded(StubBackend(eog_bias=-100)) as model:
        model.complete(random_prompt(1, 100), max_tokens=50, session_id="ann")
        prompt = np.concatenate([random_prompt(1, 100)[:60], random_prompt(2, 10)])
        reply = model.complete(prompt, max_tokens=10, session_id="ann", seed=1)
        assert reply.cache == erllama.CacheHit("partial", "live", 60)
        assert reply.tokens == alone(prompt, max_tokens=10, seed=1).tokens


def test_prefill_warms_a_session_and_samples_nothing() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        warm = model.prefill(random_prompt(1, 100), session_id="ann")
        assert (warm.tokens, warm.text, warm.finish_reason) == ((), "", "length")
        reply = model.complete(
            [*random_prompt(1, 100), 7], max_tokens=1, session_id="ann", parent_key=warm.finish_key
        )
        assert reply.cache == erllama.CacheHit("exact", "live", 100)


# --- what fails, fails alone --------------------------------------------------------------------------------


class Failing(StubBackend):
    """Raises, or gives NaN, for batches with a certain token."""

    def __init__(self, error: Exception | None, token: int = 99, **options: object) -> None:
        super().__init__(**{"eog_bias": -100.0, **options})  # type: ignore[arg-type]
        self.error, self.token = error, token
        self.failures = 0

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        hit = batch.tokens == self.token
        if self.error is not None and hit.any() and self.failures < 1:
            self.failures += 1
            raise self.error
        logits = super().decode(batch)
        rows = np.flatnonzero(batch.output)
        for i, row in enumerate(rows):
            if self.error is None and batch.tokens[row] == self.token:
                logits[i] = np.nan
        return logits


def prompts_with(token: int) -> list[list[int]]:
    return [[1, 2, 3 + i] for i in range(3)] + [[4, 5, token]]


def test_a_request_whose_sampling_fails_ends_alone() -> None:
    prompts = prompts_with(99)
    expected = [alone(np.array(prompt, np.int32), max_tokens=5, temperature=0).tokens for prompt in prompts]
    assert all(99 not in tokens for tokens in expected)
    with loaded(Failing(None)) as model:
        streams = [model.stream(prompt, max_tokens=5, temperature=0) for prompt in prompts]
        with pytest.raises(erllama.SamplingError):
            streams[3].result()
        assert [stream.result().tokens for stream in streams[:3]] == expected[:3]


def once(call: Callable[..., object], when: Callable[[], bool] = lambda: True) -> Callable[..., object]:
    """`call`, which fails the first time that `when`."""
    left = [1]

    def failing(*arguments: object, **options: object) -> object:
        if left and when():
            left.clear()
            raise RuntimeError("injected")
        return call(*arguments, **options)

    return failing


@pytest.mark.parametrize("name", ["share", "drop", "cut", "pack", "restore"])
def test_whatever_call_of_the_backend_fails_nobody_waits_for_ever(name: str) -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100)
    prompts = [np.concatenate([random_prompt(1, 100), random_prompt(i, 40)]) for i in range(6)]
    with loaded(backend, n_seq_max=3, parked_cells=0) as model:
        for _ in range(3):
            setattr(backend, name, once(getattr(StubBackend, name).__get__(backend)))
            streams = [model.stream(prompt, max_tokens=10 + 20 * i, seed=i) for i, prompt in enumerate(prompts)]
            for i, stream in enumerate(streams):
                with suppress(erllama.BackendError):
                    tokens = stream.result().tokens
                    assert tokens == alone(prompts[i], max_tokens=10 + 20 * i, seed=i).tokens
        model.evict()
        live = model._runner._scheduler.live
        assert backend.cells_used == live.cells.used == 0
        assert len(live._numbers) == 12, "no number leaks"


def test_a_backend_that_cannot_drop_what_is_evicted_loses_nothing() -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100)
    with loaded(backend, n_seq_max=3) as model:
        model.complete(random_prompt(1, 100), max_tokens=10)
        model.complete(random_prompt(2, 100), max_tokens=10)
        stream = model.stream(random_prompt(3, 100), max_tokens=400, seed=3)
        next(stream)
        backend.drop = once(backend.drop)  # type: ignore[method-assign]
        model.evict()
        assert stream.result().tokens == alone(random_prompt(3, 100), max_tokens=400, seed=3).tokens
        model.evict()
        live = model._runner._scheduler.live
        assert backend.cells_used == live.cells.used == 0
        assert len(live._numbers) == 12, "no number leaks"


CACHE_CALLS = ["lookup", "load", "load_each", "save", "wants", "contains", "stored", "packing", "expecting", "hold"]
CACHE_CALLS += ["let_go", "count_request", "awaits", "tier_names"]


@pytest.mark.parametrize("name", CACHE_CALLS)
def test_whatever_call_of_the_cache_fails_requests_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake in the cache")

    with loaded(StubBackend(n_ctx=512, eog_bias=-100), n_seq_max=2) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=5, seed=1)
        monkeypatch.setattr(Cache, name, property(broken) if name == "tier_names" else broken)
        for i in range(4):
            streams = [
                model.stream(random_prompt(j, 100), max_tokens=150, seed=1, parent_key=first.finish_key)
                for j in range(1, 4)
            ]
            for j, stream in enumerate(streams, 1):
                assert stream.result().tokens == alone(random_prompt(j, 100), max_tokens=150, seed=1).tokens, i
        monkeypatch.undo()
        assert model.complete(random_prompt(1, 100), max_tokens=5, seed=1).tokens == first.tokens


def test_cells_that_run_out_for_a_moment_cost_a_request_nothing() -> None:
    backend = StubBackend(n_ctx=512, eog_bias=-100)
    decode = backend.decode

    def tight(batch: Batch) -> NDArray[np.float32]:
        if backend.tokens_decoded > 110 and not failed:
            failed.append(1)
            raise erllama.CellsExhausted("not now")
        return decode(batch)

    failed: list[int] = []
    backend.decode = tight  # type: ignore[method-assign]
    with loaded(backend) as model:
        reply = model.complete(random_prompt(1, 77), max_tokens=100, seed=1)
    assert failed
    assert reply.tokens == alone(random_prompt(1, 77), max_tokens=100, seed=1).tokens


def test_a_model_whose_context_cannot_be_made_anew_says_why() -> None:
    class Dying(StubBackend):
        dead = False

        def decode(self, batch: Batch) -> NDArray[np.float32]:
            self.dead = True
            raise erllama.BackendError("the device is lost")

        def clear(self) -> None:
            if self.dead:
                raise erllama.BackendError("and does not come back")
            super().clear()

    with loaded(Dying()) as model:
        with pytest.raises(erllama.Error, match="does not come back"):
            model.complete([1])
        with pytest.raises(erllama.ModelUnloaded, match="cannot go on"):
            eventually(lambda: model.complete([1]))


@pytest.mark.parametrize("error", [erllama.BackendError("broken"), ValueError("broken"), MemoryError("broken")])
def test_a_failed_decode_ends_its_batch_and_the_queue_goes_on(error: Exception) -> None:
    backend = Failing(error, n_ctx=2048)
    with loaded(backend, n_seq_max=2) as model:
        parked = model.complete([7] * 50, max_tokens=1)
        bad = model.stream([99] * 10, max_tokens=5)
        with pytest.raises(erllama.BackendError, match="broken"):
            bad.result()
        streams = [model.stream([8] * 30, max_tokens=10, seed=i) for i in range(6)]
        for i, stream in enumerate(streams):
            assert stream.result().tokens == alone(np.full(30, 8, np.int32), max_tokens=10, seed=i).tokens
        again = model.complete([7] * 50, max_tokens=1)
        assert again.cache.kind == "exact", "what had been saved is still there"
        assert parked.finish_reason == again.finish_reason


def test_a_backend_that_runs_out_of_cells_before_it_should_is_no_error_of_the_requests() -> None:
    class Tight(StubBackend):
        def decode(self, batch: Batch) -> NDArray[np.float32]:
            if self.cells_used + len(batch.tokens) > 256:  # half of what it says
                raise erllama.CellsExhausted("no free cells")
            return super().decode(batch)

    with loaded(Tight(n_ctx=512, eog_bias=-100), n_seq_max=6) as model:
        streams = [model.stream(random_prompt(i, 60), max_tokens=40, seed=i) for i in range(6)]
        for i, stream in enumerate(streams):
            assert stream.result().tokens == alone(random_prompt(i, 60), max_tokens=40, seed=i).tokens
        with pytest.raises(erllama.CellsExhausted):
            model.complete(random_prompt(1, 300), max_tokens=1)


def test_the_queue_is_bounded() -> None:
    backend = Watched()
    with loaded(backend, n_seq_max=1, max_pending=2) as model:
        backend.hold()
        first = model.stream([1], max_tokens=1)
        assert backend.at_decode.wait(30)
        waiting = [model.stream([2], max_tokens=1) for _ in range(2)]
        with pytest.raises(erllama.QueueFull, match="max_pending=2"):
            model.complete([3])
        assert (model.pending, model.queue_depth, erllama.queue_depth()) == (2, 1, 1)
        backend.let_go()
        for stream in [first, *waiting]:
            stream.result()
        assert (model.pending, model.queue_depth, model.phase) == (0, 0, "idle")
        assert metrics(model).refused == 1


def test_a_session_that_the_queue_refused_is_not_busy() -> None:
    backend = Watched()
    with loaded(backend, n_seq_max=1, max_pending=1) as model:
        backend.hold()
        first = model.stream([1], max_tokens=1)
        assert backend.at_decode.wait(30)
        second = model.stream([1], max_tokens=1)
        with pytest.raises(erllama.QueueFull):
            model.stream([3], session_id="ann")
        backend.let_go()
        first.result()
        second.result()
        assert model.complete([3], max_tokens=1, session_id="ann").finish_reason == "length"


def test_a_deadline_ends_who_runs_and_who_waits() -> None:
    backend = Watched(n_ctx=65536)
    with loaded(backend, n_seq_max=1) as model:
        running = model.stream([1], timeout=0.2)
        waiting = model.stream([2], timeout=0.2)
        for stream in (running, waiting):
            with pytest.raises(erllama.DeadlineExceeded, match=r"timeout=0\.2"):
                stream.result()
            with pytest.raises(TimeoutError):
                stream.result()
        assert model.complete([3], max_tokens=1, timeout=60).finish_reason == "length"
        assert metrics(model).failed == {"DeadlineExceeded": 2}


def test_a_call_from_the_models_own_thread_is_refused() -> None:
    class Calling(StubBackend):
        model: erllama.Model

        def decode(self, batch: Batch) -> NDArray[np.float32]:
            self.model.complete([1])
            return super().decode(batch)

    backend = Calling()
    with loaded(backend) as model:
        backend.model = model
        with pytest.raises(erllama.CalledFromModelThread, match="its own thread"):
            model.complete([1], max_tokens=1)


def test_requests_that_run_at_the_unload_are_saved_and_told() -> None:
    backend = Watched()
    cache = Cache(block_size=SIZE)
    model = loaded(backend, cache=cache, n_seq_max=3)
    streams = [model.stream(random_prompt(i, 100), max_tokens=None) for i in range(4)]
    for stream in streams[:3]:
        next(stream)
    model.unload()
    for stream in streams:
        with pytest.raises(erllama.ModelUnloaded):
            list(stream)
    assert cache.counters()["saves_shutdown"] >= 3
    with pytest.raises(erllama.ModelUnloaded):
        model.end_session("ann")
    cache.close()


INTERRUPTED = """
import signal, sys, threading, time
import numpy as np
import erllama

model = erllama.load_model(sys.argv[1], n_ctx=65536, n_threads=1)
vocabulary = model._backend.vocabulary
vocabulary.is_eog = np.zeros(vocabulary.n_tokens, bool)
main = threading.get_ident()
def interrupt():
    while model.phase != "generating":
        time.sleep(0.001)
    signal.pthread_kill(main, signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    if sys.argv[2] == "complete":
        model.complete([5, 6, 7], temperature=0)
    else:
        for event in model.stream([5, 6, 7], temperature=0):
            pass
except KeyboardInterrupt:
    print("interrupted")
while model.queue_depth:
    time.sleep(0.001)
print(model.metrics.finished)
print(model.complete([5, 6, 7], max_tokens=1).finish_reason)
"""


@pytest.mark.parametrize("way", ["complete", "stream"])
def test_control_c_during_a_decode_ends_that_request_alone(tmp_path: Path, way: str) -> None:
    path = write_llama(tmp_path / "model.gguf", seed=1)
    assert must_run(INTERRUPTED, path, way).split("\n") == ["interrupted", "{'cancelled': 1}", "length", ""]


@pytest.mark.parametrize("way", ["complete", "stream", "acomplete", "astream"])
def test_an_interrupt_right_after_submitting_cancels_the_request(way: str) -> None:
    with loaded(StubBackend(eog_bias=-100, n_ctx=65536)) as model:
        submit = model._runner.submit

        def interrupted(ticket: Ticket) -> None:
            submit(ticket)
            raise KeyboardInterrupt

        async def ask() -> None:
            asked = getattr(model, way)("x")
            if way == "acomplete":
                await asked

        model._runner.submit = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(ask()) if way.startswith("a") else getattr(model, way)("x")
        while model.pending or model.queue_depth:
            time.sleep(0.001)
        model.end_session("nobody's")  # comes back between two ticks, so after the last
        assert model.metrics.finished == {"cancelled": 1}


# --- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_seq_max": 0}, "at least 1"),
        ({"n_seq_max": 13}, "at most 12"),
        ({"n_seq_max": "many"}, "integer"),
        ({"prefill_chunk_size": 0}, "at least 1"),
        ({"prefill_chunk_size": 10**6}, "at most 512"),
        ({"parked_cells": -1}, "at least 0"),
        ({"max_pending": 0}, "at least 1"),
        ({"n_seqmax": 2}, "did you mean 'n_seq_max'"),
    ],
)
def test_a_models_wrong_options_are_typed_errors(options: dict[str, object], words: str) -> None:
    with pytest.raises(erllama.OptionError, match=words):
        loaded(StubBackend(), **options)


@pytest.mark.parametrize("n", [0, 256, 10**6])
def test_libllama_is_never_asked_for_more_sequences_than_it_has(tiny_gguf: Path, n: int) -> None:
    with pytest.raises(erllama.OptionError, match="n_seq_max"):
        erllama.load_model(tiny_gguf, n_seq_max=n)


def test_libllamas_most_sequences_can_be_used(tiny_gguf: Path) -> None:
    with erllama.load_model(tiny_gguf, n_seq_max=255, n_ctx=2048) as model:
        streams = [model.stream([i % 200 + 3, 5], max_tokens=2, temperature=0) for i in range(255)]
        assert all(len(stream.result().context_tokens) >= 2 for stream in streams)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": 5}, "give a text"),
        ({"stop": [b"x"]}, "give a text"),
        ({"logprobs": -1}, "at least 0"),
        ({"logprobs": 101}, "at most 100"),
        ({"session_id": ""}, "not empty"),
        ({"session_id": 5}, "not empty"),
        ({"timeout": -1}, "at least 0"),
        ({"timeout": float("inf")}, "finite"),
        ({"max_tokens": -1}, "at least 0"),
    ],
)
def test_a_requests_wrong_options_are_typed_errors(options: dict[str, object], words: str) -> None:
    with loaded(StubBackend()) as model, pytest.raises(erllama.OptionError, match=words):
        model.complete("x", **options)  # type: ignore[arg-type]


def test_prefill_takes_no_options_of_sampling() -> None:
    with loaded(StubBackend()) as model, pytest.raises(erllama.OptionError, match="prefill has no option 'seed'"):
        model.prefill("x", seed=1)  # type: ignore[call-arg]


# --- looking at it -----------------------------------------------------------------------------------------


def test_looking_never_waits_for_a_decode() -> None:
    backend = Watched()
    with loaded(backend, n_seq_max=2, id="busy") as model:
        model.complete(random_prompt(1, 100), max_tokens=1)
        backend.hold()
        backend.at_decode.clear()
        stream = model.stream(random_prompt(1, 100), max_tokens=5)
        assert backend.at_decode.wait(30)
        assert model.phase == "prefilling"
        assert (model.pending, model.queue_depth, erllama.queue_depth()) == (0, 1, 1)
        assert model.last_cache_hit == erllama.CacheHit("exact", "live", 99)
        assert model.cached_prefix(random_prompt(1, 100)) == 99
        assert model.cached_prefix([1, 2, 3]) == 0
        assert model.info.queue_depth == 1
        assert (model.info.id, model.info.backend, model.info.n_seq_max) == ("busy", "stub", 2)
        backend.step()
        eventually(lambda: model.phase == "generating")
        backend.let_go()
        stream.result()


def test_logprobs_are_those_of_the_model() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        reply = model.complete([1, 2], max_tokens=5, temperature=0, logprobs=3)
        assert reply.logprobs is not None
        assert [entry.token for entry in reply.logprobs] == list(reply.tokens)
        for entry in reply.logprobs:
            assert entry.top[0] == (entry.token, entry.logprob), "greedy takes the most likely"
            assert entry.logprob >= entry.top[1][1] >= entry.top[2][1]
        everything = model.complete([1, 2], max_tokens=1, logprobs=100).logprobs
        assert everything is not None
        assert 0.2 < sum(np.exp(logprob) for _, logprob in everything[0].top) <= 1
        assert model.complete([1, 2], max_tokens=5).logprobs is None


def test_parked_cells_are_a_tier_that_operators_see_and_evict() -> None:
    with loaded(StubBackend(eog_bias=-100)) as model:
        cache = model.cache
        assert cache.tier_names[0] == "live"
        model.complete(random_prompt(1, 100), max_tokens=1)
        assert cache.counters()["blocks_live"] == 4
        assert cache.counters()["bytes_live"] == 100 * 8
        live = [row for row in cache.rows() if row.tier == "live"]
        assert sum(row.n_tokens for row in live) == 100
        assert cache.evict_bytes(1, ("live",)) > 0, "the youngest block"
        assert model.complete(random_prompt(1, 100), max_tokens=1).cache.tier == "ram"
        assert model.complete(random_prompt(1, 100), max_tokens=1).cache.tier == "live"
        model.evict()
        assert cache.counters()["blocks_live"] == 0
        cache.check_integrity()
    assert "live" not in {status.tier for status in cache.tiers()}


def test_blocks_that_are_only_in_cells_are_not_taken_for_stored() -> None:
    """What RAM has lost is saved again by whoever goes on from it."""
    with loaded(StubBackend(eog_bias=-100)) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=1)
        model.cache.evict_bytes("1GiB", ("ram",))
        second = model.complete([*first.context_tokens, 5, 6], max_tokens=1)
        assert second.cache.tier == "live"
        model.evict()
        assert model.complete([*second.context_tokens, 7], max_tokens=1).cache == erllama.CacheHit(
            "partial", "ram", 103
        )


# --- counting cells ----------------------------------------------------------------------------------------


@st.composite
def cell_steps(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    numbers = st.integers(0, 4)
    step = st.tuples(st.sampled_from(["extend", "share", "cut", "drop"]), numbers, numbers, st.integers(0, 12))
    return draw(st.lists(step, max_size=40))


@settings(max_examples=300)
@given(cell_steps())
def test_cells_are_counted_as_if_each_were_looked_at(steps: list[tuple[str, int, int, int]]) -> None:
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
        assert [cells.held(number) for number in range(5)] == [len(held[number]) for number in range(5)]
        for group in ({0}, {1, 2}, {0, 3, 4}):
            inside = set().union(*(held[number] for number in group))
            outside = set().union(*(held[number] for number in range(5) if number not in group))
            assert cells.only_of(group) == len(inside - outside)


# --- loading ---------------------------------------------------------------------------------------------


def test_a_model_decodes_once_before_it_is_given_out_and_nothing_of_that_remains(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, threads = LlamaBackend.decode, []

    def watched(self: LlamaBackend, batch: Batch) -> NDArray[np.float32]:
        threads.append(threading.current_thread().name)
        return decode(self, batch)

    monkeypatch.setattr(LlamaBackend, "decode", watched)
    replies = []
    for warmup in (True, False):
        threads.clear()
        with Cache() as cache, erllama.load_model(tiny_gguf, cache=cache, n_ctx=256, warmup=warmup) as model:
            assert threads == [f"erllama-model-{model.id}"] * warmup
            assert model.metrics.ticks == 0
            assert cache.rows() == []
            replies.append(model.complete([5, 6, 7], max_tokens=20, temperature=0, logprobs=0))
    assert replies[0].cache.kind == "cold"
    assert replies[0].logprobs == replies[1].logprobs


def test_a_model_that_cannot_decode_is_refused_when_it_is_loaded(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: LlamaBackend, batch: Batch) -> NDArray[np.float32]:
        raise erllama.BackendError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaBackend, "decode", failing)
        with pytest.raises(erllama.BackendError, match="out of memory"):
            erllama.load_model(tiny_gguf, id="cannot", n_ctx=256)
    assert "cannot" not in [model.id for model in erllama.list_models()]
    with erllama.load_model(tiny_gguf, id="cannot", n_ctx=256) as model:
        assert model.complete([5], max_tokens=1).tokens
    with pytest.raises(erllama.OptionError, match="warmup"):
        erllama.load_model(tiny_gguf, warmup="yes")  # type: ignore[arg-type]
