"""Messages and tools of callers: normalized to one form, with errors that name the message."""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Mapping
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erllama import Grammar
from erllama.chat.json_values import InvalidValueError, parse_json
from erllama.chat.messages import normalize_messages
from erllama.chat.tool_calls.tools import (
    ToolChoice,
    check_schemas,
    get_parameters,
    get_tool_names,
    normalize_tools,
    parse_tool_choice,
)
from erllama.chat.types import ROLES
from erllama.errors import ChatError, OptionError

Message = dict[str, object]


def hi() -> Message:
    return {"role": "user", "content": "Hi"}


def call(id: str = "c1", name: str = "f", arguments: object = "{}") -> Message:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Message, **more: object) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": list(calls or [call()]), **more}


def result(id: str = "c1", content: object = "42", **more: object) -> Message:
    return {"role": "tool", "tool_call_id": id, "content": content, **more}


# --- One form ----------------------------------------------------------------------------------


def test_plain_messages_are_unchanged() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": ""},
        {"role": "user", "content": "Hi", "name": "ann"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert normalize_messages(messages) == messages
    assert normalize_messages(tuple(map(MappingProxyType, messages))) == messages


def test_text_parts_are_joined_in_order() -> None:
    parts = [
        {"type": "text", "text": "a"},
        "b",
        {"type": "input_text", "text": "\nc"},
        {"type": "output_text", "text": "d"},
    ]
    for role in ("system", "developer", "user", "assistant"):
        assert normalize_messages([{"role": role, "content": parts}]) == [{"role": role, "content": "ab\ncd"}]
    cached = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    assert normalize_messages([{"role": "user", "content": cached}]) == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("arguments", ['{"a": [1, null]}', ' {"a":[1,null]}\n', {"a": [1, None]}, {"a": (1, None)}])
def test_arguments_become_a_mapping(arguments: object) -> None:
    (_, asked) = normalize_messages([hi(), calling(call(arguments=arguments))])
    assert asked == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call(arguments={"a": [1, None]})],
    }


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_missing_arguments_are_an_empty_mapping(arguments: object) -> None:
    assert normalize_messages([calling(call(arguments=arguments))])[0]["tool_calls"] == [call(arguments={})]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_normalized_to_one_key(key: str) -> None:
    expected = [{"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}]
    assert normalize_messages([{"role": "assistant", "content": "4", key: "2 + 2"}]) == expected
    both = [{"role": "assistant", "content": "4", key: "2 + 2", "reasoning_content": "2 + 2"}]
    assert normalize_messages(both) == expected
    assert normalize_messages([{"role": "assistant", "content": "4", key: ""}]) == [
        {"role": "assistant", "content": "4"}
    ]


def test_a_refusal_becomes_the_content() -> None:
    expected = [{"role": "assistant", "content": "No."}]
    assert normalize_messages([{"role": "assistant", "content": None, "refusal": "No."}]) == expected
    part = {"type": "refusal", "refusal": "No."}
    assert normalize_messages([{"role": "assistant", "content": [part]}]) == expected


def test_results_carry_the_name_of_their_call() -> None:
    messages = [calling(call("x", "f"), call("y", "g")), result("y", "1"), result("x", "2", name="f")]
    assert normalize_messages(messages)[1:] == [
        {"role": "tool", "content": "1", "tool_call_id": "y", "name": "g"},
        {"role": "tool", "content": "2", "tool_call_id": "x", "name": "f"},
    ]


def test_replies_that_clients_send_back_are_accepted() -> None:
    reply: Message = {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "parsed": None,
    }
    assert normalize_messages([reply]) == [{"role": "assistant", "content": "Hello"}]
    assert normalize_messages([{**reply, "tool_calls": []}]) == [{"role": "assistant", "content": "Hello"}]


def test_the_older_form_of_calls_is_accepted() -> None:
    messages = [
        hi(),
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "42"},
    ]
    _, asked, answer = normalize_messages(messages)
    assert isinstance(asked["tool_calls"], list)
    (made,) = asked["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"a": 1}}
    assert answer == {"role": "tool", "content": "42", "tool_call_id": made["id"], "name": "f"}


def test_calls_without_ids_are_answered_by_name_and_in_order() -> None:
    bare = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in "fgf"]
    answers = [
        {"role": "tool", "name": name, "content": text} for name, text in (("g", "1"), ("f", "2"), ("f", "3"))
    ]
    asked, *found = normalize_messages([{"role": "assistant", "tool_calls": bare}, *answers])
    assert isinstance(asked["tool_calls"], list)
    ids = [made["id"] for made in asked["tool_calls"]]
    assert len(set(ids)) == 3
    assert [(message["tool_call_id"], message["content"]) for message in found] == [
        (ids[1], "1"),
        (ids[0], "2"),
        (ids[2], "3"),
    ]


def test_a_generated_id_differs_from_existing_ids() -> None:
    bare: Message = {"function": {"name": "g"}}
    asked = normalize_messages([calling(call("call_0_1"), bare)])[0]
    assert isinstance(asked["tool_calls"], list)
    assert asked["tool_calls"][1]["id"] not in ("call_0_1", None, "")


def test_an_id_may_be_reused_once_it_is_answered() -> None:
    messages = [calling(call(name="f")), result(), calling(call(name="g")), result()]
    assert [message.get("name") for message in normalize_messages(messages)] == [None, "f", None, "g"]


def test_results_precede_other_content_of_a_user_message() -> None:
    blocks = [
        {"type": "text", "text": "So "},
        {
            "type": "tool_result",
            "tool_use_id": "y",
            "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}],
        },
        {"type": "text", "text": "what?"},
        {"type": "tool_result", "tool_use_id": "x", "is_error": True},
    ]
    messages = [calling(call("x", "f"), call("y", "g")), {"role": "user", "content": blocks}]
    assert normalize_messages(messages)[1:] == [
        {"role": "tool", "content": "12", "tool_call_id": "y", "name": "g"},
        {"role": "tool", "content": "", "tool_call_id": "x", "name": "f"},
        {"role": "user", "content": "So what?"},
    ]
    alone = normalize_messages([messages[0], {"role": "user", "content": blocks[1:2]}])
    assert [message["role"] for message in alone] == ["assistant", "tool"]


def test_callers_objects_are_neither_changed_nor_shared() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    given: list[Message] = [
        {"role": Role.USER, "content": [{"type": "text", "text": "Hi"}]},
        calling(call(arguments={"a": {"b": [1]}})),
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "x"}]},
    ]
    before = copy.deepcopy(given)
    found = normalize_messages(given)
    assert given == before
    assert type(found[0]["role"]) is str
    found[1]["tool_calls"][0]["function"]["arguments"]["a"]["b"].append(2)  # type: ignore[index]
    assert given == before


