"""Scores and infill: log-probabilities equal a direct computation, use the cache, and run beside replies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.engine import Batch
from erllama.engine.backends.llama import LlamaBackend
from erllama.engine.backends.stub import StubBackend
from erllama.testing.models import write_gemma3, write_lfm2, write_mamba
from erllama.testing.scripted import write_scripted
from support.recording_backend import RecordingBackend, llama_backend, short_of_cells

PROMPT = "Once upon a time " * 8
EXACT: dict[str, object] = {"kv_type_k": "f32", "kv_type_v": "f32", "flash_attn": False}


def directly(
    backend: LlamaBackend | StubBackend, prompt: NDArray[np.int32], after: NDArray[np.int32]
) -> list[float]:
    """Return the log-probabilities of `after`, by one decode per token in an empty context."""
    logprobs = []
    backend.clear()
    tokens = np.concatenate([prompt, after]).astype(np.int32)
    for at in range(len(tokens) - 1):
        row = [np.array([value], np.int32) for value in (tokens[at], at, 0)]
        logits = backend.decode(Batch(*row, np.ones(1, np.int8)))[0].astype(np.float64)
        if at >= len(prompt) - 1:
            top = logits.max()
            logprobs.append(float(logits[tokens[at + 1]] - top - np.log(np.exp(logits - top).sum())))
    backend.clear()
    return logprobs


@pytest.fixture
def backend(tiny_gguf: Path) -> LlamaBackend:
    return llama_backend(tiny_gguf, **EXACT, n_sequences=5)


@pytest.fixture
def model(backend: LlamaBackend) -> Iterator[erllama.Model]:
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as found:
        yield found


@pytest.mark.parametrize("continuation", [" there was", "x", "a longer one " * 30])
def test_a_score_matches_a_direct_computation(
    continuation: str, backend: LlamaBackend, model: erllama.Model
) -> None:
    prompt, after = model.tokenize(PROMPT), model.tokenize(continuation, add_special=False)
    model.evict()
    expected = directly(backend, prompt, after)
    for given in (
        (PROMPT, continuation),
        (prompt, after),
        (PROMPT, after.tolist()),
        (prompt.tolist(), continuation),
    ):
        score = model.score(*given)
        assert score.tokens == tuple(after.tolist())
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-3)
        assert score.logprob == pytest.approx(sum(score.logprobs))
    for _ in range(2):
        score = model.score(PROMPT, continuation, reproducible=True)
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-3)
    assert model.score(PROMPT, continuation, reproducible=True).logprobs == score.logprobs, "to the bit"


def test_a_score_matches_the_logprobs_of_the_reply(model: erllama.Model) -> None:
    reply = model.complete(PROMPT, max_tokens=20, temperature=0, logprobs=0)
    assert reply.logprobs is not None
    score = model.score(model.tokenize(PROMPT), reply.tokens)
    assert score.is_greedy
    np.testing.assert_allclose(score.logprobs, [entry.logprob for entry in reply.logprobs], atol=1e-3)
    likely = list(reply.tokens)
    likely[7] = (likely[7] + 1) % 250 + 3
    assert not model.score(model.tokenize(PROMPT), likely).is_greedy


def test_cached_tokens_of_a_scored_prompt_are_not_computed_again(tiny_gguf: Path) -> None:
    backend = RecordingBackend(llama_backend(tiny_gguf, **EXACT))
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        n = len(model.tokenize(PROMPT))
        assert model.score(PROMPT, "abc").cache.kind == "cold"
        for continuation in ("abc", "xyz", "abcdef"):
            backend.forget()
            score = model.score(PROMPT, continuation)
            assert (score.cache.kind, score.cache.tokens) == ("exact", n - 1)
            assert (backend.slices[0][0], backend.slices[-1][1]) == (n - 1, n + len(continuation))
            assert len(backend.slices) <= 2, "the last token of a prompt is a slice of its own"
            assert len(backend.logits) == len(continuation)
        model.evict()
        backend.forget()
        assert model.score(PROMPT, "abc").cache.tokens == n - 1, "the result from the cache equals that from cells"
        assert backend.slices[0][0] == n - 1
        assert model.complete(PROMPT + "abcdef", max_tokens=1).cache.tokens >= n + 5, "its KV stays available"


def test_a_long_continuation_is_scored_in_small_batches(tiny_gguf: Path) -> None:
    backend = RecordingBackend(llama_backend(tiny_gguf, **EXACT))
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        score = model.score("a", "b" * 500)
        assert len(score.logprobs) == len(backend.logits) == 500
        assert max(end - start for start, end in backend.slices) <= 66
        assert len(backend.slices) <= 10


def test_scores_and_replies_run_concurrently(model: erllama.Model) -> None:
    endings = [f"{n} ended" * (n + 1) for n in range(12)]
    expected = [model.score(PROMPT, ending).logprobs for ending in endings]
    reply = model.complete("Other", max_tokens=100, seed=3, banned_tokens=[2])
    model.evict()
    with ThreadPoolExecutor(8) as pool:
        other = pool.submit(model.complete, "Other", max_tokens=100, seed=3, banned_tokens=[2])
        found = [each.logprobs for each in pool.map(lambda ending: model.score(PROMPT, ending), endings)]
        assert other.result().text == reply.text
    for one, another in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, another, atol=1e-3)

    async def ask() -> list[erllama.Score]:
        return list(await asyncio.gather(*(model.ascore(PROMPT, ending) for ending in endings)))

    for score, another in zip(asyncio.run(ask()), expected, strict=True):
        np.testing.assert_allclose(score.logprobs, another, atol=1e-3)


@pytest.mark.parametrize("at", [2, 4])
def test_a_restarted_score_reports_each_token_once(at: int) -> None:
    inner = StubBackend()
    expected = directly(inner, *(inner.vocabulary.tokenize(text) for text in ("prompt", "y" * 300)))
    backend = RecordingBackend(inner)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model, short_of_cells(backend, at):
        score = model.score("prompt", "y" * 300)
    np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
    assert len(backend.logits) == 300


@pytest.mark.parametrize("write", [write_gemma3, write_mamba, write_lfm2])
def test_models_with_memory_that_cannot_be_cut_score(write: type[write_gemma3], tmp_path: Path) -> None:
    backend = llama_backend(write(tmp_path / "model.gguf"), **EXACT)
    with erllama.Cache() as cache, erllama.load_backend(backend, cache=cache) as model:
        prompt, after = model.tokenize(PROMPT * 3), model.tokenize("there was", add_special=False)
        first = model.score(prompt, after)
        again = model.score(prompt, after)
        assert again.cache.tokens > 0
        model.evict()
        expected = directly(backend, prompt, after)
    np.testing.assert_allclose(first.logprobs, expected, atol=1e-2)
    np.testing.assert_allclose(again.logprobs, expected, atol=1e-2)


def test_a_scored_text_is_tokenized_as_a_whole(tmp_path: Path) -> None:
    path = write_scripted(tmp_path / "words.gguf", {}, words=["hello", "world"])
    with erllama.load_model(path, n_ctx=256, n_threads=1) as model:
        whole = model.tokenize("say hello").tolist()
        for cut, n in {"say ": 1, "say hel": 1, "say": 2}.items():
            score = model.score(cut, "say hello".removeprefix(cut))
            assert list(score.tokens) == whole[len(whole) - n :], cut
        with pytest.raises(erllama.PromptError, match="one token of the prompt and what follows"):
            model.score("hel", "lo")
        assert len(model.score(model.tokenize("hel"), "lo").tokens) == 2


def test_score_arguments_are_checked(model: erllama.Model) -> None:
    for prompt, continuation, error, says in [
        ("", "a", erllama.PromptError, "the prompt is empty"),
        ("a", "", erllama.PromptError, "the continuation is empty"),
        ("a", [], erllama.PromptError, "empty"),
        ("a", [320], erllama.PromptError, "token id 320"),
        ([999], "a", erllama.PromptError, "token id 999"),
        ("a", 3, erllama.PromptError, "3 is neither text"),
        ("a", "b" * 2000, erllama.PromptTooLong, "2002 tokens and the context holds 1024"),
        ([5] * 1000, [5] * 100, erllama.PromptTooLong, "1100 tokens and the context holds 1024"),
    ]:
        with pytest.raises(error, match=says):
            model.score(prompt, continuation)  # type: ignore[arg-type]
    with pytest.raises(erllama.OptionError, match="score has no option 'temperature'"):
        model.score("a", "b", temperature=1)  # type: ignore[call-arg]
    with pytest.raises(erllama.DeadlineExceeded):
        model.score("a", "b", timeout=0)
    full = model.score([5], [5] * 1023)
    assert len(full.logprobs) == 1023
    model.unload()
    with pytest.raises(erllama.ModelUnloaded):
        model.score("a", "b")


# --- gaps ---------------------------------------------------------------------------------------

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture
def coder(tmp_path: Path) -> Iterator[erllama.Model]:
    follows = {"<|fim_middle|>": "return", "return": " ", " ": "1", "1": "</s>"}
    path = write_scripted(tmp_path / "coder.gguf", follows, words=["return"], special=MARKS)
    with erllama.load_model(path, n_ctx=256, n_threads=1) as model:
        yield model


def test_infill_uses_both_sides_of_a_gap(coder: erllama.Model) -> None:
    marks = [coder.tokenize(mark, add_special=False, parse_special=True).tolist() for mark in MARKS]
    assert [len(mark) for mark in marks] == [1, 1, 1]
    before, after = (coder.tokenize(text, add_special=False).tolist() for text in ("def f(): ", "<|fim_middle|>\n"))
    reply = coder.infill("def f(): ", "<|fim_middle|>\n", temperature=0)
    assert reply.text == "return 1"
    prompt = [*marks[0], *before, *marks[1], *after, *marks[2]]
    assert list(reply.context_tokens) == [*prompt, *reply.tokens], "a marker spelled in a text is text"
    assert coder.infill("def", "", max_tokens=1, temperature=0).text == "return"
    streamed = list(coder.stream_infill("def f(): ", "", temperature=0))
    assert "".join(event.text for event in streamed if isinstance(event, erllama.TextDelta)) == "return 1"

    async def ask() -> None:
        assert (await coder.ainfill("", "end", temperature=0)).text == "return 1"
        events = [event async for event in coder.astream_infill("", "end", temperature=0)]
        assert isinstance(events[-1], erllama.Done)
        assert events[-1].completion.text == "return 1"

    asyncio.run(ask())


def test_infill_arguments_are_checked(coder: erllama.Model, model: erllama.Model) -> None:
    with pytest.raises(erllama.Unsupported, match=r"cannot fill gaps: its vocabulary has no tokens .*\(FIM\)"):
        model.infill("a", "b")
    for prefix, suffix, says in [
        ("", "", "prefix and suffix are empty"),
        (3, "a", "prefix=3"),
        ("a", b"b", "suffix="),
    ]:
        with pytest.raises(erllama.PromptError, match=says):
            coder.infill(prefix, suffix)  # type: ignore[arg-type]
    with pytest.raises(erllama.OptionError, match="did you mean 'temperature'"):
        coder.infill("a", "b", temperatur=1)  # type: ignore[call-arg]
    with pytest.raises(erllama.PromptTooLong):
        coder.infill("a" * 300, "b")
    with erllama.load_backend(StubBackend()) as stub, pytest.raises(erllama.Unsupported):
        stub.infill("a", "b")
