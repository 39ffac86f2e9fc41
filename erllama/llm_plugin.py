"""The plugin of Simon Willison's llm: models on this machine by their names, with erllama's cache.

The models are `erllama/NAME`. llm finds this module by its entry point and calls `register_models`. Models are
loaded at their first prompt and stay loaded until the process ends. Their prompts are cached in the user's cache
directory, so the next process restores a conversation. No other part of erllama imports this module.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import llm
from llm.parts import (
    AttachmentPart,
    Message,
    Part,
    ReasoningPart,
    StreamEvent,
    TextPart,
    ToolCallPart,
    ToolResultPart,
)
from pydantic import Field

import erllama
from erllama._model.default_cache import default_cache
from erllama._model.requests.options import ChatOptions
from erllama.errors import ChatError
from erllama.models.catalogue import CATALOGUE
from erllama.models.names import local_models, model_path

PREFIX = "erllama/"
_DEMO = "demo"
_LOAD_OPTIONS = ("n_ctx", "n_threads")


@llm.hookimpl
def register_models(register: Callable[..., object]) -> None:
    """Register the models on this machine, those of `erllama pull`, and the demo model."""
    taken: set[str] = set()
    for name, aliases in _names():
        free = [PREFIX + each for each in dict.fromkeys((name, *aliases)) if PREFIX + each not in taken]
        if PREFIX + name in free:
            taken.update(free)
            register(ErllamaModel(name), AsyncErllamaModel(name), aliases=free[1:])


def _names() -> Iterator[tuple[str, list[str]]]:
    """Yield each model's name and further names, which `llm` does not find in any case as erllama does."""
    short_names = {model.name: model.title[: len(model.name)] for model in CATALOGUE}
    for local in local_models():
        if not local.problem:
            names = [*local.names, *(each.casefold() for each in local.names)]
            for name in local.names:
                spelling = short_names.pop(name, "") if local.store == "erllama" else ""
                names += [spelling] if spelling.casefold() == name else []
            yield local.name, names[1:]
    for name, spelling in short_names.items():  # not downloaded: a prompt says how
        yield name, [spelling] if spelling.casefold() == name else []
    yield _DEMO, []


class Options(llm.Options):
    """Options of a prompt, `-o NAME VALUE`. erllama checks the values. None for erllama's default."""

    temperature: float | None = Field(
        default=None, description="Randomness; 0 always takes the most likely token. Default: 0.8."
    )
    max_tokens: int | None = Field(
        default=None, description="Maximum number of tokens of the reply. Default: what the context holds."
    )
    top_k: int | None = Field(default=None, description="Sample from the k most likely tokens. Default: 40.")
    top_p: float | None = Field(
        default=None,
        description="Sample from the fewest tokens whose probabilities sum to this. Default: 0.95.",
    )
    min_p: float | None = Field(
        default=None,
        description="Minimum probability of a token, relative to the most likely one. Default: 0.05.",
    )
    repeat_penalty: float | None = Field(
        default=None, description="Make recent tokens less likely, such as 1.1. Default: 1, which is off."
    )
    seed: int | None = Field(default=None, description="Seed of the random draws. Default: a random seed.")
    stop: str | None = Field(default=None, description="End the reply before this text.")
    thinking: bool | None = Field(
        default=None, description="Turn thinking on or off. Default: the setting of the model's template."
    )
    n_ctx: int | Literal["fit"] | None = Field(
        default=None,
        description="Context size in tokens, or fit for the largest that fits the free memory. "
        "Default: the model's, up to 4096.",
    )
    n_threads: int | None = Field(
        default=None, description="Number of threads. Default: at most the number of cores."
    )


class _Loaded:
    """The models that this process has loaded. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: dict[tuple[object, ...], erllama.Model] = {}

    def get(self, name: str, options: Mapping[str, Any]) -> erllama.Model:
        """Return the model of a name with these options of `load_model`; load it at the first call.

        Raises:
            erllama.Error: as `load_model` does.
        """
        path = _path(name)
        key = (os.path.realpath(path), *sorted(options.items()))
        with self._lock:
            if key not in self._models:
                self._models[key] = erllama.load_model(path, cache=default_cache(), **options)
            return self._models[key]

    def close(self) -> None:
        """Unload the models. The exit of the process does the same."""
        with self._lock:
            while self._models:
                self._models.popitem()[1].unload()


loaded = _Loaded()


def _path(name: str) -> Path:
    if name == _DEMO and not any(each.name == _DEMO for each in local_models()):
        return erllama.demo_model()
    return model_path(name)


class _Shared:
    """What the model and its asyncio form share. `name` is the model's name in erllama."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.model_id = PREFIX + name

    def __str__(self) -> str:
        return f"erllama: {self.model_id}"


