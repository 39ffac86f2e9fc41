"""Items of requests as messages: how replies are put together, names of functions, and thinking that comes back."""

from __future__ import annotations

import pytest

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.responses.items import read_items
from erllama.server.responses.reasoning import encode_thinking
from erllama.server.responses.tools import name_in_prompt, read_response_tools, read_tool_choice

USER: Json = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
MESSAGE: Json = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "hello", "annotations": []}],
}
REASONING: Json = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def call(id: str, **fields: object) -> Json:
    return {"type": "function_call", "call_id": id, "name": "f", "arguments": "{}", **fields}


def output(id: str, text: object = "done") -> Json:
    return {"type": "function_call_output", "call_id": id, "output": text}


def test_the_items_of_a_reply_are_one_message() -> None:
    messages = read_items(None, [USER, REASONING, MESSAGE, call("a"), call("b"), output("a"), output("b")]).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    reply = messages[1]
    assert reply["reasoning_content"] == "hm"
    assert [each["text"] for each in reply["content"]] == ["hello"]
    assert [each["id"] for each in reply["tool_calls"]] == ["a", "b"]


def test_replies_of_several_turns_stay_apart() -> None:
    messages = read_items(None, [USER, call("a"), output("a"), call("b"), output("b"), MESSAGE, USER]).messages
    assert [message["role"] for message in messages] == [
        *("user", "assistant", "tool", "assistant", "tool", "assistant", "user")
    ]


def test_two_messages_of_the_assistant_in_a_row_are_two_replies() -> None:
    messages = read_items(None, [USER, MESSAGE, MESSAGE]).messages
    assert [message["role"] for message in messages] == ["user", "assistant", "assistant"]


def test_developer_messages_keep_their_role_and_place() -> None:
    developer = {"role": "developer", "content": "rules"}
    conversation = read_items("be brief", [developer, developer, USER, MESSAGE, developer])
    assert [message["role"] for message in conversation.messages] == [
        *("system", "developer", "developer", "user", "assistant", "developer")
    ]
    assert conversation.places == [None, 0, 1, 2, 3, 4]


def test_outputs_may_be_texts_or_parts() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    messages = read_items(None, [USER, call("a"), call("b"), output("a", "text"), output("b", parts)]).messages
    assert [message["content"] for message in messages[2:]] == ["text", parts]


def test_unknown_items_are_skipped_and_reported() -> None:
    conversation = read_items(None, [USER, {"type": "web_search_call", "id": "ws_1"}])
    assert len(conversation.messages) == 1
    assert conversation.skipped == {"web_search_call"}


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({"content": [{"type": "reasoning_text", "text": "hm"}], "encrypted_content": encode_thinking("x")}, "hm"),
        ({"content": None, "encrypted_content": encode_thinking("schön")}, "schön"),
        ({"encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "short"}]}, "short"),
        ({"encrypted_content": "erllama-1:%%%"}, None),
        ({"summary": []}, None),
    ],
)
def test_thinking_is_read_from_what_the_client_kept(fields: Json, thinking: str | None) -> None:
    messages = read_items(None, [USER, {"type": "reasoning", **fields}, MESSAGE]).messages
    assert messages[1].get("reasoning_content") == thinking


def test_a_function_has_the_same_name_in_tools_and_calls() -> None:
    function = {"type": "function", "name": "f", "parameters": {}}
    namespace = {"type": "namespace", "name": "mcp__x", "description": "X.", "tools": [function]}
    tools = read_response_tools([namespace])
    assert tools.functions is not None
    [tool] = tools.functions
    assert tool["function"]["name"] == "mcp__x__f"
    assert tool["function"]["description"] == "X."
    messages = read_items(None, [USER, call("a", namespace="mcp__x")]).messages
    assert messages[1]["tool_calls"][0]["function"]["name"] == "mcp__x__f"
    assert tools.names.split("mcp__x__f") == ("mcp__x", "f")


def test_functions_of_namespaces_may_have_equal_names() -> None:
    function = {"type": "function", "name": "f"}
    tools = read_response_tools(
        [
            function,
            {"type": "namespace", "name": "a", "description": "", "tools": [function, {"type": "custom"}]},
            {"type": "namespace", "name": "b", "description": "", "tools": [function]},
        ]
    )
    assert tools.functions is not None
    assert [tool["function"]["name"] for tool in tools.functions] == ["f", "a__f", "b__f"]


def test_long_names_are_shortened_and_stay_apart() -> None:
    names = [name_in_prompt("n" * 40, "f" * 40 + end) for end in "ab"]
    assert names[0] != names[1]
    assert all(len(name) <= 64 for name in names)


def test_tools_keep_the_order_of_their_keys() -> None:
    parameters = {"type": "object", "z": 1, "a": 2}
    tools = read_response_tools([{"name": "f", "parameters": parameters, "description": "d", "type": "function"}])
    assert tools.functions is not None
    function = tools.functions[0]["function"]
    assert list(function) == ["name", "parameters", "description"]
    assert function["parameters"] is parameters


def test_allowed_tools_of_several_limits_the_functions() -> None:
    tools = read_response_tools([{"type": "function", "name": name} for name in "abc"])
    named = [{"type": "function", "name": name} for name in "ac"]
    choice = read_tool_choice({"type": "allowed_tools", "mode": "auto", "tools": named}, tools)
    assert choice.tool_choice == "auto"
    assert choice.functions is not None
    assert [each["function"]["name"] for each in choice.functions] == ["a", "c"]
    with pytest.raises(ApiError, match="names 'd'"):
        read_tool_choice({"type": "function", "name": "d"}, tools)
