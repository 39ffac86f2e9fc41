"""`/v1/completions`, as the official client calls it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

import erllama
from erllama.engine import InfillTokens
from erllama.server.openai.completions import CompletionBody
from support.openai_server import Json, openai_client, without_validation
from support.scripted_backend import PieceVocabulary, ScriptedBackend

VOCABULARY = PieceVocabulary(["he", "llo"])
MARKS = ["<pre>", "<suf>", "<mid>"]


def echoing(vocabulary: PieceVocabulary, *, n_ctx: int = 4096) -> erllama.Model:
    """Load a model that continues a text with its first character, twice, and ends."""

    def next_token(tokens: list[int]) -> int:
        return tokens[0] if tokens[-2:] != [tokens[0]] * 2 else 256

    backend = ScriptedBackend(vocabulary, next_token, n_ctx=n_ctx)
    return erllama.load_backend(backend, cache=erllama.Cache())


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    """A client of a model that completes "abc" with "aa"."""
    with echoing(VOCABULARY) as model, openai_client(model) as client:
        yield client


def post(client: openai.OpenAI, body: Json) -> httpx.Response:
    return httpx.post(f"{client.base_url}completions", json={"prompt": "abc", **body}, timeout=60)


def test_a_prompt_is_a_text_or_token_ids(client: openai.OpenAI) -> None:
    for prompt in ("abc", list(b"abc")):
        reply = client.completions.create(model="any", prompt=prompt)
        assert [(choice.text, choice.finish_reason) for choice in reply.choices] == [("aa", "stop")]
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 2)


def test_several_prompts_have_choices_in_order(client: openai.OpenAI) -> None:
    for prompts in (["abc", "xyz"], [list(b"abc"), list(b"xyz")]):
        reply = client.completions.create(model="any", prompt=prompts, n=2)
        assert [choice.text for choice in reply.choices] == ["aa", "aa", "xx", "xx"]
        assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
        assert reply.usage is not None
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (6, 8)


def test_echo_puts_the_prompt_before_the_text(client: openai.OpenAI) -> None:
    for prompt in ("abc", list(b"abc")):
        assert client.completions.create(model="any", prompt=prompt, echo=True).choices[0].text == "abcaa"
        with without_validation(client) as other:
            chunks = other.completions.create(model="any", prompt=prompt, echo=True, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == "abcaa"
    assert client.completions.create(model="any", prompt="abc", echo=True, max_tokens=0).choices[0].text == "abc"


def test_logprobs_have_tokens_tops_and_offsets(client: openai.OpenAI) -> None:
    logprobs = client.completions.create(model="any", prompt="abc", logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "a"]
    assert logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == pytest.approx([0.0, 0.0], abs=1e-3)
    assert [len(top) for top in logprobs.top_logprobs or []] == [2, 2]


def test_streamed_choices_match_whole_ones(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    offsets: list[int] = []
    usage = None
    body: Json = {"stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    with without_validation(client) as other:
        chunks = list(other.completions.create(model="any", prompt=["abc", "xyz"], **body))  # type: ignore[call-overload]
    for chunk in chunks:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
            if choice.index == 0 and choice.logprobs is not None:
                offsets += choice.logprobs.text_offset or []
    assert texts == {0: "aa", 1: "xx"}
    assert reasons == {0: "stop", 1: "stop"}
    assert offsets == [0, 1]
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (6, 4)


def test_a_reply_has_sixteen_tokens_unless_told_otherwise() -> None:
    backend = ScriptedBackend(VOCABULARY, lambda tokens: ord("a"))
    with erllama.load_backend(backend, cache=erllama.Cache()) as model, openai_client(model) as client:
        reply = client.completions.create(model="any", prompt="abc")
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("a" * 16, "length")
        assert client.completions.create(model="any", prompt="abc", max_tokens=20).choices[0].text == "a" * 20
        assert post(client, {"max_tokens": 10**9, "stop": "a" * 30}).json()["choices"][0]["text"] == ""


def test_a_suffix_fills_the_gap() -> None:
    vocabulary = PieceVocabulary([], MARKS)
    prefix, suffix, middle = (vocabulary.special[mark] for mark in MARKS)
    vocabulary.infill_tokens = InfillTokens((), prefix, suffix, middle)  # type: ignore[attr-defined]

    def next_token(tokens: list[int]) -> int:
        expected = [prefix, *b"def", suffix, *b"end", middle]
        return ord("!") if tokens == expected else 256

    backend = ScriptedBackend(vocabulary, next_token)
    with erllama.load_backend(backend, cache=erllama.Cache()) as model, openai_client(model) as client:
        assert client.completions.create(model="any", prompt="def", suffix="end").choices[0].text == "!"
        with without_validation(client) as other:
            chunks = other.completions.create(model="any", prompt="def", suffix="end", stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == "!"


def test_a_suffix_needs_a_model_that_fills_gaps(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="any", prompt="def", suffix="end")
    assert raised.value.param == "suffix"
    assert "fill gaps" in raised.value.message


def test_grammars_and_schemas_constrain_a_completion(client: openai.OpenAI) -> None:
    for body in ({"grammar": 'root ::= "7"'}, {"json_schema": {"const": 7}}):
        assert post(client, dict(body)).json()["choices"][0]["text"] == "7"
    wrong = post(client, {"grammar": "root ::= ("})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_grammar")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"n": 99}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": [1, 2], "suffix": "x"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
    ],
)
def test_an_error_names_the_field(client: openai.OpenAI, body: Json, param: str) -> None:
    answer = post(client, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_nulls_are_accepted(client: openai.OpenAI) -> None:
    nulls: Json = dict.fromkeys(name for name in CompletionBody.__struct_fields__ if name != "prompt")
    assert post(client, {**nulls, "brand_new": 1}).json()["choices"][0]["text"] == "aa"