# --- OpenAI's and Anthropic's spellings --------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
arguments_ = st.dictionaries(texts, values, max_size=3)
names = st.text("abz_-.9", min_size=1, max_size=6)
# A turn: the user's text, the assistant's thinking and text, and the calls with their results.
turns = st.tuples(texts, texts, texts, st.lists(st.tuples(names, arguments_, texts), max_size=3))


@given(st.lists(turns, min_size=1, max_size=3), st.booleans(), st.booleans())
def test_both_client_forms_normalize_to_one_conversation(
    conversation: list[tuple[str, str, str, list[tuple[str, dict[str, object], str]]]],
    as_text: bool,
    in_parts: bool,
) -> None:
    openai: list[Message] = []
    anthropic: list[Message] = []
    ids = iter(f"toolu_{n}" for n in range(100))
    pending: list[Message] = []
    for question, thought, answer, made in conversation:
        openai.append({"role": "user", "content": [{"type": "text", "text": question}] if in_parts else question})
        anthropic.append({"role": "user", "content": [*pending, {"type": "text", "text": question}]})
        asked = [(next(ids), name, arguments, text) for name, arguments, text in made]
        reply: Message = {"role": "assistant", "content": answer or (None if asked else "")}
        blocks: list[Message] = [{"type": "text", "text": answer}]
        if thought:
            reply["reasoning_content"] = thought
            blocks = [
                {"type": "thinking", "thinking": thought, "signature": "abc"},
                {"type": "redacted_thinking", "data": "…"},
                *blocks,
            ]
        if asked:
            reply["tool_calls"] = [
                call(id, name, json.dumps(arguments) if as_text else arguments) for id, name, arguments, _ in asked
            ]
            blocks += [
                {"type": "tool_use", "id": id, "name": name, "input": arguments} for id, name, arguments, _ in asked
            ]
        openai += [reply, *(result(id, text) for id, _, _, text in asked)]
        anthropic.append({"role": "assistant", "content": blocks})
        pending = [{"type": "tool_result", "tool_use_id": id, "content": text} for id, _, _, text in asked]
    if pending:
        anthropic.append({"role": "user", "content": pending})
    expected = normalize_messages(openai)
    assert normalize_messages(anthropic) == expected
    assert normalize_messages(expected) == expected
    assert [message["content"] for message in expected if message["role"] == "user"] == [
        turn[0] for turn in conversation
    ]


