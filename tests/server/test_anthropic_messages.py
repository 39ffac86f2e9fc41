"""Anthropic's Messages API: whole messages, driven by the official client."""

from __future__ import annotations

import anthropic
import httpx
import pytest

from support.anthropic_clients import TOOLS, client_of, client_replying, prompt_tokens
from support.chat.scripted_model import CALL, model_replying
from support.http_server import running_server

HELLO = [{"role": "user", "content": "hello"}]


def create(client: anthropic.Anthropic, messages: list[dict[str, object]] | None = None, **options: object):
    given = {"model": "any", "max_tokens": 200, "messages": messages or HELLO, **options}
    return client.messages.create(**given)


def test_a_message_has_text_and_all_token_counts() -> None:
    with client_replying("Good day.") as client:
        message = create(client)
        assert [block.to_dict() for block in message.content] == [{"type": "text", "text": "Good day."}]
        assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
        assert message.usage.output_tokens == len("Good day.")
        counted = client.messages.count_tokens(model="any", messages=HELLO).input_tokens
        assert prompt_tokens(message.usage) == counted


def test_a_second_message_reads_its_prompt_from_the_cache() -> None:
    with client_replying("Good day.") as client:
        create(client)
        usage = create(client).usage
        assert usage.cache_read_input_tokens == prompt_tokens(usage) - 1
        assert usage.input_tokens + usage.cache_creation_input_tokens == 1


def test_a_tool_is_called_and_its_result_answered() -> None:
    with client_replying(f"I look.{CALL}", "Noon.") as client:
        first = create(client, tools=TOOLS)
        assert [block.type for block in first.content] == ["text", "tool_use"]
        call = first.content[1]
        assert (call.name, call.input, first.stop_reason) == ("get_time", {"city": "Oslo"}, "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "12:00"}]}
        messages = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        second = create(client, messages, tools=TOOLS)
        assert second.content[0].text == "Noon."
        # All but the result and the template's own tokens was computed before.
        before = prompt_tokens(first.usage) + first.usage.output_tokens
        assert second.usage.cache_read_input_tokens >= before


def test_tool_choice_none_and_required_are_followed() -> None:
    with client_replying(CALL) as client:
        assert create(client, tools=TOOLS, tool_choice={"type": "any"}).stop_reason == "tool_use"
        named = {"type": "tool", "name": "get_time", "disable_parallel_tool_use": True}
        assert create(client, tools=TOOLS, tool_choice=named).stop_reason == "tool_use"
        assert create(client, tools=TOOLS, tool_choice={"type": "auto"}).stop_reason == "tool_use"
        message = create(client, tools=TOOLS, tool_choice={"type": "none"})
        assert [block.type for block in message.content] == ["text"]
        with pytest.raises(anthropic.BadRequestError, match="unknown tool"):
            create(client, tools=TOOLS, tool_choice={"type": "tool", "name": "web_search"})


def test_one_call_per_reply_if_parallel_use_is_disabled() -> None:
    with client_replying(CALL + CALL) as client:
        assert len(create(client, tools=TOOLS).content) == 2
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        assert len(create(client, tools=TOOLS, tool_choice=choice).content) == 1


def test_stop_sequences_and_limits_name_the_reason() -> None:
    with client_replying("one two three") as client:
        stopped = create(client, stop_sequences=["two", "xyz"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "two")
        assert stopped.content[0].text == "one "
        limited = create(client, max_tokens=3)
        assert (limited.stop_reason, limited.content[0].text) == ("max_tokens", "one")
        warmed = create(client, max_tokens=0)
        assert (warmed.stop_reason, warmed.content) == ("max_tokens", [])


def test_system_blocks_count_and_stay_in_their_places() -> None:
    with client_replying("x") as client:

        def count(**options: object) -> int:
            return client.messages.count_tokens(**{"model": "any", "messages": HELLO, **options}).input_tokens

        block = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
        assert count(system="Be brief.") == count(system=[block]) > count()
        assert count(tools=TOOLS) > count()
        later = [*HELLO, {"role": "system", "content": [block]}]
        assert count(messages=later) == count(system="Be brief.")
        message = create(client, later)
        assert prompt_tokens(message.usage) == count(messages=later)


@pytest.mark.parametrize(
    "content",
    [
        "failed",
        [{"type": "text", "text": "failed", "cache_control": None}],
        [{"type": "text", "text": "Error: failed"}],
    ],
)
def test_a_failed_tool_is_an_error_for_the_model(content: object) -> None:
    call = {"type": "tool_use", "id": "a", "name": "get_time", "input": {"city": "Oslo"}}
    asked = [*HELLO, {"role": "assistant", "content": [call]}]

    def messages(**result: object) -> list[dict[str, object]]:
        return [*asked, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", **result}]}]

    with client_replying("x") as client:
        failed = client.messages.count_tokens(model="any", messages=messages(content=content, is_error=True))
        plain = client.messages.count_tokens(model="any", messages=messages(content="Error: failed"))
        assert failed.input_tokens == plain.input_tokens


def test_blocks_of_server_tools_and_redacted_thinking_are_skipped() -> None:
    blocks = [
        {"type": "redacted_thinking", "data": "abc"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        {"type": "text", "text": "found"},
    ]
    with client_replying("x") as client:

        def count(content: object) -> int:
            messages = [*HELLO, {"role": "assistant", "content": content}, *HELLO]
            return client.messages.count_tokens(model="any", messages=messages).input_tokens

        assert count(blocks) == count("found")


def test_a_last_message_of_the_assistant_is_continued() -> None:
    with client_replying("x", "The answer is 42.") as client:
        message = create(client, [*HELLO, {"role": "assistant", "content": "x"}, *HELLO])
        assert message.content[0].text == "The answer is 42."
        begun = [
            *HELLO,
            {"role": "assistant", "content": "x"},
            *HELLO,
            {"role": "assistant", "content": "The answer"},
        ]
        continued = create(client, begun)
        assert continued.content[0].text == " is 42."


def test_messages_of_the_user_in_a_row_are_one() -> None:
    with client_replying("x") as client:
        rows = [{"role": "user", "content": "one"}, {"role": "user", "content": [{"type": "text", "text": "two"}]}]
        one = [{"role": "user", "content": "one\n\ntwo"}]
        counts = [client.messages.count_tokens(model="any", messages=each).input_tokens for each in (rows, one)]
        assert counts[0] == counts[1]


def test_a_json_schema_constrains_the_text() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    with client_replying('{"a": 1} and more') as client:
        message = create(
            client, output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "max"}
        )
        assert message.content[0].text == '{"a": 1}'


def test_sampling_options_and_metadata_are_accepted() -> None:
    with client_replying("Good day.") as client:
        message = create(
            client,
            metadata={"user_id": "u"},
            service_tier="auto",
            extra_body={
                "temperature": 1,
                "top_k": 5,
                "top_p": 0.9,
                "stop_sequences": None,
                "unknown": {"field": 1},
            },
        )
        assert message.content[0].text == "Good day."


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "tool_use"}]}, "system[0].type"),
        ({"tools": {}}, "tools"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ],
)
def test_a_wrong_field_is_an_error_with_its_path(change: dict[str, object], where: str) -> None:
    with client_replying("x") as client, pytest.raises(anthropic.BadRequestError) as caught:
        create(client, extra_body=change)
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert where in body["error"]["message"]
    assert body["request_id"] == caught.value.request_id


