"""Replies generated together, for many ticks in a row: as each alone, whatever happens to one of them."""

from __future__ import annotations

import asyncio
import gc
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama._model.requests.streams import LoopWaker
from erllama.engine import Batch, RowSelector
from erllama.engine.backends.stub import StubBackend
from support.engine_models import GatedBackend, cold_reply, engine_metrics, load_stub
from support.recording_backend import RecordingBackend, llama_backend
from support.threads import in_threads, wait_until

# Without saves, only the end of a reply interrupts its growth.
NO_SAVES = {"continued_interval": 0}


def comparable(reply: erllama.Completion) -> tuple[object, ...]:
    return reply.text, reply.tokens, reply.finish_reason


def observed(model: erllama.Model, prompt: list[int], **options: object) -> tuple[object, ...]:
    """Return a reply whose log-probabilities are reported, so that the engine looks at every token."""
    return comparable(model.complete(prompt, logprobs=0, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("n_seq_max", [1, 4])
def test_replies_generated_together_are_those_of_each_alone(n_seq_max: int) -> None:
    options = [{"seed": i, "max_tokens": 20 + 7 * i, "temperature": i % 3 / 2} for i in range(12)]
    with load_stub(StubBackend(eog_bias=2), n_seq_max=n_seq_max) as model:
        streams = [model.stream([3 + i], **each) for i, each in enumerate(options)]  # type: ignore[arg-type]
        events = [[e for e in stream if isinstance(e, erllama.TextDelta)] for stream in streams]
        replies = [stream.result() for stream in streams]
        assert {reply.finish_reason for reply in replies} == {"stop", "length"}
        expected = [observed(model, [3 + i], **each) for i, each in enumerate(options)]
    assert [comparable(reply) for reply in replies] == expected
    for pieces, reply in zip(events, replies, strict=True):
        assert "".join(piece.text for piece in pieces) == reply.text
        assert tuple(token for piece in pieces for token in piece.tokens) == reply.tokens
        assert all(len(piece.tokens) == 1 for piece in pieces[:-1]), "one event for each token"


def test_penalties_see_every_token_of_the_reply() -> None:
    options = {"max_tokens": 60, "temperature": 0, "repeat_penalty": 1.5, "repeat_last_n": 32}
    with load_stub(StubBackend(eog_bias=-100)) as model:
        reply = model.complete([5], **options)  # type: ignore[arg-type]
        assert comparable(reply) == observed(model, [5], **options)
        assert len(set(reply.tokens)) > 30


def test_blocks_that_a_reply_fills_are_saved_while_it_grows() -> None:
    backend = GatedBackend()
    with load_stub(backend, policy={"min_tokens": 1, "continued_interval": 32}) as model:
        stream = model.stream([5], max_tokens=3000, temperature=0)
        wait_until(lambda: len(backend.batches) > 150)
        reply = cold_reply(np.array([5], np.int32), max_tokens=140, temperature=0)
        wait_until(lambda: model.cached_prefix(reply.context_tokens) >= 96)
        assert not stream._ticket.done
        stream.cancel()


class FailingBackend(StubBackend):
    """Returns NaN for one sequence of a decode of several, after some decodes."""

    def __init__(self, at: int) -> None:
        super().__init__(eog_bias=-100)
        self.at, self.n = at, 0

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        if len(batch.tokens) == 3 and batch.output.all():
            self.n += 1
            if self.n == self.at:
                logits[1] = np.nan
        return logits


def test_a_request_whose_logits_are_nan_fails_alone() -> None:
    prompts = [[5], [6], [7]]
    with load_stub(FailingBackend(at=10), n_seq_max=3) as model:
        streams = [model.stream(prompt, max_tokens=40, seed=1) for prompt in prompts]
        failed, results = 0, []
        for stream in streams:
            try:
                results.append(comparable(stream.result()))
            except erllama.SamplingError:
                failed += 1
        assert failed == 1
        assert len(results) == 2
        expected = [observed(model, prompt, max_tokens=40, seed=1) for prompt in prompts]
        assert all(result in expected for result in results)


@pytest.mark.parametrize("n_beside", [0, 2])
def test_a_deadline_ends_a_reply_that_is_generated(n_beside: int) -> None:
    with load_stub(StubBackend(n_ctx=1 << 14, eog_bias=-100), n_seq_max=4, policy=NO_SAVES) as model:
        others = [model.stream([6 + i], max_tokens=None) for i in range(n_beside)]
        for other in others:
            next(other)
        with pytest.raises(erllama.DeadlineExceeded):
            model.complete([5], max_tokens=None, timeout=0.3)
        assert not any(other._ticket.done for other in others)
        for other in others:
            other.cancel()
            assert other.result().finish_reason == "cancelled"


def test_a_deadline_of_a_waiting_request_is_kept() -> None:
    with load_stub(StubBackend(n_ctx=1 << 14, eog_bias=-100), n_seq_max=1, policy=NO_SAVES) as model:
        first = model.stream([5], max_tokens=None)
        next(first)
        with pytest.raises(erllama.DeadlineExceeded):
            model.complete([6], timeout=0.2)
        assert not first._ticket.done
        first.cancel()


def test_a_waiting_request_is_admitted_when_one_ends() -> None:
    with load_stub(StubBackend(n_ctx=1 << 14, eog_bias=-100), n_seq_max=2, policy=NO_SAVES) as model:
        long = model.stream([5], max_tokens=None)
        streams = [model.stream([6 + i], max_tokens=30) for i in range(5)]
        assert [len(stream.result().tokens) for stream in streams] == [30] * 5
        assert not long._ticket.done
        long.cancel()
        assert long.result().finish_reason == "cancelled"


def test_calls_between_ticks_see_every_token() -> None:
    backend = GatedBackend()
    with load_stub(backend, policy={"min_tokens": 1, "continued_interval": 0}) as model:
        stream = model.stream([5], max_tokens=None, temperature=0)
        wait_until(lambda: len(backend.batches) > 150)
        model.evict()
        reply = cold_reply(np.array([5], np.int32), max_tokens=130, temperature=0)
        assert model.cached_prefix(reply.context_tokens) >= 96
        assert not stream._ticket.done


def test_counts_are_those_of_single_ticks() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        model.complete([5, 6], max_tokens=50)
        metrics = engine_metrics(model)
        assert (metrics.ticks, metrics.decoded_tokens, metrics.prefilled_tokens) == (51, 49, 2)
        assert sum(metrics.between_tokens.counts) == 49
        assert sum(metrics.first_token.counts) == 1


def test_an_event_loop_is_woken_once_for_all_streams_of_a_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    n_wakes = 0
    wake = LoopWaker.wake

    def counting(self: LoopWaker) -> None:
        nonlocal n_wakes
        n_wakes += 1
        wake(self)

    async def read(stream: erllama.AsyncStream) -> int:
        return sum([len(event.tokens) async for event in stream if isinstance(event, erllama.TextDelta)])

    async def run(model: erllama.Model) -> list[int]:
        return await asyncio.gather(*(read(model.astream([5 + i], max_tokens=50)) for i in range(8)))

    monkeypatch.setattr(LoopWaker, "wake", counting)
    with load_stub(StubBackend(eog_bias=-100), n_seq_max=8) as model:
        assert asyncio.run(run(model)) == [50] * 8
        # At most one for each tick, and one more where replies end.
        assert n_wakes <= 2 * engine_metrics(model).ticks


def test_streams_of_two_event_loops_are_woken_in_their_own() -> None:
    async def read(model: erllama.Model, at: int) -> None:
        events = [event async for event in model.astream([5 + at], max_tokens=40)]
        assert isinstance(events[-1], erllama.Done)
        assert len(events[-1].completion.tokens) == 40

    with load_stub(StubBackend(eog_bias=-100), n_seq_max=4) as model:
        in_threads(lambda at: asyncio.run(read(model, at)), 4)


class LateCalls(deque[object]):
    """Calls that arrive just after the model thread has looked for the first time."""

    looked = False

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__()
        self.notify = notify

    def __bool__(self) -> bool:
        looked, self.looked = self.looked, len(self) > 0
        if self.looked and not looked:
            self.notify()
        return looked and len(self) > 0


def test_a_call_that_arrives_between_two_looks_sees_every_token() -> None:
    backend = GatedBackend()
    with load_stub(backend, policy={"min_tokens": 1, "continued_interval": 0}) as model:
        runner = model._runner
        runner._calls = LateCalls(runner._notify)  # type: ignore[attr-defined]
        stream = model.stream([5], max_tokens=None, temperature=0)
        wait_until(lambda: len(backend.batches) > 150)
        model.evict()
        reply = cold_reply(np.array([5], np.int32), max_tokens=130, temperature=0)
        assert model.cached_prefix(reply.context_tokens) >= 96
        assert not stream._ticket.done
        stream.cancel()


def test_a_closed_event_loop_is_not_kept() -> None:
    loops: list[ref[asyncio.AbstractEventLoop]] = []

    async def leave(model: erllama.Model) -> erllama.AsyncStream:
        loops.append(ref(asyncio.get_running_loop()))
        stream = model.astream([5], max_tokens=None)
        await anext(stream)
        with suppress(TimeoutError):
            await asyncio.wait_for(stream._waiter.wait(), 120)
        return stream

    with load_stub(StubBackend(n_ctx=1 << 14, eog_bias=-100)) as model:
        for _ in range(3):
            stream = asyncio.run(leave(model))
            stream.cancel()  # its last events arrive when the loop is closed
            wait_until(lambda ticket=stream._ticket: ticket.done)  # type: ignore[misc]
            del stream
        gc.collect()
        assert [loop() for loop in loops[:-1]] == [None, None]


def test_a_backend_that_selects_logits_gives_the_replies_of_numpy(tiny_gguf: Path) -> None:
    """The draws of a seed are the same, with every chain of samplers."""
    options: list[dict[str, object]] = [
        {},
        {"temperature": 0},
        {"top_k": 1},
        {"top_k": 0, "top_p": 0.9},
        {"top_k": 600, "min_p": 0.0},
        {"temperature": 1.5, "min_p": 0.01, "min_keep": 3},
        {"repeat_penalty": 1.3},
        {"temperature": 0, "presence_penalty": 0.5},
        {"xtc_probability": 0.5, "xtc_threshold": 0.01},
        {"typical_p": 0.7},
        {"mirostat": 2},
        {"dry_multiplier": 0.8},
        {"top_n_sigma": 1.0},
        {"logit_bias": {7: 3.0}},
    ]
    replies = []
    for backend in (llama_backend(tiny_gguf), RecordingBackend(llama_backend(tiny_gguf))):
        assert isinstance(backend, RowSelector) == (not isinstance(backend, RecordingBackend))
        with erllama.load_backend(backend, cache=erllama.Cache(ram=0)) as model:
            replies.append(
                [
                    comparable(model.complete([5 + i], seed=i, max_tokens=12, **options[i % len(options)]))  # type: ignore[arg-type]
                    for i in range(6 * len(options))
                ]
            )
    assert replies[0] == replies[1]
