"""The model of the agents, which has scripted replies.

It is a GGUF file on libllama, like any other. Its template ends a prompt with a token that stands
for the step of the conversation, and the script of that step follows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from erllama.testing.scripted import END, write_scripted

# Common words of prompts are tokens, so that a prompt has fewer tokens than bytes.
_COMMON = """
the to and of in is for you that or be it not this with use if are on as file an tool by from must when run only
can your command will do should path user before all other text type string description properties object required
"""
_WORDS = tuple(_COMMON.split())
TEMPLATE = (Path(__file__).parent / "template.jinja").read_text()


class Call(NamedTuple):
    """A reply that calls a tool.

    Attributes:
        thinking: what the model thinks before.
        name, arguments: of the tool.
    """

    thinking: str
    name: str
    arguments: Mapping[str, object]

    def __str__(self) -> str:
        call = json.dumps({"name": self.name, "arguments": self.arguments})
        return f"<think>\n{self.thinking}\n</think>\n\n<tool_call>\n{call}\n</tool_call>"


class Script(NamedTuple):
    """What a scripted model replies.

    Attributes:
        first: step by step, to the first message of the user and to the results of the calls.
        later: the same for each later message.
        without_tools: to requests without tools, such as for the title of a conversation.
    """

    first: Sequence[Call | str]
    later: Sequence[Call | str]
    without_tools: str

    def replies(self) -> dict[str, str]:
        """Return the reply of each step, by the token that stands for it."""
        steps = {f"<|first-{n}|>": str(reply) for n, reply in enumerate(self.first)}
        steps |= {f"<|later-{n}|>": str(reply) for n, reply in enumerate(self.later)}
        return {**steps, "<|plain|>": self.without_tools}


def write_scripted_model(path: Path, script: Script) -> Path:
    """Write a model with scripted replies as GGUF."""
    replies = script.replies()
    pieces = _unique_pieces(list(replies.values()))
    follows: dict[str, str] = {}
    for step, reply in zip(replies, pieces, strict=True):
        follows |= dict(pairwise([step, *reply, END]))
    words = [*_WORDS, *(piece for reply in pieces for piece in reply)]
    special = ["<|im_start|>", "<|im_end|>", *replies]
    n_steps = {"first": len(script.first), "later": len(script.later)}
    template = TEMPLATE.replace("n_steps = {}", f"n_steps = {n_steps}")
    return write_scripted(path, follows, words=words, special=special, chat_template=template, n_ctx_train=1 << 17)


def _unique_pieces(texts: Sequence[str]) -> list[list[str]]:
    """Split texts into pieces of two characters or more, of which no two are equal: each has one successor."""
    used: set[str] = set(_WORDS)
    split = []
    for text in texts:
        pieces: list[str] = []
        open_piece = ""
        for part in re.findall(r"\s*\S{1,8}|\s+", text):
            open_piece += part
            if len(open_piece) > 1 and open_piece not in used:
                used.add(open_piece)
                pieces.append(open_piece)
                open_piece = ""
        while open_piece and pieces:  # the rest of a text joins the piece before it
            open_piece = pieces.pop() + open_piece
            if open_piece not in used:
                used.add(open_piece)
                pieces.append(open_piece)
                open_piece = ""
        split.append(pieces)
    return split
