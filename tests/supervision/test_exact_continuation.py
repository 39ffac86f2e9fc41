"""A reply of a real model after a crash: bit for bit with `reproducible`, and otherwise up to equal logits.

ERLLAMA_DEATHS says how many processes end; `make stress`: 200.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

import erllama

N_DEATHS = int(os.environ.get("ERLLAMA_DEATHS", "4"))
OPTIONS: dict[str, object] = {"n_ctx": 1024, "n_threads": 1, "n_batch": 128, "n_ubatch": 32}
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM)
# Two logits this close may change places when they are computed in another batch, from cells in half precision.
NEAR = 2e-2


def interrupted(
    model: erllama.Model, prompt: str, kill_at: set[int], number: signal.Signals, **options: object
) -> erllama.Completion:
    """A reply during which the process ends after some tokens."""
    n_tokens = 0
    with model.stream(prompt, **options) as stream:  # type: ignore[arg-type]
        for event in stream:
            before, n_tokens = n_tokens, n_tokens + len(getattr(event, "tokens", ()))
            if any(before < n <= n_tokens for n in kill_at) and model.info.pid:
                os.kill(model.info.pid, number)
        return stream.result()


@pytest.mark.parametrize("reproducible", [True, False])
def test_a_reply_continues_with_the_same_bits_or_at_a_near_tie(
    tiny_gguf: Path, tmp_path: Path, reproducible: bool
) -> None:
    dice = random.Random(1)
    options = {"max_tokens": 80, "logprobs": 5, "reproducible": reproducible}
    with (
        erllama.Cache(ram=None, ram_file=tmp_path, block_size=32) as cache,
        erllama.load_model(
            tiny_gguf,
            cache=cache,
            process={"max_restarts": 1000},
            **OPTIONS,  # type: ignore[arg-type]
        ) as model,
    ):
        n_deaths = 0
        while n_deaths < N_DEATHS:
            prompt = "".join(dice.choice("abcdefgh ") for _ in range(dice.randrange(1, 200)))
            sampling = {"temperature": 0} if dice.random() < 0.5 else {"seed": dice.randrange(100)}
            expected = model.complete(prompt, cache_salt="undisturbed", **options, **sampling)  # type: ignore[arg-type]
            kill_at = {dice.randrange(1, 80)}
            found = interrupted(
                model, prompt, kill_at, dice.choice(SIGNALS), cache_salt="killed", **options, **sampling
            )
            n_deaths += found.restarts
            assert found.logprobs is not None
            assert expected.logprobs is not None
            if reproducible:
                assert found.tokens == expected.tokens
                assert found.logprobs == expected.logprobs
            elif found.tokens != expected.tokens:
                at = next(i for i, (a, b) in enumerate(zip(found.tokens, expected.tokens, strict=True)) if a != b)
                logprobs = dict(expected.logprobs[at].top)
                if "seed" in sampling:
                    # Another token was drawn by the same number: only if the distributions differ a little.
                    for a, b in zip(found.logprobs[at].top, expected.logprobs[at].top, strict=True):
                        assert a[1] == pytest.approx(b[1], abs=NEAR)
                else:
                    assert logprobs[found.tokens[at]] == pytest.approx(logprobs[expected.tokens[at]], abs=NEAR)
