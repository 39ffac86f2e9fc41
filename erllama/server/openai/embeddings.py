"""`POST /v1/embeddings`: the vectors of texts, as numbers or as base64 of float32."""

from __future__ import annotations

import base64
from typing import Any, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from erllama._model.requests.embeddings import Pooling
from erllama.errors import PromptTooLong
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.replies.embeddings import note_tokens
from erllama.server.replies.openai_errors import ERRORS
from erllama.server.replies.prompts import read_prompts
from erllama.server.replies.running import wait_for_process


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The body of a request for embeddings."""

    input: object
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [Endpoint("POST", "/v1/embeddings", EmbeddingBody, answer, ERRORS, "Return the vectors of texts.")]


async def answer(call: Call, body: EmbeddingBody) -> Response:
    """Answer a request with one vector for each input."""
    served = await call.use_model(body.model)
    if served.pooling == "none":
        raise ApiError("invalid_request", "the server does not pool vectors, so a text has several; use /embedding")
    inputs = await read_prompts(served.model, body.input, "input")
    await wait_for_process(call, served)
    try:
        pooling = cast(Pooling | None, served.pooling)
        vectors = await served.model.aembed(inputs, pooling=pooling)
    except PromptTooLong as error:
        message = f"the input is too large: {str(error).partition(';')[0]}; send shorter texts"
        details = {"n_prompt_tokens": error.n_tokens, "n_ctx": error.n_ctx}
        raise ApiError("invalid_request", message, "context_length_exceeded", "input", details=details) from error
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
        message = f"dimensions is {body.dimensions}, and the vectors of {served.name!r} have {vectors.shape[1]}"
        raise ApiError("invalid_request", f"{message}; leave dimensions out", param="dimensions")
    n_tokens = sum(map(len, inputs))
    note_tokens(call, n_tokens)
    encode = _as_base64 if body.encoding_format == "base64" else _as_numbers
    rows = [{"object": "embedding", "index": i, "embedding": encode(row)} for i, row in enumerate(vectors)]
    counts = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    values: Json = {"object": "list", "data": rows, "model": served.name, "usage": counts}
    return json_response(values)


def _as_numbers(row: NDArray[np.float32]) -> list[float]:
    numbers: list[float] = row.tolist()
    return numbers


def _as_base64(row: NDArray[np.float32]) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()
