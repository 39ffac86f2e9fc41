"""Speculation: fewer decodes, and exactly the reply that the model gives without it."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.engine.backends.stub import EOG, StubBackend
from erllama.engine.speculation import DecodeCosts, NgramDrafter, Speculator
from erllama.testing.models import LlamaShape, write_llama
from erllama.testing.scripted import write_scripted
from support.examples import examples

N_PROMPTS = int(os.environ.get("ERLLAMA_SPECULATION", "10"))


@pytest.fixture(autouse=True)
def always_paying(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stub, one more row costs as much as a decode, so no token would ever be drafted."""
    monkeypatch.setattr(DecodeCosts, "ratio", lambda self, n_rows, more: 1.0)


def stub(**sizes: int) -> erllama.Model:
    return erllama.load_backend(StubBackend(**sizes), cache=erllama.Cache(block_size=32))  # type: ignore[arg-type]


def oracle(reply: Sequence[int], n_prompt: int, lies: Sequence[bool]) -> erllama.Drafter:
    """A drafter that knows the reply and proposes some wrong tokens."""

    def draft(tokens: NDArray[np.int32], n_max: int) -> Sequence[int]:
        at = len(tokens) - n_prompt
        truth = list(reply[at : at + n_max])
        return [(t + 1) % EOG if lies[(at + i) % len(lies)] else t for i, t in enumerate(truth)]

    return draft


OPTIONS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 60), "seed": st.integers(0, 99), "temperature": st.sampled_from([0.0, 0.8, 2.0])},
    optional={
        "logprobs": st.just(2),
        "stop": st.sampled_from(["a", "e\x00"]),
        "repeat_penalty": st.just(1.3),
        "mirostat": st.just(2),
        "regex": st.sampled_from(["[a-c]*", "(abc|x[0-9]{3})*"]),
        "logit_bias": st.just({EOG: 3.0}),
    },
).filter(lambda options: not ("mirostat" in options and options["temperature"] == 0.0))


@settings(max_examples=examples(35), deadline=None)
@given(
    st.text("abc ", min_size=1, max_size=80), OPTIONS, st.lists(st.booleans(), min_size=1, max_size=5), st.data()
)
def test_speculation_does_not_change_a_reply(
    prompt: str, options: dict[str, object], lies: list[bool], data: st.DataObject
) -> None:
    with stub() as plain, stub() as model:
        expected = plain.complete(prompt, **options)  # type: ignore[arg-type]
        drafter = data.draw(st.sampled_from(["ngram", oracle(expected.tokens, len(prompt), lies)]))
        stream = model.stream(prompt, speculative=drafter, **options)  # type: ignore[arg-type]
        deltas = [event for event in stream if isinstance(event, erllama.TextDelta)]
        reply = stream.result()
        assert (reply.text, reply.tokens, reply.finish_reason) == (
            expected.text,
            expected.tokens,
            expected.finish_reason,
        )
        assert "".join(delta.text for delta in deltas) == reply.text
        assert reply.logprobs == expected.logprobs
        assert (reply.stop_sequence, reply.sampling_state) == (expected.stop_sequence, expected.sampling_state)
        # Rejected drafts are neither in the context nor in the saved blocks.
        more = {"max_tokens": 20, "temperature": 0.0}
        for context in (reply.context_tokens, reply.context_tokens[: len(prompt) + 5]):
            assert model.complete(context, **more).tokens == plain.complete(context, **more).tokens


def test_many_requests_speculate_together() -> None:
    prompts = [f"{i} abcabcabc" for i in range(6)]
    with stub() as plain, stub(n_sequences=8) as model:
        expected = [plain.complete(prompt, max_tokens=50, seed=i).tokens for i, prompt in enumerate(prompts)]

        async def ask() -> list[erllama.Completion]:
            asked = [
                model.acomplete(
                    prompt,
                    max_tokens=50,
                    seed=i,
                    speculative=oracle(expected[i], len(prompt), [False, False, True]) if i % 2 else None,
                )
                for i, prompt in enumerate(prompts)
            ]
            return list(await asyncio.gather(*asked))

        replies = asyncio.run(ask())
        assert [reply.tokens for reply in replies] == expected
        assert [reply.drafts is not None and reply.drafts.accepted > 0 for reply in replies] == [False, True] * 3
        assert model.metrics.accepted_tokens == sum(reply.drafts.accepted for reply in replies if reply.drafts)
        assert model.metrics.drafted_tokens == sum(reply.drafts.drafted for reply in replies if reply.drafts)


