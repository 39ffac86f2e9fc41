"""Continued contexts: by the key of a reply, or by the name of a session."""

from __future__ import annotations

import numpy as np
import pytest

import erllama
from erllama.engine.backends.stub import StubBackend
from support.engine_models import (
    GatedBackend,
    cold_reply,
    engine_metrics,
    load_stub,
    random_prompt,
)
from support.threads import wait_until

# --- continuations and sessions ----------------------------------------------------------------------------


def test_an_unknown_parent_key_is_a_miss() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        reply = model.complete(random_prompt(1, 50), max_tokens=1, parent_key=bytes(32))
        assert reply.cache.kind == "cold"


def test_waiting_for_a_parent_key_does_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = GatedBackend(n_ctx=65536)
    with load_stub(backend, n_seq_max=2, policy={"session_resume_wait_ms": 60_000}) as model:
        other = model.stream([1], max_tokens=None)
        next(other)
        key = b"k" * 32
        with model.cache.expecting(key):
            waiting = model.stream(random_prompt(1, 50), max_tokens=1, parent_key=key)
            ticks = engine_metrics(model).ticks
            wait_until(lambda: engine_metrics(model).ticks > ticks + 50)
            assert not waiting._ticket.done
            assert model.queue_depth == 2
        assert waiting.result().finish_reason == "length"
        other.cancel()


def test_a_request_waiting_for_a_save_can_be_cancelled_at_once() -> None:
    with load_stub(StubBackend(eog_bias=-100), policy={"session_resume_wait_ms": 3_600_000}) as model:
        key = b"k" * 32
        with model.cache.expecting(key):
            waiting = model.stream([1], parent_key=key)
            late = model.stream([1], parent_key=key, timeout=0.05)
            assert model.complete([2], max_tokens=3).finish_reason == "length"
            with pytest.raises(erllama.DeadlineExceeded):
                late.result()
            waiting.cancel()
            assert waiting.result().finish_reason == "cancelled"


def test_a_session_keeps_its_cells_longer_than_parked_ones() -> None:
    backend = StubBackend(n_ctx=1024, eog_bias=-100)
    with erllama.Cache(ram=0) as none, load_stub(backend, cache=none, parked_cells=0) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=10, session_id="ann")
        for i in range(20):
            model.complete(random_prompt(10 + i, 100), max_tokens=10)
        second = model.complete([*first.context_tokens, 1, 2], max_tokens=10, session_id="ann")
        assert second.cache == erllama.CacheHit("partial", "live", 109)
        assert model.end_session("ann")
        assert not model.end_session("ann")
        model.complete(random_prompt(50, 100), max_tokens=10)
        assert model.complete([*second.context_tokens, 1], max_tokens=1).cache.kind == "cold"


def test_session_cells_are_evicted_last() -> None:
    with load_stub(StubBackend(n_ctx=256, eog_bias=-100)) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=10, session_id="ann")
        assert model.complete(random_prompt(2, 200), max_tokens=20).finish_reason == "length"
        second = model.complete([*first.context_tokens, 1, 2], max_tokens=10, session_id="ann")
        assert second.cache == erllama.CacheHit("partial", "ram", 109), "saved, and restored"


def test_a_session_in_use_is_busy() -> None:
    backend = GatedBackend()
    with load_stub(backend) as model:
        backend.hold()
        stream = model.stream([1, 2], max_tokens=5, session_id="ann")
        with pytest.raises(erllama.SessionBusy, match="'ann'"):
            model.complete([1, 2, 3], session_id="ann")
        with pytest.raises(erllama.SessionBusy):
            model.end_session("ann")
        other = model.stream([1, 2], max_tokens=5, session_id="bob")
        backend.release()
        stream.result()
        other.result()
        assert model.complete([1, 2, 3], max_tokens=1, session_id="ann").finish_reason == "length"


def test_sessions_are_separate_per_tenant() -> None:
    backend = GatedBackend()
    with load_stub(backend) as model:
        backend.hold()
        first = model.stream(random_prompt(1, 50), max_tokens=5, session_id="chat", cache_salt="a")
        second = model.stream(random_prompt(2, 50), max_tokens=5, session_id="chat", cache_salt="b")
        backend.release()
        first.result()
        second.result()
        assert model.end_session("chat", cache_salt="a")
        assert not model.end_session("chat")
        assert model.end_session("chat", cache_salt="b")


def test_a_restarted_session_shares_the_prefixes_of_others() -> None:
    with (
        erllama.Cache(ram=0) as none,
        load_stub(StubBackend(eog_bias=-100), cache=none, parked_cells=4096) as model,
    ):
        prompt = random_prompt(1, 200)
        model.complete([prompt[0], 9, 9, 9], max_tokens=5, session_id="ann")
        model.complete(prompt, max_tokens=5)
        assert model.complete(prompt, max_tokens=5, session_id="ann").cache == erllama.CacheHit(
            "exact", "live", 199
        )


def test_a_session_can_return_to_an_earlier_turn() -> None:
    """The next request shares only a part, and the rest of the cells is released."""
    with load_stub(StubBackend(eog_bias=-100)) as model:
        model.complete(random_prompt(1, 100), max_tokens=50, session_id="ann")
        prompt = np.concatenate([random_prompt(1, 100)[:60], random_prompt(2, 10)])
        reply = model.complete(prompt, max_tokens=10, session_id="ann", seed=1)
        assert reply.cache == erllama.CacheHit("partial", "live", 60)
        assert reply.tokens == cold_reply(prompt, max_tokens=10, seed=1).tokens


def test_prefill_fills_a_session_without_sampling() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        warm = model.prefill(random_prompt(1, 100), session_id="ann")
        assert (warm.tokens, warm.text, warm.finish_reason) == ((), "", "length")
        reply = model.complete(
            [*random_prompt(1, 100), 7], max_tokens=1, session_id="ann", parent_key=warm.finish_key
        )
        assert reply.cache == erllama.CacheHit("exact", "live", 100)
