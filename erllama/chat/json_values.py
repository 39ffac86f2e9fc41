"""What callers and models write as arguments, read strictly: JSON, Python's literals, and plain values.

Everything here is bounded: reading takes time in proportion to the text, and
what is nested deeper than `MAX_NESTING` is refused, so that no later reader or
writer of it runs out of stack. What is refused raises `Unreadable`, with the
place; `erllama.chat.messages` and `erllama.chat.tool_calls.formats` make their errors of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from difflib import get_close_matches

# Far more than arguments have, and few enough for every reader of JSON.
MAX_NESTING = 100
# Python writes integers of up to 4,300 digits.
_MAX_DIGITS = 4000
_SHOWN = 12
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_TOO_DEEP = f"nested deeper than {MAX_NESTING} levels"


class Unreadable(ValueError):  # noqa: N818 - reads as what happened
    """A text or value that is not what is read.

    Attributes:
        at: where in the text, in characters from 0.
    """

    def __init__(self, problem: str, at: int = 0) -> None:
        super().__init__(problem)
        self.at = at


def read_json(text: str, at: int = 0) -> tuple[object, int]:
    """The JSON value that begins at `at`, and where it ends.

    Raises:
        Unreadable: there is none; or it has a number of more than 4,000 digits, or text that is not Unicode. Of
            a key that comes twice, the last one counts.
    """
    try:
        found, end = _JSON.raw_decode(text, at)
        return plain(found), end
    except json.JSONDecodeError as error:
        raise Unreadable(error.msg, error.pos) from None
    except RecursionError:
        raise Unreadable(_TOO_DEEP, at) from None
    except Unreadable as error:
        raise Unreadable(str(error), at) from None
    except ValueError:
        raise Unreadable("a number with too many digits", at) from None


def json_of(text: str) -> object:
    """The JSON value that a text is, white space around it apart.

    Raises:
        Unreadable: it is none, or more than that.
    """
    found, end = read_json(text, after_space(text, 0))
    end = after_space(text, end)
    if end < len(text):
        raise Unreadable("more text after the JSON", end)
    return found


def plain(value: object) -> object:
    """A fresh copy of what JSON can say, made of dict, list, str, int, float, bool and None.

    Raises:
        Unreadable: it is of another type, no number, not encodable as UTF-8, or nested too deeply.
    """
    return _plain(value, MAX_NESTING)


def plain_text(value: str) -> str:
    """A str of exactly that type.

    Raises:
        Unreadable: it has half of a surrogate pair, which UTF-8 cannot encode.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unreadable(
            f"character {error.start} is half of a surrogate pair: no UTF-8 has it", error.start
        ) from None
    return str.__str__(value)


def after_space(text: str, at: int) -> int:
    """Where white space that begins at `at` ends."""
    match = _WHITE_SPACE.match(text, at)
    return match.end() if match else at


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error's message: the nearest name, or all."""
    names = list(known)
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = [*map(repr, names[:_SHOWN]), *(["…"] if len(names) > _SHOWN else [])]
    return f"; there is {', '.join(shown)}" if names else ""


