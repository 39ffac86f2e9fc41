"""Requests that continue replies of another process: their progress, pieces, numbers and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import erllama
from erllama.cache import Cache, Policy
from erllama.engine import (
    Completion,
    Grammar,
    Markers,
    PhaseOptions,
    Request,
    RequestOptions,
    SamplingOptions,
    SamplingState,
    Ticket,
    TokenLogprobs,
)
from erllama.engine.backends.stub import EOG, StubBackend
from erllama.engine.requests.progress import ReplyProgress
from erllama.engine.requests.text_reply import decode_pieces
from erllama.engine.requests.ticket import DeltaPiece, Piece, TextTokens
from support.engine_models import GatedBackend, random_prompt, start_thread
from support.resumption import Life, Record, comparable, events_of
from support.scripted_backend import START, PieceVocabulary, ScriptedBackend
from support.threads import wait_until

GREEDY = SamplingOptions(temperature=0.0)
STATE = SamplingState(1, (3, 5, 0, 0))


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache(block_size=16) as found:
        yield found


def prompt_only(**options: object) -> Request:
    return Request(random_prompt(1, 20), RequestOptions(**{"sampling": GREEDY, **options}))  # type: ignore[arg-type]


def whole_reply(asked: Request, backend: StubBackend) -> Completion:
    """Return the reply of a new model without a cache."""
    with Cache(ram=0) as none:
        outcome = Life(asked, backend, none).outcome
    assert isinstance(outcome, Completion)
    return outcome


def progress_after(tokens: tuple[int, ...], **others: object) -> ReplyProgress:
    return ReplyProgress(tokens, **{"logprobs": (), "sampling_state": STATE, **others})  # type: ignore[arg-type]


def tokens_of(pieces: list[Piece]) -> list[int]:
    """Return the tokens of the pieces of a reply that is all text."""
    found: list[int] = []
    for piece in pieces:
        assert isinstance(piece, int | TextTokens)
        found += [piece] if isinstance(piece, int) else piece.tokens
    return found


# --- progress ---------------------------------------------------------------------------------------------


class Forwarder:
    """Listens to a ticket as a process of its own would: forwards pieces and progress whenever it is woken."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket, self.record = ticket, Record()
        self.threads: set[str] = set()
        self.n_wakes = 0

    def announce(self) -> Forwarder:
        return self

    def wake(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.n_wakes += 1
        if self.ticket.source is not None:
            self.record.add(self.ticket)
        else:
            self.record.pieces += self.ticket.take_pieces()


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_listener_receives_pieces_and_progress_after_every_tick(cache: Cache, logprobs: int | None) -> None:
    asked = prompt_only(max_tokens=40, logprobs=logprobs)
    backend = StubBackend(eog_bias=-100)
    thread = start_thread(backend, cache)
    ticket = Ticket(asked, streaming=True)
    forwarder = Forwarder(ticket)
    ticket.listen(forwarder)
    thread.submit(ticket)
    reply = ticket.result()
    thread.stop()
    assert forwarder.n_wakes >= 40
    assert forwarder.threads == {"erllama-model-test"}
    progress = forwarder.record.progress
    assert progress is not None
    assert (progress.tokens, progress.logprobs) == (reply.tokens, reply.logprobs or ())
    assert progress.sampling_state == reply.sampling_state
    assert progress.hit == reply.cache
    events = events_of(asked, forwarder.record.pieces, reply, backend.vocabulary)
    assert tuple(token for event in events for token in event.tokens) == reply.tokens  # type: ignore[union-attr]


def test_progress_has_only_what_is_new(cache: Cache) -> None:
    backend = GatedBackend()
    thread = start_thread(backend, cache)
    ticket = Ticket(prompt_only(max_tokens=30, logprobs=0), streaming=True)
    backend.hold()
    thread.submit(ticket)
    assert backend.at_decode.wait(120)
    for _ in range(10):
        backend.step()
    found: list[ReplyProgress] = []

    def look() -> None:
        assert ticket.source is not None
        found.extend(ticket.source.progress(n) for n in (0, 3, 3))

    thread.call_soon(look)
    backend.release()
    reply = ticket.result()
    thread.stop()
    n = len(found[0].tokens)
    assert n >= 9
    assert found[0].tokens == reply.tokens[:n]
    assert found[1] == found[2] == found[0]._replace(tokens=reply.tokens[3:n], logprobs=reply.logprobs[3:n])  # type: ignore[index]


def test_a_call_between_two_ticks_of_a_run_sees_all_tokens(cache: Cache) -> None:
    """The sequences are not up to date during a run, and a call that is not awaited does not end it."""
    backend = GatedBackend(n_ctx=8192)
    thread = start_thread(backend, cache)
    ticket = Ticket(prompt_only(max_tokens=None), streaming=True)
    thread.submit(ticket)
    tokens: list[int] = []
    seen: list[tuple[int, int, int]] = []

    def look() -> None:
        source = ticket.source
        run = thread._scheduler._run
        if source is not None and run is not None:
            tokens.extend(tokens_of(ticket.take_pieces()))
            seen.append((len(source.progress(0).tokens), len(tokens), run.n_ticks))

    for _ in range(50):
        thread.call_soon(look)
        n = len(backend.batches)
        wait_until(lambda n=n: len(backend.batches) > n)  # type: ignore[misc]
    ticket.cancel()
    reply = ticket.result()
    thread.stop()
    assert any(n_ticks > 1 for *_, n_ticks in seen)
    assert all(n_known == n_sent for n_known, n_sent, _ in seen)
    assert all(one[0] <= other[0] for one, other in pairwise(seen))
    assert tuple(tokens) == reply.tokens[: len(tokens)]


def test_tokens_that_the_engine_queued_are_a_part_of_the_progress(cache: Cache) -> None:
    """With log-probabilities, the tokens that end thinking are appended one at a time."""
    vocabulary = PieceVocabulary()
    phases = PhaseOptions(
        thinking=Markers(("<t>",), ("</t>",)), starts_in_thinking=True, thinking_budget=2, budget_message=" so "
    )
    options = RequestOptions(sampling=GREEDY, max_tokens=20, logprobs=0, phases=phases)
    asked = Request(np.array([START], np.int32), options)

    def scripted() -> ScriptedBackend:
        return ScriptedBackend(vocabulary, lambda tokens: ord("x"))

    expected = whole_reply(asked, scripted())
    assert expected.thinking == "xx so"
    queues = set()
    for n_ticks in range(2, 15):
        record = Record()
        Life(asked, scripted(), cache, record, kill_after=n_ticks)
        assert record.progress is not None
        queues.add(bytes(record.progress.queued))
        assert record.progress.thinking_ended == (3 <= n_ticks <= 9)
        outcome = Life(replace(asked, resumed=record.progress), scripted(), cache, record).outcome
        assert isinstance(outcome, Completion)
        assert (outcome.tokens, outcome.thinking, outcome.text) == (
            expected.tokens,
            expected.thinking,
            expected.text,
        )
    assert queues == {b" so </t>"[n:] for n in range(1, 9)}


def test_the_end_of_a_thought_is_inserted_once(cache: Cache) -> None:
    """The marker that the engine inserted may become a longer one: the thought has not ended yet."""
    vocabulary = PieceVocabulary()
    phases = PhaseOptions(
        thinking=Markers(("<t>",), ("</t>", "<</t>x")), starts_in_thinking=True, thinking_budget=2
    )
    asked = Request(np.array([START], np.int32), RequestOptions(sampling=GREEDY, phases=phases))
    reply = vocabulary.byte_tokens("a<</t>yz")
    expected = whole_reply(asked, ScriptedBackend(vocabulary, reply))
    assert (expected.thinking, expected.text) == ("a<", "yz")
    has_ended = []
    for n_ticks in range(1, 5):
        record = Record()
        Life(asked, ScriptedBackend(vocabulary, reply), cache, record, kill_after=n_ticks)
        assert record.progress is not None
        has_ended.append(record.progress.thinking_ended)
        backend = ScriptedBackend(vocabulary, reply)
        outcome = Life(replace(asked, resumed=record.progress), backend, cache, record).outcome
        assert isinstance(outcome, Completion)
        assert (outcome.tokens, outcome.thinking, outcome.text) == (expected.tokens, "a<", "yz")
    assert has_ended == [False, True, True, False], "the inserted tokens take a tick of their own"


# --- replies that have ended ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},  # the end token
        {"max_tokens": 3},
        {"stop": ("é",)},
        {"stop_token_ids": (ord("b"),)},
        {"stop_token_ids": (EOG,)},
        {"grammar": Grammar.regex("aéb")},
    ],
)
def test_a_reply_that_ended_before_the_interruption_ends_at_once(options: dict[str, object], cache: Cache) -> None:
    """The process is killed while it saves the context of the reply."""
    vocabulary = PieceVocabulary()
    reply = vocabulary.byte_tokens("aéb")
    asked = Request(np.array([START], np.int32), RequestOptions(sampling=SamplingOptions(seed=5), **options))  # type: ignore[arg-type]
    expected = Life(asked, ScriptedBackend(vocabulary, reply), cache)
    assert isinstance(expected.outcome, Completion)
    n_ended = 0
    for n_ticks in range(1, 7):
        record = Record()
        with Cache(block_size=16) as other:
            life = Life(asked, ScriptedBackend(vocabulary, reply), other, record, kill_after=n_ticks)
            if life.outcome is None:
                backend = ScriptedBackend(vocabulary, reply)
                life = Life(replace(asked, resumed=record.progress), backend, other, record)
                n_ended += not backend.tokens_decoded
        assert comparable(life.outcome, "finish_key", "cache_delta") == comparable(
            expected.outcome, "finish_key", "cache_delta"
        )
        assert events_of(asked, record.pieces, life.outcome, vocabulary) == expected.events
    assert n_ended == 1


