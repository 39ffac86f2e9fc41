"""Tool calls as models write them: which are read, which are refused, and with which errors."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import jsonschema
import pytest

from erllama import Grammar
from erllama.chat.thinking import find_thinking_markers
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.formats import TOOL_FORMATS, find_tool_format, get_tool_format
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.tools import normalize_tools
from erllama.errors import GrammarError, OptionError, ToolCallError
from support.chat.tool_calls import (
    ALL,
    CALL_TEXTS,
    DEEPSEEK,
    EXAMPLES,
    EXPECTED_CALLS,
    FULL,
    HARD,
    SEVERAL,
    TEMPLATES,
    TOOLS,
    VARIANTS,
    WEATHER,
    glm,
    grammar,
    lark_literal,
    minimax,
    needs_templates,
    parsed_calls,
    qwen,
    seed,
)

# --- What a model writes is read, and is of the grammar ---------------------------------------


@pytest.mark.parametrize(("format", "kind", "text"), EXAMPLES + VARIANTS)
def test_example_calls_are_read_and_match_the_grammar(format: str, kind: str, text: str) -> None:
    assert parsed_calls(format, text) == EXPECTED_CALLS[kind]
    assert grammar(format, parallel=True).accepts(text)
    # Without parallel calls, only the first counts.
    assert grammar(format).accepts(text) == (kind != SEVERAL)
    assert grammar(format, name="get_weather").accepts(text) == (kind != SEVERAL)
    assert not grammar(format, name="now", parallel=True).accepts(text)


def test_every_format_has_examples() -> None:
    assert set(CALL_TEXTS) == set(TOOL_FORMATS)
    for format, texts in CALL_TEXTS.items():
        opening = (*get_tool_format(format).open, *get_tool_format(format).leading)
        for text in texts:
            assert text.replace(" ", "").startswith(tuple(mark.replace(" ", "") for mark in opening)), format


@pytest.mark.parametrize(("format", "text"), [(format, text) for format, kind, text in EXAMPLES if kind == ALL])
def test_spans_and_payloads_are_found_where_the_format_defines_them(format: str, text: str) -> None:
    found = get_tool_format(format)
    if found.close:
        assert text.endswith(found.close)
    # The end-of-turn token may replace the close marker, unless only the marker shows that a list is complete.
    if found.close and format != "glm":
        assert parsed_calls(format, text.removesuffix(found.close[0])) == EXPECTED_CALLS[ALL]
    starts = [text.find(mark) + len(mark) for mark in found.payload_open if mark in text]
    assert starts
    assert min(starts) <= text.index("Paris")
    assert "get_weather" in text[: min(starts)]


@pytest.mark.parametrize(("format", "text"), [(format, text) for format, kind, text in EXAMPLES if kind != SEVERAL])
def test_an_incomplete_call_is_not_a_call(format: str, text: str) -> None:
    found = get_tool_format(format)
    # The close marker may be missing, and the white space before it.
    closing = found.close[0] if found.close and format != "glm" else ""
    whole = len(text.removesuffix(closing).rstrip())
    assert not grammar(format, parallel=True).accepts(text[: whole - 1])
    for end in range(whole):
        with pytest.raises(ToolCallError):
            read_calls(found, text[:end], TOOLS)


NESTED = 5000
# Texts that are not calls of the family, each with a part of the error.
BAD_JSON = {
    "no tool": ('{"name": "nothing", "arguments": {}}', "no tool 'nothing'"),
    "near": ('{"name": "get_wether", "arguments": {}}', "did you mean 'get_weather'"),
    "no name": ('{"arguments": {}}', "'name'"),
    "no arguments": ('{"name": "now"}', "'arguments'"),
    "a list": ('{"name": "now", "arguments": []}', "not a JSON object"),
    "null": ('{"name": "now", "arguments": null}', "not a JSON object"),
    "text that is no JSON": ('{"name": "now", "arguments": "x"}', "not JSON"),
    "more keys": ('{"name": "now", "arguments": {}, "then": 1}', "'then'"),
    "single quotes": ("{'name': 'now', 'arguments': {}}", "Expecting property name"),
    "half": ('{"name": "now", "arguments": {', "Expecting property name"),
    "a number": ("5", "JSON object"),
    "a name of another type": ('{"name": 5, "arguments": {}}', "no tool 5"),
    "NaN": ('{"name": "get_weather", "arguments": {"city": NaN}}', "NaN"),
    "infinite": ('{"name": "get_weather", "arguments": {"city": 1e9999}}', "too many digits"),
    "half a surrogate pair": ('{"name": "get_weather", "arguments": {"city": "\\ud800"}}', "surrogate"),
    "too many digits": ('{"name": "get_weather", "arguments": {"city": ' + "9" * 5000 + "}}", "too many digits"),
    "deep": (
        '{"name": "get_weather", "arguments": {"city": ' + "[" * NESTED + "]" * NESTED + "}}",
        "nested deeper",
    ),
    "open deep": ('{"name": "get_weather", "arguments": {"city": ' + "[" * 200_000, "nested deeper"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_errors_state_why_a_json_object_is_not_a_call(what: str) -> None:
    text, problem = BAD_JSON[what]
    with pytest.raises(ToolCallError) as error:
        parsed_calls("hermes", f"<tool_call>{text}</tool_call>")
    assert problem in str(error.value)
    assert "at character" in str(error.value)
    assert len(str(error.value)) < 300
    assert not grammar("hermes").accepts(f"<tool_call>{text}</tool_call>")


MALFORMED = {
    "hermes": [
        "",
        "x",
        '{"name": "now", "arguments": {}}',
        "<tool_call></tool_call>",
        CALL_TEXTS["hermes"][0] + " and",
    ],
    "llama3": ["now()", '{"name": "now", "parameters": {}}; ;', "<|python_tag|>now.call()"],
    "mistral": ['[{"name": "now", "arguments": {}}]', "[TOOL_CALLS]now{}", "[TOOL_CALLS][]"],
    "mistral-v11": [
        "[TOOL_CALLS]now[ARGS]{}",
        "[TOOL_CALLS]now[CALL_ID]1[ARGS]{}",
        "[TOOL_CALLS][CALL_ID]a1B2c3D4e[ARGS]{}",
    ],
    "mistral-v13": ["[TOOL_CALLS]now{}", "[TOOL_CALLS]now[ARGS][]", "[TOOL_CALLS]now[ARGS]{}[ARGS]{}"],
    "deepseek-r1": [CALL_TEXTS["deepseek-v3.1"][0], CALL_TEXTS["deepseek-r1"][0].replace("```<", "<")],
    "deepseek-v3.1": [
        CALL_TEXTS["deepseek-r1"][0],
        DEEPSEEK[0] + DEEPSEEK[1],
        CALL_TEXTS["deepseek-v3.1"][0] + "x",
    ],
    "gpt-oss": [
        "<|channel|>commentary<|message|>{}<|call|>",
        "<|channel|>final to=functions.now<|message|>{}<|call|>",
        "<|channel|>commentary to=now <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.now <|constrain|>xml<|message|>{}<|call|>",
    ],
    "json": ["[]", "{}", '"now"', '{"name": "now", "function": {"name": "now", "arguments": {}}}', "now"],
    "qwen3-coder": [
        "<tool_call>\n<function=nothing>\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\n</tool_call>",
        qwen("get_weather", [("days", "three")]),
        qwen("get_weather", [("city", "Paris"), ("city", "Rome")]),
        qwen("get_weather", [("city", "Paris"), ("exact", "yes")]),
        "<function=now>\n</function>",
    ],
    "seed": [
        qwen("now", []),
        seed("get_weather", [("city", "a"), ("near", "{}")]),
        "<seed:tool_call></seed:tool_call>",
    ],
    "glm": [glm("nothing", []), "<tool_call>\n</tool_call>", "<tool_call>now<arg_key>a</arg_key></tool_call>"],
    "minimax": [minimax(("nothing", [])), minimax(), minimax(("get_weather", [("days", "1.5"), ("city", "x")]))],
    "kimi": [
        CALL_TEXTS["kimi"][0].replace("functions.", ""),
        CALL_TEXTS["kimi"][0].replace(":0", ""),
        "<|tool_calls_section_begin|><|tool_calls_section_end|>",
    ],
    "nemotron": ["<TOOLCALL>now()</TOOLCALL>", "<TOOLCALL>[]</TOOLCALL>"],
    "command-r": ["<|START_ACTION|>[]<|END_ACTION|>", "<|START_ACTION|>[5]<|END_ACTION|>"],
    "lfm2": [
        "<|tool_call_start|>[]<|tool_call_end|>",
        "<|tool_call_start|>now()<|tool_call_end|>",
        "<|tool_call_start|>[now(1)]<|tool_call_end|>",
        "<|tool_call_start|>[now(**{})]<|tool_call_end|>",
        "<|tool_call_start|>[get_weather(city=open('x'))]<|tool_call_end|>",
        "<|tool_call_start|>[get_weather(city='a' 'b')]<|tool_call_end|>",
        "<|tool_call_start|>[get_weather(city='\\ud800')]<|tool_call_end|>",
        "<|tool_call_start|>[get_weather(city=" + "[" * NESTED + "]<|tool_call_end|>",
        "<|tool_call_start|>[now() now()]<|tool_call_end|>",
    ],
    "apertus": [
        '<|tools_prefix|>[{"now": {}, "get_weather": {}}]<|tools_suffix|>',
        "<|tools_prefix|>[{}]<|tools_suffix|>",
    ],
    "granite": ["<|tool_call|>", "<|tool_call|>[]", "<|tool_call|>now"],
    "functionary": [">>>all\nnow", ">>>now{}", ">>>now\n[]", ">>>now\n{} and"],
    "gemma4": [
        "<|tool_call>call:now<tool_call|>",
        "<|tool_call>now{}<tool_call|>",
        '<|tool_call>call:get_weather{city:"Paris"}<tool_call|>',
        '<|tool_call>call:get_weather{city:<|"|>Paris}<tool_call|>',
        '<|tool_call>call:get_weather{<|"|>Paris<|"|>}<tool_call|>',
        "<|tool_call>call:get_weather{city:" + "[" * NESTED + "<tool_call|>",
    ],
}


@pytest.mark.parametrize(
    ("format", "text"), [(format, text) for format, texts in MALFORMED.items() for text in texts]
)
def test_malformed_calls_are_refused_and_do_not_match_the_grammar(format: str, text: str) -> None:
    with pytest.raises(ToolCallError) as error:
        parsed_calls(format, text)
    assert len(str(error.value)) < 300
    assert not grammar(format, parallel=True).accepts(text)


def test_every_format_has_malformed_texts() -> None:
    assert set(MALFORMED) == set(TOOL_FORMATS)


# --- Ids, values, thinking, and invalid calls ---------------------------------------------------


def test_an_id_is_the_models_own_or_generated() -> None:
    def ids(format: str, text: str) -> list[str]:
        return [call.id for call in read_calls(get_tool_format(format), text, TOOLS)]

    assert ids("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "a1B2c3D4e"}]') == ["a1B2c3D4e"]
    assert ids("mistral-v11", CALL_TEXTS["mistral-v11"][0]) == ["a1B2c3D4e"]
    assert ids("kimi", CALL_TEXTS["kimi"][0]) == ["functions.get_weather:0"]
    # The same call twice is two calls.
    first, second, third = ids("mistral-v11", CALL_TEXTS["mistral-v11"][2])
    assert first == "a1B2c3D4e"
    assert len({first, second, third}) == 3
    for format in set(TOOL_FORMATS) - {"mistral-v11", "kimi"}:
        (found,) = ids(format, CALL_TEXTS[format][0])
        # Mistral's templates accept only ids of nine letters and digits.
        assert re.fullmatch("[0-9a-f]{9}" if "mistral" in format else "call_[0-9a-f]{24}", found)


def test_arguments_are_available_as_json_text() -> None:
    (call,) = read_calls(get_tool_format("hermes"), CALL_TEXTS["hermes"][1], TOOLS)
    assert json.loads(call.arguments_json) == FULL
    assert (
        "é"
        in read_calls(get_tool_format("hermes"), CALL_TEXTS["hermes"][0].replace("Paris", "é"), TOOLS)[
            0
        ].arguments_json
    )


@pytest.mark.parametrize(
    ("schema", "raw", "expected"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": "string"}, " spaced \n ", " spaced \n "),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["string", "null"]}, '"quoted"', '"quoted"'),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "five", "five"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5.5", "5.5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, '"5"', "5"),
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "5.0", 5.0),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "True", True),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, "['a', None, 1.5, {'b': \"it's\"}]", ["a", None, 1.5, {"b": "it's"}]),
        ({"type": "object"}, "{'a': '\\x41\\u00e9\\n\\\\'}", {"a": "A\u00e9\n\\"}),
        ({"enum": [1, "one"]}, "1", 1),
        ({"enum": [1, "one"]}, "one", "one"),
        ({"$ref": "#/$defs/n"}, "7", 7),
        ({"allOf": [{"$ref": "#/$defs/n"}]}, "7", 7),
        ({"$ref": "#/$defs/loop"}, "7", "7"),
        ({}, "5", 5),
        ({}, "five", "five"),
        (True, "[1]", [1]),
    ],
)
def test_unquoted_values_are_read_by_their_schema(schema: object, raw: str, expected: object) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}, {"type": "string"}]}
    parameters = {
        "type": "object",
        "properties": {"a": schema},
        "$defs": {"n": {"type": "integer"}, "loop": loop},
    }
    tools = normalize_tools([{"name": "f", "parameters": parameters}])
    for format, written in (("glm", glm), ("seed", seed), ("qwen3-coder", qwen)):
        ((_, found),) = parsed_calls(format, written("f", [("a", raw)]), tools)
        assert found == {"a": expected}
        assert type(found["a"]) is type(expected)


def test_arguments_outside_the_schema_are_read_by_their_form() -> None:
    assert parsed_calls("glm", glm("now", [("a", "5"), ("b", "five")])) == [("now", {"a": 5, "b": "five"})]


@pytest.mark.parametrize("format", ["glm", "qwen3-coder", "seed", "minimax", "lfm2", "gemma4"])
@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"anyOf": [WEATHER["parameters"]]}, "'anyOf' in them"),
        ({"type": "object", "required": ["a"]}, "'a' is required"),
    ],
)
def test_families_that_list_arguments_need_them_in_the_schema(
    format: str, parameters: dict[str, object], problem: str
) -> None:
    tools = normalize_tools([{"name": "f", "parameters": parameters}])
    with pytest.raises(GrammarError, match=re.escape(problem)):
        write_call_grammar(get_tool_format(format), tools, name=None, parallel=False, literal=lark_literal)
    assert Grammar.lark(
        write_call_grammar(get_tool_format("hermes"), tools, name=None, parallel=False, literal=lark_literal)
    )


@pytest.mark.parametrize(("format", "text"), [(format, texts[1]) for format, texts in CALL_TEXTS.items()])
def test_parameters_may_be_references_within_their_schema(format: str, text: str) -> None:
    weather = WEATHER["parameters"]
    tools = normalize_tools([{**WEATHER, "parameters": {"$ref": "#/$defs/p", "$defs": {"p": weather}}}])
    assert parsed_calls(format, text, tools) == EXPECTED_CALLS[ALL]
    written = write_call_grammar(get_tool_format(format), tools, name=None, parallel=False, literal=lark_literal)
    assert Grammar.lark(written).accepts(text)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {"type": "string"},
            ["", "a\nb", '"', "</p", "</parameter", "<tool_call>"],
            ["</parameter>", "a</arg_value>"],
        ),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc", "éé"], ["", "a", "abcd"]),
        ({"type": "string", "maxLength": 1}, ["", "a"], ["ab"]),
        ({"type": "string", "pattern": "^[a-z]+/[0-9]$"}, ["a/1"], ["a/", "/1", "xa/12", ""]),
        ({"type": "string", "pattern": "[0-9]"}, ["1", "a1b"], ["", "ab"]),
        ({"type": "string", "pattern": "^a"}, ["a", "ab"], ["ba", ""]),
        ({"type": "string", "pattern": "a$", "maxLength": 2}, ["a", "ba"], ["ab", "bba"]),
        ({"type": "string", "pattern": "^a\nb$"}, ["a\nb"], ["anb"]),
        ({"enum": ["a.b", "c"]}, ["a.b", "c"], ["axb", "", '"c"']),
        ({"const": "a"}, ["a"], ["b", ""]),
        ({"type": ["string", "null"], "maxLength": 1}, ["a", "null"], ["ab"]),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, ["a", "null"], ["c", ""]),
        ({"allOf": [{"type": "string", "maxLength": 2}, {"type": "string", "minLength": 2}]}, ["ab"], ["a", "abc"]),
        ({"$ref": "#/$defs/word"}, ["ab"], ["a b", ""]),
        ({"type": "string", "anyOf": [{"type": "string", "maxLength": 1}, {"type": "integer"}]}, ["a"], ["ab"]),
        ({"type": "integer", "minimum": 5}, ["5", "10"], ["4", "5.5", "five", ""]),
        ({"type": "boolean"}, ["true", "false"], ["yes", '"true"']),
        ({"type": ["integer", "string"]}, ["5", '"a"'], ["a", "true"]),
        ({"type": "array", "items": {"type": "integer"}, "maxItems": 1}, ["[]", "[1]"], ["[1, 2]", '["a"]']),
    ],
)
def test_unquoted_values_are_constrained_to_their_schema(schema: object, good: list[str], bad: list[str]) -> None:
    parameters = {
        "properties": {"a": schema, "never": False},
        "required": ["a"],
        "$defs": {"word": {"type": "string", "pattern": "^[a-z]+$"}},
    }
    tools = normalize_tools([{"name": "f", "parameters": parameters}])
    for format, written in (("glm", glm), ("seed", seed), ("qwen3-coder", qwen)):
        kept = Grammar.lark(
            write_call_grammar(get_tool_format(format), tools, name=None, parallel=False, literal=lark_literal)
        )
        for raw in good:
            text = written("f", [("a", raw)])
            assert kept.accepts(text), (format, raw)
            ((_, found),) = parsed_calls(format, text, tools)
            jsonschema.validate(found, parameters)
        for raw in bad:
            if ("</parameter>" in raw and format == "glm") or ("</arg_value>" in raw and format != "glm"):
                continue
            assert not kept.accepts(written("f", [("a", raw)])), (format, raw)
        assert not kept.accepts(written("f", [])), format
        assert not kept.accepts(written("f", [("a", good[0]), ("never", "1")])), format


def test_a_grammar_allows_only_the_tools_of_the_request() -> None:
    hermes = get_tool_format("hermes")
    with pytest.raises(OptionError, match="no tool has the name 'x'"):
        write_call_grammar(hermes, TOOLS, name="x", parallel=False, literal=lark_literal)
    with pytest.raises(OptionError, match="needs at least one tool"):
        write_call_grammar(hermes, [], name=None, parallel=False, literal=lark_literal)


def test_formats_are_found_by_name() -> None:
    for name, format in TOOL_FORMATS.items():
        assert get_tool_format(name) is format
        assert format.name == name
    with pytest.raises(OptionError, match="did you mean 'hermes'"):
        get_tool_format("hermess")
    with pytest.raises(OptionError, match="there is no tool format"):
        get_tool_format(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_hostile_texts_are_refused_in_time(format: str) -> None:
    found = get_tool_format(format)
    heads = {text[: text.index(end)] for text in CALL_TEXTS[format] for end in ("get_weather", "Paris")}
    begun = time.thread_time()
    for head in heads:
        for part in (
            *HARD,
            "[",
            "(",
            "-",
            "\\x",
            '{"a":',
            "a=",
            "k:{",
            '"a",',
            "'a',",
            "1,",
            "<parameter=a>",
            "now",
        ):
            with pytest.raises(ToolCallError) as error:
                read_calls(found, head + part * (100_000 // len(part)), TOOLS)
            assert len(str(error.value)) < 300
    assert time.thread_time() - begun < 10


@pytest.mark.parametrize("format", sorted(set(TOOL_FORMATS) - {"json", "llama3"}))
def test_many_spans_are_read_in_time(format: str) -> None:
    begun = time.thread_time()
    assert len(parsed_calls(format, "\n".join(CALL_TEXTS[format][:1] * 2000))) == 2000
    assert time.thread_time() - begun < 10


@pytest.mark.parametrize(
    ("template", "open", "close"),
    [
        ("{{ '<think>' }}…</think>", "<think>", "</think>"),
        ("{{ content.split('</think>')[-1] }}", "<think>", "</think>"),
        ("[THINK]…[/THINK]", "[THINK]", "[/THINK]"),
        ("<seed:think> </seed:think> <think></think>", "<seed:think>", "</seed:think>"),
        ("'<thinking>' + text + '</thinking>'", "<thinking>", "</thinking>"),
        ("<reasoning></reasoning>", "<reasoning>", "</reasoning>"),
    ],
)
def test_thinking_markers_are_found_in_a_template(template: str, open: str, close: str) -> None:
    found = find_thinking_markers(template)
    assert found is not None
    assert open in found.open
    assert close in found.close


def test_a_template_without_markers_has_no_thinking() -> None:
    assert find_thinking_markers("{{ messages[0].content }} thinks") is None
    assert find_tool_format("{{ messages[0].content }}") is None


THINKING = {
    "Apertus-8B-Instruct": ("<|inner_prefix|>", "<|inner_suffix|>"),
    "ByteDance-Seed-OSS": ("<seed:think>", "</seed:think>"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "google-gemma-4-31B-it": ("<|channel>thought\n", "<channel|>"),
    "openai-gpt-oss-120b": ("<|channel|>analysis<|message|>", "<|end|>"),
    **dict.fromkeys(
        [
            *("GLM-4.6", "HuggingFaceTB-SmolLM3-3B", "MiniMax-M2", "NVIDIA-Nemotron-Nano-v2", "Qwen-QwQ-32B"),
            *("Qwen-Qwen3-0.6B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1"),
            "ibm-granite-granite-3.3-2B-Instruct",
        ],
        ("<think>", "</think>"),
    ),
}


@needs_templates
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_known_templates_have_their_markers(path: Path) -> None:
    found = find_thinking_markers(path.read_text())
    assert (found and (found.open[0], found.close[0])) == THINKING.get(path.stem)
