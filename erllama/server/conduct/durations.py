"""Durations as people and Ollama's clients write them, such as "5m"."""

from __future__ import annotations

import math
import re

from erllama.checks import seconds, shown
from erllama.errors import OptionError

FOREVER = math.inf


def parse_duration(name: str, value: object) -> float:
    """Return the seconds of a duration; `FOREVER` for "forever" and for any negative one.

    Args:
        name: of the option, for errors.
        value: seconds, or a text such as "90", "5m", "1h30m" or "forever".

    Raises:
        OptionError: it is neither.
    """
    given, is_negative = value, isinstance(value, int | float) and value < 0
    if isinstance(value, str):
        text = value.strip()
        is_negative, text = text.startswith("-"), text.removeprefix("-")
        given = float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text
    if given in ("forever", math.inf) or (is_negative and not isinstance(given, str)):
        return FOREVER
    try:
        found = seconds(name, given)
    except OptionError:
        raise OptionError(
            f'{name}={shown(value)}; use seconds, or a text such as "5m", "1h30m" or "forever"'
        ) from None
    return FOREVER if is_negative else found