def test_a_reply_that_had_ended_ends_beside_others(cache: Cache) -> None:
    backend = GatedBackend(n_ctx=8192)
    thread = start_thread(backend, cache, n_seq_max=1)
    long = Ticket(prompt_only(max_tokens=None), streaming=False)
    thread.submit(long)
    wait_until(lambda: len(backend.batches) > 20)
    hit = erllama.CacheHit("cold", None, 0)
    asked = Request(random_prompt(2, 20), RequestOptions(max_tokens=3))
    ended = Ticket(replace(asked, resumed=progress_after((1, 2, 3), hit=hit)), streaming=True)
    thread.submit(ended)
    reply = ended.result()
    assert (reply.tokens, reply.finish_reason, reply.cache) == ((1, 2, 3), "length", hit)
    assert (reply.finish_key, reply.seed) == (None, 1)
    assert not long.done
    thread.stop()


def test_a_resumed_request_can_be_cancelled_before_it_runs(cache: Cache) -> None:
    backend = GatedBackend()
    thread = start_thread(backend, cache, n_seq_max=1)
    backend.hold()
    thread.submit(Ticket(prompt_only(max_tokens=3), streaming=False))
    waiting = Ticket(replace(prompt_only(max_tokens=9), resumed=progress_after((65, 66))), streaming=True)
    thread.submit(waiting)
    waiting.cancel()
    backend.release()
    reply = waiting.result()
    thread.stop()
    assert (reply.text, reply.tokens, reply.finish_reason) == ("AB", (65, 66), "cancelled")