# --- Errors ------------------------------------------------------------------------------------

RESULT = {"type": "tool_result", "tool_use_id": "c1"}
USE = {"type": "tool_use", "id": "x", "name": "f", "input": {}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
# Messages, the index of the wrong one, and a part of the error.
BAD: list[tuple[object, int | None, str]] = [
    ([], None, "messages is empty"),
    ("Hi", None, "not str"),
    (hi(), None, "not dict"),
    (None, None, "not NoneType"),
    (5, None, "not int"),
    ([hi(), "Hi"], 1, "must be a mapping, not str"),
    ([hi(), None], 1, "must be a mapping"),
    ([{"content": "Hi"}], 0, "unknown role None"),
    ([{"role": "users", "content": "Hi"}], 0, "did you mean 'user'?"),
    ([hi(), {"role": "asistant", "content": "Hi"}], 1, "did you mean 'assistant'?"),
    ([{"role": "", "content": "Hi"}], 0, "known names: 'system'"),
    ([{"role": ["user"], "content": "Hi"}], 0, "unknown role ['user']"),
    ([hi(), {"role": "user"}], 1, "must have content"),
    ([{"role": "user", "content": None}], 0, "must have content"),
    ([{"role": "user", "content": []}], 0, "empty list"),
    ([hi(), {"role": "assistant"}], 1, "must have content or tool_calls"),
    ([hi(), {"role": "assistant", "content": None, "tool_calls": []}], 1, "must have content or tool_calls"),
    ([hi(), {"role": "assistant", "content": None, "thinking": "Hm"}], 1, "must have content or tool_calls"),
    ([{"role": "user", "contents": "Hi"}], 0, "did you mean 'content'?"),
    ([{"role": "user", "content": "Hi", "mood": 1}], 0, "a message has the unknown key 'mood'"),
    ([{"role": "user", "content": "Hi", 5: 1}], 0, "a message has the unknown key 5"),
    ([{"role": "user", "content": 5}], 0, "content has the type int"),
    ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], 0, "content has the type dict"),
    ([{"role": "user", "content": [5]}], 0, "a part of content must be a mapping"),
    ([{"role": "user", "content": [{"text": "Hi"}]}], 0, "the type of a part of content is None"),
    ([{"role": "user", "content": [{"type": "txt", "text": "Hi"}]}], 0, "did you mean 'text'?"),
    ([{"role": "user", "content": [{"type": "text", "text": 5}]}], 0, "must be a string, not int"),
    ([{"role": "user", "content": [{"type": "text"}]}], 0, "must be a string, not NoneType"),
    ([hi(), {"role": "user", "content": [IMAGE]}], 1, "only text is supported"),
    ([{"role": "user", "content": [{"type": "image", "source": {}}]}], 0, "only text is supported"),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], 0, "only text is supported"),
    ([{"role": "user", "content": [{"type": "file", "file": {}}]}], 0, "only text is supported"),
    ([{"role": "user", "content": "Hi", "name": 5}], 0, "name must be a string"),
    ([{"role": "user", "content": "Hi", "tool_calls": [call()]}], 0, "role 'user' must not have 'tool_calls'"),
    (
        [{"role": "assistant", "content": "Hi", "tool_call_id": "x"}],
        0,
        "role 'assistant' must not have 'tool_call_id'",
    ),
    ([{"role": "user", "content": "half \ud800"}], 0, "surrogate"),
    ([{"role": "user", "content": [{"type": "text", "text": "\udfff"}]}], 0, "surrogate"),
    ([calling(call(arguments={"a": "\ud800"}))], 0, "surrogate"),
    ([calling(call(arguments='{"a": "\\ud800"}'))], 0, "surrogate"),
    ([calling(call(arguments={"\ud800": 1}))], 0, "surrogate"),
    ([calling(call(arguments={"a": float("nan")}))], 0, "nan"),
    ([calling(call(arguments={"a": [float("inf")]}))], 0, "inf"),
    ([calling(call(arguments='{"a": NaN}'))], 0, "NaN"),
    ([calling(call(arguments='{"a": 1e9999}'))], 0, "too many digits"),
    ([calling(call(arguments="[1]"))], 0, "the type list; expected a JSON object"),
    ([calling(call(arguments=[1]))], 0, "the type list; expected a JSON object"),
    ([calling(call(arguments=5))], 0, "the type int; expected a JSON object"),
    ([calling(call(arguments="{'a': 1}"))], 0, "not JSON: Expecting property name"),
    ([calling(call(arguments='{"a": 1} x'))], 0, "more text after the JSON, at character 9"),
    ([calling(call(arguments={1: 2}))], 0, "1 is a key"),
    ([calling(call(arguments={"a": {1}}))], 0, "set is not a JSON type"),
    ([calling(call(arguments='{"a":' * 5000))], 0, "nested deeper"),
    ([calling(call(name=""))], 0, "a tool call's name is ''"),
    ([calling(call(name="f g"))], 0, "a tool call's name is 'f g'"),
    ([calling({"id": "x", "type": "function"})], 0, "'function' of a tool call must be a mapping"),
    ([calling({"id": "x", "type": "custom", "custom": {}})], 0, "the type 'custom'"),
    ([{"role": "assistant", "content": None, "tool_calls": call()}], 0, "tool_calls has the type dict"),
    ([hi(), calling(call(), call())], 1, "two tool calls have the id 'c1'"),
    ([calling(call()), calling(call())], 1, "two tool calls have the id 'c1'"),
    ([calling(call(id=""))], 0, "id is empty"),
    ([hi(), result()], 1, "unknown tool call 'c1'"),
    ([calling(call("abc")), result("abd")], 1, "did you mean 'abc'?"),
    ([calling(), result(), result()], 2, "has two results"),
    ([calling(), result(content=None)], 1, "must have content"),
    ([calling(), result(content=[IMAGE])], 1, "only text is supported"),
    ([calling(), result(name="g")], 1, "the call has 'f'"),
    ([calling(call("x"), call("y")), {"role": "tool", "content": "1"}], 1, "no tool_call_id"),
    ([hi(), {"role": "function", "name": "f", "content": "1"}], 1, "no unanswered tool call"),
    (
        [calling(), {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "z"}]}],
        1,
        "unknown tool call 'z'",
    ),
    (
        [calling(), {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "is_error": 1}]}],
        1,
        "is_error",
    ),
    (
        [{"role": "user", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {}}]}],
        0,
        "not allowed here",
    ),
    ([{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}], 0, "not allowed here"),
    (
        [{"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": "{"}]}],
        0,
        "not JSON",
    ),
    ([{"role": "assistant", "content": "4", "thinking": "a", "reasoning": "b"}], 0, "differ; use one"),
]


