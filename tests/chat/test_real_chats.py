"""Real models in conversations: templates, turns, streams, tools by schema, and constrained replies.

`make test-models` runs this file on the models that `make real-models` fetches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

import erllama
from support.paths import ROOT
from support.real_models import GREEDY, SMOLLM2, load, model_parameters, small_blocks

# Models without a template that writes tools get that of the demo model.
TOOL_TEMPLATE = ROOT / "scripts" / "demo_model" / "template.jinja"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1, "maxLength": 24},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "units": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "days", "units"],
        "additionalProperties": False,
    },
}
SEND = {
    "name": "send",
    "description": "Send a message to some people",
    "parameters": {
        "type": "object",
        "properties": {
            "to": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 2},
            "urgent": {"type": "boolean"},
        },
        "required": ["to", "urgent"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, SEND)]


@pytest.fixture(scope="module", params=model_parameters())
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[erllama.Model]:
    with small_blocks() as cache, load(path, cache) as found:
        yield found


@pytest.fixture(scope="module")
def smollm2(path: Path, model: erllama.Model) -> erllama.Model:
    if path.name != SMOLLM2:
        pytest.skip(f"states what {SMOLLM2} replies")
    return model


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def chat(model: erllama.Model, messages: list[dict[str, object]], **options: object) -> erllama.ChatCompletion:
    return model.chat(messages, **{"max_tokens": 24, **GREEDY, **options})  # type: ignore[arg-type]


def test_the_models_template_is_rendered(smollm2: erllama.Model) -> None:
    text = smollm2.render_chat([user("Hi")])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.apply_chat_template([user("Hi")]).tolist()
    assert (ids.count(1), ids.count(2)) == (3, 2), "the markers are special tokens"


def test_a_question_has_the_right_answer(smollm2: erllama.Model) -> None:
    begun = [user("What is the capital of France?"), {"role": "assistant", "content": "The capital of France is"}]
    reply = chat(smollm2, begun, continue_final_message=True)
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop", "the model ends its reply"


def test_a_turn_reuses_the_tokens_of_the_turns_before(model: erllama.Model) -> None:
    messages = [user("Name three colours."), {"role": "assistant", "content": "Red, green and blue."}]
    messages.append(user("Tell me about the first of them, in a few words."))
    first = chat(model, messages)
    messages += [first.message, user("And the second one?")]
    second = chat(model, messages)
    ids = list(second.context_tokens)
    assert ids[: len(first.context_tokens)] == list(first.context_tokens), "the reply keeps its tokens"
    assert second.cache.tokens >= len(first.context_tokens) - 1


def test_a_chat_continues_after_a_restart(path: Path, tmp_path: Path) -> None:
    """The history comes back as text, from a client that keeps no state."""
    messages = [user("Write one line about the sea.")]
    with small_blocks(disk=tmp_path / "kv") as cache, load(path, cache) as one:
        first = chat(one, messages)
    messages += [{"role": "assistant", "content": first.text}, user("One more.")]
    with small_blocks(disk=tmp_path / "kv") as cache, load(path, cache) as other:
        second = chat(other, messages)
    assert second.cache.tier == "disk"
    assert second.cache.tokens >= len(first.context_tokens) - 1


def test_a_stream_has_the_text_and_tokens_of_the_reply(model: erllama.Model) -> None:
    messages = [user("Reply with words in Japanese, Arabic and emoji: 日本語 العربية 🦙🎉")]
    whole = chat(model, messages, max_tokens=40)
    with model.stream_chat(messages, max_tokens=40, **GREEDY) as stream:  # type: ignore[arg-type]
        pieces = [event for event in stream if isinstance(event, erllama.TextDelta)]
        done = stream.result()
    assert "".join(piece.text for piece in pieces) == done.text == whole.text
    assert done.tokens == whole.tokens


def test_a_stop_string_ends_the_reply(model: erllama.Model) -> None:
    prompt = "The days of the week are Monday, Tuesday, Wednesday, Thursday,"
    plain = model.complete(prompt, max_tokens=16, **GREEDY)  # type: ignore[arg-type]
    assert "day" in plain.text
    stopped = model.complete(prompt, max_tokens=16, stop=["rday", "nday"], **GREEDY)  # type: ignore[arg-type]
    assert stopped.stop_sequence in ("rday", "nday")
    assert stopped.text == plain.text.partition(stopped.stop_sequence)[0]


# --- constrained replies ------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [WEATHER, SEND], ids=lambda tool: tool["name"])
@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 1.5, "seed": 3}], ids=["greedy", "sampled"])
def test_a_required_call_matches_the_schema_of_its_tool(
    model: erllama.Model, tool: dict[str, object], sampling: dict[str, float]
) -> None:
    messages = [user("What is the weather in Oslo for 3 days? Send it to Ann and Bo.")]
    options = {"tools": TOOLS, "tool_choice": tool["name"], "chat_template": TOOL_TEMPLATE, "max_tokens": 160}
    options["parallel_tool_calls"] = False  # a model that was not trained for chats does not end its reply
    reply = chat(model, messages, **{**options, **sampling})
    assert (reply.finish_reason, reply.tool_call_errors, reply.text) == ("tool_calls", (), "")
    (call,) = reply.tool_calls
    assert call.name == tool["name"]
    jsonschema.validate(call.arguments, tool["parameters"])
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain, 9 degrees."}
    again = chat(model, [*messages, reply.message, result], tools=TOOLS, chat_template=TOOL_TEMPLATE)
    assert again.cache.tokens >= len(reply.context_tokens) - 1, "the call keeps its tokens"


def test_a_model_may_call_any_tool_or_answer(model: erllama.Model) -> None:
    options: dict[str, object] = {"tools": TOOLS, "chat_template": TOOL_TEMPLATE, "max_tokens": 60}
    reply = chat(model, [user("What is the weather in Oslo?")], tool_choice="auto", **options)
    schemas = {str(tool["name"]): tool["parameters"] for tool in (WEATHER, SEND)}
    assert reply.tool_call_errors == (), "the grammar allows only calls that match their schema"
    for call in reply.tool_calls:
        jsonschema.validate(call.arguments, schemas[call.name])
    reply = chat(model, [user("What is the weather in Oslo?")], tool_choice="none", **options)
    assert reply.tool_calls == ()


def test_a_reply_matches_its_json_schema(model: erllama.Model) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 1, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    for options in (GREEDY, {"temperature": 2.0, "seed": 1}):
        reply = model.complete("A person as JSON: ", max_tokens=200, json_schema=schema, **options)  # type: ignore[arg-type]
        assert reply.finish_reason == "stop"
        jsonschema.validate(json.loads(reply.text), schema)


def test_a_reply_matches_its_grammar_or_pattern(model: erllama.Model) -> None:
    gbnf = 'root ::= "{" ws "\\"n\\":" ws digit "}"\ndigit ::= [0-9]\nws ::= [ \\t\\n]?'
    reply = model.complete("Reply with JSON:", max_tokens=32, grammar=gbnf, **GREEDY)  # type: ignore[arg-type]
    assert 0 <= json.loads(reply.text)["n"] <= 9
    pattern = r"[A-Z][a-z]{2,8} \d{4}-\d\d"
    reply = model.complete("A month: ", max_tokens=32, regex=pattern, temperature=1.5, seed=2)
    assert re.fullmatch(pattern, reply.text)


def test_text_survives_the_vocabulary(model: erllama.Model) -> None:
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 日本 🦙 \t\n  x = 12_345;"
    assert model.detokenize(model.tokenize(text)) == text
