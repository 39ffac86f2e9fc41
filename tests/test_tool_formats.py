"""Tool calls as families write them: read exactly, kept to schemas by grammars, found in templates."""

from __future__ import annotations

import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from erllama import Grammar
from erllama.chat.formats import TOOL_FORMATS, find_tool_format, tool_format
from erllama.chat.messages import normalized_messages
from erllama.chat.thinking import find_thinking
from erllama.chat.tools import normalized_tools, parameters_of
from erllama.engine import ToolCall
from erllama.engine.grammar import GrammarCompiler
from erllama.errors import GrammarError, OptionError, ToolCallError
from support import SHARED

TEMPLATES = SHARED / "templates"
needs_templates = pytest.mark.skipif(not TEMPLATES.is_dir(), reason="no templates beside the checkout")

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Its name."},
            "days": {"type": "integer", "description": "How many."},
            "exact": {"type": "boolean", "description": "Or rounded."},
            "near": {"type": "array", "items": {"type": "number"}, "description": "Where."},
            "unit": {"enum": ["C", "F"], "type": "string", "description": "Of temperatures."},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {
    "name": "now",
    "description": "The time.",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = normalized_tools([WEATHER, NOW])
PARIS: dict[str, object] = {"city": "Paris"}
FULL: dict[str, object] = {"city": "Paris", "days": 3, "exact": True, "near": [1, -2.5], "unit": "C"}
FULL_JSON = json.dumps(FULL)


def plainly(text: str) -> str:
    """Lark for a text, special tokens and all."""
    return json.dumps(text, ensure_ascii=False)


@cache
def grammar(format: str, *, name: str | None = None, parallel: bool = False) -> Grammar:
    return Grammar.lark(tool_format(format).grammar(TOOLS, name=name, parallel=parallel, literal=plainly))


def calls(
    format: str, text: str, tools: Sequence[Mapping[str, object]] = TOOLS
) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, call.arguments) for call in tool_format(format).parse(text, tools)]


# --- What a model writes is read, and is of the grammar ---------------------------------------

# One call with one argument, one with all, and several; a text that is none, of one call each.
ONE = "one"
ALL = "all"
SEVERAL = "several"
WANTED = {
    ONE: [("get_weather", PARIS)],
    ALL: [("get_weather", FULL)],
    SEVERAL: [("get_weather", PARIS), ("now", {}), ("get_weather", FULL)],
}
P, F = '{"city": "Paris"}', FULL_JSON
XML_FULL = [("city", "Paris"), ("days", "3"), ("exact", "true"), ("near", "[1, -2.5]"), ("unit", "C")]


def qwen(name: str, arguments: Sequence[tuple[str, str]]) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def seed(name: str, arguments: Sequence[tuple[str, str]]) -> str:
    parameters = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in arguments)
    return f"<seed:tool_call>\n<function={name}>\n{parameters}</function>\n</seed:tool_call>"


def glm(name: str, arguments: Sequence[tuple[str, str]]) -> str:
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments)
    return f"<tool_call>{name}\n{pairs}</tool_call>"


def minimax(*calls: tuple[str, Sequence[tuple[str, str]]]) -> str:
    written = ""
    for name, arguments in calls:
        parameters = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments)
        written += f'<invoke name="{name}">\n{parameters}</invoke>\n'
    return f"<minimax:tool_call>\n{written}</minimax:tool_call>"


def tagged(before: str, middle: str, after: str, between: str = "") -> list[str]:
    """The three texts of a family that writes name and JSON apart."""
    one, now, all_ = (
        f"{before}{name}{middle}{arguments}{after}"
        for name, arguments in (("get_weather", P), ("now", "{}"), ("get_weather", F))
    )
    return [one, all_, between.join([one, now, all_])]


def enveloped(open: str, close: str, key: str = "arguments", *, listed: bool = True) -> list[str]:
    one, now, all_ = (
        f'{{"name": "{name}", "{key}": {arguments}}}'
        for name, arguments in (("get_weather", P), ("now", "{}"), ("get_weather", F))
    )
    if listed:
        return [f"{open}{text}{close}" for text in (one, all_, f"{one}, {now}, {all_}")]
    return [f"{open}{text}{close}" for text in (one, all_, f"{close}\n{open}".join([one, now, all_]))]


def framed(open: str, texts: Sequence[str], close: str) -> list[str]:
    return [f"{open}{text}{close}" for text in texts]


