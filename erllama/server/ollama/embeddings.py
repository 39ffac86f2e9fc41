"""`POST /api/embed`, and the older `POST /api/embeddings` for one text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from starlette.responses import Response

from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.ollama.answers import elapsed, nanoseconds
from erllama.server.ollama.errors import ERRORS
from erllama.server.ollama.options import read_keep_alive
from erllama.server.replies.embeddings import check_number, note_tokens
from erllama.server.replies.running import wait_for_process


class EmbedBody(msgspec.Struct, kw_only=True):
    """The body of `/api/embed`. `options` are checked and have no effect."""

    input: str | list[str]
    model: str | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    keep_alive: float | str | None = None
    options: Json | None = None


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """The body of `/api/embeddings`. `options` are checked and have no effect."""

    prompt: str | None = None
    model: str | None = None
    keep_alive: float | str | None = None
    options: Json | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [
        Endpoint("POST", "/api/embed", EmbedBody, answer, ERRORS, "Return the vectors of texts, of length 1."),
        Endpoint(
            "POST",
            "/api/embeddings",
            EmbeddingsBody,
            answer_one,
            ERRORS,
            "Return the vector of one text, as it is.",
        ),
    ]


async def answer(call: Call, body: EmbedBody) -> Response:
    """Answer a request with one vector per text."""
    served = await call.use_model(body.model, read_keep_alive(body.keep_alive))
    texts = [body.input] if isinstance(body.input, str) else body.input
    rows: list[list[float]] = []
    if texts and body.input:
        vectors = await _embed(call, served, texts, normalize=True, truncate=body.truncate is not False)
        rows = _shortened(vectors, body.dimensions).tolist()
    return json_response(
        {
            "model": served.name,
            "embeddings": rows,
            "total_duration": elapsed(call),
            "load_duration": nanoseconds(call.record.load_seconds),
            "prompt_eval_count": call.record.prompt_tokens,
        }
    )


async def answer_one(call: Call, body: EmbeddingsBody) -> Response:
    """Answer a request with the vector of one text; with an empty one for an empty text."""
    served = await call.use_model(body.model, read_keep_alive(body.keep_alive))
    row: list[float] = []
    if body.prompt:
        row = (await _embed(call, served, [body.prompt], normalize=False, truncate=True))[0].tolist()
    return json_response({"embedding": row})


async def _embed(
    call: Call, served: ServedModel, texts: Sequence[str], *, normalize: bool, truncate: bool
) -> NDArray[np.float32]:
    """Return the vectors of texts, float32, shape (texts, d), and count their tokens."""
    model = served.model
    check_number(texts, "input")
    await wait_for_process(call, served)
    rows = await model.aembed(texts, normalize=normalize, truncate=truncate)
    n_tokens = await asyncio.to_thread(
        lambda: sum(min(len(model.tokenize(text, parse_special=True)), model.n_ctx) for text in texts)
    )
    note_tokens(call, n_tokens)
    return rows


def _shortened(rows: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the first dimensions of vectors, of length 1 again."""
    if dimensions is None or dimensions >= rows.shape[1]:
        return rows
    cut = rows[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    return np.asarray(cut / np.where(lengths > 0, lengths, 1.0), np.float32)
