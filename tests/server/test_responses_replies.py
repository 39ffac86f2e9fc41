"""Replies of the Responses API, whole: texts, calls, thinking, forms, and errors. Driven by OpenAI's client."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseReasoningItem
from pydantic import BaseModel

from support.responses_server import CALL, GET_TIME, client_of_replies

MODEL = "any"


def test_a_text_gets_a_reply_with_usage() -> None:
    with client_of_replies("hello there") as client:
        response = client.responses.create(model=MODEL, input="hello", metadata={"a": "b"}, temperature=0)
    assert response.output_text == "hello there"
    assert response.status == "completed"
    assert response.id.startswith("resp_")
    assert response.metadata == {"a": "b"}
    [message] = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert message.id.startswith("msg_")
    assert message.status == "completed"
    assert response.usage is not None
    assert response.usage.output_tokens == len("hello there")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_the_response_repeats_what_was_asked_for() -> None:
    with client_of_replies("hello") as client:
        response = client.responses.create(
            model=MODEL,
            instructions="be brief",
            input="hello",
            max_output_tokens=50,
            temperature=0.5,
            top_p=0.9,
            reasoning={"effort": "low", "summary": "auto"},
            parallel_tool_calls=False,
            prompt_cache_key="k",
            tools=[GET_TIME],
        )
    assert response.instructions == "be brief"
    assert response.max_output_tokens == 50
    assert (response.temperature, response.top_p) == (0.5, 0.9)
    assert response.reasoning is not None
    assert response.reasoning.effort == "low"
    assert not response.parallel_tool_calls
    assert response.tool_choice == "auto"
    assert response.prompt_cache_key == "k"
    assert [tool.to_dict() for tool in response.tools] == [GET_TIME]


def test_a_limit_makes_the_response_incomplete() -> None:
    with client_of_replies("hello there") as client:
        response = client.responses.create(model=MODEL, input="hello", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "hel"
    assert response.output[0].status == "incomplete"


def test_an_empty_reply_is_an_empty_message() -> None:
    with client_of_replies("") as client:
        response = client.responses.create(model=MODEL, input="hello")
    assert response.output_text == ""
    assert [item.type for item in response.output] == ["message"]


def test_thinking_is_a_reasoning_item_before_the_message() -> None:
    with client_of_replies("<think>hm</think>hello") as client:
        response = client.responses.create(model=MODEL, input="hello")
    reasoning, message = response.output
    assert isinstance(reasoning, ResponseReasoningItem)
    assert reasoning.content is not None
    assert [part.text for part in reasoning.content] == ["hm"]
    assert reasoning.summary == []
    assert reasoning.encrypted_content is None
    assert message.type == "message"
    assert response.output_text == "hello"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens >= 2


def test_reasoning_has_a_summary_and_encrypted_content_on_request() -> None:
    with client_of_replies("<think>hm</think>hello") as client:
        response = client.responses.create(
            model=MODEL,
            input="hello",
            reasoning={"summary": "auto"},
            include=["reasoning.encrypted_content"],
        )
    reasoning = response.output[0]
    assert isinstance(reasoning, ResponseReasoningItem)
    assert [part.text for part in reasoning.summary] == ["hm"]
    assert reasoning.encrypted_content


def test_a_call_is_an_item_and_its_output_continues() -> None:
    with client_of_replies(CALL, "it is late") as client:
        first = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
        [call] = first.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert (call.name, json.loads(call.arguments)) == ("get_time", {"city": "Oslo"})
        assert call.namespace is None
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "23:00"}
        second = client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": "time?"}, call.to_dict(), output],  # type: ignore[list-item]
            tools=[GET_TIME],
        )
    assert second.output_text == "it is late"


def test_parallel_calls_are_items_with_ids_of_their_own() -> None:
    with client_of_replies(CALL + CALL) as client:
        response = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
    calls = [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]
    assert len(calls) == 2
    assert len({call.call_id for call in calls}) == 2
    assert len({call.id for call in calls}) == 2


def test_text_beside_a_call_keeps_its_place() -> None:
    with client_of_replies(f"wait {CALL}") as client:
        response = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME])
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert response.output_text.strip() == "wait"


def test_a_namespaced_call_has_the_namespace_and_the_short_name() -> None:
    call = '<tool_call>{"name":"mcp__clock__get_time","arguments":{"city":"Oslo"}}</tool_call>'
    namespace = {"type": "namespace", "name": "mcp__clock__", "description": "Clocks.", "tools": [GET_TIME]}
    with client_of_replies(call, "late") as client:
        first = client.responses.create(model=MODEL, input="time?", tools=[namespace])  # type: ignore[list-item]
        [item] = first.output
        assert isinstance(item, ResponseFunctionToolCall)
        assert (item.namespace, item.name) == ("mcp__clock__", "get_time")
        output = {"type": "function_call_output", "call_id": item.call_id, "output": "23:00"}
        second = client.responses.create(
            model=MODEL,
            input=[{"role": "user", "content": "time?"}, item.to_dict(), output],  # type: ignore[list-item]
            tools=[namespace],  # type: ignore[list-item]
        )
    assert second.output_text == "late"
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 2


def test_tools_of_other_types_are_skipped() -> None:
    with client_of_replies("hello") as client:
        response = client.responses.create(model=MODEL, input="hello", tools=[{"type": "web_search"}, GET_TIME])
        assert [tool.type for tool in response.tools] == ["function"]
        alone = client.responses.create(model=MODEL, input="hello", tools=[{"type": "web_search"}])
    assert alone.tools == []


def test_tool_choice_none_allows_no_call() -> None:
    with client_of_replies(CALL) as client:
        response = client.responses.create(model=MODEL, input="time?", tools=[GET_TIME], tool_choice="none")
    assert [item.type for item in response.output] == ["message"]


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_time"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
    ],
)
def test_tool_choice_forces_a_call(choice: object) -> None:
    other = GET_TIME | {"name": "get_date"}
    with client_of_replies("hello") as client:  # the grammar of the call overrules the script
        response = client.responses.create(
            model=MODEL,
            input="time?",
            tools=[GET_TIME, other],
            tool_choice=choice,  # type: ignore[arg-type]
            max_output_tokens=300,
        )
    assert {item.type for item in response.output} == {"function_call"}


def test_a_schema_shapes_the_text_and_parse_reads_it() -> None:
    class Answer(BaseModel):
        city: str

    with client_of_replies('{"city":"Oslo"}') as client:
        response = client.responses.parse(model=MODEL, input="where?", text_format=Answer)
    assert response.output_parsed == Answer(city="Oslo")


def test_json_object_forces_an_object() -> None:
    with client_of_replies("{}") as client:
        response = client.responses.create(
            model=MODEL, input="where?", text={"format": {"type": "json_object"}}, max_output_tokens=40
        )
    assert json.loads(response.output_text) == {}
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_object"


def test_logprobs_come_with_the_text() -> None:
    with client_of_replies("hello") as client:
        response = client.responses.create(
            model=MODEL, input="hello", top_logprobs=2, include=["message.output_text.logprobs"]
        )
    [message] = response.output
    assert isinstance(message, ResponseOutputMessage)
    [part] = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(each.token for each in part.logprobs)[:5] == "hello"
    assert {len(each.top_logprobs) for each in part.logprobs} == {2}


def test_input_tokens_counts_the_prompt() -> None:
    with client_of_replies("hello") as client:
        counted = client.responses.input_tokens.count(
            model=MODEL, input="hello", instructions="be brief", tools=[GET_TIME]
        )
        response = client.responses.create(model=MODEL, input="hello", instructions="be brief", tools=[GET_TIME])
    assert response.usage is not None
    assert counted.input_tokens == response.usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "clown", "content": "hi"}]}, "input[0].role"),
        ({"input": [{"content": "hi"}]}, "input[0].type"),
        ({"input": "hi", "background": True}, "background"),
        ({"input": "hi", "conversation": "conv_1"}, "conversation"),
        ({"input": "hi", "text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"input": "hi", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "hi", "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        ({"input": "hi", "max_output_tokens": "many"}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0]"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input[0]"),
    ],
)
def test_a_wrong_field_is_an_error_with_its_path(fields: dict[str, object], param: str) -> None:
    with client_of_replies("hello") as client, pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**{"model": MODEL, **fields})  # type: ignore[call-overload]
    assert caught.value.param == param


def test_a_prompt_that_is_too_long_is_an_error() -> None:
    with client_of_replies("hello") as client, pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=MODEL, input="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["n_ctx"] == 4096
