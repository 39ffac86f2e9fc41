"""`POST /v1/responses`: the next reply of a conversation, whole or as a stream; `/render`: its prompt."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from erllama.chat.results import ChatCompletion
from erllama.errors import ChatError
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError, as_api_error
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.replies.messages import read_messages
from erllama.server.replies.openai_errors import ERRORS, encode_error
from erllama.server.replies.rendering import render_chat, rendered
from erllama.server.replies.running import Replies, open_chat
from erllama.server.replies.sse import encode_event, event_stream
from erllama.server.replies.templates import count_prompt_tokens
from erllama.server.replies.timings import timings
from erllama.server.responses.answer import Answer
from erllama.server.responses.body import ResponseBody, chat_options, template_options
from erllama.server.responses.items import Conversation, items_of, read_items, resolve_references
from erllama.server.responses.output import OutputBuilder
from erllama.server.responses.retrieval import find_item, not_found, owner_of
from erllama.server.responses.tools import Tools, read_response_tools, read_tool_choice
from erllama.server.stored_responses import MissingResponseError, StoredResponse

log = logging.getLogger("erllama.server")

# The index of a message in an error of the façade, or in the path of a field.
_MESSAGE = re.compile(r"message (\d+): |messages\[(\d+)\]")


def endpoints() -> list[Endpoint[ResponseBody]]:
    """Return the endpoints of this module."""
    path = "/v1/responses"
    return [
        Endpoint("POST", path, ResponseBody, answer, ERRORS, "Reply to a conversation of items."),
        Endpoint("POST", f"{path}/input_tokens", ResponseBody, count, ERRORS, "Count the tokens of items."),
        Endpoint("POST", f"{path}/render", ResponseBody, render, ERRORS, "Return the token ids of items."),
    ]


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that was read.

    Attributes:
        items: of this request, references resolved.
        earlier: items of the responses that it continues.
        conversation: the messages of all of them.
        tools: the functions.
    """

    items: Sequence[Json]
    earlier: Sequence[Json]
    conversation: Conversation
    tools: Tools


async def answer(call: Call, body: ResponseBody) -> Response:
    """Answer a request with a whole response, or with a stream of events."""
    body.check()
    served = await call.use_model(body.model)
    request = await _read(call, body)
    replies = await _open(call, served, body, request)
    run = _Run(call, served, body, request)
    if body.stream:
        return event_stream(call, run.stream(replies), encode_error, run.ping)
    async with replies:
        await run.collect(replies)
    response = run.response()
    await run.save(response)
    assert run.output.completion is not None
    values = response | {"timings": timings(run.output.completion)}
    return json_response(values)


async def count(call: Call, body: ResponseBody) -> Response:
    """Answer with the number of tokens that a request's prompt has."""
    body.check()
    served = await call.use_model(body.model)
    request = await _read(call, body)
    options = template_options(body)
    functions = read_tool_choice(body.tool_choice, request.tools).functions
    if functions is not None:
        options["tools"] = functions
    try:
        messages = read_messages(request.conversation.messages)
        n_tokens = await count_prompt_tokens(call, served, messages, body.cache_salt, **options)
    except (ApiError, ChatError) as error:
        raise _with_place(error, request) from None
    return json_response({"object": "response.input_tokens", "input_tokens": n_tokens})


async def render(call: Call, body: ResponseBody) -> Response:
    """Answer with the token ids of the prompt that `answer` would compute."""
    body.check()
    served = await call.use_model(body.model)
    request = await _read(call, body)
    options: Any = chat_options(body, request.tools, served.model)
    try:
        messages = read_messages(request.conversation.messages)
        tokens = await render_chat(call, served, messages, **options)
    except (ApiError, ChatError) as error:
        raise _with_place(error, request) from None
    return json_response(rendered(call, served, "resp", tokens))


