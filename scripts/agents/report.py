"""The figures of conversations, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from scripts.agents.requests import Request

MIN_SHARE = 0.95  # of a prompt that comes from the cache, from the second request of a conversation on


class Conversation(NamedTuple):
    """One conversation.

    Attributes:
        agent: its title.
        requests: in order.
    """

    agent: str
    requests: Sequence[Request]

    def misses(self) -> list[Request]:
        """Return the requests that computed too much of their prompts."""
        return [each for each in self.requests if not each.is_first and each.share < MIN_SHARE]

    def as_json(self) -> dict[str, object]:
        """Return the figures as values of JSON, without texts of prompts."""
        rows = [{**each._asdict(), "share": round(each.share, 4)} for each in self.requests]
        return {"agent": self.agent, "requests": rows}


def print_table(conversations: Sequence[Conversation]) -> None:
    """Print a row for each request."""
    for each in conversations:
        print(f"\n{each.agent}. The server was killed and started again before turn 3.\n")
        print("turn  prompt  cached  computed   share  first token  tier      reply")
        for request in each.requests:
            computed = request.prompt - request.cached
            share = "first" if request.is_first else f"{request.share:.1%}"
            print(
                f"{request.turn:4}  {request.prompt:6}  {request.cached:6}  {computed:8}  {share:>6}"
                f"  {request.first_token:9.2f} s  {request.tier or '-':8}  {request.completion} tokens, "
                f"{request.finish_reason}"
            )
            if request.cause:
                print(f"      {request.recomputed} tokens again: {request.cause}")
