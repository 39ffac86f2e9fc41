"""Sizes as texts such as "2GiB": parsed for options, and formatted for people."""

from __future__ import annotations

import re

from erllama.errors import OptionError

_MAX_BYTES = 2**62

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(name: str, value: object) -> int:
    """Return the bytes of `value`: an integer, or a text such as "2GiB", "512 MB" or "1.5GiB".

    Raises:
        OptionError: `value` is not a size, or is negative.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise OptionError(f"{name}={value!r}; use a size such as '2GiB', or a number of bytes")
    if isinstance(value, int):
        if value < 0:
            raise OptionError(f"{name}={value}; a size cannot be negative")
        return min(value, _MAX_BYTES)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if not found or found[2].lower() not in _UNITS:
        raise OptionError(f"{name}={value!r}; use a size such as '2GiB' or '500MB' (units: KB to TB, KiB to TiB)")
    n_bytes = float(found[1]) * _UNITS[found[2].lower()]
    if n_bytes > _MAX_BYTES:
        raise OptionError(f"{name}={value!r} is more than any storage has")
    return int(n_bytes)


def format_size(n_bytes: float) -> str:
    """Return a number of bytes with its unit: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
