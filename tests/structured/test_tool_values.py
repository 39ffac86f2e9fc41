"""Calls that the grammar can produce are read back equal; a marker within an argument is content."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping, Sequence

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import erllama
from erllama import Grammar
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.formats import TOOL_FORMATS, get_tool_format
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.tools import normalize_tools
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.errors import GrammarError
from support.chat.tool_calls import (
    HARD,
    LISTED,
    MARKERS,
    Schema,
    Unwritable,
    call_text,
    lark_literal,
)
from support.grammar_walks import VOCABULARIES, random_walk
from support.scripted_backend import PieceVocabulary, ScriptedBackend, scripted_reply

N = int(os.environ.get("ERLLAMA_TOOL_VALUES", "20"))


# --- A call as a family spells it ---------------------------------------------------------------


# --- Schemas, with values that they allow ------------------------------------------------------

# "~" stands for white space in the calls above.
texts = st.one_of(
    st.sampled_from(["", " ", "null", "None", "5", "true", "{}", '{"a": "', "\\", 'q"q', "it's", "a\nb", "\n"]),
    st.lists(st.sampled_from([text for text in HARD if "~" not in text]), max_size=4).map("".join),
    st.text(st.characters(max_codepoint=126, exclude_characters="~"), max_size=8),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="~"), max_size=3),
)
NAMES = [
    "a",
    "b-c",
    "$d",
    "e.f",
    "@g",
    "h i",
    "j:k",
    "l[0]",
    "m>n",
    'o"p',
    "q=r",
    "s,t",
    "u{v",
    "é",
    "<｜日▁",
    "</w>",
    "x'y",
    "Z",
]
names = st.one_of(st.sampled_from(NAMES), st.sampled_from([mark for mark in MARKERS if "\n" not in mark]))
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-99, 99), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=5,
)


def fixed(value: object) -> tuple[Schema, st.SearchStrategy[object]]:
    return {"const": value}, st.just(value)


def one_of_them(choices: list[object]) -> tuple[Schema, st.SearchStrategy[object]]:
    return {"enum": choices}, st.sampled_from(choices)


def listed(
    item: tuple[Schema, st.SearchStrategy[object]], least: int, more: int
) -> tuple[Schema, st.SearchStrategy[object]]:
    schema: Schema = {"type": "array", "items": item[0], "minItems": least, "maxItems": least + more}
    return schema, st.lists(item[1], min_size=least, max_size=least + more)


def object_of(
    parts: Mapping[str, tuple[Schema, st.SearchStrategy[object]]], optional: set[str]
) -> tuple[Schema, st.SearchStrategy[object]]:
    required = [name for name in parts if name not in optional]
    schema: Schema = {
        "type": "object",
        "properties": {name: part for name, (part, _) in parts.items()},
        "required": required,
        "additionalProperties": False,
    }
    # In the order of the schema, as JSON grammars require.
    values = st.fixed_dictionaries(
        {name: part for name, (_, part) in parts.items() if name in required},
        optional={name: part for name, (_, part) in parts.items() if name in optional},
    ).map(lambda found: {name: found[name] for name in parts if name in found})
    return schema, values


SCALARS: list[tuple[Schema, st.SearchStrategy[object]]] = [
    ({"type": "string"}, texts),
    ({"type": "string", "maxLength": 4}, texts.filter(lambda text: len(text) <= 4)),
    ({"type": ["string", "null"]}, st.one_of(st.none(), texts)),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, st.one_of(st.integers(0, 99), texts)),
    ({"type": "integer", "minimum": -9, "maximum": 99}, st.integers(-9, 99)),
    ({"type": "number"}, st.sampled_from([0, -1, 2.5, 0.125])),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "null"}, st.none()),
]
leaves = st.one_of(
    st.sampled_from(SCALARS),
    plain.map(fixed),
    texts.map(fixed),
    st.lists(plain, min_size=1, max_size=3, unique_by=repr).map(one_of_them),
    st.lists(texts, min_size=1, max_size=3, unique=True).map(lambda found: one_of_them([*found])),
)
objects = lambda parts: st.builds(  # noqa: E731 - a strategy of strategies reads as one
    object_of, st.dictionaries(names, parts, max_size=3), st.sets(names, max_size=2)
)
schemas = st.recursive(
    leaves,
    lambda parts: st.one_of(st.builds(listed, parts, st.integers(0, 1), st.integers(0, 2)), objects(parts)),
    max_leaves=4,
)


def grammar_of(format: str, tools: Sequence[Mapping[str, object]]) -> str:
    return write_call_grammar(get_tool_format(format), tools, name=None, parallel=False, literal=lark_literal)


@settings(
    max_examples=N,
    deadline=None,
    derandomize="ERLLAMA_TOOL_VALUES" not in os.environ,
    suppress_health_check=[*HealthCheck],
)
@given(st.data())
def test_calls_of_the_grammar_are_read_back_equal(data: st.DataObject) -> None:
    format = data.draw(st.sampled_from([*TOOL_FORMATS]))
    parameters, values = data.draw(objects(schemas))
    arguments = data.draw(values)
    assert isinstance(arguments, dict)
    tools = normalize_tools([{"name": "f.g-1", "parameters": parameters}])
    problem = ""
    try:
        grammar = Grammar.lark(grammar_of(format, tools))
    except GrammarError as error:
        problem = str(error)
    if problem:
        # Values that a family cannot write are reported, and no others are refused.
        assert re.search("alike|only texts that contain|cannot write", problem)
        assert format in (*LISTED, "gemma4")
        return
    # Text that the template writes itself.
    compiler, words = GrammarCompiler(VOCABULARIES["texts"]), VOCABULARIES["texts"]
    text = None
    if set(json.dumps(parameters, ensure_ascii=False)) <= set(words.texts):
        text = random_walk(words, compiler.matcher(grammar), random.Random(repr(arguments)))
    # A number with thousands of digits is refused with an error.
    if text is not None and not re.search(r"[eE][-+]?\d{4}", text):
        (call,) = read_calls(get_tool_format(format), text, tools)
        jsonschema.validate(call.arguments, parameters)
    # A value as the family writes it.
    try:
        text = call_text(format, "f.g-1", arguments, parameters)
    except Unwritable:
        return
    assert grammar.accepts(text), text
    (call,) = read_calls(get_tool_format(format), text, tools)
    assert json.dumps(call.arguments, sort_keys=True) == json.dumps(arguments, sort_keys=True), text


# --- A marker within an argument ----------------------------------------------------------------

TEMPLATE = "{{ messages[-1].content }}{% if tools %}{% endif %}{# <think></think> #}{{ '\t' }}"
# Names of special tokens are added as tokens below. Texts that never contain a token of the family are left out.
CONTENT = [
    *dict.fromkeys(mark for format in TOOL_FORMATS.values() for mark in (*format.close, *format.payload_close))
]


def model_replying(output: str, pieces: Sequence[str]) -> erllama.Model:
    vocabulary = PieceVocabulary(pieces, end="<|eog|>")
    tokens: Sequence[int] = vocabulary.tokenize(output).tolist()
    backend = ScriptedBackend(vocabulary, scripted_reply(vocabulary, tokens), chat_templates={"default": TEMPLATE})  # type: ignore[arg-type]
    return erllama.load_backend(backend, cache=erllama.Cache())


def with_marks(format: str, *, constant: bool) -> tuple[Schema, dict[str, object]]:
    """Draw the parameters of a tool, and arguments with the family's markers as far as it can write them."""
    found = TOOL_FORMATS[format]
    text = "".join(f"a {mark} b" for mark in dict.fromkeys([*found.payload_close, *found.close, *found.open[:1]]))
    arguments: dict[str, object] = {"body": text, "more": {"x": [text], "z": 5}}
    if format in LISTED:
        arguments["body"] = text.replace(found.payload_close[0], "")
    parts: Schema = {"x": {"type": "array", "items": {"type": "string"}}, "z": {"type": "integer"}}
    free: Schema = {
        "body": {"type": "string"},
        "more": {"type": "object", "properties": parts, "required": [*parts]},
    }
    return {
        "type": "object",
        "properties": {name: {"const": value} for name, value in arguments.items()} if constant else free,
        "required": ["body", "more"],
        "additionalProperties": False,
    }, arguments


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_a_marker_within_an_argument_is_content(format: str, choice: str) -> None:
    # The marker is text and also one text token, as USER_DEFINED tokens are.
    for token in (False, True):
        parameters, arguments = with_marks(format, constant=choice == "required")
        call = call_text(format, "write", arguments, parameters)
        found = TOOL_FORMATS[format]
        pieces = sorted({*found.open, *found.close, *found.payload_close}) if token else []
        with model_replying(f"<think>hm</think>{call}", pieces) as model:
            options = {"tools": [{"name": "write", "parameters": parameters}], "tool_format": format}
            messages = [{"role": "user", "content": "Q"}]
            stream = model.stream_chat(messages, tool_choice=choice, **options)  # type: ignore[arg-type]
            events = list(stream)
            reply = stream.result()
        assert [call.arguments for call in reply.tool_calls] == [arguments], reply.tool_call_errors
        assert (reply.thinking, reply.text, reply.finish_reason) == ("hm", "", "tool_calls")
        kinds = [type(event).__name__ for event in events]
        order = [kind for n, kind in enumerate(kinds) if n == 0 or kind != kinds[n - 1]]
        assert order == ["ThinkingDelta", "ThinkingEnd", "ToolCallDelta", "ToolCallEnd", "Done"]
        written = "".join(event.text for event in events if isinstance(event, erllama.ToolCallDelta))
        assert written == call == reply.raw_tool_calls[0].decode()


