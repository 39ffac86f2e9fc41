"""One conversation with tools through each API of the server, as agents have it.

A `Speaker` keeps the conversation in the form of its API, returns replies as the server sent them, and reports the
token counts in one form.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import anthropic
import httpx
import openai

WAIT = 300.0  # seconds; a busy machine needs some of them


class Answer(NamedTuple):
    """A reply.

    Attributes:
        text: without thinking and calls.
        calls: name and arguments of each.
        n_prompt, n_cached, n_reply: tokens of the prompt, those of them that were not computed again, and tokens of
            the reply.
    """

    text: str
    calls: list[tuple[str, Mapping[str, object]]]
    n_prompt: int
    n_cached: int
    n_reply: int


class Speaker(ABC):
    """A client in a conversation.

    Args:
        url: of the server.
        tools: in OpenAI's form.
    """

    def __init__(self, url: str, tools: Sequence[Mapping[str, Any]]) -> None:
        self._functions = [tool["function"] for tool in tools]
        self._turns: list[Any] = []
        self.connect(url)

    @abstractmethod
    def connect(self, url: str) -> None:
        """Send further requests to this server."""

    @abstractmethod
    def ask(self, text: str) -> Answer:
        """Send a message of the user."""

    @abstractmethod
    def send_result(self, result: str) -> Answer:
        """Send the result of each call of the previous reply."""


class OpenAIChatSpeaker(Speaker):
    """Speaks through `/v1/chat/completions`."""

    def connect(self, url: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=WAIT, max_retries=0, _strict_response_validation=True
        )

    def ask(self, text: str) -> Answer:
        self._turns.append({"role": "user", "content": text})
        return self._send()

    def send_result(self, result: str) -> Answer:
        for call in self._turns[-1]["tool_calls"]:
            self._turns.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return self._send()

    def _send(self) -> Answer:
        reply = self._client.chat.completions.create(
            model="warm",
            messages=self._turns,
            tools=[{"type": "function", "function": each} for each in self._functions],
            temperature=0.0,
        )
        message, usage = reply.choices[0].message, reply.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        self._turns.append(message.model_dump(exclude_none=True))
        calls = [call.function for call in message.tool_calls or () if call.type == "function"]
        return Answer(
            message.content or "",
            [(call.name, json.loads(call.arguments)) for call in calls],
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens or 0,
            usage.completion_tokens,
        )


class ResponsesSpeaker(Speaker):
    """Speaks through `/v1/responses` as Codex does: the server stores nothing."""

    def connect(self, url: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=WAIT, max_retries=0, _strict_response_validation=True
        )

    def ask(self, text: str) -> Answer:
        self._turns.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})
        return self._send()

    def send_result(self, result: str) -> Answer:
        last = max(at for at, item in enumerate(self._turns) if item.get("role") == "user" or "output" in item)
        for item in self._turns[last + 1 :]:
            if item["type"] == "function_call":
                self._turns.append({"type": "function_call_output", "call_id": item["call_id"], "output": result})
        return self._send()

    def _send(self) -> Answer:
        reply = self._client.responses.create(
            model="warm",
            instructions="",
            input=self._turns,
            tools=[{"type": "function", "strict": False, **each} for each in self._functions],
            store=False,
            include=["reasoning.encrypted_content"],
            prompt_cache_key="conversation",
            temperature=0.0,
        )
        usage = reply.usage
        assert usage is not None
        self._turns += [item.model_dump(exclude_none=True) for item in reply.output]
        calls = [item for item in reply.output if item.type == "function_call"]
        return Answer(
            reply.output_text,
            [(call.name, json.loads(call.arguments)) for call in calls],
            usage.input_tokens,
            usage.input_tokens_details.cached_tokens,
            usage.output_tokens,
        )


class AnthropicSpeaker(Speaker):
    """Speaks through `/v1/messages`, with thinking."""

    def connect(self, url: str) -> None:
        self._client = anthropic.Anthropic(
            base_url=url, api_key="none", timeout=WAIT, max_retries=0, _strict_response_validation=True
        )

    def ask(self, text: str) -> Answer:
        self._turns.append({"role": "user", "content": text})
        return self._send()

    def send_result(self, result: str) -> Answer:
        calls = [block for block in self._turns[-1]["content"] if block["type"] == "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": call["id"], "content": result} for call in calls]
        self._turns.append({"role": "user", "content": results})
        return self._send()

    def _send(self) -> Answer:
        reply = self._client.messages.create(
            model="warm",
            messages=self._turns,
            tools=[
                {"name": each["name"], "description": each["description"], "input_schema": each["parameters"]}
                for each in self._functions
            ],
            thinking={"type": "enabled", "budget_tokens": 1024},
            max_tokens=2048,
            extra_body={"temperature": 0.0},
        )
        usage = reply.usage
        self._turns.append(
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in reply.content]}
        )
        n_read, n_created = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        return Answer(
            "".join(block.text for block in reply.content if block.type == "text"),
            [(block.name, dict(block.input)) for block in reply.content if block.type == "tool_use"],
            usage.input_tokens + n_read + n_created,
            n_read,
            usage.output_tokens,
        )


class OllamaSpeaker(Speaker):
    """Speaks through `/api/chat`. Ollama's client drops the counts of cached tokens, so this one is httpx."""

    def connect(self, url: str) -> None:
        self._url = f"{url}/api/chat"

    def ask(self, text: str) -> Answer:
        self._turns.append({"role": "user", "content": text})
        return self._send()

    def send_result(self, result: str) -> Answer:
        for call in self._turns[-1]["tool_calls"]:
            self._turns.append({"role": "tool", "tool_name": call["function"]["name"], "content": result})
        return self._send()

    def _send(self) -> Answer:
        tools = [{"type": "function", "function": each} for each in self._functions]
        body = {"messages": self._turns, "tools": tools, "stream": False, "options": {"temperature": 0.0}}
        reply = httpx.post(self._url, json=body, timeout=WAIT).raise_for_status().json()
        message = reply["message"]
        for call in message.get("tool_calls", ()):
            del call["id"]  # Ollama's own client drops it
        self._turns.append(message)
        return Answer(
            message["content"],
            [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())],
            reply["prompt_eval_count"],
            reply["prompt_cached_count"],
            reply["eval_count"],
        )


SPEAKERS: dict[str, type[Speaker]] = {
    "chat": OpenAIChatSpeaker,
    "responses": ResponsesSpeaker,
    "anthropic": AnthropicSpeaker,
    "ollama": OllamaSpeaker,
}