@pytest.mark.parametrize(("messages", "index", "problem"), BAD)
def test_errors_name_the_message_and_the_fault(messages: object, index: int | None, problem: str) -> None:
    with pytest.raises(ChatError) as error:
        normalize_messages(messages)
    assert problem in str(error.value)
    assert error.value.index == index
    assert index is None or str(error.value).startswith(f"message {index}: ")
    assert len(str(error.value)) < 300


WORDS = ["text", "tool_use", "tool_result", "thinking", "image", "c1", "{}", "f"]
KEYS = [
    *("role", "content", "tool_calls", "tool_call_id", "id", "function", "name", "arguments", "type"),
    *("text", "input", "tool_use_id", "thinking", "reasoning", "refusal", "function_call", "is_error"),
]
roles = st.sampled_from([*ROLES, "function"])
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=3),
        st.sampled_from(WORDS),
        roles,
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner),
        st.dictionaries(st.one_of(st.text(max_size=2), st.integers()), inner, max_size=3),
        st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, inner)),
    ),
    max_leaves=15,
)
nearly = st.lists(
    st.fixed_dictionaries({"role": roles}, optional={"content": junk, "tool_calls": junk, "name": junk})
)


@given(st.one_of(junk, nearly))
def test_arbitrary_messages_are_refused_or_become_valid(messages: object) -> None:
    try:
        found = normalize_messages(messages)
    except ChatError:
        return
    json.dumps(found, allow_nan=False, ensure_ascii=False).encode()
    assert normalize_messages(found) == found
    for message in found:
        assert message["role"] in ROLES
        assert type(message["content"]) is str
        assert set(message) <= {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"}


# --- Tools -------------------------------------------------------------------------------------

SCHEMA: dict[str, object] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL: dict[str, object] = {"name": "f", "description": "Does f.", "parameters": SCHEMA}
NORMAL = {"type": "function", "function": TOOL}


@pytest.mark.parametrize(
    "tool",
    [
        NORMAL,
        TOOL,
        {"type": "function", **TOOL},
        {"type": "function", "function": {**TOOL, "strict": True, "return": {"type": "string"}}},
        {"name": "f", "description": "Does f.", "input_schema": SCHEMA},
        {"type": "custom", "name": "f", "description": "Does f.", "input_schema": SCHEMA, "cache_control": {}},
    ],
)
def test_tools_are_normalized_to_one_form(tool: Mapping[str, object]) -> None:
    before = copy.deepcopy(dict(tool))
    found = normalize_tools([tool])
    assert found == [NORMAL]
    assert normalize_tools(found) == found
    found[0]["function"]["parameters"]["properties"].clear()  # type: ignore[index]
    assert tool == before


def test_a_tool_without_parameters_takes_none() -> None:
    for tool in ({"name": "now"}, {"name": "now", "parameters": None}, {"name": "now", "parameters": {}}):
        (found,) = normalize_tools([tool])
        assert found["function"] == {
            "name": "now",
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        }
    assert normalize_tools(None) == []
    assert normalize_tools([]) == []


def test_a_schema_without_a_type_is_one_of_objects() -> None:
    schema = {"$ref": "#/$defs/p", "$defs": {"p": SCHEMA}}
    (found,) = normalize_tools([{"name": "f", "parameters": schema}])
    compiled = Grammar.json_schema(get_parameters([found])["f"])
    assert compiled.accepts('{"a": 1}')
    assert not compiled.accepts('{"a": "1"}')


BAD_TOOLS: list[tuple[object, str]] = [
    ("f", "not str"),
    (TOOL, "not dict"),
    ([5], "tool 0: a tool must be a mapping"),
    ([{}], "tool 0: its name is None"),
    ([NORMAL, {"name": "f"}], "tool 'f': the name is repeated"),
    ([{"name": "f g"}], "its name is 'f g'"),
    ([{"name": "é"}], "its name is"),
    ([{"name": "a" * 65}], "its name is"),
    ([{"name": "f\n"}], "its name is"),
    ([{"name": "f", "paramters": {}}], "did you mean 'parameters'?"),
    ([{"name": "f", "description": 5}], "tool 'f': its description must be a string"),
    ([{"name": "f", "description": "\ud800"}], "tool 'f': character 0 is half of a surrogate pair"),
    ([{"name": "f", "parameters": 5}], "must be a schema, not int"),
    ([{"name": "f", "parameters": {"type": "string"}}], 'the type "string"; the type of arguments is'),
    ([{"name": "f", "parameters": {"type": ["object", "null"]}}], "the type of arguments is"),
    (
        [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "strin"}}}}],
        "tool 'f': its parameters do not compile",
    ),
    ([{"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/x"}}}}], "do not compile"),
    ([{"name": "f", "parameters": {"type": "object", "minProperties": float("nan")}}], "nan"),
    ([{"name": "f", "parameters": SCHEMA, "input_schema": SCHEMA}], "remove one"),
    ([{"type": "function", "function": "f"}], "its function must be a mapping"),
    ([{"type": "web_search", "name": "f"}], "type is 'web_search'"),
]


