"""Random texts that a grammar allows, over several vocabularies."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from erllama.chat.tool_calls.formats import TOOL_FORMATS
from erllama.engine.grammar.matcher import Matcher
from support.chat.tool_calls import (
    lark_literal,
)

SPECIALS = sorted(
    {
        *(mark for format in TOOL_FORMATS.values() for mark in (*format.open, *format.close) if " " not in mark),
        *(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
        ),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[ARGS]", "[CALL_ID]", '<|"|>', "<|start|>"),
        *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    }
)


# Tokens that cross the boundaries of the syntax.
LONG = [
    "</",
    "parameter",
    "</parameter>",
    "\n</",
    "ter>x",
    '"}',
    '",',
    "</arg_value>",
    "<|",
    '<|"|>',
    "}<",
    '": "',
    "()",
]


CLOSING = set('"}])>\n,/') | set(LONG)


class Vocabulary:
    """ASCII, some longer tokens, an end, and special tokens, which have no text."""

    def __init__(self, specials: Sequence[str]) -> None:
        self.texts = [*(chr(code) for code in range(128)), *"é｜▁", *LONG]
        self.end = len(self.texts)
        self.names = [*self.texts, "", *specials]
        self.n_tokens = len(self.names)
        self.is_eog = np.arange(self.n_tokens) == self.end

    def piece(self, token: int) -> bytes:
        return self.texts[token].encode() if token < self.end else b""

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer], *, special: bool = False) -> bytes:
        return b"".join(self.names[token].encode() if special else self.piece(token) for token in map(int, tokens))

    def tokenize(
        self, source: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        text = source if isinstance(source, str) else source.decode()
        if parse_special and text in self.names[self.end + 1 :]:
            return np.array([self.end + 1 + self.names[self.end + 1 :].index(text)], np.int32)
        return np.array([self.texts.index(letter) for letter in text], np.int32)

    def literal(self, text: str) -> str:
        """Return the Lark literal of a text, with its special tokens by number."""
        specials = self.names[self.end + 1 :]
        if not specials:
            return lark_literal(text)
        any_special = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
        return " ".join(
            f"<[{self.end + 1 + specials.index(part)}]>" if part in specials else lark_literal(part)
            for part in re.split(f"({any_special})", text)
            if part
        )


VOCABULARIES = {
    "texts": Vocabulary([]),
    "specials": Vocabulary(SPECIALS),
    "all": Vocabulary([*SPECIALS, "</parameter>"]),
}


def random_walk(words: Vocabulary, matcher: Matcher, chance: random.Random) -> str | None:
    """Return a random text that a grammar allows, or None if it does not reach its end."""
    text = ""
    for _ in range(1500):
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        assert allowed, f"no token can follow {text!r}"
        if words.end in allowed and (len(allowed) == 1 or chance.random() < 0.3):
            return text
        closing = [token for token in allowed if words.names[token] in CLOSING or token > words.end]
        token = chance.choice(
            closing if closing and chance.random() < 0.4 else [t for t in allowed if t != words.end]
        )
        matcher.accept(token)
        text += words.names[token]
    return None


words = st.text("abcXYZ_", min_size=1, max_size=5)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "é😀"]}, "maxItems": 3},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "inner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "inner"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number", "minimum": -1, "maximum": 1}, "on": {"type": "boolean"}},
            "required": ["x", "on"],
            "additionalProperties": False,
        }
    },
}