GEMMA_FULL = 'city:<|"|>Paris<|"|>,days:3,exact:true,near:[1,-2.5],unit:<|"|>C<|"|>'
LFM_FULL = 'get_weather(city="Paris", days=3, exact=True, near=[1, -2.5], unit="C")'
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
WRITTEN: dict[str, list[str]] = {
    "hermes": enveloped("<tool_call>\n", "\n</tool_call>", listed=False),
    "llama3": [
        *enveloped("", "", "parameters")[:2],
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}; '
        f'{{"name": "get_weather", "parameters": {F}}}',
    ],
    "mistral": enveloped("[TOOL_CALLS][", "]"),
    "mistral-v11": tagged("[TOOL_CALLS]", "[CALL_ID]a1B2c3D4e[ARGS]", ""),
    "mistral-v13": tagged("[TOOL_CALLS]", "[ARGS]", ""),
    "deepseek-r1": framed(
        DEEPSEEK[0],
        tagged("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>", "\n"),
        DEEPSEEK[1],
    ),
    "deepseek-v3.1": framed(
        DEEPSEEK[0], tagged("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"), DEEPSEEK[1]
    ),
    "gpt-oss": tagged("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", "<|call|>")[:2],
    "json": [*enveloped("", "")[:2], enveloped("[", "]")[2]],
    "qwen3-coder": [
        qwen("get_weather", XML_FULL[:1]),
        qwen("get_weather", XML_FULL),
        "\n".join([qwen("get_weather", XML_FULL[:1]), qwen("now", []), qwen("get_weather", XML_FULL)]),
    ],
    "seed": [
        seed("get_weather", XML_FULL[:1]),
        seed("get_weather", XML_FULL),
        "\n".join([seed("get_weather", XML_FULL[:1]), seed("now", []), seed("get_weather", XML_FULL)]),
    ],
    "glm": [
        glm("get_weather", XML_FULL[:1]),
        glm("get_weather", XML_FULL),
        "\n".join([glm("get_weather", XML_FULL[:1]), glm("now", []), glm("get_weather", XML_FULL)]),
    ],
    "minimax": [
        minimax(("get_weather", XML_FULL[:1])),
        minimax(("get_weather", XML_FULL)),
        minimax(("get_weather", XML_FULL[:1]), ("now", []), ("get_weather", XML_FULL)),
    ],
    "kimi": [
        f"<|tool_calls_section_begin|>{text}<|tool_calls_section_end|>"
        for text in tagged("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", "<|tool_call_end|>")
    ],
    "nemotron": enveloped("<TOOLCALL>[", "]</TOOLCALL>"),
    "command-r": [
        text.replace('"name"', '"tool_call_id": "0", "tool_name"')
        for text in enveloped("<|START_ACTION|>[\n    ", "\n]<|END_ACTION|>", "parameters")
    ],
    "lfm2": framed(
        "<|tool_call_start|>[",
        ['get_weather(city="Paris")', LFM_FULL, f'get_weather(city="Paris"), now(), {LFM_FULL}'],
        "]<|tool_call_end|>",
    ),
    "apertus": framed(
        "<|tools_prefix|>[",
        [
            f'{{"get_weather": {P}}}',
            f'{{"get_weather": {F}}}',
            f'{{"get_weather": {P}}}, {{"now": {{}}}}, {{"get_weather": {F}}}',
        ],
        "]<|tools_suffix|>",
    ),
    "granite": enveloped("<|tool_call|>[", "]"),
    "functionary": tagged(">>>", "\n", ""),
    "gemma4": tagged("<|tool_call>call:", "", "<tool_call|>"),
}
WRITTEN["gemma4"] = [
    text.replace(P, '{city:<|"|>Paris<|"|>}').replace(F, f"{{{GEMMA_FULL}}}") for text in WRITTEN["gemma4"]
]
EXAMPLES = [
    (format, kind, text)
    for format, texts in WRITTEN.items()
    for kind, text in zip((ONE, ALL, SEVERAL), texts, strict=False)
]
# Other ways that models of the family are known to write the same.
VARIANTS = [
    ("hermes", ONE, f'<tool_call>{{"name":"get_weather","arguments":{P}}}</tool_call>'),
    ("hermes", SEVERAL, "".join(text for text in enveloped("<tool_call>", "</tool_call>", listed=False)[2:])),
    ("llama3", ONE, f'<|python_tag|>{{"name": "get_weather", "parameters": {P}}}'),
    ("llama3", ONE, f'{{"type": "function", "name": "get_weather", "parameters": {P}}}'),
    ("llama3", ONE, f' {{ "name" : "get_weather",\n"arguments": {P} }}'),
    ("mistral", ONE, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {P}, "id": "a1B2c3D4e"}}]'),
    (
        "gpt-oss",
        ONE,
        f"<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{P}<|call|>",
    ),
    ("gpt-oss", ONE, f" to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>{P}"),
    ("gpt-oss", ONE, f"<|channel|>commentary to=functions.get_weather<|message|>{P}"),
    ("gpt-oss", ONE, f"<|channel|>analysis to=functions.get_weather json<|message|>{P}<|call|>"),
    (
        "gpt-oss",
        ONE,
        f"<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{P}<|call|>",
    ),
    ("json", ONE, f'{{"type": "function", "function": {{"name": "get_weather", "arguments": {P}}}}}'),
    ("json", ONE, f'{{"function": {{"name": "get_weather", "parameters": {P}}}}}'),
    ("json", ONE, f'{{"function": "get_weather", "arguments": {P}}}'),
    ("json", ONE, f'[\n  {{"name": "get_weather", "arguments": {P}}}\n]'),
    ("kimi", ONE, WRITTEN["kimi"][0].replace("><", ">\n<")),
]


