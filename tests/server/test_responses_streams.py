"""Streams of the Responses API: the order of events, their numbers, and what OpenAI's client makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from openai import OpenAI
from openai.types.responses import ResponseFunctionToolCall, ResponseStreamEvent

import erllama
from support.chat.scripted_model import TEMPLATE, VOCABULARY
from support.responses_server import CALL, GET_TIME, client_of, client_of_replies
from support.scripted_backend import ScriptedBackend

MODEL = "any"
TEXT = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]


def read_events(client: OpenAI, **options: object) -> list[ResponseStreamEvent]:
    return list(client.responses.create(**{"model": MODEL, "input": "hello", "stream": True, **options}))  # type: ignore[call-overload]


def kinds(events: Sequence[ResponseStreamEvent]) -> list[str]:
    """Return the types of events, those of deltas once."""
    found = [event.type.removeprefix("response.") for event in events]
    return [kind for at, kind in enumerate(found) if kind != found[at - 1] or not kind.endswith("delta")]


def test_a_text_is_streamed_in_order() -> None:
    with client_of_replies("hello there") as client:
        events = read_events(client)
    assert kinds(events) == ["created", "in_progress", *TEXT, "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "hello there"
    assert len(deltas) > 1
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == "hello there"
    assert last.response.usage is not None
    assert {event.response.id for event in events if hasattr(event, "response")} == {last.response.id}


def test_thinking_is_streamed_before_the_text() -> None:
    with client_of_replies("<think>hm</think>hello") as client:
        events = read_events(client)
    reasoning = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"]
    assert kinds(events) == [
        *("created", "in_progress", *reasoning, "content_part.done", "output_item.done"),
        *(*TEXT, "output_item.done", "completed"),
    ]
    indexes = [event.output_index for event in events if hasattr(event, "output_index")]
    assert indexes == sorted(indexes)
    assert set(indexes) == {0, 1}


def test_a_requested_summary_is_streamed() -> None:
    with client_of_replies("<think>hm</think>hello") as client:
        events = read_events(client, reasoning={"summary": "auto"})
    deltas = [event.delta for event in events if event.type == "response.reasoning_summary_text.delta"]
    assert "".join(deltas) == "hm"
    assert kinds(events).index("reasoning_summary_part.added") < kinds(events).index("reasoning_summary_text.delta")
    assert kinds(events).count("reasoning_summary_part.done") == 1


def test_calls_are_streamed_as_items_of_their_own() -> None:
    with client_of_replies(CALL + CALL) as client:
        events = read_events(client, tools=[GET_TIME])
    assert kinds(events) == ["created", "in_progress", *CALL_EVENTS, *CALL_EVENTS, "completed"]
    added = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.arguments for item in added if isinstance(item, ResponseFunctionToolCall)] == ["", ""]


def test_the_helper_for_streams_assembles_the_response() -> None:
    with client_of_replies(f"<think>hm</think>wait {CALL}") as client:
        with client.responses.stream(model=MODEL, input="time?", tools=[GET_TIME]) as stream:
            for _ in stream:
                pass
            response = stream.get_final_response()
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    call = response.output[-1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert call.arguments == '{"city": "Oslo"}'


def test_a_whole_response_equals_a_streamed_one() -> None:
    with client_of_replies(f"<think>hm</think>wait {CALL}") as client:
        whole = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
        streamed = read_events(client, input="time?", tools=[GET_TIME])[-1]
    assert streamed.type == "response.completed"
    assert [item.type for item in whole.output] == [item.type for item in streamed.response.output]
    assert whole.output_text == streamed.response.output_text


def test_text_that_is_no_call_after_all_is_text() -> None:
    broken = '<tool_call>{"name":"get_time","arguments":{"city":7}}</tool_call>'
    with client_of_replies(broken) as client:
        events = read_events(client, tools=[GET_TIME | {"name": "other"}])
    last = events[-1]
    assert last.type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == last.response.output_text


@pytest.mark.parametrize("reply", ["hello there", "<think>hm, hm</think>hello", CALL])
def test_a_limit_ends_the_stream_with_an_incomplete_response(reply: str) -> None:
    with client_of_replies(reply) as client:
        events = read_events(client, tools=[GET_TIME], max_output_tokens=10)
    last = events[-1]
    assert last.type == "response.incomplete"
    assert last.response.status == "incomplete"
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in last.response.output]
    assert done[-1].status == "incomplete"


def test_an_error_ends_the_stream_with_a_failed_response() -> None:
    assistant = VOCABULARY.special["<|assistant|>"]

    def next_token(tokens: list[int]) -> int:
        if len(tokens) > tokens.index(assistant) + 5:
            raise RuntimeError("the device is gone")
        return ord("a")

    backend = ScriptedBackend(VOCABULARY, next_token, chat_templates={"default": TEMPLATE})
    with client_of(erllama.load_backend(backend)) as client:
        events = read_events(client)
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_events_have_their_type_as_the_name() -> None:
    with client_of_replies("hello") as client:
        raw = client.responses.with_raw_response.create(model=MODEL, input="hello", stream=True)
        lines = [line for line in raw.http_response.iter_lines() if line and not line.startswith(":")]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[0] == "response.created"
    assert names[-1] == "response.completed"
    assert len(names) * 2 == len(lines)
