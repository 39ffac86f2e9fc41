"""Replies of every model family through the engine: thinking, answers and calls, with markers of both kinds."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

import erllama
from erllama.chat.tool_calls.formats import TOOL_FORMATS
from support.chat.tool_calls import EXAMPLES, EXPECTED_CALLS, TOOLS, VARIANTS
from support.scripted_backend import PieceVocabulary, ScriptedBackend, scripted_reply

TEMPLATE = "{{ messages[-1].content }}{% if tools %}{% endif %}{{ '\t' }}"
# Text by which a template is recognized, and the thinking markers of its family; the others use <think>.
HARMONY = "{# <|channel|>analysis<|message|> #}"
THINKING = {"gpt-oss": (HARMONY, "<|channel|>analysis<|message|>hm<|end|>")}
# Of several markers with a common beginning, the longer one is one token, as in most of these models.
MARKER = re.compile(r"<[|｜/]?[^<>\s=\"]+>|\[[A-Z_]+\]|<\|\"\|>")


def vocabulary_of(text: str, *, special: bool) -> PieceVocabulary:
    markers = sorted(set(MARKER.findall(text))) if special else []
    return PieceVocabulary(["get_", "weather", "Paris"], markers, end="<|eog|>")


def reply_to(
    output: str, format: str, template: str, *, special: bool, **options: object
) -> erllama.ChatCompletion:
    vocabulary = vocabulary_of(output, special=special)
    tokens: Sequence[int] = vocabulary.tokenize(output, parse_special=True).tolist()
    backend = ScriptedBackend(vocabulary, scripted_reply(vocabulary, tokens), chat_templates={"default": template})
    with erllama.load_backend(backend, cache=erllama.Cache()) as model:
        return model.chat([{"role": "user", "content": "Q"}], tools=TOOLS, tool_format=format, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("format", "kind", "text"), EXAMPLES + VARIANTS)
def test_calls_of_each_family_are_separated_from_thinking_and_read(
    format: str, kind: str, text: str, special: bool
) -> None:
    marks, thought = THINKING.get(format, ("{# <think></think> #}", "<think>hm</think>\n"))
    reply = reply_to(thought + text, format, TEMPLATE + marks, special=special)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == EXPECTED_CALLS[kind], reply
    assert (reply.thinking, reply.text, reply.tool_call_errors) == ("hm", "", ())
    assert reply.finish_reason == "tool_calls"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("format", "kind", "text"), [(f, k, t) for f, k, t in EXAMPLES if k == "one"])
def test_each_family_can_be_required_to_call(format: str, kind: str, text: str, special: bool) -> None:
    marks, thought = THINKING.get(format, ("{# <think></think> #}", "<think>hm</think>"))
    for choice in ("required", "get_weather"):
        reply = reply_to(thought + text, format, TEMPLATE + marks, special=special, tool_choice=choice)
        assert [(call.name, call.arguments) for call in reply.tool_calls] == EXPECTED_CALLS[kind]
        assert reply.thinking == "hm"


def test_gpt_oss_answers_are_read_from_channels() -> None:
    output = (
        "<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Let me see. <|end|>"
        "<|start|>assistant<|channel|>final<|message|>It rains."
    )
    for special in (False, True):
        reply = reply_to(output, "gpt-oss", TEMPLATE + HARMONY + "{# to=functions. #}", special=special)
        assert (reply.thinking, reply.text, reply.tool_calls) == ("hm", "Let me see. It rains.", ())


def test_every_tool_format_is_tested_here() -> None:
    assert {format for format, _, _ in EXAMPLES} == set(TOOL_FORMATS)