@pytest.mark.parametrize(("format", "kind", "text"), EXAMPLES + VARIANTS)
def test_what_a_model_writes_is_read_and_is_of_the_grammar(format: str, kind: str, text: str) -> None:
    assert calls(format, text) == WANTED[kind]
    assert grammar(format, parallel=True).accepts(text)
    # Without parallel calls, the first is all.
    assert grammar(format).accepts(text) == (kind != SEVERAL)
    assert grammar(format, name="get_weather").accepts(text) == (kind != SEVERAL)
    assert not grammar(format, name="now", parallel=True).accepts(text)


def test_every_format_has_examples() -> None:
    assert set(WRITTEN) == set(TOOL_FORMATS)
    for format, texts in WRITTEN.items():
        opening = (*tool_format(format).open, *tool_format(format).leading)
        for text in texts:
            assert text.replace(" ", "").startswith(tuple(mark.replace(" ", "") for mark in opening)), format


@pytest.mark.parametrize(("format", "text"), [(format, text) for format, kind, text in EXAMPLES if kind == ALL])
def test_spans_end_and_payloads_lie_where_the_format_says(format: str, text: str) -> None:
    found = tool_format(format)
    if found.close:
        assert text.endswith(found.close)
    # The token that ends the turn may come instead, but in a list of arguments that only its end tells to be whole.
    if found.close and format != "glm":
        assert calls(format, text.removesuffix(found.close[0])) == WANTED[ALL]
    starts = [text.find(mark) + len(mark) for mark in found.payload_open if mark in text]
    assert starts
    assert min(starts) <= text.index("Paris")
    assert "get_weather" in text[: min(starts)]


@pytest.mark.parametrize(("format", "text"), [(format, text) for format, kind, text in EXAMPLES if kind != SEVERAL])
def test_a_call_that_is_cut_short_is_none(format: str, text: str) -> None:
    found = tool_format(format)
    # What may be missing: the close marker, and white space before it.
    closing = found.close[0] if found.close and format != "glm" else ""
    whole = len(text.removesuffix(closing).rstrip())
    assert not grammar(format, parallel=True).accepts(text[: whole - 1])
    for end in range(whole):
        with pytest.raises(ToolCallError):
            found.parse(text[:end], TOOLS)


