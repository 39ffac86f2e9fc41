"""`/v1/embeddings`, as the official client calls it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

import erllama
from support.chat.scripted_model import model_replying
from support.openai_server import Json, openai_client, without_validation

TEXTS = ["one text", "another"]


@pytest.fixture
def client(tiny: erllama.Model) -> Iterator[openai.OpenAI]:
    """A client of the tiny model."""
    with openai_client(tiny) as client:
        yield client


def post(client: openai.OpenAI, body: Json) -> httpx.Response:
    return httpx.post(f"{client.base_url}embeddings", json=body, timeout=60)


def test_numbers_and_base64_are_the_models_vectors(tiny: erllama.Model, client: openai.OpenAI) -> None:
    expected = tiny.embed(TEXTS)
    as_numbers = client.embeddings.create(model="any", input=TEXTS, encoding_format="float")
    with without_validation(client) as other:
        as_base64 = other.embeddings.create(model="any", input=TEXTS)  # which it decodes
    for reply in (as_numbers, as_base64):
        assert [entry.index for entry in reply.data] == [0, 1]
        assert np.allclose([entry.embedding for entry in reply.data], expected, atol=1e-6)
    raw = post(client, {"input": TEXTS, "encoding_format": "base64"}).json()
    assert isinstance(raw["data"][0]["embedding"], str)


def test_inputs_are_texts_or_token_ids(tiny: erllama.Model, client: openai.OpenAI) -> None:
    ids = [tiny.tokenize(text, parse_special=True).tolist() for text in TEXTS]
    of_texts = client.embeddings.create(model="any", encoding_format="float", input=TEXTS)
    of_ids = client.embeddings.create(model="any", encoding_format="float", input=ids)
    assert of_texts.data == of_ids.data
    assert of_texts.usage == of_ids.usage
    assert of_texts.usage.prompt_tokens == of_texts.usage.total_tokens == sum(map(len, ids))
    for one in (TEXTS[0], ids[0]):
        alone = client.embeddings.create(model="any", encoding_format="float", input=one).data[0].embedding
        assert np.allclose(alone, of_texts.data[0].embedding, atol=1e-5)


def test_only_the_models_own_number_of_dimensions_is_taken(tiny: erllama.Model, client: openai.OpenAI) -> None:
    n = tiny.info.n_embd
    assert (
        len(
            client.embeddings.create(model="any", encoding_format="float", input="x", dimensions=n)
            .data[0]
            .embedding
        )
        == n
    )
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model="any", encoding_format="float", input="x", dimensions=n - 1)
    assert raised.value.param == "dimensions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [["a"]]}, "input[0]"),
        ({"input": ["a", [None]]}, "input[1]"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_an_error_names_the_field(client: openai.OpenAI, body: Json, param: str) -> None:
    answer = post(client, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_inputs_are_texts_tokens_or_both(client: openai.OpenAI) -> None:
    answer = post(client, {"input": ["x", "", [5, 6], [5, "x"]]})
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 4


def test_a_text_that_is_too_long_has_both_numbers(client: openai.OpenAI) -> None:
    error = post(client, {"input": "word " * 20_000}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["n_prompt_tokens"] > error["n_ctx"] > 0


def test_a_model_that_cannot_embed_says_so() -> None:
    with model_replying("x") as model, openai_client(model) as client:
        answer = post(client, {"input": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (501, "unsupported")