def test_full_cells_disable_drafts_without_loss() -> None:
    prompts = [f"{i}" * 20 for i in range(6)]
    with stub() as plain, stub(n_ctx=160, n_sequences=8) as model:
        expected = [plain.complete(prompt, max_tokens=60, seed=1).tokens for prompt in prompts]

        async def ask() -> list[erllama.Completion]:
            drafters = [oracle(reply, 20, [False]) for reply in expected]
            asked = zip(prompts, drafters, strict=True)
            return list(
                await asyncio.gather(*(model.acomplete(p, max_tokens=60, seed=1, speculative=d) for p, d in asked))
            )

        assert [reply.tokens for reply in asyncio.run(ask())] == expected


def test_repetitive_text_takes_few_decodes(tmp_path: Path) -> None:
    # A model that counts in letters without end: each token determines the next.
    letters = "abcdefghijklmnop"
    follows = dict(zip(letters, letters[1:] + letters[0], strict=True))
    with erllama.load_model(
        write_scripted(tmp_path / "model.gguf", follows), cache=erllama.Cache(), n_threads=1
    ) as model:
        plain = model.complete(letters * 2, max_tokens=200, temperature=0.0)
        before = model.metrics.ticks
        reply = model.complete(letters * 2, max_tokens=200, temperature=0.0, speculative="ngram")
        assert reply.text == plain.text
        assert reply.drafts is not None
        assert reply.drafts.accepted > 150
        assert (model.metrics.ticks - before) * 4 < len(reply.tokens)


@pytest.fixture(scope="module")
def random_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = LlamaShape(n_layer=2, n_embd=64, n_ff=128, n_head=2, n_head_kv=1, n_vocab=300)
    return write_llama(tmp_path_factory.mktemp("models") / "random.gguf", shape, seed=5)


@pytest.mark.parametrize("flash_attn", [False, True])
def test_greedy_replies_on_libllama_are_unchanged(random_gguf: Path, flash_attn: bool) -> None:
    """Equal to the token, except for near-ties: the order of sums depends on the number of rows of a batch.

    Flash attention sums in half precision. Without it and with K and V in single precision, the ties are far
    narrower. With K and V in half precision, some processors sum in it, too.
    """
    random = np.random.default_rng(1)
    kind = "f16" if flash_attn else "f32"
    sizes = {"n_ctx": 1024, "flash_attn": flash_attn, "kv_type_k": kind, "kv_type_v": kind, "n_threads": 1}
    with (
        erllama.load_model(random_gguf, cache=erllama.Cache(), **sizes) as plain,  # type: ignore[arg-type]
        erllama.load_model(random_gguf, cache=erllama.Cache(), **sizes) as model,  # type: ignore[arg-type]
    ):
        drafted = accepted = 0
        for _ in range(N_PROMPTS):
            prompt = random.integers(3, 259, random.integers(1, 40)).tolist() * int(random.integers(1, 3))
            expected = plain.complete(prompt, max_tokens=40, temperature=0.0, logprobs=2)
            lies = (random.random(7) < 0.3).tolist()
            for drafter in ("ngram", oracle(expected.tokens, len(prompt), lies)):
                reply = model.complete(prompt, max_tokens=40, temperature=0.0, speculative=drafter)
                assert reply.tokens == expected.tokens or tied(reply, expected, 0.05 if flash_attn else 0.001)
                assert reply.drafts is not None
                drafted, accepted = drafted + reply.drafts.drafted, accepted + reply.drafts.accepted
        assert drafted > accepted > N_PROMPTS


