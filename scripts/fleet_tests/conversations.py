"""Conversations with a fleet: many at once, turn by turn, each with a system prompt that others share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

_SYSTEMS = 8  # different system prompts
_SUBJECTS = ("stories", "numbers", "weather", "animals", "letters", "gardens", "boats", "music")


class Turn(NamedTuple):
    """One answered turn: tokens of the prompt, those of them that were cached, and those that earlier turns had."""

    prompt: int
    cached: int
    earlier: int


@dataclass
class Conversation:
    """One conversation: its messages, and what its turns have cost."""

    number: int
    messages: list[dict[str, str]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    context: int = 0  # tokens that its last turn has left

    def __post_init__(self) -> None:
        subject = _SUBJECTS[self.number % _SYSTEMS]
        rules = " ".join(f"Rule {n}: speak kindly about {subject}." for n in range(12))
        self.messages.append({"role": "system", "content": f"You talk about {subject}. {rules}"})

    def ask(self) -> list[dict[str, str]]:
        """Return the messages of the next turn."""
        a, b = (self.number * 7 + len(self.turns) * 3) % 50, (self.number + len(self.turns)) % 50
        return [*self.messages, {"role": "user", "content": f"What is {a} + {b}?"}]

    def answered(self, asked: list[dict[str, str]], body: dict[str, Any]) -> None:
        """Add an answer."""
        usage = body["usage"]
        prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
        self.turns.append(Turn(prompt, cached, min(self.context, prompt)))
        self.context = prompt + usage["completion_tokens"]
        message = body["choices"][0]["message"]
        self.messages = [*asked, {"role": "assistant", "content": message["content"] or ""}]


async def send(client: httpx.AsyncClient, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    """Return the answer to a conversation."""
    body = {
        "model": "demo",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    response = await client.post("/v1/chat/completions", json=body)
    if response.status_code != 200:
        raise RuntimeError(f"status {response.status_code}: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer


async def converse(
    client: httpx.AsyncClient, conversations: Sequence[Conversation], n_turns: int, *, at_once: int, max_tokens: int
) -> None:
    """Run all conversations, interleaved: each turn of all in random order, some at once."""
    limit = asyncio.Semaphore(at_once)

    async def take_turn(each: Conversation) -> None:
        async with limit:
            asked = each.ask()
            each.answered(asked, await send(client, asked, max_tokens))

    order = random.Random(1)
    for _ in range(n_turns):
        shuffled = list(conversations)
        order.shuffle(shuffled)
        await asyncio.gather(*(take_turn(each) for each in shuffled))


def totals(conversations: Sequence[Conversation]) -> Turn:
    """Return the sums over all turns."""
    turns = [turn for each in conversations for turn in each.turns]
    return Turn(*(sum(values) for values in zip(*turns, strict=True)))


def with_client(port: int, work: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run `work` with a client of the fleet."""

    async def run() -> None:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300, limits=limits) as client:
            await work(client)

    asyncio.run(run())