@pytest.mark.parametrize(("tools", "problem"), BAD_TOOLS)
def test_errors_name_the_tool_and_the_fault(tools: object, problem: str) -> None:
    with pytest.raises(ChatError) as error:
        check_schemas(normalize_tools(tools))
    assert problem in str(error.value)
    assert len(str(error.value)) < 400


@given(junk)
def test_arbitrary_tools_are_refused_or_become_valid(tools: object) -> None:
    try:
        found = normalize_tools(tools)
        check_schemas(found)
    except ChatError:
        return
    assert normalize_tools(found) == found
    assert len(set(get_tool_names(found))) == len(found)


TOOLS = normalize_tools([TOOL, {"name": "auto.f"}, {"name": "get_weather"}])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ("f", ToolChoice("required", "f")),
        ("auto.f", ToolChoice("required", "auto.f")),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice("required", "f")),
        ({"type": "function", "name": "f"}, ToolChoice("required", "f")),
        ({"type": "auto"}, ToolChoice("auto")),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice("auto")),
        ({"type": "none"}, ToolChoice("none")),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "tool", "name": "f"}, ToolChoice("required", "f")),
        (ToolChoice("required", "f"), ToolChoice("required", "f")),
    ],
)
def test_tool_choices_are_normalized_to_one_form(choice: object, expected: ToolChoice) -> None:
    assert parse_tool_choice(choice, TOOLS) == expected


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ("get_wether", "did you mean 'get_weather'?"),
        ("xyz", "known names: 'f', 'auto.f', 'get_weather'"),
        ({"type": "tool", "name": "g"}, "tool_choice names an unknown tool: 'g'"),
        ({"type": "function", "function": {"name": "F1"}}, "tool_choice names an unknown tool: 'F1'"),
        ({"type": "tool"}, "expected 'auto'"),
        ({"type": "function"}, "expected 'auto'"),
        ({"type": ["auto"]}, "expected 'auto'"),
        ({}, "expected 'auto'"),
        (True, "expected 'auto'"),
        (5, "expected 'auto'"),
        (ToolChoice("required", "g"), "names an unknown tool"),
    ],
)
def test_an_invalid_tool_choice_is_refused(choice: object, problem: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_tool_choice(choice, TOOLS)
    assert problem in str(error.value)


@pytest.mark.parametrize("choice", ["required", {"type": "any"}, ToolChoice("required")])
def test_a_required_call_without_tools_is_refused(choice: object) -> None:
    with pytest.raises(OptionError, match="there are no tools"):
        parse_tool_choice(choice, [])
    assert parse_tool_choice("auto", []) == ToolChoice("auto")
    assert parse_tool_choice("none", []) == ToolChoice("none")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("7.205759403792274e+16", 7.205759403792274e16),
        ("1234567890123456789", 1234567890123456789),
        ("5e735", 5 * 10**735),
        ("-1.25e400", -125 * 10**398),
        ("1e-400", 0.0),
    ],
)
def test_numbers_that_a_type_holds_are_read_exactly(text: str, value: float) -> None:
    found = parse_json(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ["1e4001", "-1e99999999999999999999", "1" * 400 + ".5", "9" * 5000])
def test_numbers_that_no_type_holds_are_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match=r"digits|larger than any float"):
        parse_json(text)
