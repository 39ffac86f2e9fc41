"""The requests of an agent, from the server's access log: their figures, and what broke the prefix of a prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# A template writes some tokens around a reply in another way once a message follows.
_AROUND_REPLY = 16


class Request(NamedTuple):
    """One request of an agent.

    Attributes:
        turn: the number of the user's message that it belongs to, from 1.
        is_first: whether it is the first of its conversation. Agents have further ones, such as for titles.
        prompt, cached, completion: tokens.
        first_token: seconds until the first token.
        tier: the slowest tier that a part of the prompt came from; "" if all of it was computed.
        finish_reason: why the reply ended; "error" with a code if it failed.
        recomputed: tokens of the conversation's previous request and reply that were computed again.
        cause: why they were computed again; "" if they were not.
    """

    turn: int
    is_first: bool
    prompt: int
    cached: int
    completion: int
    first_token: float
    tier: str
    finish_reason: str
    recomputed: int
    cause: str

    @property
    def share(self) -> float:
        """The part of the prompt that came from the cache, 0 to 1."""
        return self.cached / self.prompt


class _Earlier(NamedTuple):
    messages: Sequence[Any]
    n_tokens: int


def read_requests(lines: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Request]:
    """Return the requests in lines of the access log, in order.

    Args:
        lines: each with the number of its turn.
    """
    conversations: dict[str, _Earlier] = {}
    requests = []
    for turn, line in lines:
        messages = line.get("prompt", [])
        # A conversation begins with a system message of its own, and its length tells apart what only looks alike.
        name = json.dumps(messages[:1])
        earlier = conversations.get(name)
        requests.append(_read_request(turn, line, earlier))
        conversations[name] = _Earlier(messages, line["prompt_tokens"] + line.get("completion_tokens", 0))
    return requests


def _read_request(turn: int, line: Mapping[str, Any], earlier: _Earlier | None) -> Request:
    cached = line.get("cached_tokens", 0)
    missing = earlier.n_tokens - cached - _AROUND_REPLY if earlier is not None else 0
    return Request(
        turn,
        earlier is None,
        line["prompt_tokens"],
        cached,
        line.get("completion_tokens", 0),
        line.get("first_token", 0.0),
        line.get("tier", ""),
        f"error {line['error']}" if "error" in line else line.get("finish_reason", ""),
        max(missing, 0),
        _cause(line, earlier) if missing > 0 and earlier is not None else "",
    )


def _cause(line: Mapping[str, Any], earlier: _Earlier) -> str:
    """Return what differs between a conversation's last two requests."""
    messages = line["prompt"]
    notes = [note for note in line.get("notes", []) if note.startswith("prefix changed")]
    for index, (before, after) in enumerate(zip(earlier.messages, messages, strict=False)):
        if before != after:
            return "; ".join([f"the client changed message {index} ({after.get('role')})", *notes])
    return "; ".join(["tools, the reply or its rendering changed", *notes])
