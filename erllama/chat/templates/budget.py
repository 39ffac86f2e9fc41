"""The budget of one rendering: steps, processor time and memory, charged before they are spent.

`Machine` is a `Budget`. Filters, methods and tests charge it. Every charge beyond the budget raises
`LimitExceeded`.
"""

from __future__ import annotations

from collections.abc import Sized
from time import thread_time
from typing import Final, cast

from jinja2.runtime import Undefined

from erllama.chat.templates.limits import (
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_MEMORY,
    MAX_SECONDS,
    MAX_STEPS,
    MAX_TEXT,
    MEMORY_PER_CHARACTER,
    LimitExceeded,
)
from erllama.chat.templates.values import SCALARS, SEQUENCES, TEXTS, ValueSize, describe

# Steps between two readings of the clock.
_SLICE: Final = 1000
# Characters that are copied, searched or compared in one step, as a power of two.
STEP_SHIFT: Final = 6


class Budget:
    """The remaining budget of one rendering. One thread uses it.

    Args:
        input_characters: number of characters of the input, which adds to the memory.
    """

    def __init__(self, input_characters: int = 0) -> None:
        self._left = _SLICE
        self._steps = MAX_STEPS
        self._memory = MAX_MEMORY + MEMORY_PER_CHARACTER * input_characters
        self._deadline = thread_time() + MAX_SECONDS

    def charge_steps(self, steps: int = 1) -> None:
        """Charge steps."""
        self._left -= steps
        if self._left < 0:
            self._steps -= _SLICE - self._left
            self._left = _SLICE
            if self._steps < 0:
                raise LimitExceeded(f"the template takes more than {MAX_STEPS:,} steps")
            if thread_time() > self._deadline:
                raise LimitExceeded(f"the template runs for more than {MAX_SECONDS:g} s")

    def charge_bytes(self, size: int) -> None:
        """Charge bytes, before they are allocated."""
        self._memory -= size
        if self._memory < 0:
            raise LimitExceeded(f"the template uses more than {MAX_MEMORY >> 20} MiB")

    def charge_text(self, length: int, wide: bool = True) -> None:
        """Charge a text of `length` characters, before it is made.

        Args:
            wide: the text may have characters beyond ASCII.
        """
        if length > MAX_TEXT:
            raise LimitExceeded(f"the template makes a text of {length:,} characters; the limit is {MAX_TEXT:,}")
        self.charge_bytes(length << 2 if wide else length)
        self.charge_steps(1 + (length >> STEP_SHIFT))

    def charge_result(self, text: str) -> str:
        """Charge a text that was made, and return it. It must not be much longer than texts charged before."""
        self.charge_text(len(text), not text.isascii())
        return text

    def require_room(self, length: int) -> None:
        """Raise LimitExceeded if a text of up to `length` characters would not fit the memory. Charges no text."""
        if length > self._memory:
            raise LimitExceeded(
                f"the template may make a text of up to {length:,} characters, which does not fit its memory"
            )

    def measure(self, value: object, *, data: bool = False) -> ValueSize:
        """Charge a walk over a value with all that it contains, and return its size.

        Args:
            data: raise TypeError for a value that is neither data nor undefined.
        """
        characters, level, total = 0, [value], 1
        for depth in range(MAX_DEPTH):
            below: list[object] = []
            for item in level:
                kind = type(item)
                if kind in TEXTS:
                    characters += len(cast(str, item)) + 4
                elif kind is int:
                    characters += 4 + cast(int, item).bit_length() // 3
                elif kind is dict or kind in SEQUENCES:
                    size = len(cast(Sized, item)) * (2 if kind is dict else 1)
                    total += size
                    if total > MAX_ITEMS:
                        raise LimitExceeded(f"the template handles a value with more than {MAX_ITEMS:,} parts")
                    characters += 2 + 2 * size
                    below.extend(cast("list[object]", item))
                    if kind is dict:
                        below.extend(cast("dict[str, object]", item).values())
                elif data and kind not in SCALARS and not isinstance(item, Undefined):
                    raise TypeError(f"{describe(item)} is not data")
                else:
                    characters += 24
            self.charge_steps(len(level))
            if not below:
                self.charge_steps(characters >> STEP_SHIFT)
                return ValueSize(characters, total, depth)
            level = below
        raise LimitExceeded(f"the template nests values more than {MAX_DEPTH} deep")
