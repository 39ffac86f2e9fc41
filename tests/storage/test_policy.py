"""Which parts of a context are saved, when and why, and who may find them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import erllama
from erllama import Policy, SaveReason
from erllama.cache import Cache
from erllama.engine.backends.stub import StubBackend
from support.recording_backend import RecordingBackend
from support.subprocesses import must_run

SIZE = 32


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache(block_size=SIZE) as cache:
        yield cache


def loaded(cache: Cache, policy: object = None, **options: object) -> erllama.Model:
    backend = StubBackend(eog_bias=-100, n_ctx=1024, n_ubatch=SIZE, **options)  # type: ignore[arg-type]
    return erllama.load_backend(backend, cache=cache, policy=policy)  # type: ignore[arg-type]


def saved(cache: Cache) -> dict[str, list[tuple[int, int]]]:
    """Return start and end of every stored block, by save reason."""
    found: dict[str, list[tuple[int, int]]] = {}
    stored = [row for row in cache.rows() if row.tier != "live"]
    for row in sorted(stored, key=lambda row: row.start):
        block = cache.stored(row.key)
        assert block is not None
        found.setdefault(block.reason.name, []).append((block.start, block.end))
    return found


def test_blocks_record_why_they_were_saved(cache: Cache) -> None:
    with loaded(cache) as model:
        model.complete([1] * 80, max_tokens=60)
    # The prompt is saved during prefill. The reply is saved at its end, because it is shorter than the interval.
    assert saved(cache) == {"COLD": [(0, 32), (32, 64)], "FINISH": [(64, 96), (96, 128), (128, 139)]}
    counters = cache.counters()
    assert (counters["saves_cold"], counters["saves_finish"]) == (2, 3)


def test_a_long_reply_is_saved_while_it_is_generated(cache: Cache) -> None:
    with loaded(cache, {"continued_interval": 32}) as model:
        model.complete([1] * 64, max_tokens=100)
    assert saved(cache)["CONTINUED"] == [(64, 96), (96, 128), (128, 160)]
    cache.evict_bytes(10**9)
    with loaded(cache, {"continued_interval": 0}) as model:
        model.complete([2] * 64, max_tokens=100)
    assert "CONTINUED" not in saved(cache)


def test_a_conversation_stores_each_token_once(tmp_path: Path) -> None:
    def written(turns: list[list[int]], place: Path) -> float:
        with Cache(disk=place) as cache, loaded(cache) as model:
            for prompt in turns:
                model.prefill(prompt)
            cache.flush()
            return cache.counters()["bytes_written"]

    tokens = [i % 97 for i in range(1000)]
    turns = [tokens[: 50 * (i + 1)] for i in range(20)]
    assert written(turns, tmp_path / "turns") <= 1.05 * written([tokens], tmp_path / "once")


def test_contexts_below_the_minimum_are_not_saved(cache: Cache) -> None:
    with loaded(cache, Policy(min_tokens=100)) as model:
        short = model.complete([1] * 64, max_tokens=20)
        assert short.finish_key is None
        assert saved(cache) == {}
        longer = model.complete([1] * 64, max_tokens=50)
        assert longer.finish_key is not None
        assert saved(cache)["FINISH"][-1] == (96, 113)
        assert cache.context(longer.finish_key).tolist() == list(longer.context_tokens[:-1])  # type: ignore[union-attr]


@pytest.mark.parametrize(("n_prompt", "cold"), [(60, []), (64, [(0, 32), (32, 64)]), (129, [])])
def test_prompts_within_the_length_limits_are_saved_during_prefill(
    cache: Cache, n_prompt: int, cold: list[tuple[int, int]]
) -> None:
    with loaded(cache, Policy(cold_min_tokens=64, cold_max_tokens=128)) as model:
        model.prefill([1] * n_prompt)
    found = saved(cache)
    assert found.get("COLD", []) == cold
    # The rest is saved when the request ends.
    assert sum(end - start for ranges in found.values() for start, end in ranges) == n_prompt


def test_the_end_of_a_prompt_can_be_excluded_from_prefill_saves(cache: Cache) -> None:
    with loaded(cache, Policy(boundary_trim_tokens=10, boundary_align_tokens=64)) as model:
        model.prefill([1] * 137)  # 127 without its end, and 64 of that are aligned
    assert saved(cache) == {"COLD": [(0, 32), (32, 64)], "FINISH": [(64, 96), (96, 128), (128, 137)]}


def test_memory_that_cannot_be_cut_resumes_before_the_trimmed_end(cache: Cache) -> None:
    with loaded(cache, Policy(boundary_trim_tokens=6), can_trim=False) as model:
        model.prefill([*[1] * 60, 7, 8, 9])
        assert saved(cache)["COLD"] == [(0, 32), (32, 57)]
        # The text continues, so its last tokens differ.
        again = model.complete([*[1] * 60, 7, 5, 5, 5, 5], max_tokens=1)
        assert again.cache.tokens == 57


@given(
    st.builds(
        Policy,
        min_tokens=st.integers(0, 150),
        cold_min_tokens=st.integers(0, 60),
        cold_max_tokens=st.none() | st.integers(60, 200),
        continued_interval=st.integers(0, 40),
        boundary_trim_tokens=st.integers(0, 40),
        boundary_align_tokens=st.integers(1, 70),
    ),
    st.integers(1, 140),
    st.integers(0, 60),
    st.booleans(),
    st.booleans(),
)
def test_no_policy_changes_a_reply(
    policy: Policy, n_prompt: int, max_tokens: int, can_trim: bool, reproducible: bool
) -> None:
    ask = {"max_tokens": max_tokens, "temperature": 0.0, "reproducible": reproducible}
    prompt = [i % 5 for i in range(n_prompt)]
    with Cache(ram=0, block_size=SIZE) as none, loaded(none, can_trim=can_trim) as model:
        cold = model.complete(prompt, **ask)  # type: ignore[arg-type]
    with Cache(block_size=SIZE) as cache, loaded(cache, policy, can_trim=can_trim) as model:
        for _ in range(2):
            assert model.complete(prompt, **ask).tokens == cold.tokens  # type: ignore[arg-type]
        longer = model.complete([*cold.context_tokens, 3], **ask)  # type: ignore[arg-type]
        cache.check_integrity()
        assert cache.counters()["restore_errors"] == cache.counters()["faults"] == 0
    with Cache(ram=0, block_size=SIZE) as none, loaded(none, can_trim=can_trim) as model:
        assert model.complete([*cold.context_tokens, 3], **ask).tokens == longer.tokens  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"min_token": 5}, "did you mean 'min_tokens'"),
        ({"min_tokens": -1}, "at least 0"),
        ({"min_tokens": "many"}, "integer"),
        ({"boundary_align_tokens": 0}, "at least 1"),
        ({"cold_min_tokens": 100, "cold_max_tokens": 50}, "cold_max_tokens=50"),
        ("all", "erllama.Policy"),
    ],
)
def test_wrong_policies_raise_typed_errors(cache: Cache, policy: object, words: str) -> None:
    with pytest.raises(erllama.OptionError) as caught:
        loaded(cache, policy)
    assert words in str(caught.value)


@given(
    st.sampled_from([{}, {"continued_interval": 0}, {"boundary_trim_tokens": 50}, {"boundary_align_tokens": 50}]),
    st.integers(1, 150),
    st.integers(0, 100),
    st.booleans(),
)
def test_a_finish_key_identifies_its_context(
    policy: dict[str, object], n_prompt: int, max_tokens: int, can_trim: bool
) -> None:
    with Cache(block_size=SIZE) as cache, loaded(cache, policy, can_trim=can_trim) as model:
        reply = model.complete([i % 7 for i in range(n_prompt)], max_tokens=max_tokens)
        assert reply.finish_key is not None
        # The last token sampled was never computed.
        held = reply.context_tokens[: n_prompt + max(max_tokens - 1, 0)]
        assert cache.context(reply.finish_key).tolist() == list(held)  # type: ignore[union-attr]


@given(st.integers(0, 40), st.integers(1, 3), st.integers(20, 150), st.integers(20, 150))
def test_reproducible_replies_have_the_slices_of_a_cold_run(
    trim: int, share: int, n_first: int, n_second: int
) -> None:
    """Also if a policy adds its own cut: KV with other cuts is computed again."""

    def slices(history: list[list[int]], prompt: list[int]) -> tuple[int, list[tuple[int, int]]]:
        backend = RecordingBackend(StubBackend(eog_bias=-100, n_ctx=1024, n_ubatch=SIZE, can_trim=False))
        with (
            Cache(block_size=SIZE) as cache,
            erllama.load_backend(backend, cache=cache, policy={"boundary_trim_tokens": trim}) as model,
        ):
            for earlier in history:
                model.complete(earlier, max_tokens=3)
            backend.forget()
            reply = model.complete(prompt, max_tokens=1, reproducible=True)
            return reply.cache.tokens, backend.slices

    tokens = [i % 5 for i in range(200)]
    first, second = tokens[:n_first], [*tokens[: n_second // share], *[6] * (n_second - n_second // share)]
    reused, warm = slices([first], second)
    _, cold = slices([], second)
    assert warm == [(start, end) for start, end in cold if start >= reused]
    assert reused in {0, *(end for _, end in cold)}


# --- continuations -----------------------------------------------------------------------------------


def test_a_turn_continues_from_the_previous_one(cache: Cache) -> None:
    with loaded(cache) as model:
        first = model.complete([1] * 40, max_tokens=10, temperature=0)
        second = model.complete([*first.context_tokens, 5, 6], max_tokens=10, parent_key=first.finish_key)
        assert second.cache.tokens == 49
        assert cache.counters()["hits_resume"] == 1
        third = model.complete([9] * 40, max_tokens=1, parent_key=second.finish_key)
        assert third.cache.kind == "cold", "the prompt decides, not the parent key"
        assert cache.counters()["hits_resume"] == 1


@pytest.mark.parametrize("key", [b"short", "text", 5])
def test_a_parent_key_must_be_a_finish_key(cache: Cache, key: object) -> None:
    with loaded(cache) as model, pytest.raises(erllama.OptionError, match="finish_key"):
        model.complete([1], parent_key=key)  # type: ignore[arg-type]


# --- evicting and ending ---------------------------------------------------------------------------


class Steps(StubBackend):
    """Waits before each decode until it is released."""

    def __init__(self) -> None:
        super().__init__(eog_bias=-100, n_ctx=1024, n_ubatch=SIZE)
        self.at, self.go_on = threading.Event(), threading.Event()
        self.stop_at = 10**9

    def decode(self, batch):  # type: ignore[no-untyped-def]
        if batch.positions[0] >= self.stop_at and not self.go_on.is_set():
            self.at.set()
            self.go_on.wait(120)
        return super().decode(batch)


def test_evicting_a_model_saves_its_running_request(tmp_path: Path) -> None:
    backend = Steps()
    backend.stop_at = 100
    with Cache(block_size=SIZE, disk=tmp_path) as cache, erllama.load_backend(backend, cache=cache) as model:
        stream = model.stream([1] * 40, max_tokens=100, temperature=0)
        assert backend.at.wait(120)
        evicting = threading.Thread(target=model.evict)
        evicting.start()
        while not model._runner._calls:
            pass
        backend.go_on.set()
        evicting.join(120)
        assert not evicting.is_alive()
        assert cache.counters()["saves_evict"] >= 3
        on_disk = [row for row in cache.rows() if row.tier == "disk"]
        assert sum(row.n_tokens for row in on_disk) >= 100, "evicted blocks are on disk when the call returns"
        assert len(stream.result().tokens) == 100


def test_an_idle_model_can_be_evicted(cache: Cache) -> None:
    with loaded(cache) as model:
        first = model.complete([1] * 40, max_tokens=5, temperature=0)
        model.evict()
        assert model.complete([1] * 40, max_tokens=5, temperature=0).tokens == first.tokens
    with pytest.raises(erllama.ModelUnloaded):
        model.evict()


def test_unloading_a_model_saves_its_running_request(tmp_path: Path) -> None:
    backend = Steps()
    backend.stop_at = 100
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        model = erllama.load_backend(backend, cache=cache)
        stream = model.stream([1] * 40, max_tokens=100, temperature=0)
        assert backend.at.wait(120)
        threading.Timer(0.1, backend.go_on.set).start()
        model.unload()
        with pytest.raises(erllama.ModelUnloaded):
            stream.result()
        assert saved(cache)["SHUTDOWN"][-1][1] == 100
        assert max(row.start + row.n_tokens for row in cache.rows() if row.tier == "disk") == 100


def test_a_model_unloaded_during_a_request_resumes_there(tiny_gguf: Path, tmp_path: Path) -> None:
    prompt = [5 + i % 200 for i in range(900)]
    program = """
        import sys, threading, time, erllama
        prompt = [5 + i % 200 for i in range(900)]
        with erllama.Cache(disk=sys.argv[2]) as cache:
            model = erllama.load_model(sys.argv[1], cache=cache, n_ctx=2048, n_ubatch=32, n_threads=1)
            stream = model.stream(prompt, max_tokens=1000, temperature=0)
            next(stream)
            model.unload()
            assert cache.counters()["saves_shutdown"] >= 1, cache.counters()
    """
    must_run(program, tiny_gguf, tmp_path)
    with (
        Cache(disk=tmp_path) as cache,
        erllama.load_model(tiny_gguf, cache=cache, n_ctx=2048, n_ubatch=32, n_threads=1) as model,
    ):
        assert model.complete(prompt, max_tokens=1).cache.kind == "exact"


# --- tenants ----------------------------------------------------------------------------------------


def test_tenants_do_not_share_prompts(cache: Cache) -> None:
    with loaded(cache) as model:
        for salt in ("a", "b", None):
            assert model.complete([1] * 80, max_tokens=1, cache_salt=salt).cache.kind == "cold"
            assert model.complete([1] * 80, max_tokens=1, cache_salt=salt).cache.kind == "exact"
        assert model.prefill([1] * 80, cache_salt="c").cache.kind == "cold"
        list(model.stream([1] * 80, max_tokens=1, cache_salt="d"))
        assert model.last_cache_hit == erllama.CacheHit("cold", None, 0)


def test_a_model_can_have_its_own_salt(cache: Cache) -> None:
    for salt, kind in (("a", "cold"), ("a", "exact"), (None, "cold"), ("b", "cold")):
        backend = StubBackend(eog_bias=-100)
        with erllama.load_backend(backend, cache=cache, cache_salt=salt) as model:
            assert model.complete([1] * 80, max_tokens=1).cache.kind == kind
            if salt == "a":
                assert model.complete([1] * 80, max_tokens=1, cache_salt="a").cache.kind == "exact"


@pytest.mark.parametrize("salt", ["", 5, b"a"])
def test_a_salt_must_be_text(cache: Cache, salt: object) -> None:
    with loaded(cache) as model, pytest.raises(erllama.OptionError, match="cache_salt"):
        model.complete([1], cache_salt=salt)  # type: ignore[arg-type]
    with pytest.raises(erllama.OptionError, match="cache_salt"):
        erllama.load_backend(StubBackend(), cache=cache, cache_salt=salt)  # type: ignore[arg-type]


def test_save_reasons_keep_their_numbers_in_files() -> None:
    assert [(reason.name, reason.value) for reason in SaveReason] == [
        ("COLD", 1),
        ("CONTINUED", 2),
        ("FINISH", 3),
        ("EVICT", 4),
        ("SHUTDOWN", 5),
    ]
