"""Real models: cold and warm prompts, turns, prefixes, eviction, and several models at once.

`make test-models` runs this file on the models that `make real-models` fetches.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import erllama
from support.real_models import (
    BLOCK,
    GREEDY,
    assert_equal_but_for_near_ties,
    can_trim,
    load,
    model_parameters,
    small_blocks,
    text_prompt,
)

N_PROMPT, N_REPLY = 300, 12


@pytest.fixture(scope="module", params=model_parameters())
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def model(path: Path) -> Iterator[erllama.Model]:
    with small_blocks() as cache, load(path, cache) as found:
        yield found


def complete(model: erllama.Model, prompt: object, **options: object) -> erllama.Completion:
    return model.complete(prompt, **{"max_tokens": N_REPLY, **GREEDY, **options})  # type: ignore[arg-type]


def test_a_cold_prompt_is_computed_once_and_stored(model: erllama.Model) -> None:
    prompt = text_prompt(model, N_PROMPT)
    reply = complete(model, prompt)
    assert (reply.cache.kind, reply.cache.tokens, reply.timings.prefill_tokens) == ("cold", 0, N_PROMPT)
    assert reply.finish_key is not None
    assert model.cached_prefix(reply.context_tokens) >= len(reply.context_tokens) - 1
    ends = {row.start + row.n_tokens for row in model.cache.rows()}
    assert {BLOCK, 2 * BLOCK} <= ends
    assert reply.text.isprintable() or "\n" in reply.text


def test_a_warm_prompt_is_restored_after_a_restart(path: Path, tmp_path: Path) -> None:
    replies = []
    for _ in range(2):
        with small_blocks(disk=tmp_path / "kv") as cache, load(path, cache) as model:
            replies.append(complete(model, text_prompt(model, N_PROMPT), logprobs=5))
    cold, warm = replies
    assert (warm.cache.kind, warm.cache.tier, warm.cache.tokens) == ("exact", "disk", N_PROMPT - 1)
    assert warm.timings.prefill_tokens == 1
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs), (
        "the same bits, so the same log-probabilities"
    )


def test_a_turn_resumes_where_its_parent_ended(model: erllama.Model) -> None:
    prompt = text_prompt(model, N_PROMPT)
    first = complete(model, prompt)
    model.evict()  # the context is empty: what follows comes from the cache
    question = text_prompt(model, 20, begin=9000)
    history = [*first.context_tokens, *question.tolist()]
    second = complete(model, history, parent_key=first.finish_key)
    # The last sampled token is not computed: it is the first that the next turn computes.
    assert second.cache.tokens == len(first.context_tokens) - 1
    assert (second.cache.kind, second.cache.tier) == ("partial", "ram")
    assert second.timings.prefill_tokens == len(question) + 1
    third = complete(model, [*second.context_tokens, *question.tolist()], max_tokens=1)
    assert (third.cache.tier, third.cache.tokens) == ("live", len(second.context_tokens) - 1)
    assert_equal_but_for_near_ties(second.tokens, complete(model, history, reproducible=True, logprobs=5))


def test_the_longest_common_prefix_is_found(model: erllama.Model) -> None:
    prefix = text_prompt(model, N_PROMPT).tolist()
    tails = [text_prompt(model, 24, begin=begin).tolist() for begin in (8000, 9000)]
    complete(model, [*prefix, *tails[0]], max_tokens=1)
    assert tails[0][0] != tails[1][0]
    model.evict()
    reply = complete(model, [*prefix, *tails[1]], max_tokens=1)
    assert reply.cache.kind == "partial"
    assert reply.cache.tokens == (N_PROMPT if can_trim(model) else N_PROMPT // BLOCK * BLOCK)
    assert reply.timings.prefill_tokens == N_PROMPT + 24 - reply.cache.tokens


def test_evicted_prompts_are_computed_again(model: erllama.Model) -> None:
    prompt = text_prompt(model, N_PROMPT)
    cold = complete(model, prompt)
    model.evict()
    assert complete(model, prompt).cache.tier == "ram", "evicting the context keeps what is stored"
    model.evict()
    model.cache.flush()
    model.cache.evict_bytes(2**40, tiers=["ram"])
    assert model.cache.counters()["blocks_ram"] == 0
    again = complete(model, prompt)
    assert (again.cache.kind, again.timings.prefill_tokens) == ("cold", N_PROMPT)
    assert again.tokens == cold.tokens


def test_several_models_run_at_once_with_one_cache(path: Path) -> None:
    """The same file with another type of KV is another model to the cache: neither finds the KV of the other."""
    kinds = ("f16", "q8_0")
    with small_blocks() as cache:
        with load(path, cache, kv_type_k=kinds[0]) as one, load(path, cache, kv_type_k=kinds[1]) as other:
            prompt = text_prompt(one, 200)
            with ThreadPoolExecutor(2) as callers:
                first = list(callers.map(lambda model: complete(model, prompt), (one, other)))
                again = list(callers.map(lambda model: complete(model, prompt), (one, other)))
    assert [reply.cache.kind for reply in first] == ["cold", "cold"]
    assert [reply.cache.kind for reply in again] == ["exact", "exact"]
    assert [reply.tokens for reply in again] == [reply.tokens for reply in first]


def test_streams_at_once_compute_a_common_prefix_once(path: Path) -> None:
    n_streams, n_prefix, n_tail = 4, 2 * BLOCK, 16
    with small_blocks() as cache, load(path, cache, n_seq_max=n_streams) as model:
        prefix = text_prompt(model, n_prefix).tolist()
        prompts = [
            [
                *prefix,
                *model.tokenize(f" Agent number {at}:", add_special=False).tolist(),
                *text_prompt(model, n_tail, 9000).tolist(),
            ]
            for at in range(n_streams)
        ]
        with ThreadPoolExecutor(n_streams) as callers:
            replies = list(callers.map(lambda prompt: complete(model, prompt), prompts))
        n_computed = sum(reply.timings.prefill_tokens for reply in replies)
        n_tails = sum(map(len, prompts)) - n_streams * n_prefix
        assert n_computed <= n_prefix + n_tails, "a tail may share its first tokens with another one"
        # Rows of a shared batch have other sums than a row alone.
        for prompt, reply in zip(prompts, replies, strict=True):
            assert_equal_but_for_near_ties(reply.tokens, complete(model, prompt, reproducible=True, logprobs=5))
