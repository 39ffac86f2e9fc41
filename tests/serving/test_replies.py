"""`complete` and `stream`: promises to callers, on the stub and, where it matters, on libllama."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine import Batch
from erllama.engine.backends.stub import EOG, StubBackend, StubVocabulary
from erllama.engine.output.text import TextDecoder
from support.examples import examples
from support.threads import wait_until


@pytest.fixture
def stub() -> Iterator[erllama.Model]:
    with Cache() as cache, erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
        yield model


class Scripted(StubBackend):
    """Replies with the given bytes, then ends."""

    def __init__(self, says: bytes, **options: int) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._says = [*says, EOG]
        self._said = 0

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = super().decode(batch)
        for row in logits:
            row[:] = 0
            row[self._says[self._said]] = 50
            self._said += 1
        return logits


class Slow(StubBackend):
    """Decodes slowly until `slow` is cleared."""

    seconds = 0.02

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        time.sleep(self.seconds)
        return super().decode(batch)


class Gated(StubBackend):
    """Waits before each decode until its gate is opened."""

    def __init__(self) -> None:
        super().__init__(eog_bias=-100)
        self.gate = threading.Event()

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.gate.wait()
        return super().decode(batch)


def loaded(backend: StubBackend) -> erllama.Model:
    return erllama.load_backend(backend, cache=Cache())


# --- the reply ------------------------------------------------------------------------------


def test_a_completion_reports_what_happened(stub: erllama.Model) -> None:
    reply = stub.complete("a prompt", max_tokens=10, seed=5)
    assert len(reply.tokens) == 10
    assert reply.context_tokens == (*b"a prompt", *reply.tokens)
    assert reply.text == bytes(reply.tokens).decode("utf-8", "replace")
    assert reply.finish_reason == "length"
    assert reply.cache == erllama.CacheHit("cold", None, 0)
    assert reply.seed == 5
    assert reply.finish_key is not None
    assert stub.cache.contains(reply.finish_key)
    assert reply.timings.prefill_tokens == 8
    assert reply.timings.decode_tokens == 9
    assert reply.timings.total > 0
    assert stub.last_cache_hit == reply.cache


def test_a_text_and_its_tokens_are_the_same_prompt(stub: erllama.Model) -> None:
    replies = [
        stub.complete(prompt, max_tokens=5, temperature=0).tokens
        for prompt in ("abc", [97, 98, 99], (97, 98, 99), np.array([97, 98, 99]), np.array([97, 98, 99], np.uint8))
    ]
    assert len(set(replies)) == 1


def test_generation_ends_at_an_end_token() -> None:
    with loaded(Scripted(b"done")) as model:
        reply = model.complete("x")
    assert (reply.text, reply.finish_reason) == ("done", "stop")
    assert EOG not in reply.tokens


@pytest.mark.parametrize("n_prompt", [1, 40, 63, 64])
def test_generation_ends_when_the_context_is_full(n_prompt: int) -> None:
    with loaded(StubBackend(n_ctx=64, eog_bias=-100)) as model:
        reply = model.complete([1] * n_prompt)
        # Every cell is used. The token sampled last needs none.
        assert len(reply.context_tokens) == 65
        assert reply.finish_reason == "context_full"
        assert model.complete([1] * n_prompt, max_tokens=1).finish_reason == "length"


def test_max_tokens_of_zero_computes_the_prompt_only(stub: erllama.Model) -> None:
    reply = stub.complete("a prompt", max_tokens=0)
    assert (reply.text, reply.tokens, reply.finish_reason) == ("", (), "length")
    assert stub.complete("a prompt", max_tokens=1).cache.kind == "exact"


def test_prefill_stores_the_prompt(stub: erllama.Model) -> None:
    assert stub.prefill("a long system prompt").cache.kind == "cold"
    reply = stub.complete("a long system prompt and a question", max_tokens=1)
    assert reply.cache == erllama.CacheHit("partial", "live", 20)


@settings(max_examples=examples(25))
@given(st.binary(min_size=1, max_size=40), st.integers(0, 1))
def test_streamed_text_has_whole_characters_and_adds_up(says: bytes, cut: int) -> None:
    with loaded(Scripted(says)) as model:
        events = list(model.stream("x", max_tokens=len(says) + 1 - cut))
    done = events[-1]
    assert isinstance(done, erllama.Done)
    deltas = [event for event in events[:-1] if isinstance(event, erllama.TextDelta)]
    assert "".join(delta.text for delta in deltas) == done.completion.text
    assert [token for delta in deltas for token in delta.tokens] == list(done.completion.tokens)
    assert done.completion.text == bytes(done.completion.tokens).decode("utf-8", "replace")


@given(st.text(max_size=30))
def test_a_character_is_sent_with_its_last_byte(text: str) -> None:
    decoder = TextDecoder()
    raw = text.encode("utf-8", "replace")
    pieces = [decoder.feed(raw[i : i + 1]) for i in range(len(raw))]
    assert all(len(piece) <= 1 and piece != "\ufffd" for piece in pieces) or "\ufffd" in text
    assert "".join(pieces) + decoder.finish() == raw.decode()


def test_streaming_and_blocking_calls_return_the_same_reply(stub: erllama.Model) -> None:
    waited = stub.complete("prompt", max_tokens=20, seed=1)
    stream = stub.stream("prompt", max_tokens=20, seed=1)
    events = list(stream)
    assert stream.result().tokens == waited.tokens
    assert isinstance(events[-1], erllama.Done)
    assert events[-1].completion is stream.result()


# --- cancelling, waiting, unloading ----------------------------------------------------------------


def test_a_cancelled_stream_still_ends_with_done() -> None:
    with loaded(Slow(eog_bias=-100)) as model, model.stream("prompt") as stream:
        first = next(stream)
        stream.cancel()
        rest = list(stream)
    assert isinstance(first, erllama.TextDelta)
    assert isinstance(rest[-1], erllama.Done)
    assert rest[-1].completion.finish_reason == "cancelled"
    assert 1 <= len(rest[-1].completion.tokens) < 4000, "the context holds more"


@pytest.mark.parametrize("way", ["leave the with", "drop it"])
def test_leaving_a_stream_cancels_its_request(way: str) -> None:
    with loaded(Slow(eog_bias=-100)) as model:
        stream = model.stream("prompt")
        next(stream)
        if way == "drop it":
            del stream
        else:
            with stream:
                pass
        wait_until(lambda: model.phase == "idle")


def test_requests_run_in_order_of_arrival() -> None:
    backend = Gated()
    with erllama.load_backend(backend, cache=Cache(), n_seq_max=1) as model:
        streams = [model.stream(f"prompt {i}", max_tokens=3) for i in range(3)]
        assert model.pending >= 2
        backend.gate.set()
        results = [stream.result() for stream in streams]
        assert [r.timings.queued for r in results] == sorted(r.timings.queued for r in results)
        assert model.pending == 0


def test_many_threads_can_call_one_model(stub: erllama.Model) -> None:
    alone = {i: stub.complete(f"prompt {i}", max_tokens=8, seed=i).tokens for i in range(8)}
    found: dict[int, tuple[int, ...]] = {}

    def ask(i: int) -> None:
        found[i] = stub.complete(f"prompt {i}", max_tokens=8, seed=i).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_unloading_fails_running_and_waiting_requests() -> None:
    model = loaded(Slow(eog_bias=-100))
    running, waiting = model.stream("one"), model.stream("two")
    next(running)
    model.unload()
    for stream in (running, waiting):
        with pytest.raises(erllama.ModelUnloaded, match=model.id):
            stream.result()
    for use in (lambda: model.complete("x"), lambda: model.tokenize("x"), lambda: model.detokenize([1])):
        with pytest.raises(erllama.ModelUnloaded, match="load it again"):
            use()
    model.unload()
    assert "unloaded" in repr(model)


def test_models_are_found_by_id() -> None:
    with loaded(StubBackend()) as first, erllama.load_backend(StubBackend(), id="mine") as second:
        assert erllama.get_model("mine") is second
        assert erllama.list_models()[-2:] == [first, second]
        with pytest.raises(erllama.AlreadyLoaded, match="'mine'"):
            erllama.load_backend(StubBackend(), id="mine")
    with pytest.raises(erllama.ModelNotFound, match="'mine'"):
        erllama.get_model("mine")


# --- failures -----------------------------------------------------------------------------------------


def test_a_failing_request_does_not_affect_others() -> None:
    class Failing(StubBackend):
        fail = True

        def decode(self, batch: Batch) -> NDArray[np.float32]:
            if self.fail:
                raise erllama.BackendError("the device went away")
            return super().decode(batch)

    backend = Failing(eog_bias=-100)
    with loaded(backend) as model:
        with pytest.raises(erllama.BackendError, match="device went away"):
            model.complete("x")
        with pytest.raises(erllama.BackendError, match="device went away"):
            list(model.stream("x"))
        backend.fail = False
        assert len(model.complete("x", max_tokens=3).tokens) == 3


def test_an_unexpected_error_becomes_a_typed_error(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(StubBackend):
        def decode(self, batch: Batch) -> NDArray[np.float32]:
            raise ZeroDivisionError("a bug")

    with loaded(Broken()) as model, pytest.raises(erllama.BackendError, match="a bug") as caught:
        model.complete("x")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_without_a_finite_value_raise_an_error(value: float) -> None:
    class Spoilt(StubBackend):
        def decode(self, batch: Batch) -> NDArray[np.float32]:
            logits = super().decode(batch)
            logits[:] = value
            return logits

    with loaded(Spoilt()) as model:
        for temperature in (0.0, 1.0):
            with pytest.raises(erllama.SamplingError):
                model.complete("x", temperature=temperature)


def test_a_wrong_cache_answer_causes_a_cold_start(caplog: pytest.LogCaptureFixture) -> None:
    """Payloads that do not fit are dropped, counted and logged, and the reply is the cold one."""
    with Cache() as cache, erllama.load_backend(StubBackend(eog_bias=-100), cache=cache) as model:
        first = model.complete("x" * 600, max_tokens=5, temperature=0)
        rows = [row for row in cache.rows() if row.tier == "ram"]
        second_block = cache.stored(sorted(rows, key=lambda row: row.start)[1].key)
        assert second_block is not None
        cache.save(second_block, bytes(100), replace=True)
        model.evict()
        second = model.complete("x" * 600, max_tokens=5, temperature=0)
        third = model.complete("x" * 600, max_tokens=5, temperature=0)
        assert cache.counters()["restore_errors"] == 1
    assert first.tokens == second.tokens == third.tokens
    assert second.cache == erllama.CacheHit("partial", "ram", 256)
    assert third.cache.kind == "exact"
    assert "could not be restored" in caplog.text


# --- the memory that cannot be cut -----------------------------------------------------------------------


@settings(max_examples=examples(25))
@given(st.lists(st.integers(0, 2), min_size=1, max_size=120), st.integers(0, 120), st.booleans(), st.data())
def test_memory_that_cannot_be_cut_resumes_only_at_packed_states(
    ids: list[int], share: int, reproducible: bool, data: st.DataObject
) -> None:
    """The stub refuses cuts, and packs that do not end at the last token. The reply must still be the cold one."""
    other = ids[:share] + data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=40))
    with Cache(ram=0) as none, erllama.load_backend(StubBackend(can_trim=False, n_ubatch=32), cache=none) as cold:
        expected = [cold.complete(prompt, max_tokens=20, temperature=0).tokens for prompt in (ids, other)]
    backend = StubBackend(can_trim=False, n_ubatch=32)
    with Cache(block_size=16) as cache, erllama.load_backend(backend, cache=cache) as model:
        found = [
            model.complete(prompt, max_tokens=20, temperature=0, reproducible=reproducible)
            for prompt in (ids, other, ids)
        ]
        assert [reply.tokens for reply in found] == [expected[0], expected[1], expected[0]]
        assert found[2].cache.tokens >= (len(ids) - 1) // 16 * 16
        assert cache.counters()["restore_errors"] == 0


def test_a_repeated_prompt_is_an_exact_hit_for_every_memory_kind() -> None:
    backend = StubBackend(can_trim=False, n_ubatch=32, eog_bias=-100)
    with Cache(block_size=256) as cache, erllama.load_backend(backend, cache=cache) as model:
        model.complete("x" * 300, max_tokens=10)
        assert model.complete("x" * 300, max_tokens=10).cache == erllama.CacheHit("exact", "ram", 299)


@settings(max_examples=examples(25))
@given(st.integers(1, 300), st.lists(st.integers(1, 300), max_size=3), st.booleans())
def test_cached_replies_of_the_stub_equal_cold_ones(n: int, others: list[int], reproducible: bool) -> None:
    prompt = np.random.default_rng(n).integers(0, 256, n)
    with Cache(ram=0) as none, loaded_with(none) as cold:
        expected = cold.complete(prompt, max_tokens=20, seed=1).tokens
    with Cache(block_size=32) as cache, loaded_with(cache) as model:
        for other in others:
            model.complete(np.concatenate([prompt[:other], [1, 2, 3]]), max_tokens=10)
        for _ in range(2):
            assert model.complete(prompt, max_tokens=20, seed=1, reproducible=reproducible).tokens == expected


def loaded_with(cache: Cache) -> erllama.Model:
    return erllama.load_backend(StubBackend(n_ubatch=64), cache=cache)


def test_tokens_are_computed_once() -> None:
    backend = StubBackend(eog_bias=-100)
    with loaded(backend) as model:
        model.complete("x" * 1000, max_tokens=10)
        assert backend.tokens_decoded == 1000 + 9
        model.complete("x" * 1000, max_tokens=10)
        assert backend.tokens_decoded == 1009 + 1 + 9, "only the last prompt token and the reply"


# --- options and prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 1.5}, "integer"),
        ({"max_tokens": True}, "integer"),
        ({"temperature": -0.1}, "at least 0"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 1.1}, "at most 1"),
        ({"min_p": -1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "at most"),
        ({"reproducible": 1}, "True or False"),
        ({"max_token": 5}, "did you mean 'max_tokens'"),
        ({"temprature": 5}, "did you mean 'temperature'"),
        ({"xyzzy": 5}, "it takes banned_tokens, cache_salt, dry_allowed_length"),
    ],
)
@pytest.mark.parametrize("call", ["complete", "stream"])
def test_wrong_options_raise_typed_errors(
    stub: erllama.Model, call: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(erllama.OptionError) as caught:
        getattr(stub, call)("x", **options)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, -1], "token id -1 at 1"),
        ([1, 257], "ids are 0 to 256"),
        (np.array([2**40]), "token id 1099511627776"),
        ([1.5], "neither"),
        ([[1]], "neither"),
        (["a"], "neither"),
        (None, "neither"),
        (b"bytes", "neither"),
        (5, "neither"),
        ([1] * 5000, "5000 tokens and the context holds 4096"),
    ],
)
def test_wrong_prompts_raise_typed_errors(stub: erllama.Model, prompt: object, words: str) -> None:
    with pytest.raises(erllama.PromptError) as caught:
        stub.complete(prompt, max_tokens=1)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert stub.complete("the model continues", max_tokens=1).tokens


def test_the_stub_is_deterministic() -> None:
    vocabulary = StubVocabulary()
    assert vocabulary.detokenize(vocabulary.tokenize("héllo")).decode() == "héllo"
    replies = []
    for seed in (1, 1, 2):
        with loaded(StubBackend(seed=seed, eog_bias=-100)) as model:
            replies.append(model.complete("x", max_tokens=10, temperature=0).tokens)
    assert replies[0] == replies[1] != replies[2]
