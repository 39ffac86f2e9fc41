"""Agents on the Responses API: a conversation as Codex has it stays in the cache, and WebSockets are refused."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

import pytest
from openai import OpenAI
from openai.types.responses import Response
from starlette.types import Message

from erllama.server.conduct.upgrades import RefuseUpgrades
from erllama.server.endpoints import error_response
from erllama.server.replies.openai_errors import ERRORS
from support.chat.scripted_model import model_replying
from support.http_server import running_server
from support.responses_server import CALL, GET_TIME, client_of_replies, n_computed, n_new, new_client

MCP_CALL = '<tool_call>{"name":"mcp__notes__add","arguments":{"city":"Oslo"}}</tool_call>'
TOOLS = [
    GET_TIME,
    {
        "type": "namespace",
        "name": "mcp__notes",
        "description": "Notes.",
        "tools": [GET_TIME | {"name": "add", "description": "Add a note."}],
    },
    {"type": "web_search"},
]
TURNS = [
    f"<think>the time</think>{CALL}",
    f"<think>hm</think>I note it.{MCP_CALL}",
    "<think>ok</think>hello",
    "bye",
]


def codex_request(client: OpenAI, items: Sequence[object], **options: object) -> Response:
    """Send what Codex sends on each turn, and return the response at the end of the stream."""
    stream = client.responses.create(
        **{  # type: ignore[call-overload]
            "model": "gpt-oss",
            "instructions": "You are a coding agent.",
            "input": items,
            "tools": TOOLS,
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "conversation-1",
            "extra_body": {"chat_template_kwargs": {"keep_thinking": True}, "client_metadata": {"a": "b"}},
            **options,
        }
    )
    last = list(stream)[-1]
    assert last.type == "response.completed"
    response: Response = last.response
    return response


def codex_item(item: object, *, keep_content: bool = True) -> dict[str, object]:
    """Return an item of a reply as Codex sends it back: without id and status."""
    fields: dict[str, object] = item.to_dict()  # type: ignore[attr-defined]
    dropped = ("id", "status") if keep_content else ("id", "status", "content")
    return {key: value for key, value in fields.items() if key not in dropped or fields["type"] == "message"}


def developer(text: str) -> dict[str, object]:
    return {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": text}]}


def user(text: str) -> dict[str, object]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def outputs(response: Response) -> list[dict[str, object]]:
    return [
        {"type": "function_call_output", "call_id": item.call_id, "output": "done"}
        for item in response.output
        if item.type == "function_call"
    ]


@pytest.mark.parametrize("keep_content", [True, False])
def test_each_turn_of_codex_computes_only_new_tokens(keep_content: bool) -> None:
    items: list[object] = [developer("permissions"), developer("environment"), user("what time is it?")]
    responses: list[Response] = []
    with client_of_replies(*TURNS) as client:
        for _ in TURNS:
            response = codex_request(client, items)
            if responses:
                assert n_computed(response) <= n_new(response, responses[-1]) + 2
            responses.append(response)
            items += [codex_item(item, keep_content=keep_content) for item in response.output]
            items += outputs(response) or [user("go on")]
    assert [[item.type for item in response.output] for response in responses] == [
        ["reasoning", "function_call"],
        ["reasoning", "message", "function_call"],
        ["reasoning", "message"],
        ["message"],
    ]


def test_each_turn_with_stored_responses_computes_only_new_tokens() -> None:
    items: list[object] = [developer("permissions"), developer("environment"), user("what time is it?")]
    previous: Response | None = None
    with client_of_replies(*TURNS) as client:
        for _ in TURNS:
            id = previous.id if previous is not None else None
            response = codex_request(client, items, store=True, previous_response_id=id)
            if previous is not None:
                assert n_computed(response) <= n_new(response, previous) + 2
            previous = response
            items = [*(outputs(response) or [user("go on")])]


def test_requests_of_one_cache_key_at_once_all_succeed() -> None:
    with client_of_replies("hello there " * 20) as client:
        found: list[Response] = []
        threads = [
            threading.Thread(target=lambda n=n: found.append(codex_request(client, [user(f"go {n}")])))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [response.status for response in found] == ["completed"] * 4


def test_a_websocket_is_refused_and_post_still_works() -> None:
    with model_replying("hello") as model, running_server(model) as server, new_client(server.url) as client:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        headers = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
        }
        connection.request("GET", "/v1/responses", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 426
        answer.read()
        connection.close()
        assert client.responses.create(model="any", input="hi").output_text == "hello"


def test_a_websocket_scope_is_answered_with_426() -> None:
    sent: list[Message] = []

    async def never(*_: object) -> None:
        raise AssertionError("the application is called")

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/v1/responses",
        "headers": [],
        "extensions": {"websocket.http.response": {}},
    }
    refuse = lambda scope, error: error_response(ERRORS, error)  # noqa: E731
    asyncio.run(RefuseUpgrades(never, refuse)(scope, receive, send))
    assert (sent[0]["type"], sent[0]["status"]) == ("websocket.http.response.start", 426)