# --- numbers of a resumed reply -----------------------------------------------------------------------------


def test_the_numbers_of_a_resumed_reply_are_those_of_the_whole_request(cache: Cache) -> None:
    asked = prompt_only(max_tokens=40)
    record = Record()
    policy = Policy(continued_interval=16)
    Life(asked, StubBackend(eog_bias=-100), cache, record, kill_after=30, policy=policy)
    assert record.progress is not None
    thread = start_thread(backend := StubBackend(eog_bias=-100), cache)
    ticket = Ticket(replace(asked, resumed=record.progress), streaming=False)
    thread.submit(ticket)
    reply = ticket.result()
    metrics = thread.metrics
    thread.stop()
    expected = whole_reply(asked, StubBackend(eog_bias=-100))
    assert reply.tokens == expected.tokens
    assert reply.cache == erllama.CacheHit("cold", None, 0)
    assert reply.cache_delta == erllama.CacheDelta(0, len(reply.context_tokens) - 1)
    n_known = len(record.progress.tokens)
    n_stored = (20 + n_known - 1) // 16 * 16
    assert n_stored > 40
    assert backend.tokens_decoded == 59 - n_stored
    assert reply.timings.prefill_tokens == 0
    assert reply.timings.decode_tokens == 40 - n_known - 1
    assert reply.timings.decode > 0
    assert (metrics.prompt_tokens, metrics.cached_tokens, sum(metrics.first_token.counts)) == (0, 0, 0)
    assert reply.restarts == 0


