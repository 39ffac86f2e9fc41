"""`/v1/chat/completions`, as the official client calls it: streams."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest

from erllama.server.replies import running
from support.chat.scripted_model import CALL, TOOLS, model_replying
from support.http_server import running_server
from support.openai_server import USER, Json, client_of, openai_client, stream_events

OTHER_CALL = CALL.replace("Oslo", "Rome")


def chunks_of(reply: str, **body: object) -> list[Any]:
    """Return the chunks of a streamed reply, without the event that ends the stream."""
    with model_replying(reply) as model, running_server(model) as server:
        messages: Json = {"messages": [USER], "stream": True}
        *chunks, last = stream_events(f"{server.url}/v1/chat/completions", {**messages, **body})
    assert last == "[DONE]"
    return chunks


def test_only_the_first_delta_of_a_choice_has_the_role() -> None:
    chunks = chunks_of("hello there", n=2)
    for index in range(2):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0]["role"] == "assistant"
        assert not any("role" in delta for delta in deltas[1:])
        assert "".join(delta.get("content") or "" for delta in deltas) == "hello there"


@pytest.mark.parametrize("n", [1, 2])
def test_tokens_of_a_fast_reply_share_chunks(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = "a reply with many tokens " * 4
    monkeypatch.setattr(running, "_GATHER_SECONDS", 0.5)
    chunks = chunks_of(reply, n=n, logprobs=True)
    contents = [c["choices"][0]["delta"].get("content") for c in chunks if c["choices"][0]["index"] == n - 1]
    assert "".join(text for text in contents if text) == reply
    assert len(contents) < len(reply) / 2
    listed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["index"] == n - 1]
    assert sum(len(each["content"]) for each in listed if each) >= len(reply)


def test_tokens_of_a_slow_reply_have_chunks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_GATHER_SECONDS", 0.0)  # every reply is slower
    contents = [chunk["choices"][0]["delta"].get("content") for chunk in chunks_of("hello there")]
    assert len([text for text in contents if text]) > len("hello there") / 2


def test_chunks_have_one_id_and_the_last_one_the_reason() -> None:
    chunks = chunks_of("hello")
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["timings"]["predicted_n"] == len("hello")


def test_each_call_has_its_index_and_its_id_type_and_name_once() -> None:
    chunks = chunks_of("hello" + CALL + OTHER_CALL, tools=TOOLS)
    parts = [part for chunk in chunks for part in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [part["index"] for part in parts if "id" in part] == [0, 1]
    for index, city in enumerate(("Oslo", "Rome")):
        own = [part for part in parts if part["index"] == index]
        assert sum("id" in part for part in own) == sum("type" in part for part in own) == 1
        assert [part["function"]["name"] for part in own if "name" in part["function"]] == ["get_time"]
        arguments = "".join(part["function"].get("arguments", "") for part in own)
        assert json.loads(arguments) == {"city": city}
    ids = [part["id"] for part in parts if "id" in part]
    assert all(ids)
    assert len(set(ids)) == 2
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_without_tools_is_content() -> None:
    chunks = chunks_of(CALL)
    assert not any("tool_calls" in chunk["choices"][0]["delta"] for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == CALL


def test_thinking_streams_as_reasoning_content() -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of("<think>hm</think>hello")]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.get("content") or "" for delta in deltas) == "hello"


def test_usage_comes_last_and_only_when_requested() -> None:
    *before, last = chunks_of("hello", stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len("hello")
    assert "cached_tokens" in last["usage"]["prompt_tokens_details"]
    assert all(chunk["usage"] is None for chunk in before)
    assert not any("usage" in chunk for chunk in chunks_of("hello"))


def test_streamed_logprobs_cover_the_whole_reply() -> None:
    chunks = chunks_of("hello" + CALL, tools=TOOLS, logprobs=True, top_logprobs=1)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [entry["token"] for each in logprobs if each for entry in each["content"]]
    assert "".join(tokens) == "hello" + CALL


def test_a_function_streams_in_the_older_form() -> None:
    chunks = chunks_of(CALL, functions=[TOOLS[0]["function"]])
    called = [d["function_call"] for c in chunks if "function_call" in (d := c["choices"][0]["delta"])]
    assert [each["name"] for each in called] == ["get_time"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_an_error_before_the_stream_is_a_status() -> None:
    with model_replying("x") as model, openai_client(model) as client:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="any", messages=[], stream=True)
        assert raised.value.param == "messages"


class get_time(pydantic.BaseModel):  # noqa: N801 - the tool's name
    """The time in a city."""

    city: str


def test_the_clients_stream_helper_reads_text_and_calls() -> None:
    tool = openai.pydantic_function_tool(get_time)
    with model_replying("hello" + CALL) as model, openai_client(model) as client:
        with client.chat.completions.stream(model="any", messages=[USER], tools=[tool]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
    assert {"chunk", "content.delta", "content.done", "tool_calls.function.arguments.done"} <= set(kinds)
    assert final.message.content == "hello"
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.parsed_arguments == get_time(city="Oslo")


def test_the_client_reads_streams_and_their_raw_responses() -> None:
    with model_replying("hello there") as model, running_server(model) as server, client_of(server) as client:
        stream = client.chat.completions.create(
            model="any", messages=[USER], stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello there"
        assert chunks[-1].usage is not None
        with client.chat.completions.with_streaming_response.create(
            model="any", messages=[USER], stream=True
        ) as response:
            assert list(response.iter_lines())[-2:] == ["data: [DONE]", ""]
