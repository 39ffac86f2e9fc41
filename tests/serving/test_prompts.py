"""Text prompts have the BOS and EOS that the model wants exactly once, for every method."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.engine.requests.prompts import PromptTokenizer
from erllama.testing.models import BOS, write_llama
from support.paths import SHARED
from support.scripted_backend import PieceVocabulary

WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
MESSAGES = [{"role": "user", "content": "Where is Oslo?"}]


class Framed(PieceVocabulary):
    """Puts one special token before a text and one after it."""

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        ids = super().tokenize(source, parse_special=parse_special)
        first, last = self.special.values()
        return np.array([first, *ids, last], np.int32) if add_special else ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[erllama.Model]:
    path = write_llama(tmp_path_factory.mktemp("prompts") / "model.gguf")
    with erllama.Cache() as cache, erllama.load_model(path, cache=cache, n_ctx=256, n_threads=1) as model:
        yield model


def test_a_prompt_with_a_bos_gets_no_second_one(model: erllama.Model) -> None:
    bos = model.info.special_tokens["bos"].text
    text = "Where is Oslo?"
    ids = model.tokenize(text).tolist()
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    rendered = model.render_chat(MESSAGES, chat_template=WITH_BOS).rstrip("\n")
    assert rendered == bos + text
    assert model.tokenize(rendered, parse_special=True).tolist() == ids
    assert model.tokenize(rendered.encode(), parse_special=True).tolist() == ids
    parent = model.complete(text, max_tokens=1)
    prompts = [
        model.complete(rendered, max_tokens=1),
        model.complete(rendered, max_tokens=1, parent_key=parent.finish_key),
        model.complete(rendered, max_tokens=1, reproducible=True),
        model.stream(rendered, max_tokens=1).result(),
        asyncio.run(model.acomplete(rendered, max_tokens=1)),
        model.complete(model.tokenize(rendered, parse_special=True), max_tokens=1),
    ]
    for reply in prompts:
        assert list(reply.context_tokens[: len(ids)]) == ids
    assert list(model.prefill(rendered).context_tokens) == ids
    assert model.cached_prefix(rendered) == model.cached_prefix(text)
    assert model.verify(rendered, [5]) == model.verify(text, [5])
    np.testing.assert_array_equal(model.embed(rendered), model.embed(text))


def test_a_doubled_bos_is_kept(model: erllama.Model) -> None:
    bos = model.info.special_tokens["bos"].text
    ids = model.tokenize("Oslo").tolist()
    assert list(model.prefill([BOS, *ids]).context_tokens) == [BOS, *ids]
    assert list(model.prefill(f"{bos}{bos}Oslo").context_tokens) == [BOS, *ids]
    assert list(model.prefill(ids[1:]).context_tokens) == ids[1:]


def test_a_bos_in_plain_text_is_text(model: erllama.Model) -> None:
    bos = model.info.special_tokens["bos"].text
    ids = model.tokenize(f"{bos}Oslo").tolist()
    assert ids[0] == BOS
    assert BOS not in ids[1:]
    assert model.detokenize(ids) == f"{bos}Oslo"


def test_the_score_of_a_text_does_not_depend_on_the_source_of_its_bos(model: erllama.Model) -> None:
    bos = model.info.special_tokens["bos"].text
    plain, written = (model.score(text, " of Norway") for text in ("The capital", f"{bos}The capital"))
    assert written.tokens == plain.tokens
    np.testing.assert_allclose(written.logprobs, plain.logprobs, atol=1e-2)


@pytest.mark.parametrize("begun", ["", "<s>"])
@pytest.mark.parametrize("ended", ["", "</s>"])
def test_bos_and_eos_appear_once_around_a_text(begun: str, ended: str) -> None:
    vocabulary = Framed(special=["<s>", "</s>"])
    first, last = vocabulary.special.values()
    tokenizer = PromptTokenizer(vocabulary)
    assert (tokenizer.first, tokenizer.last) == ([first], [last])
    assert tokenizer.tokenize(f"{begun}ab{ended}").tolist() == [first, ord("a"), ord("b"), last]


@pytest.mark.parametrize("name", ["qwen2", "llama-bpe", "llama-spm"])
def test_a_text_without_a_bos_has_the_tokens_of_the_tokenizer(name: str) -> None:
    path = Path(SHARED / "vocab" / f"ggml-vocab-{name}.gguf")
    if not path.exists():
        pytest.skip(f"{path.name} is missing")
    with erllama.load_model(path, vocab_only=True) as model:
        bos = model.info.special_tokens.get("bos")
        for text in ["Hello", " Hello", "\n", "1 + 1 = 2", "日本🙂", "<unk>", "a</s>b"]:
            whole = model._backend.vocabulary.tokenize(text, add_special=True, parse_special=True).tolist()
            assert model.tokenize(text, parse_special=True).tolist() == whole
            if bos is not None and whole[0] == bos.id:
                assert model.tokenize(bos.text + text, parse_special=True).tolist() == whole


@pytest.mark.parametrize("method", ["complete", "stream", "prefill", "score", "scored", "infill", "chat", "embed"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    method: str, model: erllama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = model._backend.vocabulary.longest_piece  # type: ignore[attr-defined]
    assert longest == max(len(model._backend.vocabulary.piece(id)) for id in range(model.n_vocab))
    text = "7" * (longest * model.n_ctx + 1)
    call = {
        "score": lambda: model.score(text, "a"),
        "scored": lambda: model.score([5], text),
        "infill": lambda: model.infill(text, "a"),
        "chat": lambda: model.chat([{"role": "user", "content": text}]),
    }.get(method, lambda: getattr(model, method)(text))
    model.tokenize("a")
    tokenized: list[int] = []
    vocabulary = model._backend.vocabulary
    tokenize = type(vocabulary).tokenize

    def recorded(self: object, source: str | bytes, **options: bool) -> NDArray[np.int32]:
        tokenized.append(len(source))
        return tokenize(vocabulary, source, **options)

    monkeypatch.setattr(type(vocabulary), "tokenize", recorded)
    with pytest.raises(erllama.PromptTooLong, match=r"bytes, which are \d+ tokens at least"):
        call()
    assert max(tokenized, default=0) < 100


def test_too_many_tools_are_refused_before_their_grammar_is_built(
    model: erllama.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a grammar was made")

    monkeypatch.setattr("erllama.chat.family.Family.constrain_calls", refused)
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(1000)]
    with pytest.raises(erllama.PromptTooLong):
        model.chat(MESSAGES, tools=tools, chat_template="{{ tools | tojson }}<tool_call>{{ messages[0].content }}")


@pytest.mark.parametrize("text", ["a" * 255, "é" * 100, "🙂" * 60])
def test_a_text_that_may_fit_is_tokenized(text: str, model: erllama.Model) -> None:
    assert len(model.prefill(text).context_tokens) == 1 + len(text.encode())
