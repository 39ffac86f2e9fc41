"""llama-server's endpoints for embeddings and rankings, and for filling gaps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from support.llama_server import client_of, events, post, refused

import erllama
from erllama.server import ServedModel
from erllama.testing.bert import write_bert
from scripts.llama_server_tests.stand_ins import write_stories


def load(path: Path) -> Iterator[erllama.Model]:
    with erllama.Cache() as cache, erllama.load_model(path, cache=cache, n_ctx=1024, n_threads=1) as model:
        yield model


@pytest.fixture
def encoder(tmp_path: Path) -> Iterator[erllama.Model]:
    yield from load(write_bert(tmp_path / "mean.gguf"))


@pytest.fixture
def ranker(tmp_path: Path) -> Iterator[erllama.Model]:
    yield from load(write_bert(tmp_path / "rank.gguf", pooling="rank"))


@pytest.fixture
def editor(tmp_path: Path) -> Iterator[erllama.Model]:
    yield from load(write_stories(tmp_path / "gaps.gguf", fills_gaps=True))


# --- embeddings


@pytest.mark.parametrize("path", ["/embedding", "/embeddings"])
def test_each_text_has_its_vector(encoder: erllama.Model, path: str) -> None:
    texts = ["one", "two words"]
    with client_of(encoder) as client:
        answer = post(client, path, content=texts)
        single = post(client, path, input="one")
    assert [each["index"] for each in answer] == [0, 1]
    np.testing.assert_allclose([each["embedding"][0] for each in answer], encoder.embed(texts), rtol=1e-5)
    assert single[0]["embedding"][0] == pytest.approx(answer[0]["embedding"][0])


def test_vectors_keep_their_length_on_request(encoder: erllama.Model) -> None:
    with client_of(encoder) as client:
        answer = post(client, "/embedding", content="one", embd_normalize=-1)
        assert refused(client, "/embedding", content="one", embd_normalize=0)["param"] == "embd_normalize"
    np.testing.assert_allclose(answer[0]["embedding"], encoder.embed("one", normalize=False), rtol=1e-5)


def test_without_pooling_each_token_has_a_vector(encoder: erllama.Model) -> None:
    with client_of(ServedModel(encoder, pooling="none")) as client:
        answer = post(client, "/embedding", content="abc")
    assert len(answer[0]["embedding"]) == len(encoder.tokenize("abc"))


@pytest.mark.parametrize("content", [None, 1.5, [], [[]], "x" * 2000])
def test_wrong_texts_are_refused(encoder: erllama.Model, content: object) -> None:
    with client_of(encoder) as client:
        assert refused(client, "/embedding", content=content)["code"] == 400


def test_embeddings_count_as_prompts(encoder: erllama.Model) -> None:
    with client_of(encoder) as client:
        post(client, "/embedding", content="abc")
        lines = client.get("/metrics").text.splitlines()
    assert f"llamacpp:prompt_tokens_total {len(encoder.tokenize('abc'))}" in lines
    assert "llamacpp:n_decode_total 1" in lines
    assert "llamacpp:tokens_predicted_total 0" in lines


# --- rankings

DOCUMENTS = ["first", "the second one", "3"]


@pytest.mark.parametrize("path", ["/rerank", "/reranking", "/v1/rerank", "/v1/reranking"])
def test_documents_come_best_first(ranker: erllama.Model, path: str) -> None:
    with client_of(ranker) as client:
        answer = post(client, path, query="what", documents=DOCUMENTS)
    scores = ranker.rerank("what", DOCUMENTS)
    found = [(each["index"], each["relevance_score"]) for each in answer["results"]]
    assert [index for index, _ in found] == np.argsort(-scores).tolist()
    assert [score for _, score in found] == pytest.approx(sorted(scores.tolist(), reverse=True))
    pair = 3 + len(ranker.tokenize("what", add_special=False))
    n_tokens = sum(pair + len(ranker.tokenize(each, add_special=False)) for each in DOCUMENTS)
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert answer["model"] == ranker.id


@pytest.mark.parametrize(("top_n", "n"), [(None, 3), (2, 2), (0, 0), (99, 3)])
def test_answer_has_at_most_top_n_documents(ranker: erllama.Model, top_n: int | None, n: int) -> None:
    with client_of(ranker) as client:
        assert len(post(client, "/rerank", query="q", documents=DOCUMENTS, top_n=top_n)["results"]) == n


def test_texts_have_the_answer_of_text_embeddings_inference(ranker: erllama.Model) -> None:
    with client_of(ranker) as client:
        answer = post(client, "/rerank", query="q", texts=DOCUMENTS, return_text=True)
        objects = [{"text": each} for each in DOCUMENTS]
        jina = post(client, "/rerank", query="q", documents=objects, return_documents=True)["results"]
    assert [each["text"] for each in answer] == [DOCUMENTS[each["index"]] for each in answer]
    assert [each["score"] for each in answer] == [each["relevance_score"] for each in jina]
    assert [each["document"]["text"] for each in jina] == [each["text"] for each in answer]


@pytest.mark.parametrize("documents", [[], None, 123, [1, 2, 3]])
def test_wrong_documents_are_refused(ranker: erllama.Model, documents: object) -> None:
    with client_of(ranker) as client:
        assert refused(client, "/rerank", query="q", documents=documents)["code"] == 400


def test_models_that_do_not_rank_or_embed_say_so(encoder: erllama.Model, tiny: erllama.Model) -> None:
    with client_of(encoder) as client:
        assert refused(client, "/rerank", query="q", documents=DOCUMENTS)["type"] == "not_supported_error"
        assert refused(client, "/completion", prompt="x")["type"] == "not_supported_error"


# --- gaps


def prompt_of(client: TestClient, **body: object) -> str:
    answer = post(client, "/infill", n_predict=4, response_fields=["prompt"], **body)
    return str(answer["prompt"])


def test_gap_lies_between_prefix_and_suffix(editor: erllama.Model) -> None:
    with client_of(editor) as client:
        prompt = prompt_of(client, input_prefix="before", input_suffix="after", prompt="begun")
        assert post(client, "/infill", input_prefix="a", input_suffix="b", n_predict=8)["content"]
        assert events(client, "/infill", input_prefix="a", input_suffix="b", n_predict=8)[-1]["stop"]
    at = [prompt.index(text) for text in ("<fim_prefix>", "before", "begun", "<fim_suffix>", "after", "<fim_middle>")]
    assert at == sorted(at)


def test_other_files_come_first_by_name(editor: erllama.Model) -> None:
    extra = [{"text": "int f();", "filename": "f.h"}, {"text": "int g();"}]
    with client_of(editor) as client:
        prompt = prompt_of(client, input_prefix="before", input_suffix="", input_extra=extra)
    at = [prompt.index(text) for text in ("f.h", "int f();", "int g();", "<fim_prefix>", "before")]
    assert at == sorted(at)


def test_texts_that_are_too_long_are_cut_far_from_the_gap(editor: erllama.Model) -> None:
    body = {"input_prefix": "p" * 3000 + "NEAR", "input_suffix": "NEXT" + "s" * 3000}
    with client_of(editor) as client:
        answer = post(client, "/infill", n_predict=4, input_extra=[{"text": "e" * 3000}], **body)
    assert answer["tokens_evaluated"] + 4 <= editor.n_ctx
    assert "NEAR<fim_suffix>" in answer["prompt"].replace("<fim_suffix> ", "<fim_suffix>")
    assert "NEXT" in answer["prompt"]


@pytest.mark.parametrize("extra", [{}, {"filename": "ok"}, {"filename": 123, "text": "abc"}, {"text": 456}])
def test_wrong_files_are_refused(editor: erllama.Model, extra: dict[str, object]) -> None:
    with client_of(editor) as client:
        assert refused(client, "/infill", input_prefix="", input_suffix="", input_extra=[extra])["code"] == 400


def test_model_without_marks_of_gaps_says_so(tiny: erllama.Model) -> None:
    with client_of(tiny) as client:
        error = refused(client, "/infill", input_prefix="a", input_suffix="b")
    assert (error["code"], error["type"]) == (501, "not_supported_error")
