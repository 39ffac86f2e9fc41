"""erllama's models in Simon Willison's `llm`: its command in processes of its own, and its Python interface."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llm
import pytest
from llm.parts import (
    AttachmentPart,
    Message,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)

import erllama
from erllama import llm_plugin
from erllama._model.default_cache import default_cache
from support.doc_pages import DOCS, blocks
from support.model_stores import empty_home

LLM = Path(sys.executable).parent / "llm"
GREEDY = {"temperature": 0.0, "n_threads": 1}
SUM = "What is 17 + 25?"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home directory without models, whose files `llm` and the cache use."""
    empty_home(tmp_path / "home", monkeypatch)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "erllama")
    monkeypatch.setenv("ERLLAMA_CACHE_DIR", str(tmp_path / "prompts"))
    monkeypatch.setattr("erllama._model.default_cache._default_cache", None)
    (tmp_path / "llm").mkdir()
    yield tmp_path
    llm_plugin.loaded.close()
    default_cache().close()


def run_llm(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [LLM, *arguments], input=typed, capture_output=True, text=True, timeout=300, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done


def cached_tokens(printed: str) -> tuple[int, int]:
    """Return the prompt tokens of the reply, and how many of them came from the cache."""
    found = re.search(r'(\d+) input, \d+ output, \{"cached_tokens": (\d+)\}', printed)
    assert found, printed
    return int(found[1]), int(found[2])


def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return json.dumps({"temperature": 21, "condition": "cloudy"})


# --- the command


def test_a_conversation_continues_from_disk_in_the_next_process() -> None:
    options = ("-u", "-o", "temperature", "0", "-o", "n_threads", "1")
    first = run_llm("-m", "erllama/demo", *options, SUM)
    assert first.stdout.strip() == "17 + 25 = 42."
    assert "1 + 2 + 1 = 4" in first.stderr, "thinking is not part of the reply"
    n_first, n_cached = cached_tokens(first.stderr)
    assert n_cached == 0
    second = run_llm("-c", *options, "And minus 3?")
    assert second.stdout.strip() == "42 - 3 = 39."
    n_second, n_cached = cached_tokens(second.stderr)
    assert n_first < n_cached < n_second, "the whole first turn is restored, with the reply"


def test_a_chat_keeps_the_model_and_the_conversation() -> None:
    typed = f"{SUM}\nAnd minus 3?\nexit\n"
    done = run_llm("chat", "-m", "erllama/demo", "-o", "temperature", "0", "-o", "n_threads", "1", typed=typed)
    assert done.stdout.index("17 + 25 = 42.") < done.stdout.index("42 - 3 = 39.")
    logs = json.loads(run_llm("logs", "--json").stdout)
    kinds = [log["response_json"]["cache"]["kind"] for log in logs]
    assert sorted(kinds) == ["cold", "partial"]


def test_the_package_has_the_entry_point_and_the_command_lists_models() -> None:
    (plugin,) = json.loads(run_llm("plugins").stdout)
    assert plugin["name"] == "erllama"
    assert plugin["hooks"] == ["register_models"]
    listed = run_llm("models", "--options", "-m", "erllama/demo").stdout
    assert "erllama: erllama/demo" in listed
    for name in llm_plugin.Options.model_fields:
        assert f"{name}: " in listed
    assert "streaming" in listed
    assert "schemas" in listed
    assert "tools" in listed


def test_a_model_that_is_not_downloaded_says_how() -> None:
    done = subprocess.run([LLM, "-m", "erllama/SmolLM2", "hi"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "`erllama pull smollm2` downloads it" in done.stderr


# --- names


def names() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    llm_plugin.register_models(lambda model, _, aliases: found.update({model.model_id: set(aliases)}))
    return found


def test_models_on_this_machine_have_their_names(
    home: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "own").mkdir()
    (home / "own" / "Tiny.gguf").symlink_to(tiny_gguf)
    (home / "own" / "broken.gguf").write_text("no model")
    monkeypatch.setenv("ERLLAMA_MODELS", str(home / "own"))
    found = names()
    assert found["erllama/Tiny"] == {"erllama/tiny"}
    assert found["erllama/smollm2"] == {"erllama/SmolLM2"}
    assert set(found) == {"erllama/Tiny", "erllama/smollm2", "erllama/gemma3", "erllama/demo"}


def test_a_downloaded_model_keeps_its_short_name(
    home: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERLLAMA_MODEL_CACHE", str(home))
    (home / "smollm2-135m-instruct-q4_1.gguf").symlink_to(tiny_gguf)
    found = names()
    assert found["erllama/smollm2-135m-instruct-q4_1"] == {"erllama/smollm2", "erllama/SmolLM2"}
    assert "erllama/smollm2" not in found


# --- the Python interface


def test_a_reply_streams_and_is_that_of_chat() -> None:
    model = llm.get_model("erllama/demo")
    response = model.prompt(SUM, system="You are helpful.", **GREEDY)
    pieces = list(response)
    assert len(pieces) > 1
    with erllama.load_model(erllama.demo_model(), cache=erllama.Cache(), n_threads=1) as own:
        messages = [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": SUM}]
        reply = own.chat(messages, temperature=0.0)
    assert response.text() == "".join(pieces) == reply.text
    assert (response.usage().input, response.usage().output) == (reply.usage.prompt, reply.usage.completion)
    (message,) = response.messages()
    assert [type(part) for part in message.parts] == [ReasoningPart, TextPart]


def test_options_reach_the_model() -> None:
    model = llm.get_model("erllama/demo")
    short = model.prompt("Tell me a story.", max_tokens=3, thinking=False, **GREEDY)
    assert short.usage().output == 3
    assert short.response_json["finish_reason"] == "length"
    stopped = model.prompt(SUM, stop="=", **GREEDY)
    assert stopped.text() == "17 + 25 "
    with pytest.raises(erllama.OptionError, match="temperature=-1"):
        model.prompt(SUM, temperature=-1, n_threads=1).text()
    with pytest.raises(ValueError, match="temprature"):
        model.prompt(SUM, temprature=1)
    with pytest.raises(erllama.PromptTooLong):
        model.prompt("word " * 400, n_ctx="256", n_threads="1").text()  # the command passes texts
    with pytest.raises(ValueError, match="n_ctx"):
        model.prompt(SUM, n_ctx="large")


def test_a_schema_constrains_the_reply() -> None:
    schema = {"type": "object", "properties": {"sum": {"enum": [41, 42]}}, "required": ["sum"]}
    reply = llm.get_model("erllama/demo").prompt(SUM, schema=schema, thinking=False, **GREEDY)
    assert json.loads(reply.text())["sum"] in (41, 42)


def test_tools_are_called_and_their_results_reported() -> None:
    model = llm.get_model("erllama/demo")
    chain = model.chain("What is the weather in Oslo?", tools=[get_weather], options=GREEDY)
    assert "21 degrees" in chain.text()
    first, second = chain._responses
    (call,) = first.tool_calls()
    assert (call.name, call.arguments) == ("get_weather", {"city": "Oslo"})
    assert second.usage().details["cached_tokens"] > first.usage().input, "the call itself is restored, too"


def test_the_asyncio_interface_replies_the_same() -> None:
    async def ask() -> tuple[list[str], str]:
        response = llm.get_async_model("erllama/demo").prompt(SUM, **GREEDY)
        pieces = [piece async for piece in response]
        return pieces, await response.text()

    pieces, text = asyncio.run(ask())
    assert len(pieces) > 1
    assert "".join(pieces) == text == "17 + 25 = 42."


def test_a_reply_that_is_left_early_leaves_the_model_usable() -> None:
    model = llm.get_model("erllama/demo")
    pieces = iter(model.prompt("Tell me a story.", **GREEDY))
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert model.prompt(SUM, **GREEDY).text() == "17 + 25 = 42."


def test_the_page_about_the_plugin_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("docs/llm.md", "python")
    exec(compile(block.text, "docs/llm.md", "exec"), {})
    assert capsys.readouterr().out == "17 + 25 = 42.\n"
    page = (DOCS / "llm.md").read_text()
    for name in llm_plugin.Options.model_fields:
        assert re.search(rf"^\|.*`{name}`", page, re.MULTILINE), name


def test_messages_of_llm_become_those_of_chat() -> None:
    conversation = [
        Message("user", [TextPart("one "), TextPart("two")]),
        Message("assistant", [ReasoningPart("hm"), TextPart("so"), ToolCallPart("f", {"a": 1}, "id1")]),
        Message("tool", [ToolResultPart("f", "42", "id1")]),
        Message("assistant", [ToolCallPart("search", {}, "s", server_executed=True), TextPart("done")]),
    ]
    call = {"id": "id1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert llm_plugin.messages_of(conversation) == [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "so", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "id1", "name": "f", "content": "42"},
        {"role": "assistant", "content": "done"},
    ]
    picture = AttachmentPart(llm.Attachment(type="image/png", content=b"png"))
    with pytest.raises(erllama.ChatError, match="has an attachment"):
        llm_plugin.messages_of([Message("user", [picture])])
