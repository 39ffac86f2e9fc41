"""Sentences from patterns: `[a|b]` is one of several texts, can be nested, and `{name}` is a value."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(pattern: str, random: Random, values: Mapping[str, str] | None = None) -> str:
    """Return one of the texts of a pattern.

    >>> expand("[Good morning|Hello], {name}.", Random(1), {"name": "Mia"})
    'Good morning, Mia.'
    """
    while "[" in pattern:
        pattern = _CHOICE.sub(lambda match: random.choice(match[1].split("|")), pattern)
    return pattern.format_map(values or {})


def one(patterns: Sequence[str], random: Random, values: Mapping[str, str] | None = None) -> str:
    """Return one of the texts of one of several patterns."""
    return expand(random.choice(patterns), random, values)


def an(noun: str) -> str:
    """Return a noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    """Return a text with a capital first letter."""
    return text[:1].upper() + text[1:]