async def _read(call: Call, body: ResponseBody) -> _Request:
    items = items_of(body.input)
    owner, earlier = owner_of(call), []
    if body.previous_response_id is not None:
        try:
            stored = await asyncio.to_thread(call.server.responses.conversation, body.previous_response_id, owner)
        except MissingResponseError as error:
            raise not_found(error.id, body.previous_response_id) from None
        earlier = [item for each in stored for item in (*each.input, *each.output)]
    if any(item.get("type") == "item_reference" for item in items):
        store = call.server.responses
        items = await asyncio.to_thread(resolve_references, items, lambda id: find_item(store, id, owner))
    conversation = read_items(body.instructions, [*earlier, *items])
    if conversation.skipped:
        call.record.notes.append(f"skipped items: {', '.join(sorted(conversation.skipped))}")
    return _Request(items, earlier, conversation, read_response_tools(body.tools))


async def _open(call: Call, served: ServedModel, body: ResponseBody, request: _Request) -> Replies[ChatCompletion]:
    """Submit a request. An error in a message names the item."""
    options: Any = chat_options(body, request.tools, served.model)
    try:
        messages = read_messages(request.conversation.messages)
        return await open_chat(call, served, messages, session_hint=body.prompt_cache_key, **options)
    except (ApiError, ChatError) as error:
        raise _with_place(error, request) from None


def _with_place(error: ApiError | ChatError, request: _Request) -> ApiError | ChatError:
    """Return an error in a message with the place of the item that the message was made of."""
    found = _MESSAGE.match((error.param or "") if isinstance(error, ApiError) else str(error))
    place = request.conversation.places[int(found[1] or found[2])] if found is not None else None
    if found is None or place is None or place < len(request.earlier):
        return error
    where = f"input[{place - len(request.earlier)}]"
    message = str(error).removeprefix(found[0])
    return ApiError("invalid_request", f"{where}: {message.removeprefix(': ')}", param=where)


class _Run:
    """One reply: from its events to the response, which is stored."""

    def __init__(self, call: Call, served: ServedModel, body: ResponseBody, request: _Request) -> None:
        self._call, self._body, self._items = call, body, request.items
        id = call.record.id
        self._is_stored = body.store is not False and call.server.options.max_stored_responses > 0
        self._answer = Answer(
            f"resp_{id}", served.name, int(time.time()), body, request.tools.shown, self._is_stored
        )
        self.output = OutputBuilder(
            id,
            served.model,
            request.tools.names,
            encrypted=body.wants_encrypted_reasoning,
            summary=body.wants_summary,
        )
        self._n_events = 0

    async def collect(self, replies: Replies[ChatCompletion]) -> None:
        """Read a reply to its end."""
        async for _, event in replies.events():
            for _ in self.output.add(event):
                pass

    async def stream(self, replies: Replies[ChatCompletion]) -> AsyncIterator[bytes]:
        """Yield the events of a reply, encoded. An error becomes a failed response."""
        async with replies:
            for kind in ("response.created", "response.in_progress"):
                yield self._encode({"type": kind, "response": self._answer.in_progress()})
            try:
                async for _, event in replies.events():
                    for each in self.output.add(event):
                        yield self._encode(each)
            except Exception as error:
                found = as_api_error(error)
                self._call.record.error = found.code or found.kind
                response = self._answer.failed(self.output.items, found)
            else:
                response = self.response()
        await self.save(response)
        last: Json = {"type": f"response.{response['status']}", "response": response}
        if self.output.completion is not None:
            last["timings"] = timings(self.output.completion)
        yield self._encode(last)

    def ping(self) -> bytes:
        """Return an event for a quiet stream. Codex ends a stream without events after five minutes."""
        return self._encode({"type": "response.in_progress", "response": self._answer.in_progress()})

    def response(self) -> Json:
        """Return the response with its reply, which is done."""
        output = self.output
        assert output.completion is not None
        return self._answer.done(output.items, output.completion, output.n_reasoning_tokens, output.is_incomplete)

    async def save(self, response: Json) -> None:
        """Store the response, if the client wants it. A failure is logged: the client has its reply."""
        if not self._is_stored:
            return
        stored = StoredResponse(
            self._answer.id, owner_of(self._call), self._body.previous_response_id, self._items, response
        )
        try:
            await asyncio.to_thread(self._call.server.responses.save, stored)
        except Exception:
            log.exception("the response %s is not stored", self._answer.id)

    def _encode(self, event: Json) -> bytes:
        numbered = {"type": event["type"], "sequence_number": self._n_events} | event
        self._n_events += 1
        return encode_event(numbered, str(event["type"]))
