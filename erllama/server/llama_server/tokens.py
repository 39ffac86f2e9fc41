"""`/tokenize`, `/detokenize`, `/apply-template`, and the number of tokens of a conversation."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response

from erllama._model.model import Model
from erllama._model.requests.options import TemplateOptions
from erllama._types import Messages
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.llama_server.errors import ERRORS
from erllama.server.replies.messages import continues_final_message, read_messages, read_tools
from erllama.server.replies.prompts import read_parts
from erllama.server.replies.templates import count_prompt_tokens, rendering_options, thinking_options
from erllama.server.replies.unstable_prefixes import drop_unstable_headers


class TokenizeBody(msgspec.Struct, kw_only=True):
    """The body of `/tokenize`.

    Attributes:
        content: a text, or a list of texts and token ids.
        with_pieces: return the text of each token, too.
    """

    content: object = ""
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None
    model: str | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """The body of `/detokenize`."""

    tokens: list[int] = []
    model: str | None = None


class TemplateBody(msgspec.Struct, kw_only=True):
    """The body of `/apply-template`: the fields of a chat completion that change its prompt."""

    messages: list[Json]
    tools: list[Json] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Json | None = None
    reasoning_effort: str | None = None
    model: str | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    counts = [
        Endpoint("POST", path, TemplateBody, answer_count, ERRORS, "Count the tokens of a conversation.")
        for path in ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens")
    ]
    return [
        Endpoint("POST", "/tokenize", TokenizeBody, answer_tokenize, ERRORS, "Return the tokens of a text."),
        Endpoint("POST", "/detokenize", DetokenizeBody, answer_detokenize, ERRORS, "Return the text of tokens."),
        Endpoint("POST", "/apply-template", TemplateBody, answer_template, ERRORS, "Return the prompt of a chat."),
        *counts,
    ]


async def answer_tokenize(call: Call, body: TokenizeBody) -> Response:
    """Answer with the tokens of a text."""
    model = (await call.use_model(body.model)).model
    parse_special = body.parse_special is not False
    content = body.content if isinstance(body.content, list) else [body.content]
    ids = await asyncio.to_thread(read_parts, model, content, "content", body.add_special is True, parse_special)
    tokens: list[int] = ids.tolist()
    if not body.with_pieces:
        return json_response({"tokens": tokens})
    return json_response({"tokens": [{"id": token, "piece": _piece(model, token)} for token in tokens]})


def _piece(model: Model, token: int) -> str | list[int]:
    """Return the text of a token; its bytes if they are a part of a character."""
    raw = model.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def answer_detokenize(call: Call, body: DetokenizeBody) -> Response:
    """Answer with the text of tokens."""
    model = (await call.use_model(body.model)).model
    for index, token in enumerate(body.tokens):
        if not 0 <= token < model.n_vocab:
            where = f"tokens[{index}]"
            limit = f"token ids of this model are 0 to {model.n_vocab - 1}"
            raise ApiError("invalid_request", f"{where} is {token}; {limit}", param=where)
    text = await asyncio.to_thread(model.detokenize, np.array(body.tokens, np.int32), special=True)
    return json_response({"content": text})


async def answer_template(call: Call, body: TemplateBody) -> Response:
    """Answer with the text of a conversation."""
    served = await call.use_model(body.model)
    messages: Messages = read_messages(body.messages)
    if call.server.options.drop_unstable_headers:
        messages = drop_unstable_headers(messages)
    text = await asyncio.to_thread(
        served.model.render_chat,
        messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        **rendering_options(served, _template_options(body)),
    )
    return json_response({"prompt": text})


async def answer_count(call: Call, body: TemplateBody) -> Response:
    """Answer with the number of tokens of a conversation."""
    served = await call.use_model(body.model)
    n_tokens = await count_prompt_tokens(call, served, read_messages(body.messages), **_template_options(body))
    return json_response({"object": "response.input_tokens", "input_tokens": n_tokens})


def _template_options(body: TemplateBody) -> TemplateOptions:
    """Return the options of `Model.render_chat` for a body."""
    options = thinking_options(body.chat_template_kwargs, body.reasoning_effort)
    tools = read_tools(body.tools)
    if tools is not None:
        options["tools"] = tools
    if continues_final_message(body.add_generation_prompt, body.continue_final_message):
        options["continue_final_message"] = True
    return options
