"""Calls that a grammar allows are read and valid, and so are calls that templates render."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jinja2
import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from erllama import Grammar
from erllama.chat.messages import normalize_messages
from erllama.chat.tool_calls.call_grammar import write_call_grammar
from erllama.chat.tool_calls.formats import TOOL_FORMATS, find_tool_format, get_tool_format
from erllama.chat.tool_calls.reader import read_calls
from erllama.chat.tool_calls.tools import get_parameters, normalize_tools
from erllama.engine import ToolCall
from erllama.engine.grammar.grammar import GrammarCompiler
from erllama.errors import ToolCallError
from support.chat.tool_calls import (
    HARD,
    NOW,
    TEMPLATES,
    WEATHER,
    lark_literal,
    needs_templates,
)
from support.examples import examples
from support.grammar_walks import VOCABULARIES, random_walk, words

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
RICH_TOOLS = normalize_tools([RICH, NOW, WEATHER])


@cache
def walked(format: str, vocabulary: str, name: str | None, parallel: bool) -> tuple[GrammarCompiler, Grammar]:
    words = VOCABULARIES[vocabulary]
    written = write_call_grammar(
        get_tool_format(format), RICH_TOOLS, name=name, parallel=parallel, literal=words.literal
    )
    return GrammarCompiler(words), Grammar.lark(written)


def written_by_chance(format: str, vocabulary: str, name: str | None, parallel: bool, seed: int) -> str | None:
    """Return a random text that a format's grammar allows, or None if it does not reach its end."""
    compiler, grammar = walked(format, vocabulary, name, parallel)
    return random_walk(VOCABULARIES[vocabulary], compiler.matcher(grammar), random.Random(seed))


def read_or_too_large(format: str, text: str) -> list[ToolCall] | None:
    """Return the calls, or None if a JSON number is beyond floats."""
    problem = ""
    try:
        return read_calls(get_tool_format(format), text, RICH_TOOLS)
    except ToolCallError as error:
        problem = str(error)
    assert re.search("too many digits|larger than any float", problem), text
    return None


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("format", TOOL_FORMATS)
def test_calls_that_a_grammar_allows_are_read_and_valid(format: str, vocabulary: str) -> None:
    finished, n_walks = 0, int(os.environ.get("ERLLAMA_GRAMMARS", "10"))
    for seed in range(n_walks):
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
            jsonschema.validate(call.arguments, get_parameters(RICH_TOOLS)[call.name])
    assert 4 * finished > n_walks


# --- What templates write is read back ---------------------------------------------------------

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
LOOSE = normalize_tools(
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
    """How a template writes calls: limits of arguments, the end of a turn, the number of calls."""

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
# Two of the others support tools without writing calls. The rest do not support tools.
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
    """A template that changes lists, which current sandboxes refuse."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source).render


def written_by_template(name: str, made: Sequence[Mapping[str, object]]) -> str:
    """Return the span of the calls in a rendered conversation that ends with them."""
    source = (TEMPLATES / f"{name}.jinja").read_text()
    family = FAMILIES[name]
    tool_calls = [
        {"id": f"call{n:05}", "type": "function", "function": {"name": "loose-tool_1", "arguments": arguments}}
        for n, arguments in enumerate(made)
    ]
    messages = normalize_messages(
        [{"role": "user", "content": ASKED}, {"role": "assistant", "content": None, "tool_calls": tool_calls}]
    )
    if name.startswith("meetkai"):
        # This template takes arguments as JSON text.
        for call in messages[-1]["tool_calls"]:  # type: ignore[attr-defined]
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    if name.startswith("Kimi"):
        text = changing_template(source)(messages=messages, tools=LOOSE)
    else:
        text = renderer()(source, messages, LOOSE)
    text = text[text.index(ASKED) :]
    format = get_tool_format(family.format)
    begin = min(at for mark in (*format.open, '{"name": "loose-tool_1"') if (at := text.find(mark)) >= 0)
    end = text.rindex(family.end) if family.end else max(text.rfind(mark) + len(mark) for mark in format.close)
    return text[begin:end]


@needs_templates
@pytest.mark.parametrize("name", FAMILIES)
@settings(suppress_health_check=[HealthCheck.filter_too_much], max_examples=examples(25), deadline=None)
@given(chosen=st.data())
def test_calls_rendered_by_a_template_are_read_back(name: str, chosen: st.DataObject) -> None:
    family = FAMILIES[name]
    made = chosen.draw(st.lists(family.arguments, min_size=1, max_size=family.most))
    assume(not any(family.without in text for text in strings_in(made)))
    span = written_by_template(name, made)
    found = read_calls(get_tool_format(family.format), span, LOOSE)
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
def test_calls_rendered_by_a_template_match_the_grammar(name: str) -> None:
    arguments: dict[str, object] = {"text": 'a "b"', "whole": 5, "list": [1, "x"]}
    family = FAMILIES[name]
    text = written_by_template(name, [arguments] * family.most)
    written = write_call_grammar(
        get_tool_format(family.format), LOOSE, name=None, parallel=family.most > 1, literal=lark_literal
    )
    if family.format == "seed":
        # This template writes lists as Python does, unlike its models.
        text = text.replace("'x'", '"x"')
    assert Grammar.lark(written).accepts(text)


@needs_templates
@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.jinja")), ids=lambda path: path.stem)
def test_the_format_is_recognized_by_the_template(path: Path) -> None:
    found = find_tool_format(path.read_text())
    if path.stem in TOOLLESS:
        assert found is None
    else:
        family = FAMILIES.get(path.stem)
        assert found is get_tool_format(family.format if family else SILENT[path.stem])
