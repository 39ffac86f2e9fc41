"""Streams, asyncio and stop strings: readers that pause or leave, and where a reply ends."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.engine import Batch, Request, RequestOptions, Ticket
from erllama.engine.backends.stub import EOG, StubBackend
from erllama.engine.requests.ticket import DeltaPiece, EndPiece
from support.engine_models import (
    GatedBackend,
    engine_metrics,
    load_stub,
)
from support.threads import wait_until

# --- streams -----------------------------------------------------------------------------------------


def test_a_stream_cancelled_by_another_thread_ends_with_done() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        stream = model.stream([1], max_tokens=None)
        next(stream)
        threading.Thread(target=stream.cancel).start()
        *_, last = stream
        assert isinstance(last, erllama.Done)
        assert last.completion.finish_reason == "cancelled"


def test_a_waiting_request_can_be_cancelled() -> None:
    backend = GatedBackend()
    with load_stub(backend, n_seq_max=1) as model:
        backend.hold()
        first, second = model.stream([1], max_tokens=3), model.stream([2], max_tokens=3)
        second.cancel()
        backend.release()
        assert len(first.result().tokens) == 3
        reply = second.result()
        assert (reply.finish_reason, reply.tokens, reply.cache.kind) == ("cancelled", (), "cold")


def test_a_paused_reader_delays_only_its_reply_and_loses_no_event() -> None:
    with load_stub(StubBackend(n_ctx=8192, eog_bias=-100)) as model:
        stream = model.stream([1], max_tokens=3000, seed=1)
        whole = stream.result()
        assert stream._ticket._unread.qsize() == 258, "256 pieces, the rest as one, and the end"
        pieces = [event for event in stream if isinstance(event, erllama.TextDelta)]
        assert len(pieces) == 257, "the rest is one piece"
        assert "".join(piece.text for piece in pieces) == whole.text
        assert tuple(token for piece in pieces for token in piece.tokens) == whole.tokens


def test_a_request_that_pauses_sends_what_a_slow_reader_has_not_read() -> None:
    ticket = Ticket(Request(np.zeros(1, np.int32), RequestOptions()), streaming=True)
    for token in range(300):
        ticket.emit(DeltaPiece("text", chr(token + 256), (token,), ()))
        ticket.notify()
    events = [ticket.poll() for _ in range(256)]
    assert ticket.poll() is None
    ticket.flush()
    events.append(ticket.poll())
    assert [token for event in events if isinstance(event, erllama.TextDelta) for token in event.tokens] == [
        *range(300)
    ]
    assert ticket.poll() is None


@pytest.mark.parametrize("read_first", [0, 3, 40])
def test_joining_what_is_unread_changes_neither_text_nor_tokens(read_first: int) -> None:
    with load_stub(StubBackend(n_ctx=8192, eog_bias=-100)) as model:
        stream = model.stream([1], max_tokens=1000, seed=1)
        whole = stream.result()
        pieces = [next(stream) for _ in range(read_first)]
        for _ in range(2):  # joins what is joined already, too
            stream._ticket.join_unread()
        *rest, done = stream
        assert len(rest) == 1
        pieces += rest
        assert "".join(piece.text for piece in pieces if isinstance(piece, erllama.TextDelta)) == whole.text
        assert [token for p in pieces if isinstance(p, erllama.TextDelta) for token in p.tokens] == [*whole.tokens]
        assert done == erllama.Done(whole)


def test_only_events_of_one_kind_are_joined_and_the_end_stays() -> None:
    ticket = Ticket(Request(np.zeros(1, np.int32), RequestOptions()), streaming=True)
    for kind, token in (("thinking", 1), ("thinking", 2), ("end", 3), ("text", 4), ("text", 5), ("call", 6)):
        piece = EndPiece("thinking", b"") if kind == "end" else DeltaPiece(kind, str(token), (token,), ())  # type: ignore[arg-type]
        ticket.emit(piece)
        ticket.notify()
    ticket.fail(erllama.SamplingError("the end"))
    ticket.join_unread()
    assert [ticket.poll() for _ in range(4)] == [
        erllama.ThinkingDelta("12", (1, 2), ()),
        erllama.ThinkingEnd(b""),
        erllama.TextDelta("45", (4, 5), ()),
        erllama.ToolCallDelta("6", (6,), ()),
    ]
    with pytest.raises(erllama.SamplingError):
        ticket.poll()


def test_a_ticket_that_several_threads_read_ends_for_each_of_them() -> None:
    ticket = Ticket(Request(np.zeros(1, np.int32), RequestOptions()), streaming=True)
    found: list[erllama.Event] = []
    ended = []

    def read() -> None:
        with suppress(erllama.SamplingError):
            found.extend(ticket.events())
        with pytest.raises(erllama.SamplingError):
            ticket.result()
        ended.append(True)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for token in range(1000):
        ticket.emit(DeltaPiece("text", "x", (token,), ()))
        ticket.notify()
    ticket.fail(erllama.SamplingError("the end"))
    for reader in readers:
        reader.join()
    assert len(ended) == len(readers)
    assert sorted(token for event in found if isinstance(event, erllama.TextDelta) for token in event.tokens) == [
        *range(1000)
    ]


def test_completions_without_a_stream_keep_no_events() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        ticket = model._requests.ticket([1], erllama.engine.RequestOptions(max_tokens=50), model)
        model._runner.submit(ticket)
        ticket.result()
        assert [type(event) for event in ticket.events()] == [erllama.Done]


def test_streams_and_blocking_calls_work_side_by_side() -> None:
    with load_stub(StubBackend(eog_bias=-100), n_seq_max=4) as model:
        streams = [model.stream([i], max_tokens=10, seed=i) for i in range(10)]
        replies = [model.complete([i], max_tokens=10, seed=i) for i in range(10)]
        assert [stream.result().tokens for stream in streams] == [reply.tokens for reply in replies]


# --- asyncio ------------------------------------------------------------------------------------------


def test_async_requests_start_no_threads() -> None:
    async def run(model: erllama.Model) -> list[erllama.Completion]:
        before = threading.active_count()
        tasks = [asyncio.ensure_future(model.acomplete([i], max_tokens=30, seed=i)) for i in range(50)]
        await asyncio.sleep(0)
        assert threading.active_count() <= before
        return list(await asyncio.gather(*tasks))

    with load_stub(StubBackend(eog_bias=-100)) as model:
        replies = asyncio.run(run(model))
        assert [reply.tokens for reply in replies] == [
            model.complete([i], max_tokens=30, seed=i).tokens for i in range(50)
        ]


def test_async_streams_yield_the_same_events() -> None:
    async def run(model: erllama.Model) -> list[erllama.Event]:
        return [event async for event in model.astream("hello", max_tokens=30, seed=1)]

    with load_stub(StubBackend(eog_bias=-100)) as model:
        *pieces, done = asyncio.run(run(model))
        assert isinstance(done, erllama.Done)
        expected = model.complete("hello", max_tokens=30, seed=1)
        assert done.completion.tokens == expected.tokens
        assert "".join(p.text for p in pieces if isinstance(p, erllama.TextDelta)) == expected.text


def test_the_event_loop_runs_while_a_model_computes() -> None:
    backend = GatedBackend()

    async def run(model: erllama.Model) -> int:
        backend.hold()
        task = asyncio.ensure_future(model.acomplete([1], max_tokens=2))
        while not backend.at_decode.is_set():
            await asyncio.sleep(0.001)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not task.done()
        backend.release()
        return len((await task).tokens)

    with load_stub(backend) as model:
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
        while not engine_metrics(model).ticks:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while model.queue_depth:
            await asyncio.sleep(0.001)

    with load_stub(StubBackend(n_ctx=65536, eog_bias=-100)) as model:
        asyncio.run(run(model))
        assert engine_metrics(model).finished == {"cancelled": 1}


def test_leaving_an_async_stream_cancels_it() -> None:
    async def run(model: erllama.Model) -> erllama.Completion:
        async with model.astream([1]) as stream:
            async for _ in stream:
                break
        return await stream.result()

    with load_stub(StubBackend(n_ctx=65536, eog_bias=-100)) as model:
        assert asyncio.run(run(model)).finish_reason == "cancelled"


def test_async_calls_raise_the_same_errors() -> None:
    async def run(model: erllama.Model) -> None:
        with pytest.raises(erllama.OptionError):
            await model.acomplete([1], max_tokens=-1)
        with pytest.raises(erllama.DeadlineExceeded):
            await model.acomplete([1], timeout=0.0)
        with pytest.raises(erllama.DeadlineExceeded):
            async for _ in model.astream([1], timeout=0.0):
                pass
        assert (await model.aprefill([1, 2, 3])).tokens == ()

    with load_stub(StubBackend(eog_bias=-100)) as model:
        asyncio.run(run(model))


def test_a_closed_event_loop_does_not_harm_the_model() -> None:
    async def run(model: erllama.Model) -> erllama.AsyncStream:
        return model.astream([1], max_tokens=200)

    with load_stub(StubBackend(eog_bias=-100)) as model:
        stream = asyncio.run(run(model))
        wait_until(lambda: stream._ticket.done)
        assert model.complete([2], max_tokens=1).finish_reason == "length"


# --- stop strings --------------------------------------------------------------------------------------


class TextBackend(StubBackend):
    """Replies with a text, one byte per token, then ends."""

    def __init__(self, text: str) -> None:
        super().__init__(n_sequences=4)
        self.says = text.encode()

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        for row, position in enumerate(batch.positions[batch.output == 1]):
            at = int(position)  # for a prompt of one token
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
    with load_stub(TextBackend("One, two, END, three, ü")) as model:
        stream = model.stream([1], stop=stop, temperature=0)
        pieces = [event.text for event in stream if isinstance(event, erllama.TextDelta)]
        reply = stream.result()
    assert "".join(pieces) == reply.text == text
    assert reply.stop_sequence == matched
    assert reply.finish_reason == "stop"


def test_held_back_text_is_sent_at_the_end() -> None:
    with load_stub(TextBackend("almost STO")) as model:
        stream = model.stream([1], stop="STOP", temperature=0)
        pieces = [event for event in stream if isinstance(event, erllama.TextDelta)]
        assert pieces[-1].text == "STO"
        assert "".join(bytes(piece.tokens).decode() for piece in pieces) == "almost STO", (
            "tokens are sent with their text"
        )
        assert stream.result().stop_sequence is None
