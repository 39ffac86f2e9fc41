"""`/embedding` and `/embeddings`: llama-server's own embeddings, each text with a list of vectors."""

from __future__ import annotations

from typing import cast

import msgspec
import numpy as np
from starlette.responses import Response

from erllama._model.requests.embeddings import Pooling
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.llama_server.errors import ERRORS
from erllama.server.replies.embeddings import note_tokens
from erllama.server.replies.prompts import read_prompts
from erllama.server.replies.running import wait_for_process


class EmbeddingBody(msgspec.Struct, kw_only=True):
    """The body of `/embedding`.

    Attributes:
        content, input: a text, token ids, both mixed, or a list of those. The two names mean the same.
        embd_normalize: -1 leaves the vectors as they are, and 2 scales them to length 1, which is the default.
    """

    content: object = None
    input: object = None
    embd_normalize: int | None = None
    model: str | None = None


def endpoints() -> list[Endpoint[EmbeddingBody]]:
    """Return the endpoints of this module."""
    paths = ("/embedding", "/embeddings")
    return [Endpoint("POST", path, EmbeddingBody, answer, ERRORS, "Return the vectors of texts.") for path in paths]


async def answer(call: Call, body: EmbeddingBody) -> Response:
    """Answer with the vectors of each text: one, or one for each token if the model does not pool."""
    served = await call.use_model(body.model)
    name, value = ("content", body.content) if body.input is None else ("input", body.input)
    if value is None:
        raise ApiError("invalid_request", "content is missing; send a text, or several", param="content")
    if body.embd_normalize not in (None, -1, 2):
        where = "embd_normalize"
        raise ApiError("invalid_request", f"{where} is {body.embd_normalize}; send -1 or 2", param=where)
    texts = await read_prompts(served.model, value, name)
    pools = served.pooling != "none"
    await wait_for_process(call, served)
    vectors = await served.model.aembed(
        texts,
        pooling=cast(Pooling | None, served.pooling),
        normalize=pools and body.embd_normalize != -1,
    )
    note_tokens(call, sum(map(len, texts)))
    return json_response(
        [{"index": index, "embedding": np.atleast_2d(each).tolist()} for index, each in enumerate(vectors)]
    )
