"""Every kind of memory resumes only where it can, with the bits of a cold run.

Full attention has its own, longer tests in test_exactness.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import erllama
from erllama.testing.models import write_gemma3, write_lfm2, write_mamba
from support.examples import examples
from support.recording_backend import RecordingBackend, llama_backend, prompt_of, same_bits, short_of_cells

BLOCK, UBATCH = 32, 64
KINDS = {"sliding window": write_gemma3, "recurrent": write_mamba, "hybrid": write_lfm2}


class Trial:
    """One model, cold and warm, recorded."""

    def __init__(self, path: Path) -> None:
        self.cold_backend = RecordingBackend(llama_backend(path, n_ubatch=UBATCH))
        self.warm_backend = RecordingBackend(llama_backend(path, n_ubatch=UBATCH))
        # With the same block size: memory that cannot be cut is packed, and so sliced, at the end of every block.
        self.none = erllama.Cache(ram=0, block_size=BLOCK)
        self.cold = erllama.load_backend(self.cold_backend, cache=self.none)

    def close(self) -> None:
        self.cold.unload()
        self.warm_backend.inner.close()
        self.none.close()


@pytest.fixture(scope="module", params=KINDS)
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    path = KINDS[request.param](tmp_path_factory.mktemp("memory") / "model.gguf", seed=1)
    found = Trial(path)
    yield found
    found.close()


def test_the_models_of_this_file_have_memory_that_cannot_be_cut(trial: Trial) -> None:
    assert not trial.warm_backend.limits.can_trim
    with pytest.raises(erllama.BackendError, match="cannot be cut"):
        trial.warm_backend.cut(0, 0)


def test_the_reply_depends_on_the_first_token(trial: Trial) -> None:
    """Otherwise a wrong state would not be visible."""
    rows = []
    for first in (5, 6):
        trial.cold_backend.forget()
        trial.cold.complete([first, *prompt_of(3, 300).tolist()], max_tokens=1, temperature=0)
        rows.append(trial.cold_backend.logits[0])
    assert not np.array_equal(*rows)


@settings(max_examples=examples(25))
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 400),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 90), st.booleans()), max_size=3),
)
def test_replies_have_the_bits_of_a_cold_run(
    trial: Trial, seed: int, n: int, history: list[tuple[float, int, bool]]
) -> None:
    prompt = prompt_of(seed, n)
    trial.cold_backend.forget()
    expected = trial.cold.complete(prompt, max_tokens=40, temperature=0)
    expected_logits = trial.cold_backend.logits
    backend = trial.warm_backend
    backend.close = lambda: None  # type: ignore[method-assign]
    backend.abort(False)
    permitted = {0, n - 1}
    with erllama.Cache(block_size=BLOCK) as cache, erllama.load_backend(backend, cache=cache) as model:
        for share, more, reproducible in history:
            earlier = np.concatenate([prompt[: round(share * n)], prompt_of(seed + 1, more)])
            if len(earlier):
                reply = model.complete(earlier, max_tokens=20, temperature=0, reproducible=reproducible)
                # State was packed before the last prompt token and after the last computed token.
                permitted |= {len(earlier) - 1, len(reply.context_tokens) - 1}
        for _ in range(2):
            backend.forget()
            reply = model.complete(prompt, max_tokens=40, temperature=0, reproducible=True)
            assert reply.tokens == expected.tokens
            assert same_bits(backend.logits, expected_logits)
            assert reply.cache.tokens % BLOCK == 0 or reply.cache.tokens in permitted
        assert reply.cache.tokens >= (n - 1) // BLOCK * BLOCK
        backend.forget()
        again = model.complete(prompt, max_tokens=40, temperature=0)
        assert again.cache.tokens % BLOCK == 0 or again.cache.tokens in permitted
        if not history:
            assert again.cache.tokens >= (n - 1) // BLOCK * BLOCK
            assert same_bits(backend.logits, expected_logits)
        counters = cache.counters()
        assert counters["restore_errors"] == counters["faults"] == 0


@settings(max_examples=examples(25))
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 60))
def test_a_restarted_reproducible_reply_keeps_its_bits(trial: Trial, seed: int, n: int, at: int) -> None:
    prompt, backend = prompt_of(seed, n), trial.warm_backend
    trial.cold_backend.forget()
    expected = trial.cold.complete(prompt, max_tokens=50, temperature=0)
    backend.close = lambda: None  # type: ignore[method-assign]
    backend.abort(False)
    with erllama.Cache(block_size=BLOCK) as cache, erllama.load_backend(backend, cache=cache) as model:
        backend.forget()
        with short_of_cells(backend, at):
            reply = model.complete(prompt, max_tokens=50, temperature=0, reproducible=True)
    assert reply.tokens == expected.tokens
    assert same_bits(backend.logits, trial.cold_backend.logits)


@settings(max_examples=examples(10))
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 40))
def test_a_prompt_of_whole_blocks_is_found_whole(trial: Trial, seed: int, n_blocks: int, n_reply: int) -> None:
    prompt, backend = prompt_of(seed, n_blocks * BLOCK), trial.warm_backend
    trial.cold_backend.forget()
    expected = trial.cold.complete(prompt, max_tokens=40, temperature=0)
    backend.close = lambda: None  # type: ignore[method-assign]
    backend.abort(False)
    with erllama.Cache(block_size=BLOCK) as cache, erllama.load_backend(backend, cache=cache) as model:
        model.complete(prompt, max_tokens=n_reply, temperature=0)
        for reproducible in (True, False):
            model.evict()
            backend.forget()
            again = model.complete(prompt, max_tokens=40, temperature=0, reproducible=reproducible)
            assert again.cache.tokens == len(prompt) - 1
            assert again.tokens == expected.tokens
            assert same_bits(backend.logits, trial.cold_backend.logits)
        longer = model.complete([*prompt.tolist(), 7], max_tokens=1, temperature=0)
        assert longer.cache.tokens == len(prompt), "its last block is stored, too"


def test_recurrent_memory_resumes_from_the_last_block_alone(trial: Trial) -> None:
    backend, prompt = trial.warm_backend, prompt_of(7, 200)
    backend.close = lambda: None  # type: ignore[method-assign]
    backend.abort(False)
    with erllama.Cache(block_size=BLOCK) as cache, erllama.load_backend(backend, cache=cache) as model:
        cold = model.complete(prompt, max_tokens=5, temperature=0)
        backend.forget()
        warm = model.complete(prompt, max_tokens=5, temperature=0)
        assert warm.tokens == cold.tokens
        assert warm.cache.kind == "exact"
        ends = [end for _, end in backend.restored]
        assert ends == ([199] if backend.limits.whole_state else [32, 64, 96, 128, 160, 192, 199])
        # If the last block is lost, the one before it is used.
        tail = max(cache.rows(), key=lambda row: row.start + row.n_tokens if row.start + row.n_tokens < 200 else 0)
        last = cache.stored(tail.key)
        assert last is not None
        cache.save(last, b"nonsense", replace=True)
        backend.forget()
        again = model.complete(prompt, max_tokens=5, temperature=0)
        assert again.cache.tokens == 192
        assert again.tokens == cold.tokens
        assert cache.counters()["restore_errors"] == 1


@pytest.mark.parametrize(
    ("window", "block", "ubatch", "bits"),
    [
        (64, 256, 512, False),
        (192, 256, 512, False),
        (256, 256, 512, True),
        (64, 64, 512, True),
        (512, 256, 512, True),
    ],
)
def test_a_window_is_restored_exactly_or_not_at_all(
    tmp_path: Path, window: int, block: int, ubatch: int, bits: bool
) -> None:
    path = write_gemma3(tmp_path / "model.gguf", seed=1, window=window)
    cold_backend, warm_backend = (RecordingBackend(llama_backend(path, n_ubatch=ubatch)) for _ in range(2))
    with (
        erllama.Cache(ram=0, block_size=block) as none,
        erllama.Cache(block_size=block) as cache,
        erllama.load_backend(cold_backend, cache=none) as cold,
        erllama.load_backend(warm_backend, cache=cache) as warm,
    ):
        for n in (257, 300, 513, 900):
            prompt = prompt_of(n, n)
            cold_backend.forget()
            expected = cold.complete(prompt, max_tokens=8, temperature=0)
            warm.complete(prompt, max_tokens=8, temperature=0)
            warm_backend.forget()
            reply = warm.complete(prompt, max_tokens=8, temperature=0, reproducible=True)
            assert reply.tokens == expected.tokens
            assert same_bits(warm_backend.logits, cold_backend.logits)
            assert (reply.cache.kind == "exact") is bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_cancelled_request_leaves_no_wrong_state(kind: str, tmp_path: Path) -> None:
    """After an unload during a decode, the saved KV gives the replies of a cold run."""
    path = KINDS[kind](tmp_path / "model.gguf", seed=1)
    with (
        erllama.Cache(ram=0, block_size=BLOCK) as none,
        erllama.load_backend(llama_backend(path, n_ubatch=UBATCH), cache=none) as cold,
    ):
        for i in range(12):
            prompt = prompt_of(i, 100)
            with erllama.Cache(block_size=BLOCK) as cache:
                model = erllama.load_backend(llama_backend(path, n_ubatch=UBATCH), cache=cache)
                stream = model.stream(prompt, max_tokens=400, temperature=0)
                for _ in range(3 + i):
                    next(stream, None)
                model.unload()
                longest = max((row for row in cache.rows()), key=lambda row: row.start + row.n_tokens)
                context = cache.context(longest.key)
                assert context is not None
                again = [*context.tolist(), 7]
                with erllama.load_backend(llama_backend(path, n_ubatch=UBATCH), cache=cache) as model:
                    warm = model.complete(again, max_tokens=4, temperature=0)
                assert warm.cache.kind == "exact"
            assert warm.tokens == cold.complete(again, max_tokens=4, temperature=0).tokens


def test_a_window_of_another_layout_is_not_used(tmp_path: Path) -> None:
    """libllama sizes the cells of a window by the number of sequences, and the order of sums depends on them."""
    path = write_gemma3(tmp_path / "model.gguf", seed=1)
    one, four = (llama_backend(path, n_sequences=n) for n in (1, 4))
    again = llama_backend(path, n_sequences=4)
    assert one.recipe != four.recipe == again.recipe
    for backend in (one, four, again):
        backend.close()