class ErllamaModel(_Shared, llm.Model):
    """A model of erllama for `llm`."""

    Options = Options  # type: ignore[assignment] # `llm` declares a class of its own in each model

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None = None,
    ) -> Iterator[str | StreamEvent]:
        """Yield the reply to a prompt; see `llm.Model`."""
        loading, options = _options(prompt)
        model = loaded.get(self.name, loading)
        with model.stream_chat(messages_of(prompt.messages), **options) as events:
            for event in events:
                if isinstance(event, erllama.Done):
                    yield from _finish(event.completion, response)
                else:
                    yield from _pieces(event)


class AsyncErllamaModel(_Shared, llm.AsyncModel):
    """A model of erllama for the asyncio interface of `llm`."""

    Options = Options  # type: ignore[assignment] # `llm` declares a class of its own in each model

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None = None,
    ) -> AsyncGenerator[str | StreamEvent, None]:
        """Yield the reply to a prompt; see `llm.AsyncModel`."""
        loading, options = _options(prompt)
        model = await asyncio.to_thread(loaded.get, self.name, loading)
        async with model.astream_chat(messages_of(prompt.messages), **options) as events:
            async for event in events:
                pieces = _finish(event.completion, response) if isinstance(event, erllama.Done) else _pieces(event)
                for piece in pieces:
                    yield piece


def _options(prompt: llm.Prompt) -> tuple[dict[str, Any], ChatOptions]:
    """Return the options of `load_model` and those of the request."""
    given = {name: value for name, value in prompt.options.model_dump().items() if value is not None}
    loading = {name: given.pop(name) for name in _LOAD_OPTIONS if name in given}
    if prompt.schema is not None:
        given["json_schema"] = prompt.schema
    if prompt.tools:
        given["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema or {"type": "object", "properties": {}},
                },
            }
            for tool in prompt.tools
        ]
    return loading, cast(ChatOptions, given)


def messages_of(messages: Iterable[Message]) -> list[dict[str, object]]:
    """Return messages of `llm` in the form that `Model.chat` takes.

    Raises:
        ChatError: a message has an attachment.
    """
    found: list[dict[str, object]] = []
    for message in messages:
        if message.role == "tool":
            found += [
                {"role": "tool", "tool_call_id": part.tool_call_id, "name": part.name, "content": part.output}
                for part in message.parts
                if isinstance(part, ToolResultPart)
            ]
        else:
            found.append({"role": message.role, **_content(message.parts)})
    return found


def _content(parts: Iterable[Part]) -> dict[str, object]:
    """Return the content of a message. Calls that another provider's server has run are left out."""
    text, thinking = "", ""
    calls: list[dict[str, object]] = []
    for part in parts:
        if isinstance(part, TextPart):
            text += part.text
        elif isinstance(part, ReasoningPart):
            thinking += part.text
        elif isinstance(part, ToolCallPart) and not part.server_executed:
            function = {"name": part.name, "arguments": part.arguments}
            calls.append({"id": part.tool_call_id, "type": "function", "function": function})
        elif isinstance(part, AttachmentPart):
            raise ChatError("the conversation has an attachment, and models of erllama take text only")
    content: dict[str, object] = {"content": text}
    if thinking:
        content["reasoning_content"] = thinking
    if calls:
        content["tool_calls"] = calls
    return content


def _pieces(event: erllama.Event) -> Iterator[StreamEvent]:
    if isinstance(event, erllama.TextDelta) and event.text:
        yield StreamEvent(type="text", chunk=event.text)
    elif isinstance(event, erllama.ThinkingDelta) and event.text:
        yield StreamEvent(type="reasoning", chunk=event.text)


def _finish(completion: erllama.Completion, response: llm.Response | llm.AsyncResponse) -> Iterator[StreamEvent]:
    """Report the tool calls of a reply, its token counts, and what it had from the cache."""
    reply = cast(erllama.ChatCompletion, completion)
    for call in reply.tool_calls:
        yield StreamEvent(type="tool_call_name", chunk=call.name, tool_call_id=call.id)
        yield StreamEvent(type="tool_call_args", chunk=call.arguments_json, tool_call_id=call.id)
        response.add_tool_call(llm.ToolCall(name=call.name, arguments=call.arguments, tool_call_id=call.id))
    usage = reply.usage
    response.set_usage(input=usage.prompt, output=usage.completion, details={"cached_tokens": usage.cached})
    response.response_json = {
        "finish_reason": reply.finish_reason,
        "seed": reply.seed,
        "cache": {"kind": reply.cache.kind, "tier": reply.cache.tier, "tokens": reply.cache.tokens},
    }
