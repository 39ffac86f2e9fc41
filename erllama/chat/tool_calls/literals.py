"""Argument values that some families write instead of JSON: Python literals and Gemma's values.

`Literals` reads one such notation. It reads in time in proportion to the text and refuses values nested deeper than
`MAX_NESTING`. `reader` calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from erllama.chat.json_values import (
    MAX_NESTING,
    TOO_DEEP,
    InvalidValueError,
    check_text,
    read_json,
    skip_white_space,
)


class Literals:
    """A notation for values: lists and mappings as in JSON, with its own strings, keys and constants.

    Args:
        read_string: reads the string that begins at a position, and returns it and its end; None if no string
            begins there.
        constants: values by the words that stand for them, such as `true`.
        key: pattern of the keys of a mapping that are not strings.
    """

    def __init__(
        self,
        read_string: Callable[[str, int], tuple[str, int] | None],
        constants: Mapping[str, object],
        key: re.Pattern[str] | None = None,
    ) -> None:
        self._read_string, self._constants, self._key = read_string, constants, key

    def read(self, text: str, at: int) -> tuple[object, int]:
        """Return the value that begins at `at`, and its end.

        Raises:
            InvalidValueError: no value begins there.
        """
        return self._read_value(text, skip_white_space(text, at), MAX_NESTING)

    def read_mapping(self, text: str, at: int, equals: str, end: str) -> tuple[dict[str, object], int]:
        """Return the keys and values up to `end`, such as arguments in brackets, and the position of `end`.

        Raises:
            InvalidValueError: the text there is something else.
        """
        mapping, after = self._read_mapping(text, at, equals, end, MAX_NESTING)
        return mapping, after - len(end)

    def _read_value(self, text: str, at: int, levels: int) -> tuple[object, int]:
        if not levels:
            raise InvalidValueError(TOO_DEEP, at)
        string = self._read_string(text, at)
        if string:
            return string
        if text.startswith("[", at):
            return self._read_list(text, at + 1, levels - 1)
        if text.startswith("{", at):
            return self._read_mapping(text, at + 1, ":", "}", levels - 1)
        match = _WORD.match(text, at)
        if match is None:
            raise InvalidValueError("a value is missing", at)
        word = match.group()
        if word in self._constants:
            return self._constants[word], match.end()
        if _NUMBER.fullmatch(word) is None:
            raise InvalidValueError(f"{word[:40]!r} is not a value", at)
        return read_json(text, at)[0], match.end()

    def _read_list(self, text: str, at: int, levels: int) -> tuple[list[object], int]:
        items: list[object] = []
        at = skip_white_space(text, at)
        while not text.startswith("]", at):
            value, at = self._read_value(text, at, levels)
            items.append(value)
            at = _skip_comma(text, at, "]")
        return items, at + 1

    def _read_mapping(
        self, text: str, at: int, equals: str, end: str, levels: int
    ) -> tuple[dict[str, object], int]:
        mapping: dict[str, object] = {}
        at = skip_white_space(text, at)
        while not text.startswith(end, at):
            key, after = self._read_key(text, at)
            at = skip_white_space(text, after)
            if not text.startswith(equals, at):
                raise InvalidValueError(f"{equals!r} is missing", at)
            mapping[key], at = self._read_value(text, skip_white_space(text, at + len(equals)), levels)
            at = _skip_comma(text, at, end)
        return mapping, at + len(end)

    def _read_key(self, text: str, at: int) -> tuple[str, int]:
        match = self._key.match(text, at) if self._key else None
        key_and_end = (match.group(), match.end()) if match else self._read_string(text, at)
        if not key_and_end:
            raise InvalidValueError("a key is missing", at)
        return key_and_end


_WORD = re.compile(r"[\w.+-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PYTHON_STRING = re.compile(r"""'([^'\\]*(?:\\.[^'\\]*)*)'|"([^"\\]*(?:\\.[^"\\]*)*)\"""", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL)
# Python's escapes, and JSON's escaped solidus.
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_ESCAPED.update({letter: letter for letter in "\\'\"/"})


def _skip_comma(text: str, at: int, end: str) -> int:
    at = skip_white_space(text, at)
    if text.startswith(",", at):
        return skip_white_space(text, at + 1)
    if not text.startswith(end, at):
        raise InvalidValueError(f"',' or {end!r} is missing", at)
    return at


def _read_python_string(text: str, at: int) -> tuple[str, int] | None:
    match = _PYTHON_STRING.match(text, at)
    if match is None:
        return None
    raw = match.group(match.lastindex or 0)
    if "\\" in raw:
        try:
            # JSON writes a character beyond 16 bits as two escapes, a surrogate pair.
            raw = _ESCAPE.sub(_unescape, raw).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except (UnicodeError, ValueError, OverflowError):
            raise InvalidValueError("an escape that stands for no character", at) from None
    try:
        return check_text(raw), match.end()
    except InvalidValueError as error:
        raise InvalidValueError(str(error), at) from None


def _unescape(match: re.Match[str]) -> str:
    hexadecimal = match.group(1) or match.group(2) or match.group(3)
    if hexadecimal:
        return chr(int(hexadecimal, 16))
    if match.group(4):
        return chr(int(match.group(4), 8))
    letter = match.group(5)
    return _ESCAPED.get(letter, match.group())


_CONSTANTS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
PYTHON = Literals(_read_python_string, _CONSTANTS)
# Keyword arguments: names are the keys. A parameter's name may have characters that Python's names do not.
PYTHON_KEY = re.compile(r"[^\W\d][\w.$@-]*")
PYTHON_ARGUMENTS = Literals(_read_python_string, _CONSTANTS, PYTHON_KEY)

GEMMA_QUOTE = '<|"|>'


def _read_gemma_string(text: str, at: int) -> tuple[str, int] | None:
    if not text.startswith(GEMMA_QUOTE, at):
        return None
    end = text.find(GEMMA_QUOTE, at + len(GEMMA_QUOTE))
    if end < 0:
        raise InvalidValueError("a string has no end", at)
    return text[at + len(GEMMA_QUOTE) : end], end + len(GEMMA_QUOTE)


GEMMA_KEY = re.compile(r"[^\s:,{}\[\]<]+")
GEMMA = Literals(_read_gemma_string, _CONSTANTS, GEMMA_KEY)
