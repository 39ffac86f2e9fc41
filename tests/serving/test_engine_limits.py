"""Options of models and requests, properties to observe a model, and the checks at loading."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.engine import Batch
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.stub import StubBackend
from support.engine_models import (
    GatedBackend,
    load_stub,
    random_prompt,
)
from support.threads import wait_until

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
def test_wrong_model_options_raise_typed_errors(options: dict[str, object], words: str) -> None:
    with pytest.raises(erllama.OptionError, match=words):
        load_stub(StubBackend(), **options)


@pytest.mark.parametrize("n", [0, 256, 10**6])
def test_n_seq_max_is_limited_to_the_sequences_of_libllama(tiny_gguf: Path, n: int) -> None:
    with pytest.raises(erllama.OptionError, match="n_seq_max"):
        erllama.load_model(tiny_gguf, n_seq_max=n, n_threads=1)


def test_the_largest_n_seq_max_of_libllama_works(tiny_gguf: Path) -> None:
    with erllama.load_model(tiny_gguf, n_seq_max=255, n_ctx=2048, n_threads=1) as model:
        streams = [model.stream([i % 200 + 3, 5], max_tokens=2, temperature=0) for i in range(255)]
        assert all(len(stream.result().context_tokens) >= 2 for stream in streams)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": ""}, "none of them empty"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"stop": 5}, "pass a text"),
        ({"stop": [b"x"]}, "pass a text"),
        ({"logprobs": -1}, "at least 0"),
        ({"logprobs": 101}, "at most 100"),
        ({"session_id": ""}, "not empty"),
        ({"session_id": 5}, "not empty"),
        ({"timeout": -1}, "at least 0"),
        ({"timeout": float("inf")}, "finite"),
        ({"max_tokens": -1}, "at least 0"),
    ],
)
def test_wrong_request_options_raise_typed_errors(options: dict[str, object], words: str) -> None:
    with load_stub(StubBackend()) as model, pytest.raises(erllama.OptionError, match=words):
        model.complete("x", **options)  # type: ignore[arg-type]


def test_prefill_refuses_sampling_options() -> None:
    with (
        load_stub(StubBackend()) as model,
        pytest.raises(erllama.OptionError, match="prefill has no option 'seed'"),
    ):
        model.prefill("x", seed=1)  # type: ignore[call-arg]


# --- looking at it -----------------------------------------------------------------------------------------


def test_properties_do_not_wait_for_a_decode() -> None:
    backend = GatedBackend()
    with load_stub(backend, n_seq_max=2, id="busy") as model:
        model.complete(random_prompt(1, 100), max_tokens=1)
        backend.hold()
        backend.at_decode.clear()
        stream = model.stream(random_prompt(1, 100), max_tokens=5)
        assert backend.at_decode.wait(120)
        assert model.phase == "prefilling"
        assert (model.pending, model.queue_depth, erllama.queue_depth()) == (0, 1, 1)
        assert model.last_cache_hit == erllama.CacheHit("exact", "live", 99)
        assert model.cached_prefix(random_prompt(1, 100)) == 99
        assert model.cached_prefix([1, 2, 3]) == 0
        assert model.info.queue_depth == 1
        assert (model.info.id, model.info.backend, model.info.n_seq_max) == ("busy", "stub", 2)
        backend.step()
        wait_until(lambda: model.phase == "generating")
        backend.release()
        stream.result()


def test_logprobs_match_the_logits_of_the_model() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        reply = model.complete([1, 2], max_tokens=5, temperature=0, logprobs=3)
        assert reply.logprobs is not None
        assert [entry.token for entry in reply.logprobs] == list(reply.tokens)
        for entry in reply.logprobs:
            assert entry.top[0] == (entry.token, entry.logprob), "greedy sampling takes the most likely token"
            assert entry.logprob >= entry.top[1][1] >= entry.top[2][1]
        everything = model.complete([1, 2], max_tokens=1, logprobs=100).logprobs
        assert everything is not None
        assert 0.2 < sum(np.exp(logprob) for _, logprob in everything[0].top) <= 1
        assert model.complete([1, 2], max_tokens=5).logprobs is None


def test_parked_cells_are_a_tier_that_can_be_listed_and_evicted() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
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


def test_blocks_that_are_only_in_cells_do_not_count_as_stored() -> None:
    """A block that RAM has lost is saved again by a request that continues from it."""
    with load_stub(StubBackend(eog_bias=-100)) as model:
        first = model.complete(random_prompt(1, 100), max_tokens=1)
        model.cache.evict_bytes("1GiB", ("ram",))
        second = model.complete([*first.context_tokens, 5, 6], max_tokens=1)
        assert second.cache.tier == "live"
        model.evict()
        assert model.complete([*second.context_tokens, 7], max_tokens=1).cache == erllama.CacheHit(
            "partial", "ram", 103
        )


def test_another_model_does_not_find_blocks_that_are_only_in_cells() -> None:
    with load_stub(StubBackend(eog_bias=-100)) as model:
        with erllama.load_backend(StubBackend(eog_bias=-100), cache=model.cache) as other:
            prompt = random_prompt(1, 200)
            model.complete(prompt, max_tokens=1)
            assert other.cached_prefix(prompt) == 199
            model.cache.evict_bytes("1GiB", ("ram",))
            assert [row.tier for row in model.cache.rows()] == ["live"] * len(model.cache.rows()) != []
            assert model.cached_prefix(prompt) == other.cached_prefix(prompt) == 0
            assert other.complete(prompt, max_tokens=1).cache.kind == "cold"


def test_a_parked_context_is_kept_over_blocks_only_in_cells() -> None:
    with erllama.Cache(block_size=64) as cache:
        with erllama.load_backend(StubBackend(eog_bias=-100, can_trim=False), cache=cache) as model:
            prompt = random_prompt(1, 140)
            model.complete(prompt, max_tokens=1, session_id="another")
            model.complete(prompt[:102], max_tokens=1)
            cache.evict_bytes("1GiB", ("ram",))
            reply = model.complete([*prompt[:135], 5], max_tokens=1)
            assert reply.cache == erllama.CacheHit("partial", "live", 102)


def test_a_lookup_of_loadable_blocks_finds_the_longest_such_prefix() -> None:
    """Some of the neighbouring blocks in the tree are only in cells."""
    from erllama.cache import Block, SaveReason, child_key, namespace_key, token_bytes

    root = namespace_key({"backend": "a test"})

    def block(*tokens: int) -> Block:
        raw = token_bytes(list(tokens))
        return Block(child_key(root, raw), root, root, 0, raw, SaveReason.FINISH, bytes(16), 0)

    with load_stub(StubBackend(eog_bias=-100)) as model:
        cache, tier = model.cache, model._runner._tier
        assert tier is not None
        for tokens in ((1, 2), (1, 2, 3, 4, 5), (1, 2, 3, 9)):
            cache.save(block(*tokens), b"kv", trimmable=False)
        for tokens in ((1, 2, 3, 4), (1, 2, 3, 4, 6), (1, 2, 3, 4, 7)):
            assert cache.report_stored(tier, block(*tokens), 8)
        for wanted, whole, n in (
            ([1, 2, 3, 4, 7, 8], False, 4),
            ([1, 2, 3, 4, 7, 8], True, 2),
            ([1, 2, 3, 4, 5, 8], True, 5),
            ([1, 2, 3, 10], False, 3),
        ):
            with cache.lookup(root, wanted, whole=whole, loadable=True) as match:
                assert match.n_tokens == n
                assert all(cache.load(found) is not None for found in match.blocks)
        with cache.lookup(root, [1, 2, 3, 4, 7, 8]) as match:
            assert match.n_tokens == 5


# --- loading ---------------------------------------------------------------------------------------------


def test_loading_decodes_once_and_leaves_no_trace(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, threads = LlamaBackend.decode, []

    def watched(self: LlamaBackend, batch: Batch) -> NDArray[np.float32]:
        threads.append(threading.current_thread().name)
        return decode(self, batch)

    monkeypatch.setattr(LlamaBackend, "decode", watched)
    replies = []
    for warmup in (True, False):
        threads.clear()
        with (
            Cache() as cache,
            erllama.load_model(tiny_gguf, cache=cache, n_ctx=256, warmup=warmup, n_threads=1) as model,
        ):
            assert threads == [f"erllama-model-{model.id}"] * warmup
            assert model.metrics.ticks == 0
            assert cache.rows() == []
            replies.append(model.complete([5, 6, 7], max_tokens=20, temperature=0, logprobs=0))
    assert replies[0].cache.kind == "cold"
    assert replies[0].logprobs == replies[1].logprobs


def test_loading_refuses_a_model_that_cannot_decode(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: LlamaBackend, batch: Batch) -> NDArray[np.float32]:
        raise erllama.BackendError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(LlamaBackend, "decode", failing)
        with pytest.raises(erllama.BackendError, match="out of memory"):
            erllama.load_model(tiny_gguf, id="cannot", n_ctx=256, n_threads=1)
    assert "cannot" not in [model.id for model in erllama.list_models()]
    with erllama.load_model(tiny_gguf, id="cannot", n_ctx=256, n_threads=1) as model:
        assert model.complete([5], max_tokens=1).tokens
    with pytest.raises(erllama.OptionError, match="warmup"):
        erllama.load_model(tiny_gguf, warmup="yes")  # type: ignore[arg-type]
