"""The real models that `make test-models` tests, and prompts of text for them.

ERLLAMA_TEST_MODEL chooses one model file. Otherwise ERLLAMA_REAL_MODELS=1, which `make test-models` sets, chooses
the models that `make real-models` fetched. Without either variable the tests of text generation skip.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from support.paths import ROOT

sys.path.append(str(ROOT))

from scripts.real_models import MODELS, fetched_models

BLOCK = UBATCH = 128  # prompts of some hundred tokens then cross several blocks and micro-batches
OPTIONS = {"n_ctx": 2048, "n_threads": 1, "n_ubatch": UBATCH}
GREEDY = {"temperature": 0.0}
SMOLLM2 = MODELS[0].gguf
# Quantized models round activations, so the order of sums moves real ones more than random ones. Between cold runs
# of Gemma 3 and SmolLM2 with another micro-batch, number of threads or type of KV, log-probabilities of the 20 most
# likely tokens differed by up to 0.47, those of the first two by 0.2.
NEAR_TIE = 0.5


@cache
def text_models() -> tuple[Path, ...]:
    """Return the models that generate text and are tested; empty if the environment chooses none.

    Raises:
        UsageError: the chosen model is missing, or none was fetched.
    """
    if chosen := os.environ.get("ERLLAMA_TEST_MODEL"):
        if not Path(chosen).is_file():
            raise pytest.UsageError(f"ERLLAMA_TEST_MODEL={chosen} is not a file")
        return (Path(chosen).resolve(),)
    if not os.environ.get("ERLLAMA_REAL_MODELS"):
        return ()
    if not (found := fetched_models(generate=True)):
        raise pytest.UsageError("ERLLAMA_REAL_MODELS is set, and no real model is fetched; run `make real-models`")
    return tuple(found)


def model_parameters() -> list[object]:
    """Return the parameters of a fixture over the models. Without a model, return one that skips the test."""
    found = text_models()
    if not found:
        skip = pytest.mark.skip(reason="`make test-models`, or ERLLAMA_TEST_MODEL=model.gguf, runs this test")
        return [pytest.param(None, marks=skip, id="no model")]
    return [pytest.param(path, id=path.stem) for path in found]


@contextmanager
def load(path: Path, cache: erllama.Cache, **options: object) -> Iterator[erllama.Model]:
    with erllama.load_model(path, cache=cache, **{**OPTIONS, **options}) as model:  # type: ignore[arg-type]
        yield model


def small_blocks(**tiers: object) -> erllama.Cache:
    return erllama.Cache(block_size=BLOCK, **tiers)  # type: ignore[arg-type]


@cache
def _pages() -> str:
    return "\n".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("caching", "serving", "chat"))


def text_prompt(model: erllama.Model, n_tokens: int, begin: int = 0) -> NDArray[np.int32]:
    """Return exactly `n_tokens` tokens of the documentation from a character on; with BOS if that is the first."""
    tokens = model.tokenize(_pages()[begin : begin + 16 * n_tokens], add_special=not begin)[:n_tokens]
    assert len(tokens) == n_tokens
    return tokens


def can_trim(model: erllama.Model) -> bool:
    """Return whether the model's memory can be cut anywhere, so that a hit ends at any token."""
    return bool(model._backend.limits.can_trim)


def assert_equal_but_for_near_ties(tokens: Sequence[int], expected: erllama.Completion) -> None:
    """Check that a greedy reply agrees with another one up to a place where two tokens were almost equally likely.

    Args:
        expected: a reply with `logprobs` of 5 or more.
    """
    assert expected.logprobs is not None
    assert len(tokens) == len(expected.tokens)
    for at, (token, other) in enumerate(zip(tokens, expected.tokens, strict=True)):
        if token != other:
            likely = dict(expected.logprobs[at].top)
            assert token in likely, f"token {at} is not among the most likely ones"
            assert likely[other] - likely[token] < NEAR_TIE, f"token {at} differs, and is no near-tie"
            return