def tied(reply: erllama.Completion, expected: erllama.Completion, most: float) -> bool:
    """Return whether two replies diverge where the log-probabilities of two tokens differed by less than `most`."""
    pairs = zip(reply.tokens, expected.tokens, strict=False)
    at = next((i for i, (token, other) in enumerate(pairs) if token != other), None)
    if at is None or expected.logprobs is None:
        return False  # one reply ends, and its end token has no logprob
    (_, first), (_, second) = expected.logprobs[at].top
    return first - second < most


def test_speculative_draws_follow_the_models_distribution() -> None:
    """The distribution of tokens drawn after accepted drafts, by Pearson's chi-squared test."""
    options = {"temperature": 0.4, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    with stub() as model:
        one, two = model.complete("Q", max_tokens=2, temperature=0.0).tokens
        found = model.complete([ord("Q"), one, two], max_tokens=1, temperature=0.0, logprobs=100).logprobs
        assert found is not None
        weights = {token: np.exp(logprob / 0.4) for token, logprob in found[0].top}
        likely = sorted(weights, key=lambda token: -weights[token])[:4]
        counts: Counter[int] = Counter()
        for seed in range(1500):
            reply = model.complete(
                "Q",
                max_tokens=3,
                seed=seed,
                speculative=lambda tokens, n_max: [two],
                **options,  # type: ignore[arg-type]
            )
            if reply.tokens[:2] == (one, two):
                assert reply.drafts is not None
                assert reply.drafts.accepted
                counts[reply.tokens[2] if len(reply.tokens) > 2 else EOG] += 1
        n = sum(counts.values())
        assert n > 150
        expected = {token: n * weights[token] / sum(weights.values()) for token in likely}
        statistic = sum((counts[token] - mean) ** 2 / mean for token, mean in expected.items())
        rest = n - sum(expected.values())
        statistic += (n - sum(counts[token] for token in likely) - rest) ** 2 / rest
        assert statistic < 18.5, "beyond the 0.999 quantile of 4 degrees of freedom"


@pytest.mark.parametrize(
    "drafter",
    [
        lambda tokens, n_max: 1 / 0,
        lambda tokens, n_max: [-1],
        lambda tokens, n_max: [EOG + 1],
        lambda tokens, n_max: ["a"],
        lambda tokens, n_max: None,
        lambda tokens, n_max: [1] * 1000,
    ],
)
def test_a_failing_drafter_disables_only_speculation(drafter: erllama.Drafter) -> None:
    with stub() as model:
        expected = model.complete("Q", max_tokens=20, seed=1)
        assert model.complete("Q", max_tokens=20, seed=1, speculative=drafter).tokens == expected.tokens


def test_a_second_model_can_draft(random_gguf: Path) -> None:
    with (
        erllama.load_model(random_gguf, cache=erllama.Cache(), n_ctx=512, n_threads=1) as draft,
        erllama.load_model(random_gguf, cache=erllama.Cache(), n_ctx=512, n_threads=1) as model,
    ):
        expected = model.complete("hello", max_tokens=40, temperature=0.0)
        reply = model.complete("hello", max_tokens=40, temperature=0.0, speculative=draft)
        assert reply.tokens == expected.tokens
        assert reply.drafts is not None
        assert reply.drafts.accepted > 20, "both are the same model"
        draft.unload()
        assert model.complete("hello", max_tokens=40, temperature=0.0, speculative=draft).tokens == expected.tokens


def test_proposals_are_accepted_while_the_model_agrees() -> None:
    with stub() as model:
        tokens = model.draft("abc", 6)
        assert tokens == list(model.complete("abc", max_tokens=6, temperature=0.0).tokens)
        following = model.draft("abc", 7)[6]
        assert model.verify("abc", tokens) == erllama.Verification(6, following, end=False)
        wrong = [*tokens[:3], (tokens[3] + 1) % 256, *tokens[4:]]
        assert model.verify("abc", wrong) == erllama.Verification(3, tokens[3], end=False)
        assert model.verify("abc", []) == erllama.Verification(0, tokens[0], end=False)
    with stub(eog_bias=100) as model:
        assert model.draft("abc", 6) == []
        assert model.verify("abc", [1, 2]) == erllama.Verification(0, None, end=True)


def test_memory_that_cannot_be_cut_disables_speculation() -> None:
    backend = StubBackend(can_trim=False)
    with erllama.load_backend(backend, cache=erllama.Cache()) as model, stub() as plain:
        reply = model.complete("ababab", max_tokens=30, temperature=0.0, speculative="ngram")
        assert reply.drafts == erllama.Drafts(0, 0)
        assert len(reply.tokens) == len(plain.complete("ababab", max_tokens=30, temperature=0.0).tokens)


@settings(max_examples=examples(75))
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6))
def test_an_ngram_predicts_its_last_continuation(tokens: list[int], n_max: int) -> None:
    ids = np.array(tokens, np.int32)
    for n_known in (0, len(tokens) // 2):
        drafter = NgramDrafter(ids[:n_known])
        expected: Sequence[int] = ()
        for size in (4, 2):
            ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[len(tokens) - size :]]
            if len(tokens) > size and ends:
                expected = tokens[ends[-1] : ends[-1] + n_max]
                break
        assert list(drafter(ids, n_max)) == list(expected)


