"""Replies end at stop tokens: special tokens given as text, and any token given by its id."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import erllama
from erllama.testing.models import EOS, write_llama
from support.scripted_backend import EOG, PieceVocabulary, ScriptedBackend

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '\t' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\t{% endif %}"
)
VOCABULARY = PieceVocabulary(["hello"], ["<|user|>", "<|assistant|>", "<|system|>"])
USER = VOCABULARY.special["<|user|>"]
SAID = [*b"hi th", USER, *b"ere"]


def model_replying(tokens: Sequence[int] = SAID) -> erllama.Model:
    backend = ScriptedBackend(VOCABULARY, tokens, chat_templates={"default": TEMPLATE})
    return erllama.load_backend(backend, cache=erllama.Cache(), policy={"min_tokens": 1, "cold_min_tokens": 1})


@pytest.mark.parametrize("stop", [{"stop": "<|user|>"}, {"stop": ["x", "<|user|>"]}, {"stop_token_ids": [USER]}])
def test_a_reply_ends_at_a_special_token(stop: dict[str, object]) -> None:
    messages = [{"role": "user", "content": "Q"}]
    with model_replying() as model:
        stream, chat = model.stream("\t", **stop), model.stream_chat(messages, **stop)  # type: ignore[arg-type]
        replies = [
            model.complete("\t", **stop),  # type: ignore[arg-type]
            asyncio.run(model.acomplete("\t", **stop)),  # type: ignore[arg-type]
            model.chat(messages, **stop),  # type: ignore[arg-type]
        ]
        for read in (stream, chat):
            events = list(read)
            assert "".join(event.text for event in events if isinstance(event, erllama.TextDelta)) == "hi th"
            replies.append(read.result())
        for reply in replies:
            assert (reply.text, reply.finish_reason) == ("hi th", "stop")
            assert (reply.stop_sequence, reply.stop_token) == ("<|user|>", USER)
            assert reply.tokens == (*b"hi th", USER)


def test_concurrent_streams_end_at_their_own_stop_tokens() -> None:
    stops = [{"stop": "<|user|>"}, {"stop_token_ids": [ord("t")]}, {}, {"stop": "<|system|>"}] * 2
    with model_replying() as model, ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda stop: model.stream("\t", **stop).result().text, stops))
    assert texts == ["hi th", "hi ", "hi there", "hi there"] * 2


@pytest.mark.parametrize("token", b"hit")
def test_a_text_token_can_be_a_stop_token(token: int) -> None:
    with model_replying() as model:
        reply = model.complete("\t", stop_token_ids=[token], logprobs=0)
        n = bytes(SAID[:5]).index(token)
        assert reply.text == "hi th"[:n]
        assert reply.tokens == tuple(SAID[: n + 1])
        assert (reply.stop_sequence, reply.stop_token) == (chr(token), token)
        assert reply.logprobs is not None
        assert len(reply.logprobs) == n + 1


def test_the_first_stop_by_position_wins() -> None:
    with model_replying() as model:
        early = model.complete("\t", stop=["<|user|>", "i t"])
        assert (early.text, early.stop_sequence, early.stop_token) == ("h", "i t", None)
        late = model.complete("\t", stop=["<|user|>", "there"])
        assert (late.text, late.stop_sequence, late.stop_token) == ("hi th", "<|user|>", USER)


def test_an_end_token_passed_as_stop_token_is_reported() -> None:
    with model_replying(b"hi") as model:
        reply = model.chat([{"role": "user", "content": "Q"}], stop="<|end|>")
        assert (reply.text, reply.tokens) == ("hi", tuple(b"hi"))
        assert (reply.stop_sequence, reply.stop_token) == ("<|end|>", EOG)
        assert model.complete("\t").stop_token is None


def test_a_conversation_continues_without_the_stop_token() -> None:
    with model_replying() as model:
        question = {"role": "user", "content": "Q"}
        first = model.chat([question], stop_token_ids=[USER])
        again = model.chat([question, first.message, question], stop_token_ids=[USER])
        n = first.usage.prompt + len(b"hi th")
        assert again.context_tokens[:n] == first.context_tokens[:n]
        assert again.usage.cached >= n - 1


@pytest.mark.parametrize("given", ["12", 12, None, [1.5], ["a"], [-1], [VOCABULARY.n_tokens], [True], {1: 2}])
def test_stop_tokens_are_checked(given: object) -> None:
    with model_replying() as model:
        for call in (model.complete, model.stream, model.chat):
            prompt = [{"role": "user", "content": "Q"}] if call == model.chat else "\t"
            with pytest.raises(erllama.OptionError, match="stop_token_ids"):
                call(prompt, stop_token_ids=given)  # type: ignore[operator]


def test_a_real_tokenizer_names_its_special_tokens(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "model.gguf")
    with erllama.load_model(path, cache=erllama.Cache(), n_ctx=256, n_threads=1) as model:
        bos = model.info.special_tokens["bos"]
        reply = model.complete("a", stop=bos.text, logit_bias={bos.id: 1000.0})
        assert (reply.tokens, reply.text, reply.stop_sequence) == ((bos.id,), "", bos.text)
        ended = model.complete("a", stop_token_ids=[EOS], logit_bias={EOS: 1000.0})
        assert (ended.tokens, ended.stop_token) == ((), EOS)
