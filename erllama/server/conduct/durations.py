"""Durations as people and Ollama's clients write them, such as "5m"."""

from __future__ import annotations

import math
import re

from erllama.checks import shown
from erllama.errors import OptionError

FOREVER = math.inf

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration(name: str, value: object) -> float:
    """Return the seconds of a duration; `FOREVER` for "forever" and for any negative one.

    Args:
        name: of the option, for errors.
        value: seconds, or a text such as "90", "5m", "1h30m" or "forever".

    Raises:
        OptionError: it is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
        return FOREVER if value < 0 else float(value)
    if isinstance(value, str):
        text = value.strip()
        if text == "forever" or re.fullmatch(rf"-(?:\d+(?:\.\d+)?|(?:{_PART.pattern})+)", text):
            return FOREVER
        if re.fullmatch(r"\d+(?:\.\d+)?", text):
            return float(text)
        if re.fullmatch(rf"(?:{_PART.pattern})+", text):
            return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    raise OptionError(f'{name}={shown(value)}; use seconds, or a text such as "5m", "1h30m" or "forever"')