NESTED = 5000
# What is none of a family's calls, each with a part of what the error says.
BAD_JSON = {
    "no tool": ('{"name": "nothing", "arguments": {}}', "no tool 'nothing'"),
    "near": ('{"name": "get_wether", "arguments": {}}', "did you mean 'get_weather'"),
    "no name": ('{"arguments": {}}', "'name'"),
    "no arguments": ('{"name": "now"}', "'arguments'"),
    "a list": ('{"name": "now", "arguments": []}', "no JSON object"),
    "null": ('{"name": "now", "arguments": null}', "no JSON object"),
    "text that is no JSON": ('{"name": "now", "arguments": "x"}', "no JSON"),
    "more keys": ('{"name": "now", "arguments": {}, "then": 1}', "'then'"),
    "single quotes": ("{'name': 'now', 'arguments': {}}", "Expecting property name"),
    "half": ('{"name": "now", "arguments": {', "Expecting property name"),
    "a number": ("5", "JSON object"),
    "a name of another type": ('{"name": 5, "arguments": {}}', "no tool 5"),
    "NaN": ('{"name": "get_weather", "arguments": {"city": NaN}}', "NaN"),
    "infinite": ('{"name": "get_weather", "arguments": {"city": 1e999}}', "past what a float holds"),
    "half a surrogate pair": ('{"name": "get_weather", "arguments": {"city": "\\ud800"}}', "surrogate"),
    "too many digits": ('{"name": "get_weather", "arguments": {"city": ' + "9" * 5000 + "}}", "too many digits"),
    "deep": (
        '{"name": "get_weather", "arguments": {"city": ' + "[" * NESTED + "]" * NESTED + "}}",
        "nested deeper",
    ),
    "open deep": ('{"name": "get_weather", "arguments": {"city": ' + "[" * 200_000, "nested deeper"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_a_json_object_that_is_no_call_is_told_why(what: str) -> None:
    text, problem = BAD_JSON[what]
    with pytest.raises(ToolCallError) as error:
        calls("hermes", f"<tool_call>{text}</tool_call>")
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
        WRITTEN["hermes"][0] + " and",
    ],
    "llama3": ["now()", '{"name": "now", "parameters": {}}; ;', "<|python_tag|>now.call()"],
    "mistral": ['[{"name": "now", "arguments": {}}]', "[TOOL_CALLS]now{}", "[TOOL_CALLS][]"],
    "mistral-v11": [
        "[TOOL_CALLS]now[ARGS]{}",
        "[TOOL_CALLS]now[CALL_ID]1[ARGS]{}",
        "[TOOL_CALLS][CALL_ID]a1B2c3D4e[ARGS]{}",
    ],
    "mistral-v13": ["[TOOL_CALLS]now{}", "[TOOL_CALLS]now[ARGS][]", "[TOOL_CALLS]now[ARGS]{}[ARGS]{}"],
    "deepseek-r1": [WRITTEN["deepseek-v3.1"][0], WRITTEN["deepseek-r1"][0].replace("```<", "<")],
    "deepseek-v3.1": [WRITTEN["deepseek-r1"][0], DEEPSEEK[0] + DEEPSEEK[1], WRITTEN["deepseek-v3.1"][0] + "x"],
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
        WRITTEN["kimi"][0].replace("functions.", ""),
        WRITTEN["kimi"][0].replace(":0", ""),
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
def test_what_is_malformed_is_refused_and_not_of_the_grammar(format: str, text: str) -> None:
    with pytest.raises(ToolCallError) as error:
        calls(format, text)
    assert len(str(error.value)) < 300
    assert not grammar(format, parallel=True).accepts(text)


def test_every_format_has_malformed_texts() -> None:
    assert set(MALFORMED) == set(TOOL_FORMATS)


# --- Whatever a grammar lets a model write is read, and valid ---------------------------------

RICH = {
    "name": "rich",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "maxLength": 12},
            "maybe": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
            "either": {"type": ["integer", "boolean"]},
            "word": {"enum": ["a b", "</p>", 'c"']},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$", "maxLength": 6},
            "point": {"$ref": "#/$defs/point"},
            "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2},
            "flag": {"type": "boolean"},
            "least": {"type": "integer", "minimum": 10, "maximum": 99},
            "fixed": {"const": "x"},
        },
        "required": ["text", "word", "point"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {
                    "x": {"type": "number", "minimum": -9, "maximum": 9},
                    "label": {"type": "string", "maxLength": 3},
                },
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
}
RICH_TOOLS = normalized_tools([RICH, NOW, WEATHER])
SPECIALS = sorted(
    {
        *(mark for format in TOOL_FORMATS.values() for mark in (*format.open, *format.close) if " " not in mark),
        *(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
        ),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[ARGS]", "[CALL_ID]", '<|"|>', "<|start|>"),
        *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    }
)
# Tokens that lie across the borders of the syntax.
LONG = [
    "</",
    "parameter",
    "</parameter>",
    "\n</",
    "ter>x",
    '"}',
    '",',
    "</arg_value>",
    "<|",
    '<|"|>',
    "}<",
    '": "',
    "()",
]
CLOSING = set('"}])>\n,/') | set(LONG)


