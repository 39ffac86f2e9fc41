"""The prompt that the server makes is that of `Model.apply_chat_template` for the same JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import erllama
import erllama.server
from erllama.errors import ChatError
from support.chat.tool_calls import TEMPLATES, WEATHER, needs_templates
from support.examples import examples
from support.openai_server import Json, record_prompts
from support.scripted_backend import PieceVocabulary, ScriptedBackend

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|message|>", "<s>", "[INST]", "<|eot_id|>"]
NAMES = [
    "Qwen-Qwen3-0.6B",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "meta-llama-Llama-3.1-8B-Instruct",
    "openai-gpt-oss-120b",
    "google-gemma-4-31B-it",
    "mistralai-Mistral-Nemo-Instruct-2407",
    "deepseek-ai-DeepSeek-V3.1",
    "Kimi-K2-Instruct",
]

texts = st.lists(st.sampled_from([*'ab \n{}"é<|', *SPECIAL]), min_size=1, max_size=8).map("".join)
contents = texts | st.lists(texts.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)


def shuffled(value: Json) -> st.SearchStrategy[Json]:
    """Return mappings with the entries of a mapping in any order."""
    return st.permutations(list(value.items())).map(dict)


@st.composite
def conversations(draw: st.DrawFn) -> list[Json]:
    """Return a conversation of a few turns, some of which call tools."""
    first = draw(st.lists(st.sampled_from(["system", "developer"]), max_size=1))
    messages: list[Json] = [{"role": role, "content": draw(contents)} for role in first]
    for turn in range(draw(st.integers(0, 2))):
        messages.append({"role": "user", "content": draw(contents)})
        if draw(st.booleans()):
            arguments = draw(st.permutations([("city", draw(texts)), ("days", 3), ("exact", True)]))
            function = {"name": "get_weather", "arguments": json.dumps(dict(arguments))}
            call: Json = {"id": f"call{turn:05}", "type": "function", "function": function}
            messages.append(draw(shuffled({"role": "assistant", "content": draw(texts), "tool_calls": [call]})))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": draw(texts)})
        reply: Json = {"role": "assistant", "content": draw(contents)}
        if draw(st.booleans()):
            reply["reasoning_content"] = draw(texts)
        messages.append(draw(shuffled(reply)))
    messages.append({"role": "user", "content": draw(contents)})
    return messages


@st.composite
def tools(draw: st.DrawFn) -> list[Json] | None:
    """Return no tools, or one whose schema has its keys in any order."""
    if draw(st.booleans()):
        return None
    parameters = WEATHER["parameters"]
    assert isinstance(parameters, dict)
    properties = draw(shuffled(parameters["properties"]))
    schema = draw(shuffled({**parameters, "properties": properties}))
    return [{"type": "function", "function": draw(shuffled({**WEATHER, "parameters": schema}))}]


def joined_texts(message: Json) -> Json:
    content = message.get("content")
    if message["role"] == "assistant" or not isinstance(content, list) or len(content) < 2:
        return {}
    return {"content": "\n".join(part["text"] for part in content if part["text"])}


def expected_prompt(model: erllama.Model, messages: Sequence[Json], tools: list[Json] | None) -> list[int] | None:
    """Return the tokens of the model's own rendering; None if the template refuses the conversation.

    The server puts a line end between two texts of a message, as llama-server does.
    """
    try:
        joined = [message | joined_texts(message) for message in messages]
        ids = model.apply_chat_template(joined, tools=tools, special_tokens_in_content=False)
    except ChatError:
        return None
    return [int(id) for id in ids]


@pytest.mark.slow
@needs_templates
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_models_own_rendering(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = record_prompts(monkeypatch)
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    backend = ScriptedBackend(
        PieceVocabulary([], SPECIAL), lambda tokens: 256, chat_templates={"default": template}, n_ctx=32768
    )
    rendered = 0
    with erllama.load_backend(backend, cache=erllama.Cache()) as model:
        with TestClient(erllama.server.app(model), base_url="http://localhost") as client:

            @settings(max_examples=examples(12))
            @given(messages=conversations(), tools=tools())
            def check(messages: list[Json], tools: list[Json] | None) -> None:
                nonlocal rendered
                expected = expected_prompt(model, messages, tools)
                prompts.clear()
                body = {"messages": messages, "tools": tools, "max_tokens": 1}
                answer = client.post("/v1/chat/completions", content=json.dumps(body, ensure_ascii=False))
                if expected is None:
                    assert answer.status_code == 400
                else:
                    assert answer.status_code == 200, answer.text
                    assert prompts == [expected]
                    rendered += 1

            check()
    assert rendered, "the template refused every conversation"