def test_a_prompt_that_is_too_long_names_both_numbers() -> None:
    with client_replying("x") as client:
        long = [{"role": "user", "content": "a b " * 5_000}]
        with pytest.raises(anthropic.BadRequestError) as caught:
            create(client, long)
        error = caught.value.body["error"]  # type: ignore[index]
        assert error["code"] == "context_length_exceeded"
        assert (
            f"prompt is too long: {error['n_prompt_tokens']} tokens > {error['n_ctx']} maximum" in error["message"]
        )
        assert error["n_prompt_tokens"] > error["n_ctx"] > 0


def test_a_full_queue_is_overloaded_with_a_time_to_retry() -> None:
    from erllama.errors import QueueFull
    from erllama.server.anthropic.errors import ERRORS
    from erllama.server.conduct.errors import as_api_error
    from erllama.server.endpoints import CallRecord, error_response

    response = error_response(ERRORS, as_api_error(QueueFull("full")), CallRecord("id7", "/v1/messages"))
    assert (response.status_code, response.headers["retry-after"]) == (529, "1")
    assert b'"overloaded_error"' in response.body
    assert b'"request_id":"id7"' in response.body


def test_a_wrong_key_is_an_authentication_error() -> None:
    from erllama.server import ApiKey

    with model_replying("x") as model, running_server(model, keys=(ApiKey(secret="right"),)) as server:
        with client_of(server.url, api_key="right") as client:
            assert create(client).content[0].text == "x"
        with (
            client_of(server.url, api_key="wrong") as client,
            pytest.raises(anthropic.AuthenticationError) as caught,
        ):
            create(client)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_an_empty_conversation_gets_a_reply() -> None:
    with model_replying("x") as model, running_server(model) as server:
        answer = httpx.post(f"{server.url}/v1/messages", json={"messages": []}, timeout=120.0)
        assert (answer.status_code, answer.json()["content"][0]["text"]) == (200, "x")