def test_the_first_hit_is_reported_even_if_the_cache_is_lost(cache: Cache) -> None:
    asked = prompt_only(max_tokens=20)
    Life(asked, StubBackend(eog_bias=-100), cache)
    record = Record()
    Life(asked, StubBackend(eog_bias=-100), cache, record, kill_after=10)
    with Cache(block_size=16) as empty:
        outcome = Life(replace(asked, resumed=record.progress), StubBackend(eog_bias=-100), empty).outcome
    assert isinstance(outcome, Completion)
    assert outcome.cache == erllama.CacheHit("exact", "ram", 19)
    assert outcome.cache_delta.read == 19


def test_speculation_continues(cache: Cache) -> None:
    asked = prompt_only(max_tokens=40, speculative=lambda prompt: lambda tokens, n: [1] * n)
    record = Record()
    Life(asked, StubBackend(eog_bias=-100), cache, record, kill_after=20)
    outcome = Life(replace(asked, resumed=record.progress), StubBackend(eog_bias=-100), cache).outcome
    assert isinstance(outcome, Completion)
    assert outcome.tokens == whole_reply(asked, StubBackend(eog_bias=-100)).tokens
    assert outcome.drafts is not None
    assert 0 < outcome.drafts.drafted < 40


# --- progress that does not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "progress", "words"),
    [
        ({}, progress_after((1, 257)), "token id 257"),
        ({}, progress_after((-1,)), "token id -1"),
        ({}, progress_after((1,), queued=(300,)), "token id 300"),
        ({"max_tokens": 2}, progress_after((1, 2, 3)), "3 tokens of a reply that can have 2"),
        ({}, progress_after((1,) * 110), "that can have 109"),
        ({"logprobs": 1}, progress_after((1, 2)), "0 log-probabilities of 2 tokens"),
        ({}, progress_after((1,), logprobs=(TokenLogprobs(1, -1.0, ()),)), "1 log-probabilities of 1 tokens"),
        ({"sampling": SamplingOptions(seed=2)}, progress_after((1,)), "seed 1 of a request with seed=2"),
        ({"sampling_state": replace(STATE, seed=3)}, progress_after((1,)), "seed 1 of a request with seed=3"),
        ({"stop": ("a",)}, progress_after((97, 98)), "ends with token 1 of 2"),
        ({"grammar": Grammar.regex("a+")}, progress_after((97, 98)), "not allowed"),
    ],
)
def test_progress_that_does_not_fit_raises_a_typed_error(
    options: dict[str, object], progress: ReplyProgress, words: str, cache: Cache
) -> None:
    thread = start_thread(StubBackend(n_ctx=128), cache)
    asked = Request(random_prompt(1, 20), RequestOptions(**options))  # type: ignore[arg-type]
    ticket = Ticket(replace(asked, resumed=progress), streaming=True)
    with pytest.raises(erllama.OptionError, match=words):
        thread.submit(ticket)
    assert ticket.source is None
    thread.stop()