class Vocabulary:
    """ASCII, some longer tokens, an end, and special tokens, which have no text."""

    def __init__(self, specials: Sequence[str]) -> None:
        self.texts = [*(chr(code) for code in range(128)), *"é｜▁", *LONG]
        self.end = len(self.texts)
        self.names = [*self.texts, "", *specials]
        self.n_tokens = len(self.names)
        self.is_eog = np.arange(self.n_tokens) == self.end

    def piece(self, token: int) -> bytes:
        return self.texts[token].encode() if token < self.end else b""

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return b"".join(self.names[token].encode() if special else self.piece(token) for token in map(int, tokens))

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        text = source if isinstance(source, str) else source.decode()
        if parse_special and text in self.names[self.end + 1 :]:
            return np.array([self.end + 1 + self.names[self.end + 1 :].index(text)], np.int32)
        return np.array([self.texts.index(letter) for letter in text], np.int32)

    def literal(self, text: str) -> str:
        """Lark for a text, with the special tokens in it by number."""
        specials = self.names[self.end + 1 :]
        if not specials:
            return plainly(text)
        any_special = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        return " ".join(
            f"<[{self.end + 1 + specials.index(part)}]>" if part in specials else plainly(part)
            for part in re.split(f"({any_special})", text)
            if part
        )


VOCABULARIES = {
    "texts": Vocabulary([]),
    "specials": Vocabulary(SPECIALS),
    "all": Vocabulary([*SPECIALS, "</parameter>"]),
}


@cache
def walked(format: str, vocabulary: str, name: str | None, parallel: bool) -> tuple[GrammarCompiler, Grammar]:
    words = VOCABULARIES[vocabulary]
    written = tool_format(format).grammar(RICH_TOOLS, name=name, parallel=parallel, literal=words.literal)
    return GrammarCompiler(words), Grammar.lark(written)


def written_by_chance(format: str, vocabulary: str, name: str | None, parallel: bool, seed: int) -> str | None:
    """A text that tokens drawn at random make under a format's grammar; None where it does not come to its end."""
    words, chance = VOCABULARIES[vocabulary], random.Random(seed)
    compiler, grammar = walked(format, vocabulary, name, parallel)
    matcher = compiler.matcher(grammar)
    text = ""
    for _ in range(1500):
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        assert allowed, f"nothing can follow {text!r}"
        if words.end in allowed and (len(allowed) == 1 or chance.random() < 0.3):
            return text
        closing = [token for token in allowed if words.names[token] in CLOSING or token > words.end]
        token = chance.choice(
            closing if closing and chance.random() < 0.4 else [t for t in allowed if t != words.end]
        )
        matcher.accept(token)
        text += words.names[token]
    return None


def read_or_too_large(format: str, text: str) -> list[ToolCall] | None:
    """The calls; None where a number is JSON's, and no float's."""
    problem = ""
    try:
        return tool_format(format).parse(text, RICH_TOOLS)
    except ToolCallError as error:
        problem = str(error)
    assert "past what a float holds" in problem, text
    return None


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_what_a_grammar_allows_is_read_and_valid(format: str, vocabulary: str) -> None:
    finished = 0
    for seed in range(int(os.environ.get("ERLLAMA_GRAMMARS", "25"))):
        name = "rich" if seed % 2 else None
        text = written_by_chance(format, vocabulary, name, seed % 3 != 0, seed)
        if text is None:
            continue
        finished += 1
        found = read_or_too_large(format, text)
        if found is None:
            continue
        assert found
        assert name is None or {call.name for call in found} == {name}
        assert seed % 3 != 0 or len(found) == 1
        for call in found:
            jsonschema.validate(call.arguments, parameters_of(RICH_TOOLS)[call.name])
    assert finished > 10


# --- What templates write is read back ---------------------------------------------------------

