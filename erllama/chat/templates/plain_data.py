"""Plain copies of a template's input: JSON values without references to the caller's objects.

`ChatTemplate.render` copies its arguments with `PlainDataCopier`, so a template cannot reach or change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast

from erllama.chat.templates.limits import MAX_DEPTH, MAX_INT_BITS, MAX_STEPS
from erllama.errors import ChatError, OptionError

# Nesting depth of the input: half of what a template may make of it.
MAX_INPUT_DEPTH: Final = MAX_DEPTH // 2


class PlainDataCopier:
    """Copies values into plain data, and counts their characters in `characters`."""

    def __init__(self) -> None:
        self.characters = 0
        self._parts = 0

    def copy_mappings(self, what: str, values: object) -> list[dict[object, object]]:
        """Return copies of a list of mappings.

        Args:
            what: "message", "tool" or "document", for errors.

        Raises:
            ChatError: a value is not a JSON value.
        """
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise ChatError(f"{what}s must be a list of mappings, not {type(values).__name__}")
        copies = []
        for index, item in enumerate(values):
            at = index if what == "message" else None
            if not isinstance(item, Mapping):
                raise ChatError(f"a {what} must be a mapping, not {type(item).__name__} ({what} {index})", index=at)
            try:
                copies.append(cast("dict[object, object]", self._copy(item, 0)))
            except _NotPlainError as error:
                raise ChatError(f"{what} {index}: expected JSON values, not {error}", index=at) from None
        return copies

    def copy_argument(self, name: str, value: object) -> object:
        """Return a copy of a template variable.

        Raises:
            OptionError: it is not a JSON value.
        """
        try:
            return self._copy(value, 0)
        except _NotPlainError as error:
            raise OptionError(f"{name}: expected JSON values, not {error}") from None

    def _copy(self, value: object, depth: int) -> object:
        kind = type(value)
        if kind is str:
            self.characters += len(cast(str, value))
            return value
        if value is None or kind is bool or kind is float:
            return value
        self._parts += 1
        if depth > MAX_INPUT_DEPTH:
            raise _NotPlainError(f"values nested deeper than {MAX_INPUT_DEPTH}")
        if self._parts > MAX_STEPS:
            raise _NotPlainError(f"more than {MAX_STEPS:,} values")
        if kind is dict or isinstance(value, Mapping):
            copy, depth = {}, depth + 1
            for key, item in cast("Mapping[object, object]", value).items():
                copy[key if type(key) is str else self._copy_key(key)] = self._copy(item, depth)
            return copy
        if isinstance(value, list):
            return [self._copy(item, depth + 1) for item in value]
        if isinstance(value, tuple):
            return tuple(self._copy(item, depth + 1) for item in value)
        return self._copy_scalar(value, depth)

    def _copy_scalar(self, value: object, depth: int) -> object:
        # Instances of subclasses, such as members of an enumeration, become plain values.
        if isinstance(value, str):
            return self._copy(str.__str__(value), depth)
        if isinstance(value, int):
            if int.bit_length(value) > MAX_INT_BITS:
                raise _NotPlainError(f"an integer of more than {MAX_INT_BITS} bits")
            return int.__int__(value)
        if isinstance(value, float):
            return float.__float__(value)
        raise _NotPlainError(type(value).__name__)

    def _copy_key(self, key: object) -> object:
        if not isinstance(key, str | int | float | None):
            raise _NotPlainError(f"a key of type {type(key).__name__}")
        return self._copy(key, 0)


class _NotPlainError(Exception):
    """A value that is not a JSON value; the message says what it is."""


def copy_documents(values: object) -> list[dict[object, object]]:
    """Return a copy of documents as `ChatTemplate.render` makes it, or raise ChatError."""
    return PlainDataCopier().copy_mappings("document", values)


def copy_arguments(values: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a template's variables as `ChatTemplate.render` makes it, or raise OptionError."""
    copier = PlainDataCopier()
    return {name: copier.copy_argument(name, value) for name, value in values.items()}
