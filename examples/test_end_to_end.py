"""Test your model end to end: cold, restored, resumed, branched, evicted, two models at once.

ERLLAMA_MODEL=model.gguf python -m pytest examples/test_end_to_end.py

Without the variable, all tests are skipped. Each test computes a prompt of about 700 tokens.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import erllama

PATH = os.environ.get("ERLLAMA_MODEL")
pytestmark = pytest.mark.skipif(PATH is None, reason="set ERLLAMA_MODEL to the path of a GGUF file")

STORY = "The keeper climbs the stairs, lights the lamp, and writes down every ship, its course and hour. "
BLOCK = 256  # tokens; a model with a sliding window or a recurrent state resumes at block boundaries


def load(cache: erllama.Cache, **options: object) -> erllama.Model:
    return erllama.load_model(str(PATH), cache=cache, n_ctx=4096, **options)  # type: ignore[arg-type]


def ask(model: erllama.Model, prompt: list[int], **options: object) -> erllama.Completion:
    return model.complete(prompt, max_tokens=8, temperature=0, **options)  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[erllama.Cache]:
    with erllama.Cache(disk=tmp_path / "prompts") as cache:
        yield cache


@pytest.fixture
def model(cache: erllama.Cache) -> Iterator[erllama.Model]:
    with load(cache) as model:
        yield model


@pytest.fixture
def prompt(model: erllama.Model) -> list[int]:
    """Return about 700 tokens of this model."""
    ids: list[int] = model.tokenize(STORY * 100).tolist()
    return ids[:700]


def test_a_new_prompt_is_cold(model: erllama.Model, prompt: list[int]) -> None:
    reply = ask(model, prompt)
    assert (reply.cache.kind, reply.cache.tokens) == ("cold", 0)
    assert reply.timings.prefill_tokens == len(prompt)
    assert list(reply.context_tokens[: len(prompt)]) == prompt


def test_after_a_restart_the_prompt_is_restored_with_the_same_reply(tmp_path: Path) -> None:
    replies = []
    for _ in range(2):
        with erllama.Cache(disk=tmp_path / "prompts") as cache, load(cache) as model:
            replies.append(ask(model, model.tokenize(STORY * 40).tolist()[:700]))
    first, again = replies
    assert (first.cache.kind, again.cache.kind, again.cache.tier) == ("cold", "exact", "disk")
    assert again.timings.prefill_tokens == 1
    assert again.tokens == first.tokens


def test_a_turn_continues_from_the_last_reply(model: erllama.Model, prompt: list[int]) -> None:
    first = ask(model, prompt)
    assert first.finish_key is not None
    question = model.tokenize("\nWho passed?", add_special=False).tolist()
    second = ask(model, [*first.context_tokens, *question], parent_key=first.finish_key)
    # All but the last token of the reply, which is in no cell.
    assert second.cache.tokens >= len(first.context_tokens) - 1
    assert model.cache.counters()["hits_resume"] == 1


def test_a_branch_reuses_the_common_prefix(model: erllama.Model, prompt: list[int]) -> None:
    ask(model, prompt)
    other = model.tokenize("And then the light went out.", add_special=False).tolist()
    reply = ask(model, prompt[:600] + other)
    assert reply.cache.kind == "partial"
    assert 2 * BLOCK <= reply.cache.tokens <= 600 + len(other) - 1


def test_blocks_evicted_from_memory_are_still_on_disk(
    cache: erllama.Cache, model: erllama.Model, prompt: list[int]
) -> None:
    first = ask(model, prompt)
    model.evict()
    cache.evict_bytes("64GiB", ("ram",))
    assert cache.counters()["bytes_ram"] == 0
    again = ask(model, prompt)
    assert (again.cache.kind, again.cache.tier) == ("exact", "disk")
    assert again.tokens == first.tokens
    assert cache.verify() == []


def test_two_models_at_once_on_one_cache(cache: erllama.Cache, model: erllama.Model, prompt: list[int]) -> None:
    """Two salts of one file: neither model reuses KV of the other."""
    with load(cache, cache_salt="another") as other, ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda loaded: ask(loaded, prompt), (model, other))
        assert (first.cache.kind, second.cache.kind) == ("cold", "cold")
        assert ask(model, prompt).cache.kind == ask(other, prompt).cache.kind == "exact"
    cache.check_integrity()
