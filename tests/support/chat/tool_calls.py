"""Tools, and the calls of them in the format of each model family."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache

import pytest

from erllama import Grammar
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.formats import TOOL_FORMATS, get_tool_format
from erllama.chat.tool_calls.literals import GEMMA_KEY, PYTHON_KEY
from erllama.chat.tool_calls.parameter_schemas import find_allowed_types, is_unquoted
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.syntax import ListedArguments
from erllama.chat.tool_calls.tools import normalize_tools
from support.paths import SHARED

TEMPLATES = SHARED / "templates"
needs_templates = pytest.mark.skipif(
    not TEMPLATES.is_dir(), reason="the folder of templates beside the checkout is missing"
)

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
TOOLS = normalize_tools([WEATHER, NOW])
PARIS: dict[str, object] = {"city": "Paris"}
FULL: dict[str, object] = {"city": "Paris", "days": 3, "exact": True, "near": [1, -2.5], "unit": "C"}
FULL_JSON = json.dumps(FULL)


def lark_literal(text: str) -> str:
    """Return the Lark literal of a text, including special tokens."""
    return json.dumps(text, ensure_ascii=False)


@cache
def grammar(format: str, *, name: str | None = None, parallel: bool = False) -> Grammar:
    return Grammar.lark(
        write_call_grammar(get_tool_format(format), TOOLS, name=name, parallel=parallel, literal=lark_literal)
    )


def parsed_calls(
    format: str, text: str, tools: Sequence[Mapping[str, object]] = TOOLS
) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, call.arguments) for call in read_calls(get_tool_format(format), text, tools)]


ONE = "one"
ALL = "all"
SEVERAL = "several"
EXPECTED_CALLS = {
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


def minimax(*parsed_calls: tuple[str, Sequence[tuple[str, str]]]) -> str:
    written = ""
    for name, arguments in parsed_calls:
        parameters = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments)
        written += f'<invoke name="{name}">\n{parameters}</invoke>\n'
    return f"<minimax:tool_call>\n{written}</minimax:tool_call>"


def tagged(before: str, middle: str, after: str, between: str = "") -> list[str]:
    """Return the three texts of a family that writes name and JSON separately."""
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
CALL_TEXTS: dict[str, list[str]] = {
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
CALL_TEXTS["gemma4"] = [
    text.replace(P, '{city:<|"|>Paris<|"|>}').replace(F, f"{{{GEMMA_FULL}}}") for text in CALL_TEXTS["gemma4"]
]
EXAMPLES = [
    (format, kind, text)
    for format, texts in CALL_TEXTS.items()
    for kind, text in zip((ONE, ALL, SEVERAL), texts, strict=False)
]
# Other known forms of the same calls by models of the family.
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
    ("kimi", ONE, CALL_TEXTS["kimi"][0].replace("><", ">\n<")),
]

MARKERS = sorted(
    {mark for format in TOOL_FORMATS.values() for mark in (*format.open, *format.close, *format.payload_open)}
)
HARD = [*MARKERS, '"', "'", "\\", "\n", "{", "}", "]", "null", "5", " ", "</parameter>", "é", "😀"]


Schema = dict[str, object]


LISTED = [name for name, format in TOOL_FORMATS.items() if isinstance(format.arguments, ListedArguments)]


class Unwritable(Exception):  # noqa: N818 - reads as what happened
    """The family cannot write a value."""


def call_text(format: str, name: str, arguments: Mapping[str, object], parameters: Schema) -> str:
    """Return one call exactly as a model of the family writes it."""
    found = TOOL_FORMATS[format]
    written = _arguments(format, arguments, parameters)
    span, call = found.spans[0], found.calls[0]
    id = {"mistral-v11": "a1B2c3D4e"}.get(format, "0")
    pieces = [span.begin, call.before, name, call.middle.replace("\0", id), written, call.after, span.end]
    return "".join(piece if piece is written else piece.replace("~", "").replace("\0", id) for piece in pieces)


def _arguments(format: str, arguments: Mapping[str, object], parameters: Schema) -> str:
    kind = TOOL_FORMATS[format].arguments
    if kind == "json":
        return _json(arguments)
    if kind == "python":
        return ", ".join(f"{_bare(key, PYTHON_KEY, _json(key))}={_python(v)}" for key, v in arguments.items())
    if kind == "gemma":
        return _gemma_entries(arguments)
    assert isinstance(kind, ListedArguments)
    return "".join(_listed(kind, key, value, parameters) for key, value in arguments.items())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _python(value: object) -> str:
    return str(value) if isinstance(value, bool) else _json(value)


def _bare(name: str, bare: re.Pattern[str], string: str) -> str:
    return name if bare.fullmatch(name) else string


def _gemma_entries(value: Mapping[str, object]) -> str:
    keys = sorted(value, key=str.lower)
    return ",".join(f"{_bare(key, GEMMA_KEY, _gemma(key))}:{_gemma(value[key])}" for key in keys)


def _gemma(value: object) -> str:
    if isinstance(value, str):
        if '<|"|>' in value:
            raise Unwritable
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return f"{{{_gemma_entries(value)}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_gemma, value))}]"
    return json.dumps(value)


def _listed(kind: ListedArguments, name: str, value: object, parameters: Schema) -> str:
    properties = parameters["properties"]
    assert isinstance(properties, dict)
    types = find_allowed_types(properties[name], parameters)
    text = _json(value)
    if is_unquoted(types) and isinstance(value, str):
        text = value
        if kind.close.rstrip("~") in text or (types != {"string"} and text.strip(" \t\r\n") in ("null", "None")):
            raise Unwritable
    line = "\n" if kind.on_own_lines else ""
    return f"{kind.open}{name}{kind.middle}{line}{text}{line}{kind.close}".replace("~", "")
