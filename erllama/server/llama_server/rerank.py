"""`/rerank` and its other paths: documents ordered by how well they answer a query.

The answer has Jina's form, or that of Text Embeddings Inference if the body has `texts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from starlette.responses import Response

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.llama_server.errors import ERRORS
from erllama.server.replies.embeddings import check_number, note_tokens
from erllama.server.replies.running import wait_for_process


class Document(msgspec.Struct):
    """A document as an object."""

    text: str


class RerankBody(msgspec.Struct, kw_only=True):
    """The body of `/rerank`.

    Attributes:
        documents, texts: the documents, in Jina's field or in that of Text Embeddings Inference.
        top_n: how many of the best documents to return; None for all.
        return_documents, return_text: return the documents, too; in Jina's form or in that of Text Embeddings
            Inference.
    """

    query: str
    documents: list[str | Document] | None = None
    texts: list[str | Document] | None = None
    top_n: int | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    model: str | None = None


def endpoints() -> list[Endpoint[RerankBody]]:
    """Return the endpoints of this module."""
    paths = ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking")
    return [Endpoint("POST", path, RerankBody, answer, ERRORS, "Order documents for a query.") for path in paths]


async def answer(call: Call, body: RerankBody) -> Response:
    """Answer with the documents, the best first."""
    served = await call.use_model(body.model)
    texts = [each if isinstance(each, str) else each.text for each in body.documents or body.texts or ()]
    if not texts:
        raise ApiError("invalid_request", "documents is empty; send at least one", param="documents")
    check_number(texts, "documents")
    await wait_for_process(call, served)
    scores = await served.model.arerank(body.query, texts)
    count = served.model._embeddings.count_pair_tokens
    n_tokens = sum(await asyncio.to_thread(count, body.query, texts))
    note_tokens(call, n_tokens)
    ranked = sorted(enumerate(map(float, scores)), key=lambda item: -item[1])
    ranked = ranked[: len(texts) if body.top_n is None else max(body.top_n, 0)]
    if body.texts is not None:
        return json_response(_in_tei_form(ranked, texts, bool(body.return_text)))
    results: list[Json] = [{"index": index, "relevance_score": score} for index, score in ranked]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": texts[result["index"]]}
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return json_response({"model": served.name, "object": "list", "usage": usage, "results": results})


def _in_tei_form(ranked: Sequence[tuple[int, float]], texts: Sequence[str], with_text: bool) -> list[Json]:
    results: list[Json] = [{"index": index, "score": score} for index, score in ranked]
    if with_text:
        for result in results:
            result["text"] = texts[result["index"]]
    return results