MARKERS = sorted(
    {mark for format in TOOL_FORMATS.values() for mark in (*format.open, *format.close, *format.payload_open)}
)
HARD = [*MARKERS, '"', "'", "\\", "\n", "{", "}", "]", "null", "5", " ", "</parameter>", "é", "😀"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.lists(st.sampled_from(HARD), max_size=4).map("".join),
)
numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
words = st.text("abcXYZ_", min_size=1, max_size=5)
anything = st.dictionaries(texts, values, max_size=3)
TYPED = {
    "text": texts,
    "whole": st.integers(-(2**70), 2**70),
    "number": numbers,
    "flag": st.booleans(),
    "list": st.lists(values, max_size=3),
    "more": anything,
}
typed = st.fixed_dictionaries({}, optional=TYPED)
JSON_TYPE = {"text": "string", "whole": "integer", "flag": "boolean", "list": "array", "more": "object"}
LOOSE = normalized_tools(
    [
        {
            "name": "loose-tool_1",
            "description": "Takes all.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": JSON_TYPE.get(key, key), "description": "It."} for key in TYPED},
            },
        }
    ]
)
plain_keys = st.dictionaries(
    words,
    st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, texts),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
        max_leaves=6,
    ),
    max_size=3,
)


class Written(NamedTuple):
    """How a template writes calls: what arguments may be and may not have, what ends a turn, how many calls."""

    format: str
    arguments: st.SearchStrategy[dict[str, object]] = anything
    without: str = "\0"
    end: str = ""
    most: int = 3