def test_a_refused_request_has_no_progress(cache: Cache) -> None:
    backend = GatedBackend()
    thread = start_thread(backend, cache, n_seq_max=1, max_pending=0)
    backend.hold()
    thread.submit(Ticket(prompt_only(max_tokens=3), streaming=False))
    assert backend.at_decode.wait(120)
    refused = Ticket(prompt_only(max_tokens=3), streaming=True)
    with pytest.raises(erllama.QueueFull):
        thread.submit(refused)
    assert refused.source is None
    backend.release()
    thread.stop()


# --- the ticket between two processes -----------------------------------------------------------------------


def empty_ticket(**options: object) -> Ticket:
    return Ticket(Request(np.zeros(1, np.int32), RequestOptions(**options)), streaming=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 5000])
def test_pieces_that_are_taken_late_are_complete_and_few(n: int) -> None:
    child = empty_ticket()
    for token in range(n):
        child.send_token(token % 256)
    pieces = child.take_pieces()
    assert len(pieces) <= 257, "more are joined"
    assert child.take_pieces() == []
    assert tokens_of(pieces) == [token % 256 for token in range(n)]
    child.send_token(7)
    child.emit(8)
    assert child.take_pieces() == [7, 8], "it is no longer behind"


def test_taking_pieces_leaves_the_end_to_its_readers(cache: Cache) -> None:
    outcome = whole_reply(prompt_only(max_tokens=3), StubBackend(eog_bias=-100))
    child = empty_ticket()
    child.emit(DeltaPiece("text", "a", (97,), ()))
    child.finish(outcome)
    assert child.take_pieces() == [DeltaPiece("text", "a", (97,), ())]
    assert child.take_pieces() == []
    assert list(child.events()) == [erllama.Done(outcome)]


def test_a_thread_can_fill_the_ticket_of_a_plain_reply() -> None:
    """As the parent of a model's process does: the text begins within a character of the prompt."""
    vocabulary = StubBackend().vocabulary
    prompt, text = "a☃".encode(), "☃é!".encode()
    asked = Request(np.frombuffer(prompt[:-1], np.uint8).astype(np.int32), RequestOptions())
    parent = Ticket(asked, streaming=True)
    decode_pieces(parent, vocabulary)
    pieces: list[Piece] = [*prompt[-1:], *text[:2], TextTokens(tuple(text[2:])), 0xC3, TextTokens((), is_last=True)]
    outcome = whole_reply(prompt_only(max_tokens=3), StubBackend(eog_bias=-100))

    def fill() -> None:
        for piece in pieces:
            time.sleep(0.002)
            parent.emit(piece)
            parent.notify()
        parent.finish(outcome)

    filler = threading.Thread(target=fill)
    filler.start()
    events = list(parent.events())
    filler.join()
    assert [event.text for event in events[:-1]] == ["☃", "", "", "☃é!", "", "\ufffd"]  # type: ignore[union-attr]
    assert events[-1] == erllama.Done(outcome)


def test_a_failure_reaches_the_reader_after_the_pieces() -> None:
    parent = empty_ticket()
    parent.emit(DeltaPiece("thinking", "a", (97,), ()))
    parent.fail(erllama.BackendError("the process ended"))
    events = parent.events()
    assert next(events) == erllama.ThinkingDelta("a", (97,))
    with pytest.raises(erllama.BackendError, match="the process ended"):
        next(events)