def test_decode_costs_are_a_linear_fit_of_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    costs = DecodeCosts()
    assert costs.ratio(1, 3) is None
    for _ in range(20):
        costs.record(1, 0.010)
    assert costs.ratio(1, 3) is None, "one batch size does not predict others"
    for n in (1, 3, 5, 1, 3, 5):
        costs.record(n, 0.008 + 0.002 * n)
    assert costs.ratio(1, 3) == pytest.approx(0.016 / 0.010)


def test_unprofitable_drafts_pause_and_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    costs = DecodeCosts()
    for n in (1, 2, 3, 4) * 5:
        costs.record(n, 0.001 * n)  # each row costs as much as the first
    speculator = Speculator(lambda tokens, n_max: [1] * n_max, 8, 10)
    tried = [bool(speculator.draft(np.zeros(n, np.int32), 8, 1, costs)) for n in range(1, 2000)]
    assert not any(tried), "it never can"
    cheap = DecodeCosts()
    for n in (1, 2, 3, 4) * 5:
        cheap.record(n, 0.010 + 0.004 * n)
    tried = []
    for n in range(1, 4000):
        drafts = speculator.draft(np.zeros(n, np.int32), 8, 1, cheap)
        if drafts:
            speculator.record(len(drafts), 0)  # never right
        tried.append(bool(drafts))
    assert 3 < sum(tried) < 400
    assert any(tried[2000:]), "it is tried again"
    for n in range(4000, 8000):
        drafts = speculator.draft(np.zeros(n, np.int32), 8, 1, cheap)
        if drafts:
            speculator.record(len(drafts), len(drafts))  # always right
    assert speculator.draft(np.zeros(8000, np.int32), 8, 1, cheap) == [1] * 8


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"speculative": "bigram"}, "ngram"),
        ({"speculative": 7}, "ngram"),
        ({"speculative": "ngram", "speculative_tokens": 0}, "speculative_tokens=0"),
        ({"speculative": "ngram", "reproducible": True}, "reproducible"),
        ({"speculativ": "ngram"}, "did you mean 'speculative'"),
    ],
)
def test_invalid_speculation_options_are_refused(options: dict[str, object], match: str) -> None:
    with stub() as model, pytest.raises(erllama.OptionError, match=match):
        model.complete("Q", **options)  # type: ignore[arg-type]


def test_a_draft_model_of_another_vocabulary_is_refused(random_gguf: Path) -> None:
    with stub() as model, erllama.load_model(random_gguf, cache=erllama.Cache(), n_threads=1) as other:
        with pytest.raises(erllama.OptionError, match="another vocabulary"):
            other.complete("Q", speculative=model)
        with pytest.raises(erllama.OptionError, match="the model itself"):
            model.complete("Q", speculative=model)
