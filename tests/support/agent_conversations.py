"""Codex and OpenCode as a server sees them: their requests, in the forms and with the headers that they have.

The texts, and those of the tools, are our own. `python -m scripts.agents` runs the agents themselves.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openai
from openai import Stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent

from scripts.agents.agent import NEW_LINE, NOTES, TEXT

REQUESTS = Path(__file__).parents[1] / "server" / "agents"
WAIT = 300.0  # seconds; a busy machine needs some of them
# What the tools return, by the names of the tools.
RESULTS = {
    "exec_command": f"Exit code 0 after 0.01 s. Output:\n{TEXT}",
    "read": f"<path>/project/{NOTES}</path>\n<content>\n1: {NEW_LINE}\n</content>",
    "edit": "The file has the new text.",
    "bash": f"2 {NOTES}\n",
}


class Reply(NamedTuple):
    """A reply of the server.

    Attributes:
        text: without thinking and calls.
        thinking: what the model thought.
        calls: id, name and arguments of each.
        n_prompt, n_cached, n_reply: tokens of the prompt, those of them that were not computed, and of the reply.
    """

    text: str
    thinking: str
    calls: Sequence[tuple[str, str, str]]
    n_prompt: int
    n_cached: int
    n_reply: int


class AgentConversation(ABC):
    """A conversation of an agent.

    Args:
        name: of the file with the agent's requests.
        url: of the server.
    """

    def __init__(self, name: str, url: str) -> None:
        self.requests: Mapping[str, Any] = json.loads((REQUESTS / f"{name}.json").read_text())
        self.items: list[Mapping[str, Any]] = list(self.requests["beginning"])
        self.tools: list[Mapping[str, Any]] = self.requests["tools"]
        self.connect(url)

    def connect(self, url: str) -> None:
        """Send further requests to this server."""
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=WAIT, max_retries=0, _strict_response_validation=True
        )

    def ask(self, text: str) -> list[Reply]:
        """Send a message of the user, and the results of the calls until a reply has none. Return all replies."""
        self.items.append(self.user_message(text))
        replies = [self.send()]
        while replies[-1].calls:
            self.items += [self.result(id, RESULTS[name]) for id, name, _ in replies[-1].calls]
            replies.append(self.send())
        return replies

    @abstractmethod
    def user_message(self, text: str) -> Mapping[str, Any]:
        """Return a message of the user."""

    @abstractmethod
    def result(self, call_id: str, text: str) -> Mapping[str, Any]:
        """Return the result of a call."""

    @abstractmethod
    def send(self) -> Reply:
        """Send the conversation, check the order of the events, and add the reply to the conversation."""


class CodexConversation(AgentConversation):
    """Codex, on the Responses API."""

    def __init__(self, url: str) -> None:
        super().__init__("codex", url)
        self._n_requests = 0

    def user_message(self, text: str) -> Mapping[str, Any]:
        content = [{"type": "input_text", "text": text}]
        return {"type": "message", "id": f"msg_u{len(self.items)}", "role": "user", "content": content}

    def result(self, call_id: str, text: str) -> Mapping[str, Any]:
        id = f"fco_{len(self.items)}"
        return {"type": "function_call_output", "id": id, "call_id": call_id, "output": text}

    def send(self) -> Reply:
        self._n_requests += 1
        turn = json.dumps({"turn_id": f"turn-{self._n_requests}", "turn_started_at_unix_ms": self._n_requests})
        metadata = {**self.requests["body"]["client_metadata"], "x-codex-turn-metadata": turn}
        body = {**self.requests["body"], "input": self.items, "tools": self.tools, "client_metadata": metadata}
        headers = {**self.requests["headers"], "x-codex-turn-metadata": turn}
        with self.client.post(
            "/responses",
            cast_to=Response,
            body=body,
            options={"headers": headers},
            stream=True,
            stream_cls=Stream[ResponseStreamEvent],
        ) as stream:
            response = check_response_events(list(stream))
        self.items += [item.to_dict() for item in response.output]
        usage = response.usage
        assert usage is not None
        return Reply(
            response.output_text,
            "".join(part.text for item in response.output if item.type == "reasoning" for part in item.summary),
            [(each.call_id, each.name, each.arguments) for each in response.output if each.type == "function_call"],
            usage.input_tokens,
            usage.input_tokens_details.cached_tokens,
            usage.output_tokens,
        )


def check_response_events(events: Sequence[ResponseStreamEvent]) -> Response:
    """Check that the events of a streamed response are in their order, and return the response."""
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = []
    open_item = False
    for event in events[2:-1]:
        if event.type == "response.output_item.added":
            assert not open_item, "an item begins within another one"
            assert event.output_index == len(done)
            open_item = True
            continue
        assert open_item, f"{event.type} is outside of an item"
        if event.type == "response.output_item.done":
            done.append(event.item)
            open_item = False
        else:
            assert event.output_index == len(done)  # type: ignore[union-attr]
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.to_dict() for item in done] == [item.to_dict() for item in last.response.output]
    return last.response


class OpenCodeConversation(AgentConversation):
    """OpenCode, on chat completions."""

    def __init__(self, url: str) -> None:
        super().__init__("opencode", url)

    def user_message(self, text: str) -> Mapping[str, Any]:
        return {"role": "user", "content": json.dumps(text)}

    def result(self, call_id: str, text: str) -> Mapping[str, Any]:
        return {"role": "tool", "tool_call_id": call_id, "content": text}

    def ask_for_title(self, text: str) -> Reply:
        """Send the request for a title, which is a conversation of its own."""
        messages = [*self.requests["title"], self.user_message(text)]
        body = {name: value for name, value in self.requests["body"].items() if name != "tool_choice"}
        return self._post({**body, "messages": messages})

    def send(self) -> Reply:
        reply = self._post({**self.requests["body"], "messages": self.items, "tools": self.tools})
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "reasoning_content": reply.thinking}
        if reply.calls:
            message["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": _as_javascript(arguments)}}
                for id, name, arguments in reply.calls
            ]
        self.items.append(message)
        return reply

    def _post(self, body: Mapping[str, Any]) -> Reply:
        with self.client.post(
            "/chat/completions",
            cast_to=ChatCompletion,
            body=body,
            options={"headers": self.requests["headers"]},
            stream=True,
            stream_cls=Stream[ChatCompletionChunk],
        ) as stream:
            return read_chunks(list(stream))


def _as_javascript(arguments: str) -> str:
    """Return arguments as OpenCode sends them back: parsed, and written by JavaScript."""
    return json.dumps(json.loads(arguments), separators=(",", ":"), ensure_ascii=False)


def read_chunks(chunks: Sequence[ChatCompletionChunk]) -> Reply:
    """Check that the chunks of a streamed chat completion are in their order, and return the reply."""
    *deltas, counts = chunks
    usage = counts.usage
    assert counts.choices == []
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    choices = [chunk.choices[0] for chunk in deltas]
    assert [choice.delta.role for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert [choice.finish_reason is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert choices[-1].finish_reason == ("tool_calls" if calls else "stop")
    return Reply(
        "".join(choice.delta.content or "" for choice in choices),
        "".join((choice.delta.model_extra or {}).get("reasoning_content") or "" for choice in choices),
        [_read_call(call) for call in calls],
        usage.prompt_tokens,
        usage.prompt_tokens_details.cached_tokens or 0,
        usage.completion_tokens,
    )


def _read_call(call: Any) -> tuple[str, str, str]:  # noqa: ANN401
    return call.id, call.function.name, call.function.arguments
