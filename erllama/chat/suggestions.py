"""The end of an error message that suggests the nearest known name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SHOWN = 12  # number of names to list if no name is similar


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" with the nearest name, or a list of the known names; "" if there are no names."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = [*map(repr, names[:_SHOWN]), *(["…"] if len(names) > _SHOWN else [])]
    return f"; known names: {', '.join(shown)}" if names else ""