def parted(output: str, **options: object) -> tuple[str, list[str]]:
    """Return the text and the calls of a reply without a grammar."""
    with model_replying(output, []) as model:
        reply = model.complete("Q\t", tool_markers=("<call>", "</call>"), **options)  # type: ignore[arg-type]
    return reply.text, [call.decode() for call in reply.raw_tool_calls]


@pytest.mark.parametrize(
    ("output", "text", "calls"),
    [
        ('<call>{"a": "</call>"}</call>b', "b", ['<call>{"a": "</call>"}</call>']),
        ('<call>{"a": "\\"</call>"}</call>b', "b", ['<call>{"a": "\\"</call>"}</call>']),
        ('<call>{"a": "\\\\"}</call>b</call>', "b</call>", ['<call>{"a": "\\\\"}</call>']),
        (
            '<call>{"a</call>": ["</call>", "</call>"]}</call>b',
            "b",
            ['<call>{"a</call>": ["</call>", "</call>"]}</call>'],
        ),
        # A malformed call ends at the first marker.
        ('<call>{"a": "x, "b": 1}</call>b', "b", ['<call>{"a": "x, "b": 1}</call>']),
        ('<call>{"a": "x\n}</call>b', "b", ['<call>{"a": "x\n}</call>']),
        ('<call>a 5" pipe</call>b', "b", ['<call>a 5" pipe</call>']),
        ('<call>"</call>b', "b", ['<call>"</call>']),
        ("<call>it's</call>b", "b", ["<call>it's</call>"]),
        ('<call>{"a": "</call>', "", ['<call>{"a": "</call>']),
    ],
)
def test_without_a_grammar_a_marker_within_a_string_is_content(output: str, text: str, calls: list[str]) -> None:
    assert parted(output) == (text, calls)
    assert parted(output, tool_payload_markers=("{", "}")) == (text, calls)


def test_an_invalid_call_stays_in_place_as_text() -> None:
    output = "One <tool_call>{no}</tool_call> two <tool_call>{nor}</tool_call> three"
    with model_replying(output, []) as model:
        tools = [{"name": "write", "parameters": {"type": "object"}}]
        markers = ("<tool_call>", "</tool_call>")
        reply = model.chat([{"role": "user", "content": "Q"}], tools=tools, tool_markers=markers)
    assert "".join(reply.text.split()) == "".join(output.split())
    assert len(reply.tool_call_errors) == 2
    before = [reply.text[:place] for place in reply.tool_call_places]
    assert before == ["One", "One<tool_call>{no}</tool_call>two"]