def _plain(value: object, levels: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Unreadable(f"{value} is no number that JSON has")
        return float.__float__(value)
    if not levels:
        raise Unreadable(_TOO_DEEP)
    if isinstance(value, Mapping):
        return {_key(key): _plain(part, levels - 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, levels - 1) for part in value]
    raise Unreadable(f"{type(value).__name__} is no type that JSON has")


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise Unreadable(f"{key!r:.40} is a key; JSON has texts for keys")
    return plain_text(key)


def _number(digits: str) -> float | int:
    """A number with a point or an exponent: a float, or an int for integers larger than any float."""
    number = float(digits)
    if math.isfinite(number):
        return number
    try:
        exact = Decimal(digits)
        too_long = exact.adjusted() >= _MAX_DIGITS
    except ArithmeticError:  # the exponent has 19 digits or more
        too_long = True
    if too_long:
        raise Unreadable(f"{digits[:40]} is a number with too many digits: at most {_MAX_DIGITS} are supported")
    if exact != int(exact):
        raise Unreadable(f"{digits[:40]} is larger than any float, and not an integer")
    return int(exact)


def _refused(constant: str) -> object:
    raise Unreadable(f"{constant} is not JSON")


_JSON = json.JSONDecoder(parse_float=_number, parse_constant=_refused)


# --- Literals: what some families write instead of JSON ----------------------------------------


class Literals:
    """A family's way of writing values: lists and mappings as JSON's, with strings, keys and words of its own.

    Args:
        string: reads the string that begins at a place, and tells where it ends; None where none begins there.
        words: what stands for true, false and null.
        key: what a mapping's keys match where they are no strings.
    """

    def __init__(
        self,
        string: Callable[[str, int], tuple[str, int] | None],
        words: Mapping[str, object],
        key: re.Pattern[str] | None = None,
    ) -> None:
        self._string, self._words, self._key = string, words, key

    def read(self, text: str, at: int) -> tuple[object, int]:
        """The value that begins at `at`, and where it ends.

        Raises:
            Unreadable: there is none.
        """
        return self._value(text, after_space(text, at), MAX_NESTING)

    def mapping(self, text: str, at: int, equals: str, end: str) -> tuple[dict[str, object], int]:
        """Keys and values up to `end`, and where that begins, as the arguments between two brackets.

        Raises:
            Unreadable: something else is there.
        """
        found, after = self._mapping(text, at, equals, end, MAX_NESTING)
        return found, after - len(end)

    def _value(self, text: str, at: int, levels: int) -> tuple[object, int]:
        if not levels:
            raise Unreadable(_TOO_DEEP, at)
        string = self._string(text, at)
        if string:
            return string
        if text.startswith("[", at):
            return self._list(text, at + 1, levels - 1)
        if text.startswith("{", at):
            return self._mapping(text, at + 1, ":", "}", levels - 1)
        match = _ATOM.match(text, at)
        if match is None:
            raise Unreadable("a value is missing", at)
        word = match.group()
        if word in self._words:
            return self._words[word], match.end()
        if _NUMBER.fullmatch(word) is None:
            raise Unreadable(f"{word[:40]!r} is no value", at)
        return read_json(text, at)[0], match.end()

    def _list(self, text: str, at: int, levels: int) -> tuple[list[object], int]:
        found: list[object] = []
        at = after_space(text, at)
        while not text.startswith("]", at):
            value, at = self._value(text, at, levels)
            found.append(value)
            at = _after_comma(text, at, "]")
        return found, at + 1

    def _mapping(self, text: str, at: int, equals: str, end: str, levels: int) -> tuple[dict[str, object], int]:
        found: dict[str, object] = {}
        at = after_space(text, at)
        while not text.startswith(end, at):
            key, after = self._name(text, at)
            at = after_space(text, after)
            if not text.startswith(equals, at):
                raise Unreadable(f"{equals!r} is missing", at)
            found[key], at = self._value(text, after_space(text, at + len(equals)), levels)
            at = _after_comma(text, at, end)
        return found, at + len(end)

    def _name(self, text: str, at: int) -> tuple[str, int]:
        match = self._key.match(text, at) if self._key else None
        found = (match.group(), match.end()) if match else self._string(text, at)
        if not found:
            raise Unreadable("a key is missing", at)
        return found


_ATOM = re.compile(r"[\w.+-]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PYTHON_STRING = re.compile(r"""'([^'\\]*(?:\\.[^'\\]*)*)'|"([^"\\]*(?:\\.[^"\\]*)*)\"""", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL)
# As Python has them, and JSON's solidus.
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "\n": ""}
_ESCAPED.update({letter: letter for letter in "\\'\"/"})


def _after_comma(text: str, at: int, end: str) -> int:
    at = after_space(text, at)
    if text.startswith(",", at):
        return after_space(text, at + 1)
    if not text.startswith(end, at):
        raise Unreadable(f"',' or {end!r} is missing", at)
    return at


def _python_string(text: str, at: int) -> tuple[str, int] | None:
    match = _PYTHON_STRING.match(text, at)
    if match is None:
        return None
    raw = match.group(match.lastindex or 0)
    if "\\" in raw:
        try:
            # JSON's way to write what is past 16 bits: two escapes.
            raw = _ESCAPE.sub(_unescaped, raw).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except (UnicodeError, ValueError, OverflowError):
            raise Unreadable("an escape that stands for no character", at) from None
    try:
        return plain_text(raw), match.end()
    except Unreadable as error:
        raise Unreadable(str(error), at) from None


def _unescaped(match: re.Match[str]) -> str:
    hexadecimal = match.group(1) or match.group(2) or match.group(3)
    if hexadecimal:
        return chr(int(hexadecimal, 16))
    if match.group(4):
        return chr(int(match.group(4), 8))
    letter = match.group(5)
    return _ESCAPED.get(letter, match.group())


_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
PYTHON = Literals(_python_string, _WORDS)
# The same, with names for keys, as keyword arguments have them, and as parameters are called beside them.
PYTHON_KEY = re.compile(r"[^\W\d][\w.$@-]*")
PYTHON_ARGUMENTS = Literals(_python_string, _WORDS, PYTHON_KEY)

GEMMA_QUOTE = '<|"|>'


def _gemma_string(text: str, at: int) -> tuple[str, int] | None:
    if not text.startswith(GEMMA_QUOTE, at):
        return None
    end = text.find(GEMMA_QUOTE, at + len(GEMMA_QUOTE))
    if end < 0:
        raise Unreadable("a string has no end", at)
    return text[at + len(GEMMA_QUOTE) : end], end + len(GEMMA_QUOTE)


GEMMA_KEY = re.compile(r"[^\s:,{}\[\]<]+")
GEMMA = Literals(_gemma_string, _WORDS, GEMMA_KEY)
