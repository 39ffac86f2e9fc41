"""Anthropic's Messages API: streams, driven by the official client and read as raw events."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import anthropic
import httpx

from support.anthropic_clients import TOOLS, client_replying, model_replying_slowly, prompt_tokens
from support.chat.scripted_model import CALL, model_replying
from support.http_server import running_server

HELLO = [{"role": "user", "content": "hello"}]
REPLY = f"<think>A plan.</think>I look.{CALL}"
BODY = {"model": "any", "max_tokens": 400, "messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "auto"}}


def raw_events(url: str, **body: object) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the name and the JSON of each event of a stream."""
    with httpx.stream("POST", f"{url}/v1/messages", json={**BODY, "stream": True, **body}, timeout=120.0) as answer:
        assert answer.status_code == 200, answer.read()
        name = ""
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)


def test_the_stream_helper_returns_what_create_returns() -> None:
    with client_replying(REPLY) as client:
        whole = client.messages.create(**BODY)
        with client.messages.stream(**BODY) as stream:
            streamed = stream.get_final_message()

        def without_ids(message: anthropic.types.Message) -> list[dict[str, object]]:
            return [{**block.to_dict(), "id": None, "parsed_output": None} for block in message.content]

        assert [block.type for block in whole.content][:3] == ["thinking", "text", "tool_use"]
        assert without_ids(streamed) == without_ids(whole)
        assert streamed.stop_reason == whole.stop_reason
        assert prompt_tokens(streamed.usage) == prompt_tokens(whole.usage)
        assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_events_come_in_the_order_of_the_blocks() -> None:
    with model_replying(REPLY) as model, running_server(model) as server:
        events = [event for event in raw_events(server.url) if event[0] != "ping"]
    assert all(name == event["type"] for name, event in events)
    names = [name for name, _ in events]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    is_open, started = False, 0
    for name, event in events[1:-2]:
        if name == "content_block_start":
            assert (is_open, event["index"]) == (False, started)
            is_open, started = True, started + 1
        else:
            assert (is_open, event["index"]) == (True, started - 1)
            is_open = name != "content_block_stop"
    assert (is_open, started) == (False, 3)
    kinds = [event["delta"]["type"] for name, event in events if name == "content_block_delta"]  # type: ignore[index]
    assert kinds.index("thinking_delta") < kinds.index("signature_delta") < kinds.index("text_delta")
    assert kinds.index("text_delta") < kinds.index("input_json_delta")


def test_the_first_event_has_the_length_of_the_prompt() -> None:
    with model_replying(REPLY) as model, running_server(model) as server:
        events = list(raw_events(server.url))
        count = httpx.post(f"{server.url}/v1/messages/count_tokens", json=BODY, timeout=120.0).json()[
            "input_tokens"
        ]
    start, end = events[0][1]["message"], events[-2][1]
    for usage in (start["usage"], end["usage"]):  # type: ignore[index]
        names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        assert sum(usage[name] for name in names) == count  # type: ignore[index]
    assert (start["content"], start["stop_reason"]) == ([], None)  # type: ignore[index]


def test_pings_keep_a_quiet_stream_open() -> None:
    reply = f"<tool_call>{' ' * 3000}"
    with model_replying(reply) as model, running_server(model, keep_alive_seconds=0.01) as server:
        events = list(raw_events(server.url, max_tokens=3000))
    assert ("ping", {"type": "ping"}) in events
    assert [name for name, _ in events if name != "ping"][-1] == "message_stop"


def test_the_client_skips_pings_and_reads_the_text() -> None:
    with client_replying("hello there", keep_alive_seconds=0.001) as client:
        with client.messages.stream(model="any", max_tokens=100, messages=HELLO) as stream:
            assert "".join(stream.text_stream) == "hello there"


def test_an_error_before_the_first_byte_is_a_status() -> None:
    with model_replying("x") as model, running_server(model) as server:
        body = {**BODY, "stream": True, "tool_choice": {"type": "tool", "name": "none_such"}}
        answer = httpx.post(f"{server.url}/v1/messages", json=body, timeout=120.0)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_error_within_a_stream_is_an_event() -> None:
    with model_replying_slowly() as model, running_server(model) as server:
        events = []
        for name, event in raw_events(server.url, max_tokens=None):
            events.append((name, event))
            if len(events) == 4:
                model.unload()
    name, event = events[-1]
    assert (name, event["type"], event["error"]["type"]) == ("error", "error", "api_error")  # type: ignore[index]
    assert event["request_id"]


def test_a_client_that_leaves_ends_its_reply() -> None:
    with model_replying_slowly() as model, running_server(model) as server:
        for _ in zip(range(4), raw_events(server.url, max_tokens=None), strict=False):
            pass
        while model.queue_depth:
            time.sleep(0.01)
        assert model.metrics.finished == {"cancelled": 1}
