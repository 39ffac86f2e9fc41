"""Real models: every kind of hit gives the bits of a cold run.

`make test-models` runs this file on the models that `make real-models` fetches. The prompt is longer than the
window of Gemma 3, 512 tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from support.real_models import (
    BLOCK,
    GREEDY,
    OPTIONS,
    assert_equal_but_for_near_ties,
    model_parameters,
    small_blocks,
    text_prompt,
)
from support.recording_backend import RecordingBackend, llama_backend, same_bits, short_of_cells

N_PROMPT, N_REPLY = 5 * BLOCK + 37, 8


@dataclass(frozen=True)
class Trial:
    """A recording model, the logits of the cold run, and a directory with the stored prompt."""

    backend: RecordingBackend
    prompt: NDArray[np.int32]
    cold: erllama.Completion
    logits: list[NDArray[np.float32]]
    stored: Path


@pytest.fixture(scope="module", params=model_parameters())
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    backend = RecordingBackend(llama_backend(request.param, **OPTIONS))
    close, backend.close = backend.close, lambda: None  # type: ignore[method-assign]
    stored = tmp_path_factory.mktemp("stored") / "kv"
    with small_blocks(disk=stored) as cache, erllama.load_backend(backend, cache=cache) as model:
        prompt = text_prompt(model, N_PROMPT)
        backend.forget()
        cold = complete(model, prompt)
        logits = backend.logits
    assert cold.cache.kind == "cold"
    yield Trial(backend, prompt, cold, logits, stored)
    backend.close = close  # type: ignore[method-assign]
    backend.close()


@pytest.fixture
def kv(trial: Trial, tmp_path: Path) -> Path:
    """A copy of the directory with the stored prompt."""
    return Path(shutil.copytree(trial.stored, tmp_path / "kv"))


def complete(model: erllama.Model, prompt: object, **options: object) -> erllama.Completion:
    return model.complete(prompt, **{"max_tokens": N_REPLY, **GREEDY, **options})  # type: ignore[arg-type]


def load(trial: Trial, cache: erllama.Cache) -> erllama.Model:
    trial.backend.abort(False)
    trial.backend.clear()
    trial.backend.forget()
    return erllama.load_backend(trial.backend, cache=cache)


def assert_cold_bits(trial: Trial, reply: erllama.Completion) -> None:
    assert reply.tokens == trial.cold.tokens
    assert same_bits(trial.backend.logits[-len(trial.logits) :], trial.logits)


def test_the_logits_depend_on_the_first_token(trial: Trial) -> None:
    """Otherwise the tests of this file would not see a wrong state. A window forgets it but in its full layers."""
    other = [*trial.prompt.tolist()]
    other[1] = other[7]
    with erllama.Cache(ram=0, block_size=BLOCK) as cache, load(trial, cache) as model:
        complete(model, other, max_tokens=1)
    assert not np.array_equal(trial.backend.logits[0], trial.logits[0])


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("tier", ["live", "ram", "ram_file", "disk"])
def test_an_exact_hit_of_each_tier_has_the_bits_of_a_cold_run(
    trial: Trial, kv: Path, tmp_path: Path, tier: str, reproducible: bool
) -> None:
    tiers: dict[str, object] = {"ram": "1GiB" if tier == "ram" else 0}
    if tier == "ram_file":
        tiers["ram_file"] = tmp_path / "files"
    with small_blocks(disk=kv, **tiers) as cache, load(trial, cache) as model:
        if tier != "disk":  # read from disk, which promotes the blocks, or leaves the cells in the context
            complete(model, trial.prompt)
        if tier != "live":
            cache.flush()
            model.evict()
        trial.backend.forget()
        reply = complete(model, trial.prompt, reproducible=reproducible)
        # A reproducible request starts in an empty context. Cells of a window or a state cannot be shared after the
        # reply has moved on.
        shares = trial.backend.limits.can_trim and not reproducible
        expected_tier = "disk" if tier == "live" and not shares else tier
        assert (reply.cache.kind, reply.cache.tier) == ("exact", expected_tier)
        assert cache.counters()["restore_errors"] == 0
    assert reply.timings.prefill_tokens == 1
    assert_cold_bits(trial, reply)


@pytest.mark.parametrize("shared", [BLOCK - 1, BLOCK, 4 * BLOCK + 50])
def test_a_partial_hit_has_the_bits_of_a_cold_run(trial: Trial, kv: Path, shared: int) -> None:
    """A prompt shares its first tokens with the stored one, up to the middle or the end of a block."""
    prompt = [*trial.prompt[:shared].tolist(), *trial.prompt[1:21].tolist()[::-1]]
    assert prompt[shared] != trial.prompt[shared]
    with erllama.Cache(ram=0, block_size=BLOCK) as none, load(trial, none) as model:
        cold = complete(model, prompt)
        logits = trial.backend.logits
    with small_blocks(disk=kv, ram=0) as cache, load(trial, cache) as model:
        warm = complete(model, prompt, reproducible=True)
        # Slices end at multiples of the micro-batch, which are the ends of blocks here.
        assert warm.cache.tokens == shared // BLOCK * BLOCK
        assert warm.tokens == cold.tokens
        assert same_bits(trial.backend.logits, logits)
        if trial.backend.limits.can_trim:
            model.evict()
            longest = trial.prompt[: shared + 1].tolist()
            longest[-1] = prompt[shared]
            assert complete(model, longest, max_tokens=1).cache.tokens == shared, "every common token is reused"


def test_a_restarted_reply_keeps_its_bits(trial: Trial, kv: Path) -> None:
    """The backend has no cells at one decode, so the request starts again in an empty context."""
    with small_blocks(disk=kv) as cache, load(trial, cache) as model:
        with short_of_cells(trial.backend, 4):
            reply = complete(model, trial.prompt, reproducible=True)
    assert_cold_bits(trial, reply)


def test_replies_by_speculation_are_those_of_a_cold_run(trial: Trial, kv: Path) -> None:
    with small_blocks(disk=kv) as cache, load(trial, cache) as model:
        plain = complete(model, trial.prompt, max_tokens=24, logprobs=5)
        drafted = complete(model, trial.prompt, max_tokens=24, speculative="ngram")
    assert_equal_but_for_near_ties(drafted.tokens, plain)