FAMILIES = {
    "Apertus-8B-Instruct": Written("apertus"),
    "ByteDance-Seed-OSS": Written("seed", typed, "</parameter>"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": Written("command-r"),
    "GLM-4.6": Written("glm", typed, "</arg_value>"),
    "Kimi-K2-Instruct": Written("kimi"),
    "MiniMax-M2": Written("minimax", typed, "</parameter>"),
    "Mistral-Small-3.2-24B-Instruct-2506": Written("mistral-v11", end="<EOS>"),
    "NVIDIA-Nemotron-Nano-v2": Written("nemotron"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": Written("hermes"),
    "Qwen-QwQ-32B": Written("hermes"),
    "Qwen-Qwen2.5-7B-Instruct": Written("hermes"),
    "Qwen-Qwen3-0.6B": Written("hermes"),
    "Qwen3-Coder": Written("qwen3-coder", typed, "</parameter>"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": Written("deepseek-r1"),
    "deepseek-ai-DeepSeek-V3.1": Written("deepseek-v3.1"),
    "google-gemma-4-31B-it": Written("gemma4", plain_keys, '<|"|>'),
    "meetkai-functionary-medium-v3.2": Written("functionary", end="<|eot_id|>"),
    "meta-llama-Llama-3.1-8B-Instruct": Written("llama3", end="<|eot_id|>", most=1),
    "meta-llama-Llama-3.3-70B-Instruct": Written("llama3", end="<|eot_id|>", most=1),
    "mistralai-Mistral-Nemo-Instruct-2407": Written("mistral", end="<EOS>"),
    "openai-gpt-oss-120b": Written("gpt-oss", most=1),
}
# Of the others, two know of tools without writing calls, and the rest know of none.
SILENT = {"LFM2-8B-A1B": "lfm2", "ibm-granite-granite-3.3-2B-Instruct": "granite"}
TOOLLESS = {"HuggingFaceTB-SmolLM3-3B", "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"}
ASKED = "What now?"


@cache
def renderer() -> Callable[..., str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils.chat_template_utils import render_jinja_template

    def render(
        template: str, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
    ) -> str:
        (text,), _ = render_jinja_template(
            [messages], tools=tools, chat_template=template, bos_token="<BOS>", eos_token="<EOS>"
        )
        assert isinstance(text, str)
        return text

    return render


@cache
def changing_template(source: str) -> Callable[..., str]:
    """A template that changes lists, which no sandbox of today allows."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source).render


def written_by_template(name: str, made: Sequence[Mapping[str, object]]) -> str:
    """The span of calls in what a template makes of a conversation that ends with them."""
    source = (TEMPLATES / f"{name}.jinja").read_text()
    family = FAMILIES[name]
    tool_calls = [
        {"id": f"call{n:05}", "type": "function", "function": {"name": "loose-tool_1", "arguments": arguments}}
        for n, arguments in enumerate(made)
    ]
    messages = normalized_messages(
        [{"role": "user", "content": ASKED}, {"role": "assistant", "content": None, "tool_calls": tool_calls}]
    )
    if name.startswith("meetkai"):
        # It takes arguments as JSON text.
        for call in messages[-1]["tool_calls"]:  # type: ignore[attr-defined]
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    if name.startswith("Kimi"):
        text = changing_template(source)(messages=messages, tools=LOOSE)
    else:
        text = renderer()(source, messages, LOOSE)
    text = text[text.index(ASKED) :]
    format = tool_format(family.format)
    begin = min(at for mark in (*format.open, '{"name": "loose-tool_1"') if (at := text.find(mark)) >= 0)
    end = text.rindex(family.end) if family.end else max(text.rfind(mark) + len(mark) for mark in format.close)
    return text[begin:end]


@needs_templates
@pytest.mark.parametrize("name", FAMILIES)
@settings(suppress_health_check=[HealthCheck.filter_too_much], max_examples=40, deadline=None)
@given(chosen=st.data())
def test_what_a_template_writes_is_read_back(name: str, chosen: st.DataObject) -> None:
    family = FAMILIES[name]
    made = chosen.draw(st.lists(family.arguments, min_size=1, max_size=family.most))
    assume(not any(family.without in text for text in strings_in(made)))
    span = written_by_template(name, made)
    found = tool_format(family.format).parse(span, LOOSE)
    assert [call.name for call in found] == ["loose-tool_1"] * len(made)
    assert [json.dumps(call.arguments, sort_keys=True) for call in found] == [
        json.dumps(arguments, sort_keys=True) for arguments in made
    ]
    assert len({call.id for call in found}) == len(made)


def strings_in(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = (
        [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    )
    return [text for part in parts for text in strings_in(part)]


@needs_templates
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_template_writes_is_of_the_grammar(name: str) -> None:
    arguments: dict[str, object] = {"text": 'a "b"', "whole": 5, "list": [1, "x"]}
    family = FAMILIES[name]
    text = written_by_template(name, [arguments] * family.most)
    written = tool_format(family.format).grammar(LOOSE, name=None, parallel=family.most > 1, literal=plainly)
    if family.format == "seed":
        # It writes lists as Python does, which its models need not.
        text = text.replace("'x'", '"x"')
    assert Grammar.lark(written).accepts(text)


@needs_templates
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_a_template_tells_its_format(path: Path) -> None:
    found = find_tool_format(path.read_text())
    if path.stem in TOOLLESS:
        assert found is None
    else:
        family = FAMILIES.get(path.stem)
        assert found is tool_format(family.format if family else SILENT[path.stem])


# --- Ids, values, thinking, and what nobody should write ---------------------------------------


def test_an_id_is_the_models_own_or_made_up() -> None:
    def ids(format: str, text: str) -> list[str]:
        return [call.id for call in tool_format(format).parse(text, TOOLS)]

    assert ids("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "a1B2c3D4e"}]') == ["a1B2c3D4e"]
    assert ids("mistral-v11", WRITTEN["mistral-v11"][0]) == ["a1B2c3D4e"]
    assert ids("kimi", WRITTEN["kimi"][0]) == ["functions.get_weather:0"]
    # Said twice, the second one is another call all the same.
    first, second, third = ids("mistral-v11", WRITTEN["mistral-v11"][2])
    assert first == "a1B2c3D4e"
    assert len({first, second, third}) == 3
    for format in set(TOOL_FORMATS) - {"mistral-v11", "kimi"}:
        (found,) = ids(format, WRITTEN[format][0])
        # Mistral's templates take ids of nine letters and digits only.
        assert re.fullmatch("[0-9a-f]{9}" if "mistral" in format else "call_[0-9a-f]{24}", found)


def test_arguments_are_json_text_again() -> None:
    (call,) = tool_format("hermes").parse(WRITTEN["hermes"][1], TOOLS)
    assert json.loads(call.arguments_json) == FULL
    assert "é" in tool_format("hermes").parse(WRITTEN["hermes"][0].replace("Paris", "é"), TOOLS)[0].arguments_json


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
def test_a_value_without_quotes_is_what_the_schema_says(schema: object, raw: str, expected: object) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/loop"}, {"type": "string"}]}
    parameters = {
        "type": "object",
        "properties": {"a": schema},
        "$defs": {"n": {"type": "integer"}, "loop": loop},
    }
    tools = normalized_tools([{"name": "f", "parameters": parameters}])
    for format, written in (("glm", glm), ("seed", seed), ("qwen3-coder", qwen)):
        ((_, found),) = calls(format, written("f", [("a", raw)]), tools)
        assert found == {"a": expected}
        assert type(found["a"]) is type(expected)


def test_an_argument_that_is_not_in_the_schema_is_read_as_it_looks() -> None:
    assert calls("glm", glm("now", [("a", "5"), ("b", "five")])) == [("now", {"a": 5, "b": "five"})]


@pytest.mark.parametrize("format", ["glm", "qwen3-coder", "seed", "minimax", "lfm2", "gemma4"])
@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"anyOf": [WEATHER["parameters"]]}, "'anyOf' in them"),
        ({"type": "object", "required": ["a"]}, "'a' is required"),
    ],
)
def test_parameters_that_list_no_arguments_have_no_grammar_in_families_that_list_them(
    format: str, parameters: dict[str, object], problem: str
) -> None:
    tools = normalized_tools([{"name": "f", "parameters": parameters}])
    with pytest.raises(GrammarError, match=re.escape(problem)):
        tool_format(format).grammar(tools, name=None, parallel=False, literal=plainly)
    assert Grammar.lark(tool_format("hermes").grammar(tools, name=None, parallel=False, literal=plainly))


@pytest.mark.parametrize(("format", "text"), [(format, texts[1]) for format, texts in WRITTEN.items()])
def test_parameters_may_be_elsewhere_in_their_schema(format: str, text: str) -> None:
    weather = WEATHER["parameters"]
    tools = normalized_tools([{**WEATHER, "parameters": {"$ref": "#/$defs/p", "$defs": {"p": weather}}}])
    assert calls(format, text, tools) == WANTED[ALL]
    written = tool_format(format).grammar(tools, name=None, parallel=False, literal=plainly)
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
def test_a_value_without_quotes_is_kept_to_its_schema(schema: object, good: list[str], bad: list[str]) -> None:
    parameters = {
        "properties": {"a": schema, "never": False},
        "required": ["a"],
        "$defs": {"word": {"type": "string", "pattern": "^[a-z]+$"}},
    }
    tools = normalized_tools([{"name": "f", "parameters": parameters}])
    for format, written in (("glm", glm), ("seed", seed), ("qwen3-coder", qwen)):
        kept = Grammar.lark(tool_format(format).grammar(tools, name=None, parallel=False, literal=plainly))
        for raw in good:
            text = written("f", [("a", raw)])
            assert kept.accepts(text), (format, raw)
            ((_, found),) = calls(format, text, tools)
            jsonschema.validate(found, parameters)
        for raw in bad:
            if ("</parameter>" in raw and format == "glm") or ("</arg_value>" in raw and format != "glm"):
                continue
            assert not kept.accepts(written("f", [("a", raw)])), (format, raw)
        assert not kept.accepts(written("f", [])), format
        assert not kept.accepts(written("f", [("a", good[0]), ("never", "1")])), format


def test_a_grammar_is_of_tools_that_are_there() -> None:
    hermes = tool_format("hermes")
    with pytest.raises(OptionError, match="no tool is called 'x'"):
        hermes.grammar(TOOLS, name="x", parallel=False, literal=plainly)
    with pytest.raises(OptionError, match="needs a tool"):
        hermes.grammar([], name=None, parallel=False, literal=plainly)


def test_a_format_is_found_by_its_name() -> None:
    for name, format in TOOL_FORMATS.items():
        assert tool_format(name) is format
        assert format.name == name
    with pytest.raises(OptionError, match="did you mean 'hermes'"):
        tool_format("hermess")
    with pytest.raises(OptionError, match="there is no tool format"):
        tool_format(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_hostile_texts_are_refused_in_time(format: str) -> None:
    found = tool_format(format)
    heads = {text[: text.index(end)] for text in WRITTEN[format] for end in ("get_weather", "Paris")}
    begun = time.monotonic()
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
                found.parse(head + part * (100_000 // len(part)), TOOLS)
            assert len(str(error.value)) < 300
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("format", sorted(set(TOOL_FORMATS) - {"json", "llama3"}))
def test_many_spans_are_read_in_time(format: str) -> None:
    begun = time.monotonic()
    assert len(calls(format, "\n".join(WRITTEN[format][:1] * 2000))) == 2000
    assert time.monotonic() - begun < 10


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
def test_a_template_tells_how_thinking_is_marked(template: str, open: str, close: str) -> None:
    found = find_thinking(template)
    assert found is not None
    assert open in found.open
    assert close in found.close


def test_a_template_without_marks_tells_nothing() -> None:
    assert find_thinking("{{ messages[0].content }} thinks") is None
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
def test_a_known_template_tells_its_marks(path: Path) -> None:
    found = find_thinking(path.read_text())
    assert (found and (found.open[0], found.close[0])) == THINKING.get(path.stem)
