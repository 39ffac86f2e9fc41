"""`Model.pin` computes a prefix and keeps it: after gc, eviction and a restart it is warm to the token."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama.cache import FileTier
from erllama.engine.backends.stub import StubBackend
from erllama.testing.models import write_gemma3, write_lfm2, write_llama, write_mamba
from support.chat.scripted_model import model_replying
from support.engine_models import load_stub, random_prompt
from support.recording_backend import prompt_of
from support.threads import wait_until

MEMORIES = {"llama": write_llama, "gemma3": write_gemma3, "mamba": write_mamba, "lfm2": write_lfm2}
SYSTEM = {"role": "system", "content": "You are terse. " * 10}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
]


def evict_all(cache: erllama.Cache) -> None:
    """Evict to one block, and collect the garbage."""
    cache.flush()
    cache.evict_bytes(10**12, [name for name in cache.tier_names if name != "live"])
    cache.gc()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[erllama.Cache]:
    with erllama.Cache(ram="8MiB", disk=tmp_path / "kv", disk_quota="64MiB", block_size=32) as found:
        yield found


# --- every kind of memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("write", MEMORIES.values(), ids=list(MEMORIES))
def test_a_pinned_prefix_of_2000_tokens_is_warm_after_a_restart(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", seed=1)
    prefix, options = prompt_of(7, 2000), {"n_ctx": 2304, "n_threads": 1}

    def load(cache: erllama.Cache) -> erllama.Model:
        return erllama.load_model(path, cache=cache, **options)  # type: ignore[arg-type]

    def directory() -> erllama.Cache:
        return erllama.Cache(ram=0, disk=tmp_path / "kv", disk_quota="512MiB")

    longer = [*prefix.tolist(), 9, 11]
    with erllama.Cache(ram=0) as none, load(none) as model:
        expected = model.complete(longer, max_tokens=8, temperature=0)
    with directory() as cache, load(cache) as model:
        pin = model.pin(prefix)
        assert (pin.n_tokens, pin.complete) == (2000, True)
        assert model.pin(prefix).name == pin.name
        model.complete(prompt_of(8, 600), max_tokens=2)
        evict_all(cache)
    with directory() as cache:
        evict_all(cache)
        with load(cache) as model:
            assert model.cached_prefix(longer) == 2000
            assert model.cached_prefix(prefix) == 1999
            reply = model.complete(longer, max_tokens=8, temperature=0)
            assert (reply.cache.tokens, reply.cache.tier) == (2000, "disk")
            assert reply.tokens == expected.tokens
            assert cache.counters()["restore_errors"] == cache.counters()["faults"] == 0


def test_pins_of_a_model_are_in_ram_once_it_is_loaded(tmp_path: Path, tiny_gguf: Path) -> None:
    prefix = prompt_of(1, 200)
    for ram in (0, "8MiB"):
        with erllama.Cache(ram=ram, disk=tmp_path / "kv", block_size=32) as cache:
            with erllama.load_model(tiny_gguf, cache=cache, n_ctx=512, n_threads=1) as model:
                if not ram:
                    model.pin(prefix, cache_salt="tenant")
                else:
                    wait_until(lambda: cache.counters()["blocks_ram"] == 7)
                    reply = model.complete(prefix, max_tokens=1, cache_salt="tenant")
                    assert (reply.cache.tokens, reply.cache.tier) == (199, "ram")


@pytest.mark.parametrize("can_trim", [True, False])
def test_kv_that_only_the_context_has_is_computed_anew(cache: erllama.Cache, can_trim: bool) -> None:
    prefix = random_prompt(3, 100)
    with load_stub(StubBackend(can_trim=can_trim, n_ctx=1024), cache=cache) as model:
        model.complete(prefix, max_tokens=4)
        evict_all(cache)
        assert model.pin(prefix).complete
        model.evict()
        evict_all(cache)
        assert model.complete([*prefix.tolist(), 5], max_tokens=1).cache.tokens == 100


def test_a_damaged_pin_is_repaired_by_the_next_computation(cache: erllama.Cache, tmp_path: Path) -> None:
    prefix = random_prompt(4, 100)
    with load_stub(StubBackend(n_ctx=1024), cache=cache) as model:
        model.pin(prefix, name="a")
        evict_all(cache)
        model.evict()
        damaged = next((tmp_path / "kv" / "blocks").iterdir())
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
        model.complete(prefix, max_tokens=1)
        assert cache.counters()["corrupt_files"] >= 1
        cache.flush()
        assert cache.pins()[0].complete
        evict_all(cache)
        assert model.cached_prefix([*prefix.tolist(), 5]) == 100
        assert cache.verify() == []


# --- what is pinned ---------------------------------------------------------------------------------


def test_conversations_that_continue_a_pinned_system_prompt_begin_warm(cache: erllama.Cache) -> None:
    with model_replying("Fine.", "Fine.", cache=cache) as model:
        pin = model.pin([SYSTEM])
        n_system = len(model.apply_chat_template([SYSTEM], add_generation_prompt=False))
        model.evict()
        evict_all(cache)
        for question in ("How are you?", "0 or 1?"):
            messages = [SYSTEM, {"role": "user", "content": question}]
            prompt = model.apply_chat_template(messages)
            assert model.cached_prefix(prompt) == pin.n_tokens > n_system
            assert model.chat(messages, max_tokens=5).cache.tokens >= pin.n_tokens


def test_a_conversation_that_ends_with_the_user_is_pinned_as_its_prompt(cache: erllama.Cache) -> None:
    messages = [SYSTEM, {"role": "user", "content": "How are you?"}]
    with model_replying("Fine.", cache=cache) as model:
        pin = model.pin(messages, tools=TOOLS, name="tools", ttl="1h")
        prompt = model.apply_chat_template(messages, tools=TOOLS)
        assert pin.n_tokens == len(prompt)
        assert pin.expires is not None
        assert pin.expires - pin.created == pytest.approx(3600, abs=60)
        assert model.cached_prefix(prompt) == len(prompt) - 1
        assert model.unpin("tools")
        assert not model.unpin("tools")


def test_a_text_and_its_tokens_have_one_pin(cache: erllama.Cache) -> None:
    with load_stub(StubBackend(n_ctx=1024), cache=cache) as model:
        by_text = model.pin("Once upon a time")
        by_ids = asyncio.run(model.apin(model.tokenize("Once upon a time", parse_special=True)))
        assert by_text.name == by_ids.name
        assert len(cache.pins()) == 1
        other = model.pin("Once upon a time", cache_salt="tenant")
        assert other.name != by_text.name
        assert model.cached_prefix("Once upon a time!", cache_salt="tenant") == other.n_tokens


# --- errors -----------------------------------------------------------------------------------------


def test_a_pin_over_the_bound_is_refused_and_requests_go_on(tmp_path: Path) -> None:
    with (
        erllama.Cache(disk=tmp_path, pin_quota=2000, block_size=32) as cache,
        load_stub(StubBackend(n_ctx=1024), cache=cache) as model,
    ):
        with pytest.raises(erllama.PinQuotaExceeded, match="2000"):
            model.pin(random_prompt(1, 200))
        assert cache.pins() == []
        assert model.complete(random_prompt(1, 200), max_tokens=2).tokens


def test_contexts_that_the_policy_excludes_cannot_be_pinned(cache: erllama.Cache) -> None:
    with (
        load_stub(StubBackend(n_ctx=1024), cache=cache, policy={"min_tokens": 300}) as model,
        pytest.raises(erllama.PinError, match="min_tokens"),
    ):
        model.pin(random_prompt(1, 200))


@pytest.mark.parametrize("warm", [False, True])
def test_a_prefix_that_is_never_stored_is_computed_at_most_twice(cache: erllama.Cache, warm: bool) -> None:
    """Once in the context as it is, and once in an empty one if that context had a part of the prefix."""
    backend, prefix = StubBackend(n_ctx=1024), random_prompt(1, 200)
    with load_stub(backend, cache=cache, policy={"min_tokens": 300}) as model:
        if warm:
            model.prefill(prefix)
        with pytest.raises(erllama.PinError, match="min_tokens"):
            model.pin(prefix)
        assert backend.tokens_decoded == 200 + (201 if warm else 0)
        n_decoded = backend.tokens_decoded
        with pytest.raises(erllama.PinError, match="min_tokens"):
            asyncio.run(model.apin(random_prompt(2, 200)))
        assert backend.tokens_decoded == n_decoded + 200


def test_a_pin_that_cannot_be_written_computes_no_prefix_anew(
    cache: erllama.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FileTier, pin: object) -> None:
        raise sqlite3.OperationalError("disk is full")

    backend, prefix = StubBackend(n_ctx=1024), random_prompt(1, 200)
    with load_stub(backend, cache=cache) as model:
        model.prefill(prefix)
        n_decoded = backend.tokens_decoded
        monkeypatch.setattr(FileTier, "put_pin", fail)
        with pytest.raises(erllama.PinError, match="disk is full"):
            model.pin(prefix)
        with pytest.raises(erllama.PinError, match="disk is full"):
            asyncio.run(model.apin(prefix))
        assert backend.tokens_decoded == n_decoded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nane": "a"}, "did you mean 'name'"),
        ({"ttl": "soon"}, "ttl='soon'; pass seconds"),
        ({"ttl": 0}, "more than 0 seconds"),
        ({"ttl": -1}, "ttl=-1"),
        ({"name": ""}, "printable"),
        ({"tools": TOOLS}, "pass messages"),
    ],
)
def test_wrong_options_are_refused(cache: erllama.Cache, options: dict[str, object], message: str) -> None:
    with (
        load_stub(StubBackend(n_ctx=1024), cache=cache) as model,
        pytest.raises(erllama.OptionError, match=message),
    ):
        model.pin("text", **options)  # type: ignore[arg-type]


def test_a_model_without_a_cache_cannot_pin() -> None:
    backend = StubBackend(n_ctx=1024)
    with erllama.Cache(ram=0) as none, load_stub(backend, cache=none) as model:
        with pytest.raises(erllama.PinError, match="neither a RAM tier nor a directory"):
            model.pin(np.arange(3, 50))
        assert backend.tokens_decoded == 0
