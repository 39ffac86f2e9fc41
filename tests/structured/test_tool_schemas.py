"""Tool schemas that no grammar can enforce: relaxed and validated after a call is read, or refused."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence

import jsonschema
import pytest

import erllama
from erllama import Grammar
from erllama.chat.family import Family
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.formats import TOOL_FORMATS, get_tool_format
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.schema_enforcement import find_violation, relax_schema
from erllama.chat.tool_calls.tools import ToolChoice, check_schemas, find_strict_tools, normalize_tools
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.engine.output.token_codec import TokenCodec
from erllama.errors import ChatError, GrammarError, OptionError
from support.chat.tool_calls import LISTED, NOW, WEATHER, Schema, call_text, lark_literal
from support.grammar_walks import VOCABULARIES, random_walk
from support.scripted_backend import PieceVocabulary, ScriptedBackend, scripted_reply

# As pydantic writes them: Path, bytes, SecretStr, IPv4Network, Base64Str, FilePath, Json, Decimal.
ANNOTATED: Schema = {
    "p": {"format": "path", "title": "P", "type": "string"},
    "b": {"format": "binary", "title": "B", "type": "string"},
    "k": {"format": "password", "title": "K", "type": "string", "writeOnly": True},
    "n": {"format": "ipv4network", "title": "N", "type": "string"},
    "e": {"format": "base64", "title": "E", "type": "string"},
    "f": {"format": "file-path", "title": "F", "type": "string"},
    "j": {"contentMediaType": "application/json", "contentSchema": {}, "title": "J", "type": "string"},
    "d": {"anyOf": [{"type": "number"}, {"type": "string"}], "title": "D"},
}
# Sets and further features of JSON Schema: parameters, and arguments that violate them.
UNENFORCED: dict[str, tuple[Schema, list[dict[str, object]]]] = {
    "set": (
        {"properties": {"s": {"items": {"type": "integer"}, "title": "S", "type": "array", "uniqueItems": True}}},
        [{"s": [1, 1]}],
    ),
    "one of required sets": (
        {
            "properties": {"a": {"type": "string"}, "b": {"type": "string"}},
            "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": "x", "b": "y"}],
    ),
    "names of properties": (
        {"properties": {"m": {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}}},
        [{"m": {"A": 1}}],
    ),
    "lookahead": ({"properties": {"w": {"type": "string", "pattern": "^(?!no)"}}}, [{"w": "nothing"}]),
    "not": ({"properties": {"w": {"type": "string", "not": {"const": "x"}}}}, [{"w": "x"}]),
    "conditions": (
        {
            "properties": {"a": {"type": "boolean"}, "b": {"type": "integer"}},
            "required": ["a"],
            "if": {"properties": {"a": {"const": True}}},
            "then": {"required": ["b"]},
        },
        [{"a": True}],
    ),
}


def tool(name: str, parameters: Schema, **more: object) -> dict[str, object]:
    return {"name": name, "parameters": {"type": "object", **parameters}, **more}


def rules(
    format: str, tools: Sequence[dict[str, object]], kind: str = "auto", **options: object
) -> tuple[Grammar, frozenset[str]]:
    """Return the grammar of the calls, and the tools whose arguments are validated afterwards."""
    family = Family.from_template("", may_call=True, format=format)
    choice = ToolChoice(kind)  # type: ignore[arg-type]
    codec = TokenCodec(PieceVocabulary())
    grammar, checked = family.constrain_calls(normalize_tools(tools), choice, codec, parallel=False, **options)  # type: ignore[arg-type]
    assert grammar is not None
    return grammar, checked


def test_unknown_string_formats_are_annotations() -> None:
    for schema in (*ANNOTATED.values(), {"format": "int32"}, {"type": "array", "items": {"format": "path"}}):
        assert Grammar.json_schema(schema).accepts('["x"]' if "items" in schema else '"x"')  # type: ignore[arg-type, operator]
    dated = Grammar.json_schema({"type": "string", "format": "date"})
    assert dated.accepts('"2024-02-29"')
    assert not dated.accepts('"x"')
    # `format` is a keyword only within a schema.
    named: Schema = {"type": "object", "properties": {"format": {"const": "path"}}, "required": ["format"]}
    assert Grammar.json_schema(named).accepts('{"format": "path"}')
    assert not Grammar.json_schema(named).accepts('{"format": "x"}')
    assert Grammar.json_schema({"const": {"format": "path"}}).accepts('{"format": "path"}')
    assert not Grammar.json_schema({"const": {"format": "path"}}).accepts("{}")


@pytest.mark.parametrize("kind", ["auto", "required"])
@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_schemas_with_annotations_are_enforced(format: str, kind: str) -> None:
    annotated = tool("f", {"properties": ANNOTATED, "required": [*ANNOTATED]}, strict=True)
    grammar, checked = rules(format, [annotated], kind, strict=frozenset({"f"}))
    assert not checked
    arguments = {name: 5 if name == "d" else "x" for name in ANNOTATED}
    assert grammar.accepts(call_text(format, "f", arguments, annotated["parameters"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", UNENFORCED)
@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_unenforceable_schemas_are_relaxed_and_validated(format: str, what: str) -> None:
    parameters, violating = UNENFORCED[what]
    loose = tool("loose", parameters)
    schema = loose["parameters"]
    assert isinstance(schema, dict)
    grammar, checked = rules(format, [WEATHER, loose, NOW])
    assert checked == {"loose"}
    for arguments in violating:
        text = call_text(format, "loose", arguments, schema)
        assert grammar.accepts(text), text
        (call,) = read_calls(get_tool_format(format), text, normalize_tools([loose]))
        assert call.arguments == arguments
        assert find_violation(schema, call.arguments)
    # The others stay constrained.
    city: Schema = {"properties": {"city": {"type": "string"}, "days": {}}}
    assert grammar.accepts(call_text(format, "get_weather", {"city": "Rome", "days": 3}, city))
    assert not grammar.accepts(call_text(format, "get_weather", {"city": "Rome", "days": "five"}, city))
    with pytest.raises(ChatError, match=r"tool 'loose'.*it is strict"):
        check_schemas(normalize_tools([{**loose, "strict": True}]), find_strict_tools([{**loose, "strict": True}]))
    check_schemas(normalize_tools([{**loose, "strict": False}]), find_strict_tools([{**loose, "strict": False}]))


@pytest.mark.parametrize(
    ("part", "good", "bad"),
    [
        ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1}, [1], ["x"]),
        ({"type": "object", "minProperties": 1}, {"a": 1}, {}),
        ({"allOf": [{"$ref": "#/$defs/p"}]}, {"x": 1}, {"x": "y"}),
        ({"anyOf": [{"type": "integer"}, {"type": "boolean"}], "maximum": 5}, 5, 6),
        ({"$ref": "#/$defs/n", "maximum": 5}, 5, 6),
        ({"enum": [1, 9], "maximum": 5}, 1, 9),
    ],
)
def test_gemma_values_are_constrained_or_validated(part: Schema, good: object, bad: object) -> None:
    point: Schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    parameters: Schema = {"properties": {"v": part}, "$defs": {"p": point, "n": {"type": "integer"}}}
    grammar, checked = rules("gemma4", [tool("f", parameters), NOW])
    text = call_text("gemma4", "f", {"v": good}, parameters)
    assert grammar.accepts(text)
    assert not find_violation(parameters, {"v": good})
    assert not grammar.accepts(text.replace("call:f", "call:now"))
    wrong = call_text("gemma4", "f", {"v": bad}, parameters)
    assert not grammar.accepts(wrong) or ("f" in checked and find_violation(parameters, {"v": bad}))


@pytest.mark.parametrize("format", [*LISTED, "lfm2", "gemma4"])
def test_schemas_a_family_cannot_express_are_relaxed_and_validated(format: str) -> None:
    parts: Schema = {
        "oneOf": [
            {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a", "n"]},
            {"properties": {"b": {"type": "string"}, "n": {"type": "integer"}}, "required": ["b", "n"]},
        ]
    }
    either = tool("either", parts)
    known: Schema = {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}, "b": {"type": "string"}}}
    for kind in ("auto", "required"):
        grammar, checked = rules(format, [either, NOW], kind)
        assert checked == {"either"}
        for arguments, valid in (({"a": "5", "n": 5}, True), ({"n": 5, "b": "5"}, True), ({"a": "x"}, False)):
            text = call_text(format, "either", arguments, known)
            assert grammar.accepts(text)
            (call,) = read_calls(get_tool_format(format), text, normalize_tools([either]))
            assert call.arguments == arguments
            assert bool(find_violation(either["parameters"], call.arguments)) != valid  # type: ignore[arg-type]
        # The types of list items stay.
        assert not grammar.accepts(
            call_text(format, "either", {"a": "x", "n": "five"}, {"properties": {"a": {"type": "string"}, "n": {}}})
        )
        assert not grammar.accepts(call_text(format, "now", {"a": "x"}, known))
    with pytest.raises((GrammarError, ChatError), match=r"'either'.*strict"):
        rules(format, [{**either, "strict": True}], strict=frozenset({"either"}))


def test_a_strict_tool_a_family_cannot_express_is_refused_by_name() -> None:
    strict = tool("either", {"anyOf": [{"properties": {"a": {}}}]}, strict=True)
    assert not rules("hermes", [strict], strict=frozenset({"either"}))[1]
    for format in LISTED:
        with pytest.raises(GrammarError, match="tool 'either' is strict"):
            rules(format, [strict, NOW], strict=frozenset({"either"}))
        assert rules(format, [{**strict, "strict": False}, NOW])[1] == {"either"}


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_the_most_relaxed_grammar_still_yields_readable_calls(format: str) -> None:
    parameters: Schema = {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}
    tools = normalize_tools([{"name": "f", "parameters": parameters}])
    last = [*relax_schema(parameters, get_tool_format(format).arguments)][-1]
    assert last is None
    written = write_call_grammar(
        get_tool_format(format), tools, name=None, parallel=False, literal=lark_literal, relaxed={"f": None}
    )
    grammar = Grammar.lark(written)
    assert grammar.accepts(call_text(format, "f", {"a": "x", "n": 5}, parameters))
    assert grammar.accepts(call_text(format, "f", {"z": 5}, {"properties": {"z": {}}}))
    assert grammar.accepts(call_text(format, "f", {}, parameters))
    words = VOCABULARIES["texts"]
    n_read, problems = 0, []
    for seed in range(8):
        text = random_walk(words, GrammarCompiler(words).matcher(grammar), random.Random(seed))
        try:
            n_read += text is not None and len(read_calls(get_tool_format(format), text, tools)) == 1
        except erllama.ToolCallError as error:
            problems.append(str(error))
    assert n_read
    # A text in place of an integer, or a name twice: such a call is reported as malformed.
    expected = re.compile("has none of the types|is repeated|too many digits|larger than any float")
    assert [problem for problem in problems if not expected.search(problem)] == []


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        (
            {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["a"]},
            "property 'a' is required",
        ),
        ({"properties": {"a": {"type": "objekt"}}}, "objekt"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "none"),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:9/x"}}}, "127.0.0.1"),
        ({"properties": {"a": {"type": "array", "uniqueItems": "yes"}}}, "yes"),
    ],
)
def test_unsatisfiable_schemas_are_refused(parameters: Schema, problem: str) -> None:
    with pytest.raises(ChatError, match=f"tool 'f': its parameters do not compile: .*{problem}"):
        check_schemas(normalize_tools([tool("f", parameters)]))


@pytest.mark.parametrize(
    ("part", "good", "bad"),
    [
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "multipleOf": 7}, 14, 15),
        (
            {"type": "object", "patternProperties": {"^x": {"type": "integer", "maximum": 2**64 - 1}}},
            {"x": 2**64 - 1},
            {"x": 2**64},
        ),
        (
            {"type": "object", "properties": {"a": {"const": 2**60}, "b": {}}, "maxProperties": 1},
            {"a": 2**60},
            {"a": 2**60, "b": 1},
        ),
        ({"type": "number", "minimum": -(2**60), "multipleOf": 0.5}, 1.5, 1.25),
        ({"type": "integer", "minimum": -(10**500)}, 1, "a"),
        ({"type": "string", "minLength": 2**63 - 1}, None, "a"),
        # A schema that compiles is enforced, not only validated.
        ({"type": "string", "pattern": "^a+$", "maxLength": 2**63 - 1}, "aa", "b"),
        ({"type": "string", "minLength": 1.0}, "a", ""),
    ],
)
def test_unsupported_large_numbers_are_relaxed_and_validated(part: Schema, good: object, bad: object) -> None:
    parameters = {"type": "object", "properties": {"a": part}, "required": ["a"]}
    for format in ("hermes", "qwen3-coder"):
        grammar, checked = rules(format, [tool("f", parameters)])
        if good is not None:
            assert grammar.accepts(call_text(format, "f", {"a": good}, parameters))
            assert not find_violation(parameters, {"a": good})
        assert checked or not grammar.accepts(call_text(format, "f", {"a": bad}, parameters))
    assert find_violation(parameters, {"a": bad})


def test_strict_must_be_a_boolean() -> None:
    with pytest.raises(ChatError, match="tool 'f': strict='yes'; expected true, false or null"):
        normalize_tools([tool("f", {}, strict="yes")])


def test_a_violation_is_reported_briefly_with_its_position() -> None:
    schema: Schema = {"properties": {"s": {"type": "array", "uniqueItems": True}}}
    assert find_violation(schema, {"s": [1, 2]}) == ""
    assert find_violation(schema, {"s": [1, 1]}) == "$.s: [1, 1] has non-unique elements"
    assert len(find_violation(schema, {"s": ["x" * 5000] * 2})) < 250
    # Nothing is fetched, and arguments that cannot be validated are not accepted.
    assert "cannot be checked" in find_violation({"$ref": "http://127.0.0.1:9/x"}, {})
    assert "cannot be checked" in find_violation({"pattern": r"\p{L}"}, "x")


def test_jsonschema_is_imported_only_for_unenforceable_schemas() -> None:
    code = (
        "import sys; from erllama.chat.tool_calls.tools import check_schemas, normalize_tools as n; "
        "check_schemas(n([{'name': 'f', 'parameters': {'properties': {'a': {'type': 'integer'}}}}])); "
        "assert 'jsonschema' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- through a chat ------------------------------------------------------------------------------

TEMPLATE = "{{ messages[-1].content }}{% if tools %}{% endif %}{{ '\t' }}"
SET = tool("keep", UNENFORCED["set"][0])
N: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
COUNT = tool("count", {"properties": {"n": N}, "required": ["n"], "additionalProperties": False})


def replies(reply_text: str, **options: object) -> tuple[erllama.ChatCompletion, list[erllama.Event]]:
    vocabulary = PieceVocabulary(end="<|eog|>")
    tokens = vocabulary.tokenize(reply_text).tolist()
    backend = ScriptedBackend(vocabulary, scripted_reply(vocabulary, tokens), chat_templates={"default": TEMPLATE})  # type: ignore[arg-type]
    with erllama.load_backend(backend, cache=erllama.Cache()) as model:
        stream = model.stream_chat([{"role": "user", "content": "Q"}], **options)  # type: ignore[arg-type]
        events = list(stream)
        return stream.result(), events


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_call_that_violates_its_schema_is_text_with_an_error(choice: str) -> None:
    good = '<tool_call>{"name": "keep", "arguments": {"s": [1, 2]}}</tool_call>'
    bad = good.replace("2", "1")
    options = {"tools": [COUNT, SET], "tool_format": "hermes", "tool_choice": choice}
    reply, _ = replies(good, **options)
    assert [call.arguments for call in reply.tool_calls] == [{"s": [1, 2]}]
    reply, events = replies(bad, **options)
    assert (reply.text, reply.tool_calls, reply.finish_reason) == (bad, (), "stop")
    assert reply.tool_call_errors == (
        "the arguments of 'keep' violate its parameters: $.s: [1, 1] has non-unique elements",
    )
    (end,) = [event for event in events if isinstance(event, erllama.ToolCallEnd)]
    assert (end.calls, end.error) == ((), reply.tool_call_errors[0])


@pytest.mark.parametrize("other", [SET, tool("either", {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]})])
@pytest.mark.parametrize("format", ["hermes", "glm", "gemma4", "lfm2"])
def test_an_inexpressible_tool_does_not_relax_the_others(other: dict[str, object], format: str) -> None:
    schema = COUNT["parameters"]
    assert isinstance(schema, dict)
    reply_text = call_text(format, "count", {"n": "five"}, {"properties": {"n": {}}})
    reply, _ = replies(reply_text, tools=[other, COUNT], tool_format=format, max_tokens=900, seed=1)
    assert not reply.tool_call_errors
    (call,) = reply.tool_calls
    jsonschema.validate(call.arguments, schema)


def test_calls_with_custom_markers_are_validated() -> None:
    reply_text = '<tool_call>{"name": "count", "arguments": {"n": "five"}}</tool_call>'
    options = {"tools": [COUNT], "tool_markers": ("<tool_call>", "</tool_call>")}
    reply, _ = replies(reply_text, **options)
    assert (reply.text, reply.tool_calls) == (reply_text, ())
    assert reply.tool_call_errors == (
        "the arguments of 'count' violate its parameters: $.n: 'five' is not of type 'integer'",
    )
    with pytest.raises(OptionError, match="tool 'count' is strict, and no grammar enforces calls by tool_markers"):
        replies(reply_text, **{**options, "tools": [{**COUNT, "strict": True}]})


def test_a_strict_tool_is_called_like_any_other() -> None:
    assert json.dumps(normalize_tools([{**COUNT, "strict": True}])) == json.dumps(normalize_tools([COUNT]))
